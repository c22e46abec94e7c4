"""Fine-tuning against its equations in float64, and what each member of the family promises."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data.records import Phase, TokenSequence
from editor.fine_tuning import FineTuning, FineTuningSettings
from model import LanguageModel
from tests.commands import Commands
from tests.conftest import tiny_gpt2, tiny_llama
from tests.editor.test_method import GPT2, LLAMA, dense, harness, random_turn, relative
from tests.job.test_families import EVERYTHING

CPU = torch.device("cpu")
FT_L = {"norm_constraint": 2e-3}
BREADTH = {"order": "breadth", "facts_per_step": 3}


def settings(**changes: Any) -> FineTuningSettings:
    values = {
        "lr": 1e-3, "num_steps": 3, "facts_per_step": 1, "order": "depth", "answer_loss": "tokens", "stop_loss": 0.0,
        "norm_constraint": None, **changes,
    }  # fmt: skip
    return FineTuningSettings(**values)


# ---------------------------------------------------------------------------------------------------------------------
# The reference: one fact at a time through the model, full logits, Adam written out


def loss_of(model: nn.Module, facts: Sequence[TokenSequence], prompt_last: bool) -> Tensor:
    """Mean over all answer tokens of -log p."""
    terms = []
    for fact in facts:
        log_p = model(input_ids=torch.tensor([fact.ids])).logits[0].log_softmax(-1)
        for place in range(fact.answer_start, len(fact.ids)):
            before = fact.answer_start - 1 if prompt_last else place - 1
            terms.append(-log_p[before, fact.ids[place]])
    return torch.stack(terms).mean()


def fine_tune(model: nn.Module, modules: Sequence[str], facts: Sequence[TokenSequence], chosen: Any) -> None:
    weights = [model.get_submodule(name).weight for name in modules]
    start = [weight.detach().clone() for weight in weights]
    size = chosen.facts_per_step
    batches = [facts[first : first + size] for first in range(0, len(facts), size)]
    groups = [batches] if chosen.order == "breadth" else [[batch] for batch in batches]
    for group in groups:
        m, v, t = [0.0 for _ in weights], [0.0 for _ in weights], 0
        for _ in range(chosen.num_steps):
            for batch in group:
                for weight in weights:
                    weight.requires_grad_(True)
                loss = loss_of(model, batch, chosen.answer_loss == "prompt_last")
                gradients = torch.autograd.grad(loss, weights)
                if loss < chosen.stop_loss:
                    continue
                t += 1
                for i, g in enumerate(gradients):
                    m[i] = 0.9 * m[i] + 0.1 * g
                    v[i] = 0.999 * v[i] + 0.001 * g**2
                    step = chosen.lr * (m[i] / (1 - 0.9**t)) / ((v[i] / (1 - 0.999**t)) ** 0.5 + 1e-8)
                    moved = weights[i].detach() - step
                    if chosen.norm_constraint is not None:
                        bound = chosen.norm_constraint
                        moved = torch.minimum(torch.maximum(moved, start[i] - bound), start[i] + bound)
                    weights[i].data = moved


@pytest.mark.parametrize(
    "changes",
    [{}, FT_L, FT_L | {"answer_loss": "prompt_last"}, BREADTH, BREADTH | {"stop_loss": 5.2}, {"facts_per_step": 3}],
    ids=["ft_m", "ft_l", "prompt_last", "breadth", "stop", "mini_batches"],
)
@pytest.mark.parametrize(("make", "modules"), [(tiny_llama, LLAMA), (tiny_gpt2, GPT2)])
def test_three_turns_agree_with_the_reference(
    make: Callable[..., Any], modules: list[str], changes: dict[str, Any]
) -> None:
    chosen = settings(**changes)
    model, plain = harness(make, modules, dtype=torch.float64), make(dtype=torch.float64)
    editor = FineTuning(model, chosen, CPU)
    for index in range(3):
        turn = random_turn(index, Phase.EDIT, records=4)
        before = model.snapshot()
        edit = editor.edit(model, turn)
        fine_tune(plain, modules, turn.sequences, chosen)
        loss_after = float(loss_of(plain, turn.sequences, prompt_last=False).detach())
        assert edit.details["loss_after"] == pytest.approx(loss_after, rel=1e-6)
        for name in modules:
            assert relative(model.edited[name].master, plain.get_submodule(name).weight) < 1e-6
            moved = model.edited[name].master - before[name]
            moved = moved.T if model.edited[name].transposed else moved
            assert relative(dense(edit.updates[name]), moved) < 1e-6
            assert edit.changes[name].norm == pytest.approx(float(moved.norm()), rel=1e-6)


def tuned(dtype: torch.dtype = torch.float32, master: bool = True, turns: int = 2, **changes: Any) -> Any:
    source = harness(tiny_llama, LLAMA, dtype=dtype)
    modules = {name: edited.module for name, edited in source.edited.items()}
    model = LanguageModel(source.model, None, modules, compute_tokens=90, master=master)
    editor = FineTuning(model, settings(**changes), CPU)
    return model, [editor.edit(model, random_turn(index, Phase.EDIT, records=6)) for index in range(turns)]


@pytest.mark.parametrize("order", [{}, BREADTH], ids=["depth", "breadth"])
def test_no_turn_exceeds_the_norm_constraint(order: dict[str, Any]) -> None:
    """Without it, it would be exceeded, else this said nothing."""
    bound = 5e-4
    for edit in tuned(norm_constraint=bound, **order)[1]:
        assert all(float(dense(update).abs().max()) == torch.tensor(bound) for update in edit.updates.values())
        assert all(change.largest <= bound * (1 + 1e-6) for change in edit.changes.values())
    assert all(change.largest > 2 * bound for edit in tuned(**order)[1] for change in edit.changes.values())


def test_it_learns_the_facts_and_stops_where_they_are_known() -> None:
    model = harness(tiny_llama, LLAMA)
    turn = random_turn(0, Phase.EDIT, records=2)
    editor = FineTuning(model, settings(lr=3e-3, num_steps=200, stop_loss=2.0, facts_per_step=2), CPU)
    edit, again = editor.edit(model, turn), editor.edit(model, turn)
    assert again.loss < 2 < edit.loss
    assert 0 < edit.details["steps"] < 200
    assert again.details == {"steps": 0, "loss_after": again.loss}
    assert again.loss == edit.details["loss_after"]
    assert not again.updates
    assert not again.changes


def test_weights_of_low_precision_are_rounded_once_a_turn() -> None:
    """Steps below the spacing of bf16 add up all the same."""
    model, (edit,) = tuned(torch.bfloat16, master=False, turns=1, num_steps=30, lr=1e-5)
    for name, edited in model.edited.items():
        expected = edited.original.float() + dense(edit.updates[name]).T
        assert torch.equal(edited.weight, expected.bfloat16())
        assert not edited.is_original()


def test_a_step_that_is_not_finite_leaves_the_turn_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = harness(tiny_llama, LLAMA)
    before = model.snapshot()
    gradients, calls = model.weight_gradients, iter(range(9))

    def break_the_third(terms: Any) -> Any:
        found, losses = gradients(terms)
        return {name: each / (next(calls) < 2 * len(LLAMA)) for name, each in found.items()}, losses

    monkeypatch.setattr(model, "weight_gradients", break_the_third)
    with pytest.raises(FloatingPointError, match=r"turn 3: the update of .* the weights are those of the turn before"):
        FineTuning(model, settings(), CPU).edit(model, random_turn(3, Phase.EDIT))
    assert all(torch.equal(before[name], weight) for name, weight in model.snapshot().items())


def test_a_loss_that_is_not_finite_afterwards_leaves_the_turn_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = harness(tiny_llama, LLAMA)
    before = model.snapshot()
    found = iter([[1.0], [math.nan]])
    monkeypatch.setattr(model, "losses", lambda _terms: next(found))
    with pytest.raises(FloatingPointError, match=r"turn 3: the loss .* is nan after .* weights are those of"):
        FineTuning(model, settings(), CPU).edit(model, random_turn(3, Phase.EDIT))
    assert all(torch.equal(before[name], weight) for name, weight in model.snapshot().items())
    assert model.is_original()


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize("editor", ["ft_l", "ft_m", "locft_bf"])
def test_a_run_goes_on_after_a_stop(run: Commands, editor: str) -> None:
    line = (*EVERYTHING, f"editor={editor}", "editor.num_steps=3", "diagnostics.previous=2")
    whole = run(*line, run="whole")
    resumed = run.broken_off_and_resumed(*line, turn=3, at=(FineTuning, "edit"))
    assert resumed.turns() == whole.turns()
    assert resumed.scores() == whole.scores()
    assert whole.phases() == "e" * 4
    assert all(line["steps"] > 0 and set(line["seconds"]) == {"loss", "steps", "total"}
               for line in whole.lines("turns.jsonl"))  # fmt: skip


def test_settings_without_effect_are_named(run: Commands) -> None:
    done = run("editor=ft_m", "editor.num_steps=1", "num_seq=1", "editor.passes=3", "editor.token=all", "model.lr=1e-2")
    log = (done.folder / "main.log").read_text()
    assert "editor.passes=3 has no effect with editor=ft_m" in log
    assert "editor.token=all has no effect with editor=ft_m" in log
    assert "model.lr=0.01 has no effect with editor=ft_m" in log
    assert "editor.batch_size" not in log


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("editor.num_steps=0", "editor.num_steps=0: must be 1 or more"),
        ("editor.facts_per_step=0", "editor.facts_per_step=0: must be 1 or more; null takes all facts of the turn"),
        ("editor.stop_loss=-1", "editor.stop_loss=-1.0: must be a finite number, 0 or above"),
        ("editor.norm_constraint=0", "editor.norm_constraint=0.0: must be a finite number above 0"),
        ("editor.order=width", "width"),
        ("editor.alpha=1", "alpha"),
    ],
)
def test_mistakes_are_refused(run: Commands, setting: str, said: str) -> None:
    from main import main as command
    from tests.commands import command_line

    if "order" in setting or "alpha" in setting:
        with command_line(run.line("editor=ft_l", setting)), pytest.raises(Exception, match=said):
            command()
    else:
        assert said in run.refused("editor=ft_l", setting)
