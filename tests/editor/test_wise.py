"""WISE against its equations in float64, and what it promises: the base, bit for bit, where the router says so."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data.records import LossTerm, Phase, TokenSequence, Turn
from editor.wise import WISE, WISESettings, ties
from tests.commands import MODULES, Commands
from tests.conftest import tiny_gpt2, tiny_llama
from tests.editor.test_method import GPT2, LLAMA, harness, random_turn, relative
from tests.job.test_families import EVERYTHING

CPU = torch.device("cpu")
ONE = f"model.edit_modules=[{MODULES[0]}]"


def chosen(**changes: Any) -> WISESettings:
    values = {
        "lr": 0.05, "num_steps": 6, "facts_per_step": None, "stop_loss": 0.0, "alpha": 0.5, "beta": 3.0, "gamma": 2.0,
        "shards": 2, "mask_ratio": 0.5, "merge_density": 0.3, "merge_weight": 0.9, "route_ratio": 0.88,
        "unrelated": 8, "seed": 7, **changes,
    }  # fmt: skip
    return WISESettings(**values)


# ---------------------------------------------------------------------------------------------------------------------
# The reference: W and W', one sequence and one entry at a time, the margin loss by autograd through the model


class Reference:
    def __init__(self, model: nn.Module, module: str, settings: WISESettings) -> None:
        self.model, self.settings = model, settings
        self.module = model.get_submodule(module)
        self.main = self.module.weight.detach().clone()
        if isinstance(self.module, nn.Linear):
            self.main = self.main.T
        self.side = self.main.clone()  # W' (d_k, d_v)
        self.epsilon = math.inf
        self.unrelated: list[Tensor] = []
        self.training: Tensor | None = None
        self.seen = torch.empty(0)
        self.module.register_forward_hook(self.hook)

    def hook(self, _module: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
        self.seen = inputs[0][0]
        bias = outputs[0] - self.seen @ self.main
        rows = []
        for a, b in zip(self.seen, bias, strict=True):
            if self.training is not None:
                rows.append(a @ self.training + b)
            else:
                through = (a @ (self.side - self.main)).norm() > self.epsilon
                rows.append(a @ (self.side if through else self.main) + b)
        return torch.stack(rows)[None]

    def log_p(self, fact: TokenSequence) -> Tensor:
        log_p = self.model(input_ids=torch.tensor([fact.ids])).logits[0].log_softmax(-1)
        return torch.stack([log_p[place - 1, fact.ids[place]] for place in range(fact.answer_start, len(fact.ids))])

    def answer_inputs(self, facts: list[TokenSequence]) -> list[Tensor]:
        rows: list[Tensor] = []
        for fact in facts:
            self.log_p(fact)
            rows += list(self.seen[fact.answer_start - 1 : -1].detach())
        return rows

    def activation(self, a: Tensor, side: Tensor) -> Tensor:
        shift = a @ (side - self.main)
        return shift.norm() if bool((shift != 0).any()) else 0 * shift.sum()  # at 0, of all slopes, 0

    def train(self, facts: list[TokenSequence], mask: Tensor) -> Tensor:
        side, batch = self.side, self.settings.facts_per_step or len(facts)
        for first in range(0, len(facts), batch):
            side = self.steps(facts[first : first + batch], mask, side)
        return side - self.side

    def steps(self, facts: list[TokenSequence], mask: Tensor, side: Tensor) -> Tensor:
        s, edited = self.settings, self.answer_inputs(facts)
        for _ in range(s.num_steps):
            leaf = side.clone().requires_grad_()
            self.training = leaf
            loss = -torch.cat([self.log_p(fact) for fact in facts]).mean()
            self.training = None
            e = [self.activation(a, leaf) for a in edited]
            u = [self.activation(a, leaf) for a in self.unrelated]
            zero = torch.zeros(()).double()
            loss = loss + sum(torch.maximum(zero, x - s.alpha) for x in u) / len(u)
            loss = loss + sum(torch.maximum(zero, s.beta - x) for x in e) / len(e)
            loss = loss + sum(torch.maximum(zero, s.gamma - (x - y)) for x in e for y in u) / len(e) / len(u)
            if loss < s.stop_loss:
                break
            (g,) = torch.autograd.grad(loss, leaf)
            side = side - s.lr * mask * g
        return side

    def merge(self, changes: list[Tensor], facts: list[TokenSequence]) -> None:
        merged = torch.zeros_like(self.side)
        trimmed = []
        for change in changes:
            keep = round(self.settings.merge_density * sum(float(entry) != 0 for entry in change.flatten()))
            least = change.abs().flatten().sort(descending=True).values[keep - 1]
            trimmed.append(torch.where(change.abs() >= least, change, torch.zeros_like(change)))
        for row in range(merged.shape[0]):
            for column in range(merged.shape[1]):
                entries = [float(change[row, column]) for change in trimmed]
                sign = math.copysign(1, sum(entries))
                agreeing = [entry for entry in entries if entry * sign > 0]
                merged[row, column] = sum(agreeing) / len(agreeing) if agreeing else 0.0
        self.side = self.side + self.settings.merge_weight * merged
        least = min(float(self.activation(a, self.side)) for a in self.answer_inputs(facts))
        self.epsilon = min(self.epsilon, 0.999 * self.settings.route_ratio * least)


@pytest.mark.parametrize(
    ("facts_per_step", "stop_loss"), [(None, 0.0), (1, 5.5)], ids=["a shard a step", "a fact a step"]
)
@pytest.mark.parametrize(("make", "modules"), [(tiny_llama, LLAMA), (tiny_gpt2, GPT2)])
def test_three_turns_agree_with_the_reference(
    make: Callable[..., Any], modules: list[str], facts_per_step: int | None, stop_loss: float
) -> None:
    """What is drawn (unrelated inputs, shards, masks) is taken from the editor; what is computed with it is not."""
    settings = chosen(facts_per_step=facts_per_step, stop_loss=stop_loss)
    model = harness(make, modules[1:], dtype=torch.float64)
    editor = WISE(model, settings, CPU)
    reference = Reference(make(dtype=torch.float64), modules[1], settings)
    editor.edit(model, random_turn(0, Phase.WARM_UP, records=3))
    assert editor.unrelated.shape[0] == settings.unrelated
    reference.unrelated = list(editor.unrelated)
    for index in range(1, 4):
        turn = random_turn(index, Phase.EDIT, records=4)
        shards = [turn.part(facts) for facts in editor._dealt(turn)]
        assert sorted(s.ids for part in shards for s in part.sequences) == sorted(s.ids for s in turn.sequences)
        masks = [
            (torch.rand(editor.side.shape, generator=editor._generator("mask", index, shard)) < settings.mask_ratio)
            for shard in range(len(shards))
        ]
        changes = [reference.train(list(part.sequences), mask) for part, mask in zip(shards, masks, strict=True)]
        reference.merge(changes, list(turn.sequences))
        edit = editor.edit(model, turn)
        assert relative(editor.side, reference.side - reference.main) < 1e-6
        assert editor.epsilon == pytest.approx(reference.epsilon, rel=1e-6)
        losses = torch.cat([-reference.log_p(fact) for fact in turn.sequences])
        loss = pytest.approx(float(losses.mean().detach()), rel=1e-6)
        assert edit.details["loss_after"] == model.losses([LossTerm(turn.sequences, 1.0)])[0] == loss
        routed = [float(reference.activation(a, reference.side)) > reference.epsilon for a in reference.unrelated]
        assert edit.details["unrelated_routed"] == sum(routed) / len(routed)


def test_unrelated_inputs_are_those_of_every_token_of_the_warm_up() -> None:
    """Of prompts too, not of answers alone."""
    model = harness(tiny_llama, LLAMA[1:], dtype=torch.float64)
    editor, turn = WISE(model, chosen(unrelated=10**6), CPU), random_turn(0, Phase.WARM_UP, records=3)
    editor.edit(model, turn)
    every = model.capture(turn, every_token=True).modules[LLAMA[1]].keys
    answers = model.capture(turn).modules[LLAMA[1]].keys
    assert len(answers) < len(editor.unrelated) == len(every)
    torch.testing.assert_close(editor.unrelated.sort(0).values, every.sort(0).values)


def test_ties_keeps_what_is_large_and_agreed_on() -> None:
    one = torch.tensor([[5.0, -4.0, 0.1, 0.0, 3.0]])
    other = torch.tensor([[1.0, 6.0, -0.1, 2.0, 0.0]])
    assert ties([one, other], 0.6).tolist() == [[5.0, 6.0, 0.0, 2.0, 0.0]]
    assert ties([one, other], 0.8).tolist() == [[3.0, 6.0, 0.0, 2.0, 3.0]]
    assert torch.equal(ties([one], 1.0), one)
    assert torch.equal(ties([0 * one], 0.5), 0 * one)


def test_ties_trims_what_a_mask_has_let_change() -> None:
    """With the published numbers, where it lets a fifth of the entries change and about half of these are to stay."""
    generator = torch.Generator().manual_seed(0)
    change = torch.randn((50, 40), generator=generator) * (torch.rand((50, 40), generator=generator) < 0.2)
    kept = ties([change], 0.53)
    changed = int(change.count_nonzero())
    assert int(kept.count_nonzero()) == round(0.53 * changed) < changed
    assert float(kept.abs()[kept != 0].min()) > float(change.abs()[kept == 0].max())


def edited(route_ratio: float = 0.88) -> tuple[Any, Any, WISE, Turn]:
    """An edited model, the same one without edits, the editor and the facts."""
    model, base = (harness(tiny_llama, LLAMA[:1]) for _ in range(2))
    settings = chosen(
        num_steps=80, mask_ratio=0.9, merge_density=1.0, merge_weight=1.0, beta=9.0, route_ratio=route_ratio
    )
    editor = WISE(model, settings, CPU)
    editor.edit(model, random_turn(5, Phase.WARM_UP))
    turn = random_turn(0, Phase.EDIT, records=4)
    editor.edit(model, turn)
    return model, base, editor, turn


def test_what_the_router_leaves_to_the_module_is_the_base_bit_for_bit() -> None:
    model, base, editor, turn = edited()
    (module,) = model.edited.values()
    inputs = torch.cat([editor.unrelated, model.capture(turn).modules[LLAMA[0]].keys])
    shift = inputs @ editor.side
    through = shift.norm(dim=1) > editor.epsilon
    assert 0 < int(through.sum()) < len(inputs)
    with torch.no_grad():
        ours, theirs = module.module(inputs), base.edited[LLAMA[0]].module(inputs)
    assert torch.equal(ours[~through], theirs[~through])
    assert torch.equal(ours[through], (theirs + shift)[through])
    with model.unedited():
        assert torch.equal(model.reference_logits(turn.sequences), base.reference_logits(turn.sequences))
    editor.epsilon = 1e9  # nothing goes through the side memory
    assert torch.equal(model.reference_logits(turn.sequences), base.reference_logits(turn.sequences))
    assert model.is_original()


def test_what_rounding_moves_still_goes_through_the_side_memory() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = harness(tiny_llama, LLAMA[:1], dtype=dtype)
        editor = WISE(model, chosen(route_ratio=1.0), CPU)
        editor.edit(model, random_turn(0, Phase.WARM_UP))
        edit = editor.edit(model, random_turn(1, Phase.EDIT))
        assert editor.epsilon == pytest.approx((1 - max(0.001, model.input_noise)) * edit.details["least_activation"])
    assert model.input_noise > 0.01


@pytest.mark.parametrize("route_ratio", [1.0, 0.88])
def test_its_facts_go_through_the_side_memory_and_are_learnt(route_ratio: float) -> None:
    model, base, editor, turn = edited(route_ratio)
    keys = model.capture(turn).modules[LLAMA[0]].keys
    assert bool(((keys @ editor.side).norm(dim=1) > editor.epsilon).all())
    unrelated = (editor.unrelated @ editor.side).norm(dim=1)
    assert float((unrelated > editor.epsilon).float().mean()) < 0.5
    term = [LossTerm(turn.sequences, 1.0)]
    assert model.losses(term)[0] < 0.8 * base.losses(term)[0]
    prompts = [sequence.ids[: sequence.answer_start] for sequence in turn.sequences]
    together = model.reference_logits([TokenSequence((*prompt, 0), len(prompt)) for prompt in prompts]).argmax(-1)
    assert together.tolist() == [written[0] for written in model.generate(prompts, 2)]


def test_mini_batches_of_the_stream_play_no_part() -> None:
    """They weigh the loss of those who take value gradients from it."""
    warm_up, turn = random_turn(0, Phase.WARM_UP), random_turn(1, Phase.EDIT)
    edits = []
    for weights in ([0.1] * len(turn.sequences), [0.1, *[0.3] * (len(turn.sequences) - 1)]):
        model = harness(tiny_llama, LLAMA[:1])
        editor = WISE(model, chosen(num_steps=2), CPU)
        first = editor.edit(model, replace(warm_up, loss_weights=tuple(weights)))
        edit = editor.edit(model, replace(turn, loss_weights=tuple(weights)))
        edits.append((first.loss, edit.loss, edit.details))
        assert edit.loss == pytest.approx(harness(tiny_llama, LLAMA).losses([LossTerm(turn.sequences, 1.0)])[0])
    assert edits[0] == edits[1]


def test_draws_hang_on_the_seed_alone() -> None:
    turn = random_turn(0, Phase.EDIT)
    one, same, other = (WISE(harness(tiny_llama, LLAMA[:1]), chosen(seed=s), CPU)._dealt(turn) for s in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize(("lr", "what"), [(math.inf, "the side memory of"), (1e25, "what .* adds is")])
def test_a_side_memory_that_is_not_finite_leaves_the_turn_before(lr: float, what: str) -> None:
    model = harness(tiny_llama, LLAMA[:1])
    editor = WISE(model, chosen(lr=lr, num_steps=1), CPU)
    editor.edit(model, random_turn(0, Phase.WARM_UP))
    with pytest.raises(FloatingPointError, match=rf"turn 1: {what} .* the side memory is that of the turn before"):
        editor.edit(model, random_turn(1, Phase.EDIT))
    assert not editor.side.any()
    assert editor._in_training is None


def test_a_loss_that_is_not_finite_afterwards_leaves_the_turn_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = harness(tiny_llama, LLAMA[:1])
    editor = WISE(model, chosen(num_steps=1), CPU)
    editor.edit(model, random_turn(0, Phase.WARM_UP))
    editor.edit(model, random_turn(1, Phase.EDIT))
    side, epsilon = editor.side, editor.epsilon
    monkeypatch.setattr(model, "losses", lambda terms: [math.inf for _ in terms])
    with pytest.raises(FloatingPointError, match=r"turn 2: the loss .* is inf after .* side memory is that of"):
        editor.edit(model, random_turn(2, Phase.EDIT))
    assert editor.side is side
    assert editor.epsilon == epsilon < math.inf


# ---------------------------------------------------------------------------------------------------------------------
# Runs

LINE = (*EVERYTHING, "editor=wise", ONE, "editor.num_steps=4", "editor.lr=0.05")


def test_a_run_goes_on_after_a_stop(run: Commands) -> None:
    whole = run(*LINE, run="whole")
    resumed = run.broken_off_and_resumed(*LINE, turn=5, at=(WISE, "edit"))
    assert resumed.turns() == whole.turns()
    assert resumed.scores() == whole.scores()
    assert whole.phases() == "wwweeee"
    lines = whole.lines("turns.jsonl")
    assert all(line["statistics"][MODULES[0]]["epsilon"] is None for line in lines[:3])
    assert all(line["statistics"][MODULES[0]]["epsilon"] > 0 for line in lines[3:])
    assert all(line["loss_after"] > 0 and 0 <= line["unrelated_routed"] <= 1 for line in lines[3:])


def test_it_cannot_be_exported_as_plain_weights(run: Commands) -> None:
    run.no_model_to_save(*LINE)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("editor.shards=0", "editor.shards=0: must be 1 or more"),
        ("editor.facts_per_step=0", "editor.facts_per_step=0: must be 1 or more; null takes all facts of a shard"),
        ("editor.mask_ratio=1.5", "editor.mask_ratio=1.5: must lie in (0, 1]"),
        ("editor.route_ratio=0", "editor.route_ratio=0.0: must lie in (0, 1]"),
        ("editor.beta=-1", "editor.beta=-1.0: must be a finite number above 0"),
        ("editor.preheat_mode=none", "set editor.preheat_mode=start"),
        ("num_seq_zsre=0", "set num_seq_zsre to 1 or more"),
        (
            f"model.edit_modules=[{','.join(MODULES)}]",
            "model.edit_modules: 2 modules, and editor=wise edits one",
        ),
    ],
)
def test_mistakes_are_refused(run: Commands, setting: str, said: str) -> None:
    assert said in run.refused("editor=wise", setting)
