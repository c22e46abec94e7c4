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

# python SETTING...: in the background, for a shell keeps a signal until what it waits for in front has ended. What is asked
# to stop is the run, which then ends with a checkpoint, and after it the script. (TERM, as what runs there may ignore INT.)
python() {
    .venv/bin/python "$@" &
    trap "kill -TERM $!" INT TERM
    while :; do
        code=0
        wait $! || code=$?
        kill -0 $! 2>/dev/null || break # else a signal has ended the waiting
    done
    trap - INT TERM
    [ "$code" -eq 0 ] || status=$code
    [ "$code" -lt 128 ] || exit "$code"
}

sweep() {
    name=$1
    shift
    python main.py -m resume=auto hydra.sweep.dir="$folder/$name" "$@"
}

report() {
    python -m harness.report "$1" --to "$1"
}

leaderboard() {
    python -m harness.report --leaderboard "$1" --to "$1"
}
