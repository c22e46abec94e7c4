#!/bin/sh
# Which editor is best on which data? All editors on all data sets; those that learn to edit are trained first.
#     sh sweeps/editors.sh [SETTING...]
# 25 runs, 1 to 2 hours with the default model on 2 cores and the shipped samples; then
# outputs/sweeps/editors/<time>/<dataset>/report.html
set -eu
. "$(dirname "$0")/common.sh"

sweep . dataset=zsre,fever,wikibigedit,ultraeditbench,counterfact \
    editor=stableedit,ultraedit,rledit,malmen,mend "$@"
for data in "$folder"/*/; do
    [ ! -d "$data" ] || report "${data%/}"
done
exit "$status"
