#!/bin/sh
# Which step size and ridge suit a model? A grid of editor.lr x editor.alpha.  sh sweeps/grid.sh [SETTING...]
# 9 runs, 10 to 20 minutes with the default model on 2 cores; then outputs/sweeps/grid/<time>/report.html
# Another model has other step sizes:  sh sweeps/grid.sh model=mistral-7b editor.lr=3e-7,1e-6,3e-6
set -eu
. "$(dirname "$0")/common.sh"

sweep runs editor.lr=2.5e-4,5e-4,1e-3 editor.alpha=1,10,100 "$@"
report "$folder"
exit "$status"
