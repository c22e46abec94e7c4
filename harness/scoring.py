"""Evaluations as the loop runs them: scores to the tracker and the records file, progress to the bar, seconds kept."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from harness.console import Bar, RunProgress
from harness.evaluate import PROTOCOLS, Evaluation, RecordScore, Summary
from harness.tracking import Stage, Tracker

RECORD_LINES = 300  # of records.jsonl, written together
SECONDS: dict[Stage, str] = {"base": "scoring_base", "eval": "scoring_on_the_way", "final": "scoring_final"}


class Scoring:
    """Runs evaluations and sends what they find to the tracker and the bar; keeps the seconds they took."""

    def __init__(self, evaluation: Evaluation, tracker: Tracker, progress: RunProgress) -> None:
        self.evaluation, self.tracker, self.progress = evaluation, tracker, progress
        self.seconds: dict[str, float] = {}
        self._lines: list[dict[str, Any]] = []

    def __call__(self, stage: Stage, done: int, cache: Path | None = None) -> Summary:
        """Score the base model, or the facts that the first `done` turns of the stream wrote."""
        start = time.perf_counter()
        upto = None if stage == "base" else done
        what = "the base model" if stage == "base" else f"after turn {done}"
        with self.progress.evaluation(what, self.evaluation.count(upto), unit="records") as bar:
            summary = self.evaluation.run(upto, partial(self._watch, stage, bar), cache)
            self._write()
        name = SECONDS[stage]
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.tracker.scores(done, summary, stage)
        return summary

    def _watch(self, stage: Stage, bar: Bar, score: RecordScore) -> None:
        line = {"stage": stage, "turn": self.evaluation.stream.turn_of(score.place), **asdict(score)}
        self._lines.append(line)
        if len(self._lines) >= RECORD_LINES:
            self._write()
        if score.protocol == PROTOCOLS["edit"]:  # the first probe of every record
            bar.advance()

    def _write(self) -> None:
        self.tracker.folder.append_records(self._lines)
        self._lines.clear()
