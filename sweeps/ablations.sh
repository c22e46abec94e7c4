#!/bin/sh
# What is each part of the method worth? StableEdit whole and without one part at a time, and ULTRAEDIT, each over two
# orders of the edits.  sh sweeps/ablations.sh [SETTING...]
# 12 runs, 15 to 30 minutes with the default model on 2 cores; then outputs/sweeps/ablations/<time>/report.html
set -eu
. "$(dirname "$0")/common.sh"

# Raw rows need a step size of their own. With 2, the default model's first updates are as large as with whitened
# rows and model.lr (norms of 2 turns, mean over modules); another model has another value.
LR_WITHOUT_LN=${LR_WITHOUT_LN:-2}

# As the paper has it: raw prompts without an end, one pass, one step size for all normalised rows, all records scored.
AS_PUBLISHED="dataset.prompt_form=raw dataset.answer_end=none editor.passes=1 model.lr=1e-3 evaluation.sample=null"

sweep 1_stableedit dataset.shuffle=true seed=1,2 $AS_PUBLISHED editor=stableedit \
    ablation=full_method,frozen_statistics,without_warm_up,diagonal_whitening "$@"
sweep 2_without_ln dataset.shuffle=true seed=1,2 $AS_PUBLISHED editor=stableedit ablation=without_ln editor.lr="$LR_WITHOUT_LN" "$@"
sweep 3_ultraedit dataset.shuffle=true seed=1,2 $AS_PUBLISHED editor=ultraedit "$@"
report "$folder"
exit "$status"
