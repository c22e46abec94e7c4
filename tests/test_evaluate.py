"""Scores against values that can be worked out on paper, and intervals against resampling done the long way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.batches import compute_batches
from data.records import EditRecord, LowRankUpdate, Phase, Question, TokenBatch, TokenSequence, Turn
from harness.diagnostics import TurnDiagnostics
from harness.evaluate import RecordScore, Tally, cached_scores, sample_places, score_records, summarize
from model import TurnCapture, WeightChange


class Successor:
    """A language model that always expects the next number: after token 4 it is sure of token 5."""

    device = torch.device("cpu")

    def batches(self, sequences: Sequence[TokenSequence]) -> Iterator[TokenBatch]:
        return compute_batches(sequences, 8)

    def answer_logits(self, batch: TokenBatch) -> torch.Tensor:
        seen = batch.input_ids[batch.rows, batch.positions]
        return torch.nn.functional.one_hot((seen + 1) % 50, 50).float()


def numbers(questions: Sequence[Question]) -> list[TokenSequence]:
    """ "1 2" and "3 4" become the tokens 1 2 3 4, of which the last two answer."""
    split = [(q.prompt.split(), q.answer.split()) for q in questions]
    return [TokenSequence(tuple(map(int, prompt + answer)), len(prompt)) for prompt, answer in split]


def scores_of(*records: EditRecord) -> list[RecordScore]:
    model: Any = Successor()
    return list(score_records(model, enumerate(records), numbers))


def test_token_accuracy_on_paper() -> None:
    """1 2 -> 3 4 5 is all right; 1 2 -> 3 9 10 has 3 and, after 9, 10 right; 1 2 -> 7 has nothing right."""
    answers = ["3 4 5", "3 9 10", "7"]
    scores = scores_of(*(EditRecord(10 + i, Question("1 2", answer)) for i, answer in enumerate(answers)))
    assert scores == [
        RecordScore(0, 10, "ES", 3, 3),
        RecordScore(1, 11, "ES", 2, 3),
        RecordScore(2, 12, "ES", 0, 1),
    ]
    summary = summarize(scores, 100, 0)
    assert summary["ES"]["mean"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert summary["ES_seq"]["mean"] == pytest.approx(1 / 3)


def test_a_probe_a_record_lacks_is_left_out() -> None:
    whole = EditRecord(0, Question("1", "2"), Question("3", "4"), Question("5", "7"), None, Question("8", "9"))
    bare = EditRecord(1, Question("1", "3"))
    scores = scores_of(whole, bare)
    assert [(s.place, s.protocol, s.correct) for s in scores] == [
        (0, "ES", 1), (0, "GS", 1), (0, "LS", 0), (0, "MS", 1), (1, "ES", 0),
    ]  # fmt: skip
    summary = summarize(scores, 100, 0)
    assert {name: score["n"] for name, score in summary.items() if "_" not in name} == {
        "ES": 2,
        "GS": 1,
        "LS": 1,
        "MS": 1,
    }


def test_interval_is_that_of_resampling_the_records() -> None:
    generator = np.random.default_rng(1)
    values = generator.choice([0.0, 0.5, 2 / 3, 1.0], size=200, p=[0.4, 0.3, 0.1, 0.2])
    tally = Tally()
    for value in values:
        tally.add(float(value))
    summary = tally.summary(20_000, seed=0)
    means = generator.choice(values, size=(20_000, 200)).mean(1)
    assert summary["mean"] == pytest.approx(values.mean())
    assert (summary["low"], summary["high"]) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=5e-3)


def test_intervals_cover_the_truth() -> None:
    """Of intervals over 100 draws with mean 0.3, about 95% hold 0.3."""
    covered = 0
    for seed in range(300):
        tally = Tally()
        for value in np.random.default_rng(seed).random(100) < 0.3:
            tally.add(float(value))
        summary = tally.summary(1000, seed)
        covered += summary["low"] <= 0.3 <= summary["high"]
    assert 0.90 <= covered / 300 <= 0.98


def test_kept_scores_are_the_computed_ones_and_half_of_them_are_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "base" / "scores.jsonl"
    scores = [RecordScore(place, place, "ES", 1, 2) for place in range(5)]

    def interrupted() -> Iterator[RecordScore]:
        yield scores[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(cached_scores(path, interrupted))
    assert not list(path.parent.iterdir())
    assert list(cached_scores(path, lambda: iter(scores))) == scores
    assert list(cached_scores(path, interrupted)) == scores  # read, not computed again


def test_a_sample_is_fixed_by_the_seed() -> None:
    first = list(sample_places(1000, 50, 7))
    assert first == sorted(set(first)) == list(sample_places(1000, 50, 7)) != list(sample_places(1000, 50, 8))
    assert list(sample_places(10, 50, 7)) == list(range(10))


def test_cosine_of_consecutive_updates() -> None:
    """Equal updates have cosine 1, then orthogonal ones 0; the first turn has none to compare with."""

    class Silent:
        def statistics(self) -> dict[str, dict[str, float | None]]:
            return {}

    diagnostics = TurnDiagnostics(torch.device("cpu"))
    turn = Turn(0, Phase.EDIT, (EditRecord(0, Question("1", "2")),), (TokenSequence((1, 2), 1),), (1.0,))
    east, north = (LowRankUpdate(torch.eye(2)[:, [i]], torch.tensor([[3.0, 4.0]])) for i in (0, 1))
    editor: Any = Silent()
    cosines = []
    for update in (east, east, north):
        change = {"m": WeightChange(5.0, 4.0, 0.1)}
        line = diagnostics.line(turn, TurnCapture({}, 1.0), {"m": update}, change, editor, {"capture": 1.0})
        cosines.append(line["modules"]["m"]["cosine_previous"])
    assert cosines == [None, pytest.approx(1), pytest.approx(0)]
    assert line["edits_total"] == 3
