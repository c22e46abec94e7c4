"""Evaluations as the loop runs them: scores to the tracker and the records file, progress to the bar, seconds kept."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from data.progress import Bar, progress_bar
from data.records import RecordScore
from harness.evaluation.evaluate import PROTOCOLS, Evaluation, Score, Summary, summarize_values
from harness.evaluation.examples import Examples
from harness.run import Stage
from harness.watch import SMALLER_STEPS, Tracker

RECORD_LINES = 300  # of records.jsonl, written together
BASE = "the base model"
SECONDS: dict[Stage, str] = {"base": "scoring_base", "eval": "scoring_on_the_way", "final": "scoring_final"}


class Scoring:
    """Runs evaluations and sends what they find to the tracker and the bar; keeps the seconds they took.

    What one evaluation must know of another it reads back from records.jsonl, so a resumed run lacks nothing.
    """

    def __init__(self, evaluation: Evaluation, tracker: Tracker, seconds: dict[str, float]) -> None:
        """`seconds`, with what a resumed run spent before, is added to."""
        self.evaluation, self.tracker, self.seconds = evaluation, tracker, seconds
        self._lines: list[dict[str, Any]] = []

    def __call__(self, stage: Stage, done: int, cache: Path | None = None) -> Summary:
        """Score the base model, or the facts that the first `done` turns of the stream wrote."""
        upto = None if stage == "base" else done
        what = BASE if stage == "base" else f"after turn {done}"
        count = self.evaluation.count(upto)
        with (
            _finite(what),
            self._timed(SECONDS[stage]),
            progress_bar(f"evaluating {what}", count, "records") as bar,
        ):
            line = partial(self._line, stage, after=done) if stage == "eval" else partial(self._line, stage)
            summary = self.evaluation.run(upto, line, cache, bar.advance)
            bar.finish()  # what was computed by an earlier run
            self._write()
        self.tracker.scores(done, summary, stage)
        return summary

    def base(self, begun: bool, cache: Path) -> Mapping[str, Any]:
        """The base model's scores: at the start of a run, or, where a resumed one had begun, as it has them."""
        if not begun:
            return self("base", 0, cache)
        self.evaluation.compare_with_base(cache)
        return self.tracker.folder.scores("base")

    def retention(self, done: int) -> None:
        """Score again the facts that are due after `done` turns (DESIGN section 5, retention): before each turn."""
        places = self.evaluation.retention.due(done)
        if not places:
            return
        with _finite(f"after turn {done}"), self._timed("scoring_retention"):
            scores = self._kept("retention", done, self.evaluation.retained(places))
            summary = self._summary((f"{score.protocol}_age{age}", _share(score)) for age, score in scores)
        self.tracker.scores(done, summary, "retention")

    def retained(self) -> dict[str, Any]:
        """{"retention": {"ES": {"immediate", "final", "forgetting", "by_age": {"0", "1", "2", "4", ...}}, ...}}.

        Forgetting is immediate - final, record by record. To be called after the last turn; empty where it is off.
        """
        plan, done = self.evaluation.retention, len(self.evaluation.stream)
        if not plan.sample:
            return {}
        self.retention(done)
        total = sum(1 for _ in plan.at_end())
        with self._timed("scoring_retention"), progress_bar("evaluating retention", total, "records") as bar:
            final = self._kept("retention_final", done, self.evaluation.retained(plan.at_end()), bar)
            results = _nested(self._summary(self._ends(final)))
        ages = _nested(
            self._summary((f"{score.protocol} {age}", _share(score)) for age, score in self._retention_scores())
        )
        return {"retention": {name: score | {"by_age": ages[name]} for name, score in results.items()}}

    def examples(self, examples: Examples | None, base: Sequence[str] | None = None) -> None:
        """Write examples.json; nothing where there are to be none.

        `base` is what the base model wrote where it is another model, not this one without its edits.
        """
        if examples is None:
            return
        model = self.evaluation.model
        with self._timed("examples"):
            edited = examples.texts(model)
            if base is None:
                with model.unedited():
                    base = examples.texts(model)
            self.tracker.folder.write_examples(examples.lines(base, edited))

    def _ends(self, final: Iterable[tuple[int, RecordScore]]) -> Iterator[tuple[str, float]]:
        """Of each record what it scored right after its turn, at the end, and the difference."""
        immediate = (score for age, score in self._retention_scores() if age == 0)
        for before, (_, after) in zip(immediate, final, strict=True):
            assert (before.place, before.protocol) == (after.place, after.protocol)
            yield f"{after.protocol} immediate", _share(before)
            yield f"{after.protocol} final", _share(after)
            yield f"{after.protocol} forgetting", _share(before) - _share(after)

    def _retention_scores(self) -> Iterator[tuple[int, RecordScore]]:
        """What `retention` wrote so far, also before this run was resumed: age and score."""
        for line in self.tracker.folder.lines("records.jsonl"):
            if line["stage"] == "retention":
                yield line["age"], RecordScore.of_line(line)

    def _kept(
        self, stage: str, done: int, scores: Iterable[RecordScore], bar: Bar | None = None
    ) -> Iterator[tuple[int, RecordScore]]:
        """Each score with its age, once it is among the lines of records.jsonl."""
        for score in scores:
            age = done - 1 - self.evaluation.stream.turn_of(score.place)
            self._line(stage, score, age=age)
            if bar is not None and score.protocol == PROTOCOLS["edit"]:
                bar.advance()
            yield age, score
        self._write()

    def _summary(self, values: Iterable[tuple[str, float]]) -> dict[str, Score]:
        return summarize_values(values, self.evaluation.resamples, self.evaluation.seed)

    def _line(self, stage: str, score: RecordScore, **more: int) -> None:
        """`more`: of retention its age, and of evaluations on the way after how many turns they are."""
        turn = self.evaluation.stream.turn_of(score.place)
        self._lines.append({"stage": stage, "turn": turn, **more, **score.line()})
        if len(self._lines) >= RECORD_LINES:
            self._write()

    def _write(self) -> None:
        self.tracker.folder.append_records(self._lines)
        self._lines.clear()

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class ScoringWithoutRecord(Scoring):
    """Scoring on ranks other than 0: each computes its share and records nothing."""

    def base(self, begun: bool, cache: Path) -> Mapping[str, Any]:
        if begun:
            self.evaluation.compare_with_base(cache)
        else:
            self("base", 0, cache)
        return {}

    def retention(self, done: int) -> None:
        self._compute_share(self.evaluation.retention.due(done))

    def retained(self) -> dict[str, Any]:
        self.retention(len(self.evaluation.stream))
        self._compute_share(self.evaluation.retention.at_end())
        return {}

    def _compute_share(self, places: Iterable[int]) -> None:
        for _ in self.evaluation.retained(places):
            pass


@contextmanager
def _finite(what: str) -> Iterator[None]:
    """Says what was scored where its numbers are not finite, and the way out."""
    try:
        yield
    except FloatingPointError as error:
        remedy = "look at its weights, or set model.half=fp32" if what == BASE else SMALLER_STEPS
        raise FloatingPointError(f"evaluating {what}: {error}; {remedy}") from error


def _share(score: RecordScore) -> float:
    return score.correct / score.tokens


def _nested(summary: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
    """{"ES final": score} as {"ES": {"final": score}}."""
    nested: dict[str, dict[str, Any]] = {}
    for name, score in summary.items():
        protocol, part = name.split()
        nested.setdefault(protocol, {})[part] = score
    return nested
