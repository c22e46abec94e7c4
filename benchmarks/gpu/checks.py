"""What must hold of editing on any device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.made import Facts, Shape, build, editable
from benchmarks.gpu.runs import METHODS, Course, Run, not_finite
from data.records import LowRankUpdate, Phase
from editor import linalg
from editor.registry import EDITORS

# ||a - b|| / ||b|| of what one layer gives in bf16 and in float32 on the same weights: bf16 keeps 8 bits, 4e-3 a
# rounding, and a layer has some ten of them in a row.
BF16 = 0.05


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    detail: str

    def __str__(self) -> str:
        return f"{'passed' if self.passed else 'FAILED'}  {self.name}: {self.detail}"


def same_bits(name: str, found: Mapping[str, str], wanted: Mapping[str, str]) -> Check:
    """Of two runs, `Run.bits`."""
    different = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    shown = f"{len(different)} of {len(wanted)} differ, the first being the {different[0]}" if different else ""
    return Check(name, not different, shown or f"{len(wanted)} tensors and lines, bit for bit")


def finite(name: str, run: Run) -> Check:
    losses = [line["loss"] for line in run.lines]
    wrong = not_finite({**run.tensors(), "losses": torch.tensor(losses)})
    return Check(
        f"{name}: nothing is NaN or infinite",
        not wrong,
        f"not so the {wrong[0]}" if wrong else f"losses {losses[0]:.3f} to {losses[-1]:.3f}, weights and statistics",
    )


def learned(name: str, run: Run) -> Check:
    """The facts of the last turn are likelier after it; the model still has them."""
    before = run.lines[-1]["loss"]
    after = run.model.capture(run.course.facts.turn(run.done - 1, Phase.EDIT)).loss
    return Check(f"{name}: the last turn's facts are likelier", after < before, f"loss {before:.4f}, then {after:.4f}")


def whitened(name: str, run: Run) -> Check:
    """How often by a root that was followed, the detail says."""
    turns = [state for line in run.edit_lines() for state in line["statistics"].values()]
    fully = sum(state["floored_fraction"] is not None for state in turns)
    steps = [state["whitening_steps"] for state in turns if state.get("whitening_decomposed") == 0]
    followed = (
        f"{len(steps)} by a root that was followed, in {max(steps):.0f} steps at most" if steps else "none followed"
    )
    return Check(
        f"{name}: value gradients are whitened fully in every turn of edits",
        fully == len(turns),
        f"{fully} of {len(turns)}, {followed}",
    )


def refusals(course: Course) -> Iterator[Check]:
    """An update or a weight that is NaN is refused, and no weight is changed by it."""
    model = course.model
    model.restore_original()
    updates = {
        name: LowRankUpdate(torch.zeros(d_k, 1, device=model.device), torch.ones(1, d_v, device=model.device))
        for name, (d_k, d_v) in model.shapes.items()
    }
    *_, last = updates
    updates[last].right[0, 0] = torch.nan
    said = refusal(lambda: model.apply(updates))
    yield Check(
        "an update with a NaN is refused, and no weight is changed",
        said is not None and model.is_original(),
        said or "it was taken",
    )
    broken = model.edited[last].master.clone()
    broken[0, 0] = torch.nan
    model.restore({last: broken})
    said = refusal(lambda: model.capture(course.facts.turn(0, Phase.EDIT)))
    model.restore_original()
    yield Check("a model with a NaN is refused", said is not None, said or "it was captured")


def refusal(work: Callable[[], object]) -> str | None:
    try:
        work()
    except FloatingPointError as error:
        return str(error)
    return None


def one_layer(shape: Shape, facts: Facts, device: torch.device) -> Check:
    """What the model's lowest layer, with embedding and head, gives in bf16 and in float32 on the same weights.

    Keys, value gradients, and the update that ULTRAEDIT makes of them.
    """
    plain = build(shape, torch.bfloat16, device, layers=1)
    models = {torch.bfloat16: editable(plain, 1), torch.float32: editable(copy.deepcopy(plain).float(), 1)}
    turn = facts.turn(0, Phase.EDIT)
    found: dict[torch.dtype, dict[str, Tensor]] = {}
    for dtype, model in models.items():
        ((name, capture),) = model.capture(turn).modules.items()
        rule = EDITORS["ultraedit"](model.shapes, METHODS["ultraedit"].settings(shape), device)
        update = rule.update({name: capture}, Phase.EDIT)[name]
        delta = linalg.dense((update.left, update.right))
        found[dtype] = {"keys": capture.keys, "value gradients": capture.value_grads, "update": delta}
    apart = {
        what: float((found[torch.bfloat16][what] - exact).norm() / exact.norm())
        for what, exact in found[torch.float32].items()
    }
    told = ", ".join(f"{what} {value:.1e}" for what, value in apart.items())
    return Check(f"one layer in bf16 is that in float32 within {BF16:g}", max(apart.values()) < BF16, told)
