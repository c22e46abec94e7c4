"""Retention: who is asked when, what forgetting is, and that a run that was stopped says the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from data.records import EditRecord, Question, TokenBatch, TokenSequence
from data.stream import EditStream
from harness.evaluation.evaluate import PROTOCOLS, Evaluation
from harness.evaluation.retention import RetentionPlan
from harness.evaluation.scoring import Scoring
from harness.run.folder import RunFolder
from harness.watch.tracking import Tracker, WandbSettings
from tests.hand_made import StandIn

TURNS, FACTS, SAMPLE = 9, 5, 3


class Split:
    """What EditStream asks of a tokenizer; turns are not cut into tokens here."""

    is_fast = True

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return 0

    def __call__(self, text: list[str], **_: Any) -> dict[str, Any]:
        raise AssertionError


class Fading(StandIn):
    """Knows fact p from its turn on, in full for two turns, then its first token; a rephrase it never knows in full.

    Fact p is "p" -> "p p", its rephrase "p 90" -> "p p".
    """

    done = 0

    def __init__(self, stream: EditStream) -> None:
        self.stream = stream
        self.asked = 0

    def answer_logits(self, batch: TokenBatch) -> torch.Tensor:
        self.asked += len(batch.members)
        right = []
        for row, position, target in zip(
            batch.rows.tolist(), batch.positions.tolist(), batch.targets.tolist(), strict=True
        ):
            age = self.done - 1 - self.stream.turn_of(target)
            rephrase = int(batch.input_ids[row, 1]) == 90
            second = position == 2 - (not rephrase)
            right.append(target if age >= 0 and not (second and (rephrase or age > 2)) else 99)
        return torch.nn.functional.one_hot(torch.tensor(right), 100).float()


def numbers(questions: Sequence[Question]) -> list[TokenSequence]:
    split = [(q.prompt.split(), q.answer.split()) for q in questions]
    return [TokenSequence(tuple(map(int, prompt + answer)), len(prompt)) for prompt, answer in split]


@pytest.fixture
def stream() -> EditStream:
    """Nine edit turns; two of warm-up before the third."""
    return stream_of(num_warm_up=2)


def stream_of(num_warm_up: int) -> EditStream:
    records = [
        EditRecord(i, Question(f"{i}", f"{i} {i}"), Question(f"{i} 90", f"{i} {i}"), Question("1", "2"))
        for i in range(TURNS * FACTS)
    ]
    return EditStream(
        records, records, n_edits=FACTS, batch_size=5, num_turns=TURNS, num_warm_up=num_warm_up, preheat_mode="q1",
        tokenizer=Split(), answer_tokens="joint", seed=3,
    )  # fmt: skip


def test_who_is_asked_when(stream: EditStream) -> None:
    plan = RetentionPlan(stream, SAMPLE, 42)
    assert plan.due(0) == []
    for done in range(1, len(stream) + 1):
        turns = [stream.turn_of(place) for place in plan.due(done)]
        ages = {done - 1 - turn for turn in turns}
        edit_turns = set(range(len(stream))) - {2, 3}
        assert ages == {age for age in (0, 1, 2, 4, 8) if done - 1 - age in edit_turns}
        assert turns == sorted(turns)
        assert all(turns.count(turn) == SAMPLE for turn in turns)
    assert list(plan.at_end()) == [place for turn in range(len(stream)) for place in plan.places(turn)]
    assert plan.places(2) == []
    assert plan.places(5) == RetentionPlan(stream, SAMPLE, 42).places(5)
    assert [plan.places(t) for t in (4, 5)] != [RetentionPlan(stream, SAMPLE, 1).places(t) for t in (4, 5)]
    assert RetentionPlan(stream, 100, 42).places(4) == [10, 11, 12, 13, 14]
    assert list(RetentionPlan(stream, 0, 42).at_end()) == RetentionPlan(stream, 0, 42).due(3) == []


def test_the_same_facts_are_asked_with_and_without_warm_up() -> None:
    plain, warmed_up = (list(RetentionPlan(stream_of(turns), SAMPLE, 42).at_end()) for turns in (0, 2))
    assert plain == warmed_up


def scoring_of(folder: RunFolder, stream: EditStream, retention: int) -> tuple[Scoring, Fading]:
    model: Any = Fading(stream)
    evaluation = Evaluation(
        model, stream, numbers, protocols=PROTOCOLS, sample=None, resamples=50, seed=42, retention=retention
    )
    tracker = Tracker(folder, WandbSettings(mode="disabled"))
    return Scoring(evaluation, tracker, {}), model


def new_folder(path: Path) -> RunFolder:
    return RunFolder.create(path, config={}, overrides=[], inputs={}, model={}, device="cpu")


def loop(scoring: Scoring, model: Fading, first: int, last: int) -> None:
    """As main has it: what is due after `done` turns comes before the next one."""
    for turn in range(first, last):
        scoring.retention(turn)
        model.done = turn + 1


def test_forgetting_is_immediate_minus_final(stream: EditStream, tmp_path: Path) -> None:
    with new_folder(tmp_path / "run") as folder:
        scoring, model = scoring_of(folder, stream, SAMPLE)
        loop(scoring, model, 0, len(stream))
        results = scoring.retained()["retention"]
        lines = (folder.path / "scores.jsonl").read_text().splitlines()
    assert len(lines) == len(stream), "after warm-up turns, too, older facts are asked"
    assert list(results) == ["ES", "GS"], "locality was never learned"
    means = {part: score["mean"] for part, score in results["ES"].items() if part != "by_age"}
    # ages at the end: 10, 9, 6 ... 0; those over 2 know one token of two: 6 of 9 turns
    assert means == pytest.approx({"immediate": 1, "final": (3 + 6 / 2) / 9, "forgetting": 3 / 9})
    assert results["GS"]["forgetting"] == {"mean": 0, "low": 0, "high": 0, "n": SAMPLE * TURNS}
    by_age = results["ES"]["by_age"]
    assert {age: score["mean"] for age, score in by_age.items()} == {"0": 1, "1": 1, "2": 1, "4": 0.5, "8": 0.5}
    assert by_age["0"]["n"] == SAMPLE * TURNS
    assert by_age["8"]["n"] == SAMPLE * 2  # of the turns 0 to 2 there is one of warm-up
    assert results["ES"]["immediate"] == by_age["0"]


def test_a_run_that_went_on_says_what_an_unbroken_one_says(stream: EditStream, tmp_path: Path) -> None:
    with new_folder(tmp_path / "whole") as folder:
        scoring, model = scoring_of(folder, stream, SAMPLE)
        loop(scoring, model, 0, len(stream))
        expected = scoring.retained()
    with new_folder(tmp_path / "broken") as folder:
        scoring, model = scoring_of(folder, stream, SAMPLE)
        loop(scoring, model, 0, 6)
        mark = {name: (folder.path / name).stat().st_size for name in ("records.jsonl", "scores.jsonl")}
        scoring.retention(6)  # and is stopped in turn 6, whose checkpoint is that of its beginning
        folder.go_on(mark, 6, [])
        scoring, model = scoring_of(folder, stream, SAMPLE)
        model.done = 6
        loop(scoring, model, 6, len(stream))
        assert scoring.retained() == expected
    for name in ("records.jsonl", "scores.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()


def test_off_asks_nothing(stream: EditStream, tmp_path: Path) -> None:
    with new_folder(tmp_path / "run") as folder:
        scoring, model = scoring_of(folder, stream, 0)
        loop(scoring, model, 0, len(stream))
        assert scoring.retained() == {}
        assert model.asked == 0
        assert not (folder.path / "scores.jsonl").exists()
