"""GLUE-style evaluation as a run does it: planned before the weights are read, on the base model and every so often."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.disk import write_atomically
from data.progress import progress_bar
from glue_eval.score import PreparedTask, evaluate_tasks
from harness.run import canonical_json, digest_of, places
from harness.watch import Tracker
from model import LanguageModel

log = logging.getLogger(__name__)


class Downstream:
    """Scores the tasks of `glue.*`; a run with downstream_eval_steps=0 has none, and every call does nothing."""

    def __init__(self, tasks: Sequence[PreparedTask], identity: Mapping[str, Any], seed: int, resamples: int) -> None:
        self.tasks = tasks
        self.identity = identity  # what, beside the weights, can change a score
        self.seed, self.resamples = seed, resamples

    @property
    def inputs(self) -> dict[str, str]:
        """SHA-256 of the rows that the scores come from; nothing where there are none."""
        rows = [[task.rows.task.name, task.rows.sha256] for task in self.tasks]
        return {"glue": digest_of(rows, "rows")} if rows else {}

    def base(self, model: LanguageModel, tracker: Tracker, fingerprint: str) -> None:
        """Score the base model, or take its scores from the cache: a sweep pays for them once."""
        if not self.tasks or model.all_ranks(tracker.folder.has_downstream(0)):
            return
        key = digest_of({"model": fingerprint, **self.identity}, "identity of the base model's scores")
        cache = places.CACHE / "glue" / f"{key[:16]}.json"
        if model.all_ranks(cache.is_file()):
            tracker.downstream(0, json.loads(cache.read_text(encoding="utf-8")))
        elif model.fingerprint() == fingerprint:
            self(model, tracker, 0, keep=cache)
        else:
            log.warning("glue/turn_0.json of the resumed run is gone, and the model is edited: no base scores of tasks")

    def __call__(self, model: LanguageModel, tracker: Tracker, done: int, keep: Path | None = None) -> None:
        """Score the model as `done` turns have left it; what a resumed run has behind it is not scored again."""
        if not self.tasks or model.all_ranks(tracker.folder.has_downstream(done)):
            return
        rows = sum(len(task.prompts) for task in self.tasks)
        what = f"GLUE after turn {done}" if done else "GLUE, base model"
        with progress_bar(f"evaluating {what}", rows, "rows") as bar:
            results = evaluate_tasks(
                model, self.tasks, resamples=self.resamples, seed=self.seed, watch=lambda task, n: bar.advance(n, task)
            )
        if keep is not None:
            keep.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(keep, canonical_json(results, "scores of tasks") + "\n")
        tracker.downstream(done, results)
