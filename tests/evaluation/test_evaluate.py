"""Scores against values that can be worked out on paper, and intervals against resampling done the long way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data import progress
from data.records import (
    EditRecord,
    LowRankUpdate,
    Phase,
    Question,
    TokenBatch,
    TokenSequence,
    Turn,
    WeightChange,
)
from editor.base import Edit
from harness.evaluation import evaluate
from harness.evaluation.evaluate import RecordScore, Tally, kept_scores, sample_places, score_records, summarize
from harness.watch.diagnostics import TurnDiagnostics
from model import LanguageModel
from tests.conftest import tiny_llama
from tests.hand_made import StandIn


class Successor(StandIn):
    """A language model that always expects the next number: after token 4 it is sure of token 5."""

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


def test_of_tokens_that_are_as_likely_the_first_is_the_models_choice() -> None:
    """A model without any preference chooses token 0, alone and beside longer sequences that pad its row."""

    class Indifferent(Successor):
        def answer_logits(self, batch: TokenBatch) -> torch.Tensor:
            return torch.full((len(batch.targets), 50), 0.25)

    model: Any = Indifferent()
    records = [
        EditRecord(0, Question("7", "0")),
        EditRecord(1, Question("1 2 3", "0 1 0")),
        EditRecord(2, Question("7", "1")),
    ]
    scores = list(score_records(model, enumerate(records), numbers))
    assert [(score.correct, score.tokens) for score in scores] == [(1, 1), (2, 3), (0, 1)]


def test_what_shares_a_batch_or_a_block_changes_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny Llama, answers of 1 to 9 tokens, one of which ends where the context does, against one at a time."""
    plain = tiny_llama()
    sequences = [
        TokenSequence(tuple(np.random.default_rng(i).integers(0, 200, length).tolist()), length - answer)
        for i, (length, answer) in enumerate([(256, 9), (2, 1), (30, 4), (3, 2), (256, 1), (17, 8)])
    ]
    with torch.no_grad():
        first = [plain(torch.tensor([s.ids])).logits[0].argmax(-1).tolist() for s in sequences]
    # some answer tokens are made right; each is predicted one place before it
    ids = [list(s.ids) for s in sequences]
    ids[0][-1], ids[1][-1], ids[2][-4], ids[4][-1] = first[0][-2], first[1][-2], first[2][-5], first[4][-2]
    sequences = [TokenSequence(tuple(new), s.answer_start) for new, s in zip(ids, sequences, strict=True)]
    records = [EditRecord(i, Question(str(i), "-")) for i in range(len(sequences))]

    def correct(budget: int, together: int, block: int) -> list[int]:
        monkeypatch.setattr(evaluate, "TOKENIZED_TOGETHER", together)
        monkeypatch.setattr(evaluate, "BLOCK_BATCHES", block)
        monkeypatch.setattr(evaluate, "BLOCK_TOKENS", 0)
        model = LanguageModel(plain, None, {}, compute_tokens=budget)
        cut = lambda questions: [sequences[int(question.prompt)] for question in questions]  # noqa: E731
        return [score.correct for score in score_records(model, enumerate(records), cut)]

    with torch.no_grad():
        alone = [
            int(
                (
                    plain(torch.tensor([s.ids])).logits[0, s.answer_start - 1 : -1].argmax(-1)
                    == torch.tensor(s.ids[s.answer_start :])
                ).sum()
            )
            for s in sequences
        ]
    assert all(right >= 1 for right in (alone[0], alone[1], alone[2], alone[4]))
    for budget in (1, 64, 4096):
        for together, block in ((1, 0), (4, 0), (1, 2), (4, 10**6), (384, 32)):
            assert correct(budget, together, block) == alone


@pytest.mark.parametrize("compute_tokens", [512, 8192])
def test_at_scale_nine_of_ten_tokens_computed_are_real(compute_tokens: int) -> None:
    """20,000 facts with three questions of 5 to 80 tokens, on average 16, in no order."""
    lengths = 5 + np.random.default_rng(0).geometric(1 / 12, (20_000, 3)).clip(max=75)

    class Counting(Successor):
        given, real, most = 0, 0, 0

        def answer_logits(self, batch: TokenBatch) -> torch.Tensor:
            self.given += batch.input_ids.numel()
            self.real += int(batch.lengths.sum())
            self.most = max(self.most, batch.input_ids.numel())
            return torch.zeros(len(batch.targets), 2)

    def cut(questions: Sequence[Question]) -> list[TokenSequence]:
        return [TokenSequence((1,) * int(question.prompt) + (0,), int(question.prompt)) for question in questions]

    model: Any = Counting()
    model.compute_tokens = compute_tokens
    records = (EditRecord(i, *(Question(str(n), "-") for n in own)) for i, own in enumerate(lengths))
    scores = score_records(model, enumerate(records), cut)
    assert sum(score.correct for score in scores) == lengths.size
    assert model.real == lengths.sum()
    assert model.most <= compute_tokens
    assert model.real / model.given > 0.9


def test_a_slow_block_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    caplog.set_level("INFO")

    class Slow(Successor):
        def answer_logits(self, batch: TokenBatch) -> torch.Tensor:
            now[0] += 8.0
            return super().answer_logits(batch)

    model: Any = Slow()
    records = [EditRecord(i, Question("1 2 3 4 5 6 7", "8")) for i in range(8)]  # a batch each
    assert len(list(score_records(model, enumerate(records), numbers))) == 8
    assert caplog.messages == [
        f"answering: {said}"
        for said in ("2 of 8 questions, 48 s left", "4 of 8 questions, 32 s left", "6 of 8 questions, 16 s left",
                     "8 of 8 questions, done in 1 min 04 s")
    ]  # fmt: skip


def test_shuffled_answers_score_at_chance_and_answers_given_away_all_right() -> None:
    generator = np.random.default_rng(3)
    prompts, noise = generator.integers(0, 40, 2000), generator.integers(0, 50, 2000)
    shuffled = summarize(
        scores_of(
            *(EditRecord(i, Question(str(p), str(a))) for i, (p, a) in enumerate(zip(prompts, noise, strict=True)))
        ),
        1000,
        0,
    )
    assert shuffled["ES"]["low"] <= 1 / 50 <= shuffled["ES"]["high"]  # type: ignore[index]
    given = summarize(scores_of(*(EditRecord(i, Question(str(p), str(p + 1))) for i, p in enumerate(prompts))), 10, 0)
    assert given["ES"]["mean"] == given["ES_seq"]["mean"] == 1  # type: ignore[index]


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rest", [0.0, None])
def test_logits_that_are_not_finite_are_no_scores(value: float, rest: float | None) -> None:
    """A hole at one answer token: in one place of its logits, or in all of them."""

    class Broken(Successor):
        def answer_logits(self, batch: TokenBatch) -> torch.Tensor:
            logits = super().answer_logits(batch)
            hole = batch.targets == 13
            logits[hole] = value if rest is None else logits[hole] + rest
            if rest is not None:
                logits[hole, 7] = value
            return logits

    model: Any = Broken()
    records = [EditRecord(0, Question("1 2", "3 4")), EditRecord(1, Question("1 2", "12 13 14"))]
    if value < 0 and rest is not None:  # a token that the model never says
        assert len(list(score_records(model, enumerate(records), numbers))) == 2
        return
    with pytest.raises(FloatingPointError, match="logits are not finite at 1 of 5 answer tokens"):
        list(score_records(model, enumerate(records), numbers))


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


def test_bins_of_a_continuum_keep_memory_and_hardly_move_an_interval() -> None:
    """The mean is exact; the interval is that of the values themselves to the digits of the bins."""
    values = np.random.default_rng(5).lognormal(-3, 2, size=20_000)
    binned, exact = Tally(3), Tally()
    for value in values:
        binned.add(float(value))
        exact.add(float(value))
    assert len(binned.counts) < 6000 < len(exact.counts)
    one, other = binned.summary(300, 0), exact.summary(300, 1)
    assert one["mean"] == pytest.approx(values.mean(), rel=1e-12)
    assert (one["low"], one["high"]) == pytest.approx((other["low"], other["high"]), rel=0.03)


@pytest.mark.parametrize("value", [1 / 3, 0.1, 0.7])
def test_an_interval_holds_its_mean_where_all_records_score_alike(value: float) -> None:
    """Their mean may be summed in another order than those of the resamples."""
    for n in range(1, 60):
        tally = Tally()
        for _ in range(n):
            tally.add(value)
        found = tally.summary(50, 0)
        assert found["low"] <= found["mean"] <= found["high"]


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
    folder = tmp_path / "base" / "key"
    scores = [RecordScore(0, 0, "ES", 1, 2, text="Ünï\n", exact=False, contains=True), RecordScore(1, 7, "LS", 1, 3)]

    def interrupted(_: Path) -> Iterator[RecordScore]:
        yield scores[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(kept_scores(folder, interrupted))
    assert not list(folder.parent.iterdir())
    assert list(kept_scores(folder, lambda _: iter(scores))) == scores
    assert list(kept_scores(folder, interrupted)) == scores  # read, not computed again
    assert [path.name for path in folder.parent.iterdir()] == ["key"]


def test_of_two_that_score_the_base_at_once_one_is_kept(tmp_path: Path) -> None:
    scores = [RecordScore(0, 0, "ES", 1, 2)]

    def overtaken(_: Path) -> Iterator[RecordScore]:
        list(kept_scores(tmp_path / "key", lambda _: iter(scores)))
        yield from scores

    assert list(kept_scores(tmp_path / "key", overtaken)) == scores
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


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
        line = diagnostics.line(turn, Edit(1.0, {"m": update}, change, {"capture": 1.0}), editor, 1.0)
        cosines.append(line["modules"]["m"]["cosine_previous"])
    assert cosines == [None, pytest.approx(1), pytest.approx(0)]
    assert line["edits_total"] == 3
