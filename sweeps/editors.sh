#!/bin/sh
# Which editor is best on which data? All editors on all data sets; those that learn to edit are trained first.
#     sh sweeps/editors.sh [SETTING...]
# 61 runs, hours with the default model on 2 cores and the shipped samples; then
# outputs/sweeps/editors/<time>/<dataset>/report.html, and leaderboard.html over all of them. Those that locate a fact first
# need its subject, which two data sets have; a dataset= of one's own takes the place of these two, and of the others.
set -eu
. "$(dirname "$0")/common.sh"

EDITORS=stableedit_plus,stableedit,ultraedit,rledit,malmen,mend,ft_l,ft_m,locft_bf,grace,wise

chosen=
subjects=
for setting in "$@"; do
    case $setting in
    dataset=*) chosen=${setting#dataset=} ;;
    dataset.fields.subject=* | editor.fact_token=last) subjects=given ;;
    esac
done
case $chosen in
"" | *zsre* | *counterfact*) subjects=given ;;
esac

sweep . dataset=zsre,counterfact editor="$EDITORS${subjects:+,rome,memit,alphaedit}" "$@"
[ -n "$chosen" ] || sweep . dataset=fever,wikibigedit,ultraeditbench editor=$EDITORS "$@"
for data in "$folder"/*/; do
    [ ! -d "$data" ] || report "${data%/}"
done
leaderboard "$folder"
exit "$status"
