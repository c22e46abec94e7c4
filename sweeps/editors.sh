#!/bin/sh
# Which editor is best on which data? All editors on all data sets; those that learn to edit are trained first.
#     sh sweeps/editors.sh [SETTING...]
# 55 runs, hours with the default model on 2 cores and the shipped samples; then
# outputs/sweeps/editors/<time>/<dataset>/report.html. Those that locate a fact first need its subject, which two data
# sets have:  sh sweeps/editors.sh dataset=zsre,counterfact editor=memit,alphaedit
set -eu
. "$(dirname "$0")/common.sh"

sweep . dataset=zsre,fever,wikibigedit,ultraeditbench,counterfact \
    editor=stableedit_plus,stableedit,ultraedit,rledit,malmen,mend,ft_l,ft_m,locft_bf,grace,wise "$@"
for data in "$folder"/*/; do
    [ ! -d "$data" ] || report "${data%/}"
done
exit "$status"
