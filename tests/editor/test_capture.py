"""The door of gradient-capture editors: capture, update, apply, once or several times a turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from data.records import Capture, LowRankUpdate, Phase, Turn
from editor.capture import CaptureEditor, CaptureSettings
from editor.linalg import dense
from model import LanguageModel
from tests.conftest import tiny_llama
from tests.editor.test_method import EDIT, LLAMA, harness, random_turn

CPU = torch.device("cpu")


class Descent(nn.Module):
    """A plain step down the gradient, which keeps what it was given."""

    def __init__(self, step: float = 20.0, is_dense: bool = False) -> None:
        super().__init__()
        self.step, self.is_dense = step, is_dense
        self.seen: list[Mapping[str, Capture]] = []

    def update(self, captures: Mapping[str, Capture], phase: Phase) -> dict[str, LowRankUpdate]:
        self.seen.append(captures)
        updates = {n: LowRankUpdate(c.keys.T, -self.step * c.value_grads) for n, c in captures.items()}
        if self.is_dense and len(self.seen) == 1:
            return {name: LowRankUpdate(None, dense((one.left, one.right))) for name, one in updates.items()}
        return updates

    def statistics(self) -> dict[str, dict[str, float | None]]:
        return {}


def is_said(model: LanguageModel, turn: Turn, place: int, limit: float | None) -> bool:
    """By a forward of that fact alone: its tokens are first choices or, with a limit, likelier than it says."""
    sequence = turn.sequences[place]
    logits = model.model(input_ids=torch.tensor([sequence.ids[:-1]])).logits[0, sequence.answer_start - 1 :]
    answer = torch.tensor(sequence.ids[sequence.answer_start :])
    if limit is None:
        return bool((logits.argmax(-1) == answer).all())
    return bool((functional.cross_entropy(logits, answer, reduction="none") < limit).all())


def edited_by_hand(model: LanguageModel, turn: Turn, passes: int, step: float, limit: float | None) -> list[float]:
    """The loss before each pass, of the facts captured in it."""
    losses = []
    for number in range(passes):
        captured = model.capture(turn)
        losses.append(captured.loss)
        everyone = range(len(turn.sequences))
        wrong = [place for place in everyone if number == 0 or not is_said(model, turn, place, limit)]
        rows = torch.cat([rows_of(turn, place) for place in wrong]) if wrong else torch.tensor([], dtype=torch.int64)
        for name, edited in model.edited.items():
            capture = captured.modules[name]
            edited.master -= step * (capture.keys[rows].T @ capture.value_grads[rows]).T
        weights = tuple(turn.loss_weights[place] for place in wrong)
        turn = replace(turn, sequences=tuple(turn.sequences[place] for place in wrong), loss_weights=weights)
        if not wrong:
            break
    return losses


def rows_of(turn: Turn, place: int) -> Tensor:
    before = sum(sequence.answer_length for sequence in turn.sequences[:place])
    return torch.arange(before, before + turn.sequences[place].answer_length)


@pytest.mark.parametrize("is_dense", [False, True])
@pytest.mark.parametrize(("passes", "limit"), [(1, None), (2, None), (4, None), (4, 4.0)])
def test_passes_are_captured_anew_and_leave_said_facts_alone(passes: int, limit: float | None, is_dense: bool) -> None:
    model, by_hand = harness(tiny_llama, LLAMA), harness(tiny_llama, LLAMA)
    start = model.snapshot()
    rule = Descent(is_dense=is_dense)
    edit = CaptureEditor(rule, CPU, CaptureSettings(passes, limit)).edit(model, random_turn(0, EDIT))
    losses = edited_by_hand(by_hand, random_turn(0, EDIT), passes, rule.step, limit)
    assert edit.loss == pytest.approx(losses[0])
    for name, weight in by_hand.snapshot().items():
        torch.testing.assert_close(model.snapshot()[name], weight, rtol=1e-4, atol=1e-6)
        moved = (model.snapshot()[name] - start[name]).T
        torch.testing.assert_close(dense((edit.updates[name].left, edit.updates[name].right)), moved, rtol=0, atol=2e-6)
        assert edit.changes[name].norm == pytest.approx(float(moved.norm()), rel=1e-4)
        assert edit.changes[name].drift == pytest.approx(float(moved.norm() / start[name].norm()), rel=1e-4)
    if passes == 1:
        assert edit.details == {}
    else:
        assert edit.details["passes"]["loss"] == pytest.approx(losses)
        facts = edit.details["passes"]["facts"]
        assert facts[0] == 17
        assert facts == sorted(facts, reverse=True)
        assert facts[-1] < 17  # else nothing was left alone, and this test shows nothing


def test_a_turn_ends_when_the_model_says_all_of_it() -> None:
    """Forty passes are offered and fewer taken; the last capture finds nothing to push."""
    model = harness(tiny_llama, LLAMA)
    turn = random_turn(0, EDIT, records=3)
    rule = Descent(step=10.0)
    edit = CaptureEditor(rule, CPU, CaptureSettings(passes=40)).edit(model, turn)
    facts = edit.details["passes"]["facts"]
    assert facts[-1] == 0
    assert len(facts) < 40
    assert len(rule.seen) == len(facts) - 1


@pytest.mark.parametrize("limit", [None, 5.0])
def test_of_the_replay_only_what_is_forgotten_is_pushed(limit: float | None) -> None:
    """The same edit as of a turn that has these facts as its own."""
    model, by_hand = harness(tiny_llama, LLAMA), harness(tiny_llama, LLAMA)
    replayed = random_turn(1, EDIT)
    for each in (model, by_hand):
        CaptureEditor(Descent(), CPU, CaptureSettings(passes=3)).edit(each, replayed)
    forgotten = [place for place in range(17) if not is_said(by_hand, replayed, place, limit)]
    assert 0 < len(forgotten) < 17
    own = random_turn(0, EDIT)
    before = model.capture(own)
    edit = CaptureEditor(Descent(), CPU, CaptureSettings(1, limit)).edit(model, replace(own, replay=replayed))
    CaptureEditor(Descent(), CPU).edit(by_hand, replace(own, replay=replayed.part(forgotten)).with_replay())
    assert edit.details["passes"]["facts"] == [17 + len(forgotten)]
    assert edit.loss == pytest.approx(before.loss, rel=1e-5)
    assert abs(edit.details["passes"]["loss"][0] / before.loss - 1) > 0.01
    for name, weight in by_hand.snapshot().items():
        torch.testing.assert_close(model.snapshot()[name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("passes", "place", "weights"), [(1, "turn 7: ", "turn"), (3, "turn 7, pass 2: ", "pass")])
def test_a_number_that_is_not_finite_says_where_and_what_is_left(passes: int, place: str, weights: str) -> None:
    class Spoilt(Descent):
        def update(self, captures: Mapping[str, Capture], phase: Phase) -> dict[str, LowRankUpdate]:
            updates = super().update(captures, phase)
            if len(self.seen) == min(passes, 2):
                updates[LLAMA[1]].right.fill_(torch.nan)
            return updates

    model = harness(tiny_llama, LLAMA)
    editor = CaptureEditor(Spoilt(step=0.01), CPU, CaptureSettings(passes))
    with pytest.raises(FloatingPointError, match="is not finite") as error:
        editor.edit(model, random_turn(7, EDIT))
    assert str(error.value).startswith(f"{place}the update of {LLAMA[1]}")
    assert str(error.value).endswith(f"the weights are those of the {weights} before")
    assert model.is_original() == (passes == 1)


def test_a_fact_is_right_when_all_its_tokens_are_the_first_choice() -> None:
    model = harness(tiny_llama, LLAMA)
    turn = random_turn(3, EDIT)
    right, losses = [], []
    for sequence in turn.sequences:
        logits = model.model(input_ids=torch.tensor([sequence.ids])).logits[0]
        answer = torch.tensor(sequence.ids[sequence.answer_start :])
        losses.append(-logits.log_softmax(-1)[sequence.answer_start - 1 : -1][range(len(answer)), answer])
        chosen = logits.argmax(-1)[sequence.answer_start - 1 : -1]
        right.append(chosen.tolist() == list(sequence.ids[sequence.answer_start :]))
    said = replace(turn, sequences=turn.sequences[:2] * 8 + turn.sequences[2:3])
    found = model.capture(turn)
    assert found.all_correct == tuple(right)
    assert found.mean_token_loss == pytest.approx([float(one.mean()) for one in losses], rel=1e-5)
    assert found.max_token_loss == pytest.approx([float(one.max()) for one in losses], rel=1e-5)
    assert model.capture(said).all_correct == tuple(right[:2] * 8 + right[2:3])
