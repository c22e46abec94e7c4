#!/bin/sh
# How far do scores move with the order of the edits? One configuration over five orders.
#     sh sweeps/seeds.sh [SETTING...]
# 5 runs, 10 minutes with the default model on 2 cores; then outputs/sweeps/seeds/<time>/report.html
set -eu
. "$(dirname "$0")/common.sh"

sweep runs dataset.shuffle=true seed=1,2,3,4,5 "$@"
report "$folder"
exit "$status"
