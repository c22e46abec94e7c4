"""What several processes do in the time that one takes, as ratios measured in one run:

    torchrun --nproc-per-node 2 -m benchmarks.ranks [--facts 100] [--rounds 5] [--device cuda] [--half bf16]

Capture of a turn, and evaluation. On GPUs with the kernels of a run, which give the same bits each time. On CPUs every
process keeps to a core and a thread of its own; the one that works alone is rank 0, on the same core. Rounds and
ratios are as in benchmarks/turn.py.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from functools import partial

import torch
import transformers

from benchmarks.common import race, ratio
from benchmarks.evaluation import score
from benchmarks.turn import build, parser_of
from harness.ranks import Ranks, SharedModel, init_ranks
from model import LanguageModel

ALONE, SHARED = "one rank", "all ranks"
SCORED = 60  # facts whose questions the evaluation is timed on


def compare(
    model: LanguageModel, shared: SharedModel, what: str, work: Callable[[LanguageModel], object], rounds: int
) -> None:
    """Each round on all ranks; the others have nothing to do where rank 0 works alone."""
    alone = partial(work, model) if shared.ranks.is_first else lambda: None
    contenders = {ALONE: in_step(shared.ranks, alone), SHARED: in_step(shared.ranks, partial(work, shared))}
    times = race(contenders, model.device, rounds)
    one, many = (statistics.median(times[name]) for name in (ALONE, SHARED))
    if shared.ranks.is_first:
        print(f"  {what:26s} {one:8.3f} s {many:8.3f} s   {ratio(times, ALONE, SHARED):.2f} times as fast")


def in_step(ranks: Ranks, work: Callable[[], object]) -> Callable[[], object]:
    """The work, and then the wait for the others."""

    def done() -> None:
        work()
        ranks.all_gather(lambda: None)

    return done


def main() -> None:
    transformers.logging.disable_progress_bar()
    arguments = parser_of(__doc__).parse_args()
    with init_ranks() as ranks:
        if arguments.device == "cpu":
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[ranks.rank % len(cores)]})
            torch.set_num_threads(1)
        model, turn = build(arguments)
        shared = SharedModel(model, ranks)
        if ranks.is_first:
            print(f"{arguments.facts} facts, {ranks.size} ranks")
        compare(model, shared, "capture", lambda each: each.capture(turn), arguments.rounds)
        scored = partial(score, records=turn.records[:SCORED])
        compare(model, shared, f"evaluation of {SCORED} facts", scored, arguments.rounds)


if __name__ == "__main__":
    main()
