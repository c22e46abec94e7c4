"""GRACE against its rules in float64, and what it promises: the base model, bit for bit, outside its radii."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from data.records import LossTerm, Phase, TokenSequence, Turn
from editor.grace import GRACE, Codebook, GRACESettings
from tests.commands import MODULES, Commands
from tests.conftest import tiny_gpt2, tiny_llama
from tests.editor.test_method import GPT2, LLAMA, harness, random_turn
from tests.job.test_families import EVERYTHING

CPU = torch.device("cpu")
ONE = f"model.edit_modules=[{MODULES[0]}]"


def chosen(**changes: Any) -> GRACESettings:
    return GRACESettings(**{"lr": 0.5, "num_steps": 4, "eps_init": 1.0, "stop_loss": 0.0, **changes})


# ---------------------------------------------------------------------------------------------------------------------
# The reference: entries in a list, one position after the other, values trained one fact at a time


@dataclass
class Entry:
    key: Tensor
    value: Tensor
    radius: float
    answer: tuple[int, ...]


@dataclass
class Reference:
    model: nn.Module  # float64
    module: str
    settings: GRACESettings
    entries: list[Entry] = field(default_factory=list)
    put: tuple[int, Tensor] | None = None  # a position, and what is put out there
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model.get_submodule(self.module).register_forward_hook(self.hook)

    def hook(self, _module: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
        rows = []
        for place, (x, y) in enumerate(zip(inputs[0][0], outputs[0], strict=True)):
            nearest = min(self.entries, key=lambda entry: float((x - entry.key).detach().norm()), default=None)
            self.seen.append((x.detach(), y.detach()))
            if nearest is not None and (x - nearest.key).norm() < nearest.radius:
                y = nearest.value
            rows.append(self.put[1] if self.put is not None and self.put[0] == place else y)
        return torch.stack(rows)[None]

    def loss(self, fact: TokenSequence) -> Tensor:
        self.seen = []
        log_p = self.model(input_ids=torch.tensor([fact.ids])).logits[0].log_softmax(-1)
        answer = range(fact.answer_start, len(fact.ids))
        return -torch.stack([log_p[place - 1, fact.ids[place]] for place in answer]).mean()

    def turn(self, facts: Sequence[TokenSequence]) -> None:
        reads = []
        for fact in facts:
            self.loss(fact)
            reads.append(self.seen[fact.answer_start - 1])
        values = [self.train(fact, start) for fact, (_, start) in zip(facts, reads, strict=True)]
        for fact, (key, _), value in zip(facts, reads, values, strict=True):
            self.admit(key, value, fact.ids[fact.answer_start :])

    def train(self, fact: TokenSequence, value: Tensor) -> Tensor:
        m, v = torch.zeros_like(value), torch.zeros_like(value)
        for t in range(1, self.settings.num_steps + 1):
            leaf = value.clone().requires_grad_()
            self.put = (fact.answer_start - 1, leaf)
            loss = self.loss(fact)
            self.put = None
            if loss < self.settings.stop_loss:
                break
            (g,) = torch.autograd.grad(loss, leaf)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            value = value - self.settings.lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)) ** 0.5 + 1e-8)
        return value

    def admit(self, key: Tensor, value: Tensor, answer: tuple[int, ...]) -> None:
        new = Entry(key, value, self.settings.eps_init, answer)
        nearest = min(self.entries, key=lambda entry: float((key - entry.key).norm()), default=None)
        d = math.inf if nearest is None else float((key - nearest.key).norm())
        if nearest is None or d > nearest.radius + self.settings.eps_init:
            self.entries.append(new)
        elif nearest.answer == answer:
            nearest.radius = max(nearest.radius, 1.001 * d)
        elif d <= self.settings.eps_init / 100:
            nearest.value, nearest.answer = value, answer
        else:
            nearest.radius = min(nearest.radius, d / 2)
            self.entries.append(replace(new, radius=d / 2))


def turn_of_all_kinds(index: int) -> Turn:
    """New facts, one asked again with another answer, one with the same, and near ones."""
    fresh = random_turn(index, Phase.EDIT, records=3).sequences
    first = random_turn(0, Phase.EDIT, records=3).sequences[0]
    again = TokenSequence((*first.ids[: first.answer_start], 7, index), first.answer_start)
    sequences = (*fresh, again, again, TokenSequence((9, *fresh[1].ids), fresh[1].answer_start + 1))
    return Turn(index, Phase.EDIT, (), sequences, (0.1,) * len(sequences))


@pytest.mark.parametrize("stop_loss", [0.0, 5.0])
@pytest.mark.parametrize(("make", "modules"), [(tiny_llama, LLAMA), (tiny_gpt2, GPT2)])
def test_three_turns_agree_with_the_reference(make: Callable[..., Any], modules: list[str], stop_loss: float) -> None:
    settings = chosen(stop_loss=stop_loss, eps_init=3.0)
    model = harness(make, modules[1:], dtype=torch.float64)
    editor = GRACE(model, settings, CPU)
    reference = Reference(make(dtype=torch.float64), modules[1], settings)
    kinds: dict[str, int] = {}
    for index in range(3):
        turn = turn_of_all_kinds(index)
        edit = editor.edit(model, turn)
        kinds = {kind: kinds.get(kind, 0) + count for kind, count in edit.details["codebook"].items()}
        reference.turn(turn.sequences)
        book, expected = editor.codebook, reference.entries
        assert list(book.answers) == [entry.answer for entry in expected]
        torch.testing.assert_close(book.keys, torch.stack([entry.key for entry in expected]), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(book.values, torch.stack([entry.value for entry in expected]), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(book.radii, torch.tensor([e.radius for e in expected]).double(), rtol=1e-6, atol=0)
        losses = [float(reference.loss(fact).detach()) for fact in turn.sequences]
        tokens = [fact.answer_length for fact in turn.sequences]
        mean = sum(loss * n for loss, n in zip(losses, tokens, strict=True)) / sum(tokens)
        assert mean == pytest.approx(model.losses([LossTerm(turn.sequences, 1.0)])[0], rel=1e-6)
        assert edit.details["loss_after"] == pytest.approx(mean, rel=1e-6)
    assert min(kinds.values()) > 0, kinds


# ---------------------------------------------------------------------------------------------------------------------
# What it promises


@given(
    seed=st.integers(0, 10**6),
    entries=st.integers(1, 40),
    d_k=st.sampled_from([3, 40, 300]),
    scale=st.sampled_from([1.0, 100.0]),
    wide=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_look_up_is_that_of_all_distances(
    seed: int, entries: int, d_k: int, scale: float, wide: float, dtype: torch.dtype
) -> None:
    """Also where keys repeat, where inputs lie just inside and just outside of a radius, and where radii reach others.

    `wide` is the part of the radii that are as large as keys are far from each other.
    """
    generator = torch.Generator().manual_seed(seed)
    keys = scale * torch.randn((entries, d_k), generator=generator, dtype=dtype)
    keys[-1] = keys[0]
    radii = torch.rand(entries, generator=generator, dtype=dtype) * scale
    radii[torch.rand(entries, generator=generator) < wide] *= 2 * math.sqrt(d_k)
    directions = torch.nn.functional.normalize(torch.randn((entries, d_k), generator=generator, dtype=dtype), dim=1)
    near = [keys + part * radii[:, None] * directions for part in (0.0, 0.999, 1.001)]
    inputs = torch.cat([*near, scale * torch.randn((20, d_k), generator=generator, dtype=dtype)])
    book = Codebook.of(keys, torch.zeros(entries, 2), radii, [()] * entries)
    at, found = book.hits(inputs)
    distances = (inputs[:, None] - keys[None]).norm(dim=2)
    nearest = distances.min(1)
    inside = nearest.values < radii[nearest.indices]
    assert torch.equal(at, inside.nonzero()[:, 0])
    assert torch.equal(found, nearest.indices[inside])


def with_radii(keys: Tensor, radii: Tensor) -> Codebook:
    return Codebook.of(keys, torch.zeros(len(keys), 2), radii, [()] * len(keys))


@pytest.mark.parametrize("radii", [torch.full((30,), 8.0), torch.tensor([12.0] + 29 * [4.0])], ids=["equal", "one"])
def test_look_ups_in_pieces_are_the_same(radii: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, inputs = torch.randn(30, 40), torch.randn(50, 40)
    inputs[:9] = keys[:9] + 0.1
    book = with_radii(keys, radii)
    whole, nearest = book.hits(inputs), book.nearest(inputs)
    assert 9 <= len(whole[0]) < 50
    monkeypatch.setattr("editor.grace.AT_ONCE", 100)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(book.hits(inputs), whole, strict=True))
    assert book.nearest(inputs) == nearest


RADII = {  # in typical distances: of how many of 2,000 entries
    "equal": {},
    "a tenth are wide": {200: 0.3},
    "one is wide": {1: 0.9},
    "all are wide": {2000: 0.9},
    "all reach everything": {2000: 2.0},
}


@pytest.mark.parametrize("mix", RADII)
def test_a_look_up_costs_hardly_more_than_a_product_of_inputs_and_keys(
    mix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the radii: few pairs are compared one by one, and products are of no more than 1.7 times its size."""
    generator = torch.Generator().manual_seed(0)
    inputs, keys = (torch.randn((rows, 1536), generator=generator) for rows in (200, 2000))
    keys[:20] = inputs[:20] + 0.01
    typical = float((inputs[20] - keys[20]).norm())
    radii = torch.full((2000,), 0.1 * typical)
    for count, radius in RADII[mix].items():
        radii[-count:] = radius * typical
    pairs, multiplied, distances = [], [], Codebook._distances

    def compared(book: Codebook, inputs: Tensor, at: Tensor, entries: Tensor) -> Tensor:
        pairs.append(len(at))
        return distances(book, inputs, at, entries)

    def product(bias: Tensor, one: Tensor, other: Tensor, **more: Any) -> Tensor:
        multiplied.append(one.shape[0] * one.shape[1] * other.shape[1])
        return addmm(bias, one, other, **more)

    addmm = torch.addmm
    monkeypatch.setattr(Codebook, "_distances", compared)
    monkeypatch.setattr(torch, "addmm", product)
    at, entries = with_radii(keys, radii).hits(inputs)
    assert (at[:20].tolist(), entries[:20].tolist()) == (list(range(20)), list(range(20)))
    assert (len(at) > 20) == (mix == "all reach everything")
    assert sum(pairs) <= 2 * len(inputs)
    assert sum(multiplied) <= (0.3 if mix in ("equal", "a tenth are wide", "one is wide") else 1.7) * 200 * 2000 * 1536


def test_the_nearest_entry_is_the_nearest_where_keys_have_much_in_common() -> None:
    """Inputs of one module do; ||x||^2 + ||k||^2 - 2 x k is then a small difference of large numbers."""
    generator = torch.Generator().manual_seed(0)
    common, apart, moved = (torch.randn((rows, 500), generator=generator) for rows in (1, 60, 60))
    keys = 10_000 * common + apart
    inputs = keys + 0.3 * moved
    entries, distances = with_radii(keys, torch.ones(60)).nearest(inputs)
    expected = (inputs[:, None] - keys).norm(dim=2).min(1)
    assert entries == expected.indices.tolist() == list(range(60))
    assert distances == expected.values.tolist()


def edited(compute_tokens: int = 90) -> tuple[Any, Any, Turn]:
    """An edited model, the same one without edits, and the facts."""
    model, base = (harness(tiny_llama, LLAMA[:1], compute_tokens) for _ in range(2))
    turn = random_turn(0, Phase.EDIT, records=6)
    GRACE(model, chosen(num_steps=60, eps_init=0.5), CPU).edit(model, turn)
    return model, base, turn


def test_outside_its_radii_the_model_is_the_base_bit_for_bit() -> None:
    model, base, turn = edited()
    others = random_turn(1, Phase.EDIT).sequences
    assert torch.equal(model.reference_logits(others), base.reference_logits(others))
    term = [LossTerm(turn.sequences, 1.0)]
    assert model.losses(term)[0] < 0.9 * base.losses(term)[0]
    with model.unedited():
        assert torch.equal(model.reference_logits(turn.sequences), base.reference_logits(turn.sequences))
    assert model.is_original()


def test_it_holds_in_any_batch_and_in_cached_generation() -> None:
    """The first token after each prompt, alone, padded on the right, and padded on the left with a cache."""
    model, base, turn = edited()
    prompts = [sequence.ids[: sequence.answer_start] for sequence in turn.sequences]
    first = [int(model.reference_logits([TokenSequence((*prompt, 0), len(prompt))]).argmax()) for prompt in prompts]
    together = model.reference_logits([TokenSequence((*prompt, 0), len(prompt)) for prompt in prompts]).argmax(-1)
    assert together.tolist() == first == [written[0] for written in model.generate(prompts, 2)]
    assert [written[:1] for written in base.generate(prompts, 2)] != [[token] for token in first]
    assert sum(token == s.ids[s.answer_start] for token, s in zip(first, turn.sequences, strict=True)) >= 4


def in_other_batches(model: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Tensor]]:
    """Keys as they are read in bf16: others in each compute batch."""
    keys_at, generator = model.keys_at, torch.Generator().manual_seed(0)

    def read(*asked: Any) -> dict[str, Tensor]:
        found = keys_at(*asked)[LLAMA[0]]
        moved = torch.nn.functional.normalize(torch.randn(found.shape, generator=generator), dim=1)
        return {LLAMA[0]: found + 0.5 * model.input_noise * found.norm(dim=1, keepdim=True) * moved}

    monkeypatch.setattr(model, "keys_at", read)
    return read


def asked_again(facts: Sequence[TokenSequence], answer: int, index: int) -> Turn:
    again = tuple(TokenSequence((*one.ids[: one.answer_start], answer), one.answer_start) for one in facts)
    return Turn(index, Phase.EDIT, (), again, (1 / len(facts),) * len(facts))


def test_a_prompt_is_the_same_in_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fact that is corrected replaces the old one, and what an entry was expanded to, it holds in other batches."""
    model = harness(tiny_llama, LLAMA[:1], dtype=torch.bfloat16)
    assert model.input_noise > 0.01
    read = in_other_batches(model, monkeypatch)
    editor = GRACE(model, chosen(eps_init=1e-4), CPU)
    facts = random_turn(0, Phase.EDIT, records=6).sequences
    kinds = []
    for index, answer in enumerate((7, 8, 8)):
        edit = editor.edit(model, asked_again(facts, answer, index))
        kinds.append({kind: n for kind, n in edit.details["codebook"].items() if n})
        restored = GRACE(harness(tiny_llama, LLAMA[:1]), chosen(), CPU)
        restored.load_state_dict(editor.state_dict())
        assert restored.codebook.prompts == tuple(one.ids[: one.answer_start] for one in facts)
    assert kinds == [{"added": 6}, {"replaced": 6}, {"expanded": 6}]
    keys = read(facts, [one.answer_start - 1 for one in facts])[LLAMA[0]]
    assert editor.codebook.hits(keys)[1].tolist() == list(range(6))


def test_a_state_from_before_prompts_were_kept_goes_by_distance() -> None:
    model = harness(tiny_llama, LLAMA[:1])
    editor, restored = GRACE(model, chosen(), CPU), GRACE(harness(tiny_llama, LLAMA[:1]), chosen(), CPU)
    facts = random_turn(0, Phase.EDIT, records=3).sequences
    editor.edit(model, asked_again(facts, 7, 0))
    restored.load_state_dict({name: part for name, part in editor.state_dict().items() if name != "prompts"})
    _, done, _ = restored._admitted(editor.codebook.keys, asked_again(facts, 8, 1).sequences, model.input_noise)
    assert done["replaced"] == 3


def test_different_prompts_stay_apart_however_near() -> None:
    """Their keys may be nearer than rounding moves one."""
    model = harness(tiny_llama, LLAMA[:1], dtype=torch.bfloat16)
    editor = GRACE(model, chosen(eps_init=1.0), CPU)
    keys = torch.randn(1, model.shapes[LLAMA[0]][0], generator=torch.Generator().manual_seed(0))
    near = torch.cat([keys, keys * (1 + 0.5 * model.input_noise)])
    facts = [TokenSequence((1, 2, 7), 2), TokenSequence((3, 4, 8), 2)]
    _, done, trained = editor._admitted(near, facts, model.input_noise)
    assert (done["added"], done["split"], trained) == (1, 1, {0: 0, 1: 1})


def test_an_empty_codebook_survives_a_restart() -> None:
    one, other = (GRACE(harness(tiny_llama, LLAMA[:1]), chosen(), CPU) for _ in range(2))
    other.load_state_dict(one.state_dict())
    assert other.statistics() == one.statistics() == {LLAMA[0]: {"entries": 0, "radius": None, "radius_max": None}}


def test_a_value_that_is_not_finite_leaves_the_turn_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = harness(tiny_llama, LLAMA[:1])
    editor = GRACE(model, chosen(), CPU)
    editor.edit(model, random_turn(0, Phase.EDIT, records=3))
    before = editor.codebook
    monkeypatch.setattr(
        model, "offset_losses", lambda *_, **__: lambda offsets, _chosen: (offsets[:, 0], offsets * math.nan)
    )
    with pytest.raises(FloatingPointError, match=r"turn 1: .* not finite; .* codebook is that of the turn before"):
        editor.edit(model, random_turn(1, Phase.EDIT, records=3))
    assert editor.codebook is before


def test_a_loss_that_is_not_finite_afterwards_leaves_the_turn_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = harness(tiny_llama, LLAMA[:1])
    editor = GRACE(model, chosen(), CPU)
    editor.edit(model, random_turn(0, Phase.EDIT, records=3))
    before = editor.codebook
    losses = model.losses
    monkeypatch.setattr(
        model, "losses", lambda terms: losses(terms) if editor.codebook is before else [math.nan for _ in terms]
    )
    with pytest.raises(FloatingPointError, match=r"turn 1: the loss .* is nan after .* codebook is that of"):
        editor.edit(model, random_turn(1, Phase.EDIT, records=3))
    assert editor.codebook is before


# ---------------------------------------------------------------------------------------------------------------------
# Runs

LINE = (*EVERYTHING, "editor=grace", ONE, "editor.num_steps=5")


def test_a_run_goes_on_after_a_stop(run: Commands) -> None:
    whole = run(*LINE, run="whole")
    resumed = run.broken_off_and_resumed(*LINE, turn=3, at=(GRACE, "edit"))
    assert resumed.turns() == whole.turns()
    assert resumed.scores() == whole.scores()
    last = whole.lines("turns.jsonl")[-1]
    assert last["modules"] == {}
    assert last["statistics"][MODULES[0]]["entries"] > 0
    assert set(last["codebook"]) == {"added", "expanded", "split", "replaced"}
    assert last["loss_after"] < last["loss"]
    results = whole.json("results.json")
    assert results["final"]["ES"] != results["base"]["ES"]


def test_it_cannot_be_exported_as_plain_weights(run: Commands) -> None:
    run.no_model_to_save(*LINE)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("editor.num_steps=0", "editor.num_steps=0: must be 1 or more"),
        ("editor.stop_loss=-1", "editor.stop_loss=-1.0: must be a finite number, 0 or above"),
        ("editor.eps_init=0", "editor.eps_init=0.0: must be a finite number above 0"),
        (
            f"model.edit_modules=[{','.join(MODULES)}]",
            "model.edit_modules: 2 modules, and editor=grace edits one; name it, as in "
            f"model.edit_modules=[{MODULES[1]}]",
        ),
    ],
)
def test_mistakes_are_refused(run: Commands, setting: str, said: str) -> None:
    assert said in run.refused("editor=grace", setting)
