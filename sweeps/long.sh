#!/bin/sh
# What is left after thousands of edits? 10,000 CounterFact facts, 100 a turn, after 10 warm-up turns of zsRE questions.
#     sh sweeps/long.sh dataset.valid_path=FILE dataset.train_path=FILE [SETTING...]
# Scored every 1,000 edits, with GLUE-style tasks at the start, in the middle and at the end. StableEdit with one pass also runs
# with frozen statistics, without warm-up and with diagonal whitening: what the paper claims of these parts. 21 runs, a day with
# the default model on 2 cores; then outputs/sweeps/long/<time>/report.html and leaderboard.html. The last five are slow and stop
# after 3,000.
set -eu
. "$(dirname "$0")/common.sh"

for key in dataset.valid_path dataset.train_path; do
    case " $* " in
    *" $key="* | *" dataset="*) ;; # a data set of one's own choice may have enough
    *)
        echo "error: $key is not set, and the shipped sample has too few facts: add dataset.valid_path=FILE" \
            "(CounterFact) and dataset.train_path=FILE (zsRE's training questions)" >&2
        exit 1
        ;;
    esac
done

STEP_OF_5=${STEP_OF_5:-3.5e-4}
LONG="dataset=counterfact dataset.shuffle=true num_seq=100 num_seq_zsre=10 evaluation.every=10 evaluation.sample=100 \
    evaluation.generation=100 evaluation.max_new_tokens=8 evaluation.retention=10 downstream_eval_steps=55"
SLOW="num_seq=30 downstream_eval_steps=15"

sweep 1_pass $LONG editor=stableedit,ultraedit editor.passes=1 model.lr=1e-3 seed=1,2 "$@"
sweep 2_passes $LONG editor=stableedit,ultraedit editor.passes=5 model.lr="$STEP_OF_5" seed=1,2 "$@"
sweep 3_plus_and_trajectory $LONG editor=stableedit_plus,rledit seed=1,2 "$@"
sweep 4_malmen $LONG editor=malmen seed=1 "$@"
case " $* " in
*" editor="*) ;; # which may be nothing without these parts, and have no such key
*)
    sweep 5_ablations $LONG editor=stableedit ablation=frozen_statistics,without_warm_up,diagonal_whitening \
        editor.passes=1 model.lr=1e-3 seed=1 "$@"
    sweep 6_kept_keys $LONG $SLOW editor=memit,alphaedit editor.keep_keys=true seed=1 "$@"
    ;;
esac
sweep 7_others $LONG $SLOW editor=ft_m,locft_bf,grace seed=1 "$@"
report "$folder"
leaderboard "$folder"
exit "$status"
