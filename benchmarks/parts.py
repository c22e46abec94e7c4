"""What a turn computes beside the language model, part by part, at the shapes of a 7B model:

    python -m benchmarks.parts [--modules 4] [--d-k 14336] [--d-v 4096] [--rows 400] [--tokens 2000]
                               [--half bf16] [--shrink 8] [--device cuda]

Captures and weights are made at random; no language model is needed. Operations are counted as torch runs them: flops
of products, factorisations and solves, and bytes that each operation reads and writes, as if nothing stayed in a cache.
With --shrink every size is divided, and counts are multiplied back: flops by its cube, bytes by its square. The measure
is the model's own work, 6 flops a parameter and token (forward 2, backward 4), --parameters of them.
Seconds are those of this machine and of the sizes that were run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import DTYPES, parser_with
from data.records import Capture, EditRecord, LowRankUpdate, Phase, Question, TokenSequence, Turn
from editor.base import Edit
from editor.stableedit import StableEdit, StableEditSettings
from editor.stopwatch import Stopwatch
from harness.watch.diagnostics import TurnDiagnostics
from model import edited as edited_modules
from nets import LifelongNormalizer

aten = torch.ops.aten
VIEWS = {"view", "t", "transpose", "slice", "select", "expand", "unsqueeze", "squeeze", "detach", "diagonal", "split"}


def flops_of(name: str, args: Any, result: Any) -> float:
    if name in ("mm", "addmm"):
        first = args[1] if name == "addmm" else args[0]
        return 2.0 * result.numel() * first.shape[1]
    if name == "addr":
        return 2.0 * result.numel()
    if name in ("linalg_cholesky_ex", "cholesky"):
        return args[0].shape[0] ** 3 / 3
    if name == "cholesky_solve":
        return 2.0 * args[0].numel() * args[1].shape[0]
    if name in ("_linalg_eigh", "linalg_eigh"):
        return 9.0 * args[0].shape[0] ** 3
    return 0.0


class Counter(TorchDispatchMode):
    """Flops by precision, bytes and seconds of each part."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.watch, self.part = Stopwatch(device), ""
        self.parts: dict[str, dict[str, float]] = {}

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        self.part = part
        self.parts[part] = {"float64": 0.0, "other": 0.0, "bytes": 0.0, "waits": 0.0}
        with self.watch.measure(part), self:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name, into = func._schema.name.removeprefix("aten::").rstrip("_"), self.parts[self.part]
        if name == "_local_scalar_dense":
            into["waits"] += 1
        elif name not in VIEWS:
            tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor)]
            into["bytes"] += sum(one.numel() * one.element_size() for one in tensors)
            flops = flops_of(name, args, result)
            into["float64" if flops and tensors[0].dtype is torch.float64 else "other"] += flops
        return result


def diagonal_start(rule: StableEdit, floor: float) -> None:
    """As after a decomposition of a covariance that falls like 1/i, a thousand rows a dimension."""
    for group in rule.normalizers:
        normalizer = rule.normalizers[group]
        assert isinstance(normalizer, LifelongNormalizer)
        d_v = normalizer.value_mean.numel()
        spectrum = 1 / torch.arange(1, d_v + 1, device=rule.device, dtype=torch.float64)
        normalizer.count.fill_(1000 * d_v)
        normalizer.key_scatter.fill_(1000 * d_v)
        normalizer.value_scatter.copy_(torch.diag(spectrum * 1000 * d_v) if normalizer.full else spectrum * 1000 * d_v)
        if normalizer.full:
            normalizer.whitening(0.0, floor, "shift")


def a_turn(whitens: bool, arguments: argparse.Namespace, shrink: int) -> Counter:
    device = torch.device(arguments.device)
    d_k, d_v, count = arguments.d_k // shrink, arguments.d_v // shrink, arguments.rows // shrink
    generator = torch.Generator(device).manual_seed(0)
    spread = torch.arange(1, d_v + 1, device=device) ** -0.5

    def captures() -> dict[str, Capture]:
        return {
            f"m{number}": Capture(
                torch.randn(count, d_k, generator=generator, device=device),
                torch.randn(count, d_v, generator=generator, device=device) * spread,
            )
            for number in range(arguments.modules)
        }

    modules = {}
    for number in range(arguments.modules):
        linear = nn.Linear(d_k, d_v, bias=False, device=device, dtype=DTYPES[arguments.half]).requires_grad_(False)
        modules[f"m{number}"] = edited_modules.EditModule(linear)
    mode, alpha = ("stable", 10.0) if whitens else ("original", 1.0)
    settings = StableEditSettings(
        1e-6, alpha, 512 // shrink, mode, "shape", 0.01, "shift", 0.0,  # type: ignore[arg-type]
        "newton" if whitens else "auto",
    )  # fmt: skip
    rule = StableEdit({name: edited.shape for name, edited in modules.items()}, settings, device)
    diagonal_start(rule, settings.whitening_floor)
    diagnostics = TurnDiagnostics(device, device)
    turn = Turn(0, Phase.EDIT, (EditRecord(0, Question("", "")),), (TokenSequence((0, 0), 1),), (1.0,))
    counter = Counter(device)
    for index in range(6):  # the last one counts: diagnostics then compare with as many turns as they ever do
        counter.watch.seconds.clear()
        made = captures()
        with counter.measure("statistics"):
            rule._observe(made, Phase.EDIT)
        with counter.measure("whitening, the root"):
            whitenings = rule._whitenings(Phase.EDIT)
        updates: dict[str, LowRankUpdate] = {}
        with counter.measure("value shifts and solve"):
            for module, capture in made.items():
                updates[module] = rule._module_update(module, capture, whitenings)
        changes = {}
        with counter.measure("apply"):
            for module, update in updates.items():
                assert modules[module].can_add(update)
                changes[module] = modules[module].add(update)
        with counter.measure("the turn's line"):
            diagnostics.line(Turn(index, turn.phase, turn.records, turn.sequences, turn.loss_weights),
                             Edit(1.0, updates, changes, {}), rule)  # type: ignore[arg-type]  # fmt: skip
        with counter.measure("checksums (several ranks)"):
            for edited in modules.values():
                edited_modules.checksum(edited.master)
    return counter


def main() -> None:
    sizes = {"modules": 4, "d_k": 14336, "d_v": 4096, "rows": 400, "tokens": 2000, "shrink": 8}
    arguments = parser_with(__doc__, **sizes, parameters=7e9, half="bf16", device="cpu").parse_args()
    shrink = arguments.shrink
    edited_modules.TOGETHER //= shrink**2
    own = 6 * arguments.parameters * arguments.tokens
    print(f"the model's own work: {own:.2e} flops for {arguments.tokens} tokens")
    for name, whitens in (("ultraedit", False), ("stableedit", True)):
        counter = a_turn(whitens, arguments, shrink)
        print(f"{name}: {arguments.modules} modules of {arguments.d_k} x {arguments.d_v}, {arguments.rows} rows each")
        print("  part                        flops f64  flops else  of the own      bytes   waits   seconds")
        whole = 0.0
        for part, found in counter.parts.items():
            flops = {key: found[key] * shrink**3 for key in ("float64", "other")}
            share = sum(flops.values()) / own
            whole += share
            print(
                f"  {part:<26} {flops['float64']:10.2e}  {flops['other']:10.2e}  {share:10.2%} "
                f"{found['bytes'] * shrink**2:10.2e} {found['waits']:7.0f} {counter.watch.seconds[part]:9.3f}"
            )
        print(f"  together                                           {whole:10.2%}")


if __name__ == "__main__":
    main()
