"""LS_agree and LS_kl: values on paper, the bound that is stated, and what is kept of the base model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from data.records import EditRecord, Question, TokenBatch, TokenSequence
from data.stream import EditStream
from harness.evaluation import evaluate, locality
from harness.evaluation.evaluate import Evaluation, RecordScore, evaluated_counts, score_records, summarize
from harness.evaluation.locality import BaseReader, BaseWriter, Distributions, Shift, shift
from model import LanguageModel
from tests.conftest import tiny_llama
from tests.hand_made import StandIn


def moved_by(base: torch.Tensor, edited: torch.Tensor) -> Shift:
    return shift(Distributions.of(base.clone(), base.argmax(-1)), edited.clone(), edited.argmax(-1))


def both(p: list[list[float]], q: list[list[float]]) -> tuple[list[bool], list[float], list[float]]:
    moved = moved_by(torch.tensor(p).log(), torch.tensor(q).log())
    return moved.agree.tolist(), moved.kl.tolist(), moved.error.tolist()


def test_tokens_that_a_model_never_chooses_leave_the_bound_finite() -> None:
    """As those that fill up a vocabulary, which some models put at -inf."""
    base, edited = torch.randn(2, 1, 400, generator=torch.Generator().manual_seed(0)).unbind()
    found = moved_by(base, edited)
    padding = torch.full((1, 8), -torch.inf)
    padded = moved_by(torch.cat([base, padding], 1), torch.cat([edited, padding], 1))
    assert padded.error.isfinite().all()
    torch.testing.assert_close(padded.kl, found.kl)
    torch.testing.assert_close(padded.error, found.error)


def test_values_on_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """p = 1/2 1/4 1/8 1/8 against q = 1/4 1/2 1/16 3/16; of p two tokens are kept, the others' mass is 1/4 in both."""
    p, q = [[0.5, 0.25, 0.125, 0.125]], [[0.25, 0.5, 0.0625, 0.1875]]
    exact = 0.5 * math.log(2) - 0.25 * math.log(2) + 0.125 * math.log(2) + 0.125 * math.log(2 / 3)
    assert both(p, q) == ([False], [pytest.approx(exact)], [0.0])  # all four are kept
    monkeypatch.setattr(locality, "TOP", 2)
    kept = 0.5 * math.log(2) - 0.25 * math.log(2)
    bound = 0.25 * (math.log(0.25) - math.log(0.0625) - 0)
    assert both(p, q) == ([False], [pytest.approx(kept)], [pytest.approx(bound)])
    assert kept <= exact <= kept + bound
    assert both(p, p) == ([True], [pytest.approx(0, abs=1e-7)], [pytest.approx(0.25 * math.log(2))])


def test_of_tokens_that_are_as_likely_the_first_is_the_choice() -> None:
    """As in the other scores: a model that ties two tokens agrees with one that prefers the first of them."""
    tie, first, second = [0.4, 0.4, 0.2], [0.5, 0.4, 0.1], [0.4, 0.5, 0.1]
    assert both([tie, tie, first, second], [first, second, tie, tie])[0] == [True, False, True, False]


@pytest.mark.parametrize("top", [1, 7, 40])
@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0])
def test_the_stated_bound_holds(monkeypatch: pytest.MonkeyPatch, top: int, scale: float) -> None:
    monkeypatch.setattr(locality, "TOP", top)
    generator = torch.Generator().manual_seed(top)
    logits = 3 * torch.randn(500, 90, generator=generator)
    edited = logits + scale * torch.randn(500, 90, generator=generator)
    p, q = logits.double().log_softmax(-1), edited.double().log_softmax(-1)
    exact = (p.exp() * (p - q)).sum(-1)
    moved = moved_by(logits, edited)
    assert (moved.kl <= exact + 1e-5).all()
    assert (exact <= moved.kl + moved.error + 1e-5).all()
    if scale == 3.0:
        assert (exact - moved.kl).max() > 0.01, "the bound was not tried"
    assert torch.equal(moved.agree, logits.argmax(-1) == edited.argmax(-1))


class Table(StandIn):
    """A language model whose logits after a token are the rows of a table, whatever came before."""

    def __init__(self, seed: int) -> None:
        self.logits = torch.randn(50, 50, generator=torch.Generator().manual_seed(seed))

    def answer_logits(self, batch: TokenBatch) -> torch.Tensor:
        return self.logits[batch.input_ids[batch.rows, batch.positions]]


def numbers(questions: Sequence[Question]) -> list[TokenSequence]:
    split = [(q.prompt.split(), q.answer.split()) for q in questions]
    return [TokenSequence(tuple(map(int, prompt + answer)), len(prompt)) for prompt, answer in split]


def record(i: int) -> EditRecord:
    """Locality answers of one to four tokens; every fifth record has none."""
    answer = " ".join(str((i + j) % 50) for j in range(1 + i % 4))
    return EditRecord(100 + i, Question(str(i % 50), "1"), locality=Question(f"{i % 50} 3", answer) if i % 5 else None)


def test_each_record_is_compared_with_its_own_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through batches, blocks and shards, for some of the records kept, against the two tables directly."""
    monkeypatch.setattr(evaluate, "TOKENIZED_TOGETHER", 8)
    monkeypatch.setattr(evaluate, "BLOCK_BATCHES", 2)
    monkeypatch.setattr(evaluate, "BLOCK_TOKENS", 0)
    monkeypatch.setattr(locality, "SHARD_TOKENS", 20)
    base, edited = Table(0), Table(1)
    edited.logits[::3] = base.logits[::3]
    writer = BaseWriter(tmp_path / "kept")
    model: Any = base
    first = list(score_records(model, ((i, record(i)) for i in range(60)), numbers, locality=writer))
    writer.flush()
    assert all(score.agree is score.kl is score.kl_error is None for score in first)
    assert len(list((tmp_path / "kept").iterdir())) > 3
    reader = BaseReader(tmp_path / "kept")
    model = edited
    places = [i for i in range(60) if i % 7 != 2]
    for _ in range(2):  # a second evaluation begins at the first shard again
        scores = list(score_records(model, ((i, record(i)) for i in places), numbers, locality=reader))
        local = [score for score in scores if score.protocol == "LS"]
        assert [score.place for score in local] == [i for i in places if i % 5]
        for score in local:
            before = [3, *map(int, record(score.place).locality.answer.split())][:-1]  # type: ignore[union-attr]
            p, q = base.logits[before].log_softmax(-1), edited.logits[before].log_softmax(-1)
            assert score.agree == int((p.argmax(-1) == q.argmax(-1)).sum())
            assert score.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-5)
            assert score.kl_error == 0
        assert {score.agree for score in scores if score.protocol == "ES"} == {None}
    assert 0 < summarize(scores, 100, 0)["LS_agree"]["mean"] < 1  # type: ignore[index]


def test_a_record_lies_wholly_in_the_summary() -> None:
    scores = [
        RecordScore(0, 0, "LS", 1, 2, agree=2, kl=0.5, kl_error=0.1),
        RecordScore(1, 1, "LS", 0, 4, agree=1, kl=0.25, kl_error=0.3),
    ]
    summary: Any = summarize(scores, 100, 0)
    assert list(summary) == ["LS", "LS_seq", "LS_agree", "LS_kl"]
    assert summary["LS_agree"]["mean"] == pytest.approx((1 + 0.25) / 2)
    assert summary["LS_kl"]["mean"] == pytest.approx(0.375)
    assert summary["LS_kl"]["error"] == pytest.approx(0.2)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


class Stand(Table):
    """With what Evaluation asks of a model to go back to its base."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.original = self.logits.clone()

    @contextmanager
    def unedited(self) -> Iterator[None]:
        edited, self.logits = self.logits, self.original
        yield
        self.logits = edited


class Split:
    """What EditStream asks of a tokenizer: one token a word."""

    is_fast = True

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return 0

    def __call__(self, text: list[str], **_: Any) -> dict[str, Any]:
        raise AssertionError("turns are not cut into tokens here")


def evaluation_of(model: Any, **settings: Any) -> Evaluation:
    stream = EditStream(
        [record(i) for i in range(60)], [record(i) for i in range(20)], n_edits=10, batch_size=5, num_turns=6,
        num_warm_up=2, preheat_mode="middle", tokenizer=Split(), answer_tokens="joint", seed=3,
    )  # fmt: skip
    defaults: dict[str, Any] = {"protocols": evaluate.PROTOCOLS, "sample": None, "resamples": 100, "seed": 3}
    return Evaluation(model, stream, numbers, **defaults | settings)


def scores_of(evaluation: Evaluation, upto: int | None, cache: Path | None = None) -> tuple[Any, list[RecordScore]]:
    seen: list[RecordScore] = []
    return evaluation.run(upto, seen.append, cache), seen


def test_evaluations_on_the_way_find_their_records_in_the_base(tmp_path: Path) -> None:
    """A sample of what is written so far may be no part of the last one; it is compared all the same."""
    model = Stand(0)
    evaluation = evaluation_of(model, sample=12, every=1)
    _, base = scores_of(evaluation, None, tmp_path / "key")
    last = {score.place for score in base}
    assert len(last) == 12
    model.logits = Table(1).logits
    drawn: set[int] = set()
    for done in range(1, 8):
        summary, scores = scores_of(evaluation, done)
        drawn |= {score.place for score in scores}
        assert summary["LS_kl"]["n"] == summary["LS"]["n"]
    assert not drawn <= last
    assert {len(evaluation.stream.edited(done)) for done in range(1, 8)} == set(evaluated_counts(evaluation.stream, 1))
    assert {score.protocol for score in base} == {"ES", "LS"}


def test_a_resumed_run_compares_with_the_same_base_also_where_the_cache_is_gone(tmp_path: Path) -> None:
    model = Stand(0)
    evaluation = evaluation_of(model)
    scores_of(evaluation, None, tmp_path / "key")
    model.logits = edited = Table(1).logits
    expected = scores_of(evaluation, None)
    for cache in (tmp_path / "key", tmp_path / "gone"):
        again = evaluation_of(model)
        again.compare_with_base(cache)
        assert scores_of(again, None) == expected
        assert torch.equal(model.logits, edited)


def test_a_real_model_that_nothing_changed_agrees_with_itself(tmp_path: Path) -> None:
    model = LanguageModel(tiny_llama(), None, {}, compute_tokens=32)
    evaluation = evaluation_of(model)
    scores_of(evaluation, None, tmp_path / "key")
    summary, _ = scores_of(evaluation, None)
    assert summary["LS_agree"]["mean"] == 1
    assert summary["LS_kl"]["mean"] < 1e-6
    model.compute_tokens = 1
    summary, _ = scores_of(evaluation, None)
    assert summary["LS_kl"]["mean"] < 1e-5
