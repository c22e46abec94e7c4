"""What a rank beside the first has in place of a terminal, a folder, a tracker: only rank 0 writes, talks, is stopped.

Everything else is the same on all ranks: data, plan, weights, editor, the order of the turns.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from config.schema import HyperNetworkConfig, RunConfig, Wandb
from harness.evaluation import Evaluation, Scoring, ScoringWithoutRecord
from harness.job.resume import DATA, differences
from harness.ranks import Ranks
from harness.run import NoRecord, RunFolder, ignore_signals, versions
from harness.watch import Tracker


@contextlib.contextmanager
def silence_other_ranks(ranks: Ranks, arguments: Sequence[str]) -> Iterator[list[str]]:
    """The command line as this process reads it; other ranks are silent, ignore signals, keep no files."""
    if ranks.is_first:
        yield list(arguments)
        return
    ignore_signals()
    logging.disable()
    os.environ["TERM"] = "dumb"  # so it draws no progress bars
    with (
        tempfile.TemporaryDirectory() as folder,
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        last = max((place for place, word in enumerate(arguments) if "=" in word), default=-1) + 1
        elsewhere = [f"hydra.run.dir={folder}/run", f"hydra.sweep.dir={folder}"]
        yield [*arguments[:last], *elsewhere, *arguments[last:]]


def rank_settings(cfg: RunConfig, ranks: Ranks) -> RunConfig:
    """What the configuration asks of this process: a rank beside the first saves, tracks and draws nothing."""
    if ranks.is_first:
        return cfg
    return replace(
        cfg,
        checkpoint_every=0,
        model_cache=False,
        editor=replace(cfg.editor, save_checkpoint=False) if isinstance(cfg.editor, HyperNetworkConfig) else cfg.editor,
        tracker=replace(cfg.tracker, wandb=Wandb.disabled),
        diagnostics=replace(cfg.diagnostics, report=False),
    )


def require_alike(ranks: Ranks, about: Mapping[str, Any]) -> dict[str, Any]:
    """Rank 0's `about`; ValueError, naming the rank, where another has other settings, data or versions."""
    found = ranks.all_gather(lambda: (about, versions()))
    first, packages = found[0]
    for rank, (other, others) in enumerate(found):
        for difference in differences(other["config"], first["config"]):
            raise ValueError(f"rank {rank} has other settings than rank 0: {difference}; start all with the same ones")
        for name in (name for name in first["inputs"] if other["inputs"].get(name) != first["inputs"][name]):
            raise ValueError(
                f"rank {rank} reads another file of {DATA[name]} than rank 0; give every machine the same files"
            )
        for name in (name for name in others if others[name] != packages[name]):
            raise ValueError(
                f"rank {rank} computes with {name} {others[name]} and rank 0 with {packages[name]}; install the same "
                "versions on every machine"
            )
    return dict(first)


def new_record(ranks: Ranks, folder: Path, about: Mapping[str, Any]) -> RunFolder:
    """The record of a run that begins in `folder`."""
    return RunFolder.create(folder, **about) if ranks.is_first else NoRecord(folder, dict(about))


def make_scoring(ranks: Ranks, evaluation: Evaluation, tracker: Tracker, seconds: dict[str, float]) -> Scoring:
    return (Scoring if ranks.is_first else ScoringWithoutRecord)(evaluation, tracker, seconds)
