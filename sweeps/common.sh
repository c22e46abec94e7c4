# Read by the scripts beside it, which users start.
#   sweep NAME SETTING...   runs main.py over every combination of the comma lists. resume=auto: what is finished is
#                           passed over and what was stopped goes on, whichever sweep began it; a job that fails is named,
#                           and the others run. Of a key that is set twice the later setting counts.
#   report FOLDER           compares the runs there, in FOLDER/report.html.
#   leaderboard FOLDER      makes one table of them, in FOLDER/leaderboard.html, .md, .csv and .tex, with pictures.
CDPATH='' cd -- "$(dirname -- "$0")/.."
for setting in "$@"; do
    case $setting in
    hydra.sweep.dir=* | hydra.run.dir=*)
        echo "error: $setting: the script puts its runs below outputs/sweeps, and reports on them there; leave it out" >&2
        exit 1
        ;;
    esac
done
[ -x .venv/bin/python ] || { echo "error: no .venv here yet; sh setup.sh makes it" >&2; exit 1; }
folder=outputs/sweeps/$(basename "$0" .sh)/$(date +%Y-%m-%d_%H-%M-%S)-$$ # two may begin in one second
status=0

sweep() {
    name=$1
    shift
    .venv/bin/python main.py -m resume=auto hydra.sweep.dir="$folder/$name" "$@" || status=$?
    [ "$status" -lt 128 ] || exit "$status" # a signal: the whole script stops
}

report() {
    .venv/bin/python -m harness.report "$1" --to "$1" || status=$?
}

leaderboard() {
    .venv/bin/python -m harness.report --leaderboard "$1" --to "$1" || status=$?
}
