"""What a turn computes beside the language model, part by part, at the shapes of a 7B model:

    python -m benchmarks.parts [--layers 32] [--modules 4] [--d-k 14336] [--d-v 4096] [--kv 1024] [--vocabulary 32768]
                               [--tokens 2000] [--rows 400] [--turn 40] [--half bf16] [--shrink 8] [--device cuda]

Captures and weights are made at random. Operations are counted as torch runs them: flops of products, factorisations
and solves; bytes that each operation reads and writes, as if nothing stayed in a cache; and waits of the host for the
device. With --shrink every size is divided, and counts are multiplied back: flops by its cube, bytes by its square.
What capture adds is what it counts less the bare work of the same tokens (`benchmarks.bare`). The measure is the flops
of that bare work for the model at hand (`own_flops`), of which the capture itself runs the edited layers alone.
Counts are means of turns whose statistics already hold the rows of --turn others: the root takes as many steps as it
does there. Decompositions, log(rows) times a run, are not among them.

Waits are numbers and lists read from tensors, checks of factorisations, and copies between devices that torch shows. On
a CPU no copy is one, and tensors of the host cannot be told from those of the device: capture then counts two of the
host's own.
Seconds are those of this machine and of the sizes that were run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.bare import Cut, bare
from benchmarks.common import DTYPES, parser_with
from benchmarks.gpu.made import MINI_BATCH, Shape, build, editable
from data.records import Capture, EditRecord, Phase, Question, TokenSequence, Turn
from data.stream import mini_batch_weights
from editor.base import Edit
from editor.stableedit import StableEdit, StableEditSettings
from editor.stopwatch import Stopwatch
from harness.watch import TurnDiagnostics
from model import LanguageModel
from model import edited as edited_modules
from nets import RENEWED_AT, LifelongNormalizer

VIEWS = {"view", "t", "transpose", "slice", "select", "expand", "unsqueeze", "squeeze", "detach", "diagonal", "split"}
READ = {"_local_scalar_dense", "_linalg_check_errors"}  # of a number, and of whether a factorisation has failed
COUNTED = ("float64", "other", "bytes", "waits", "seconds")
CAPTURE, CHECKSUMS = "capture, beside the bare", "checksums (several ranks)"
FACTS = 10  # of the captured turn, which share its tokens and its rows
BEFORE, MEASURED = 6, 10  # turns: diagnostics compare with as many as they ever do after five or six


def own_flops(
    *, layers: int, edited: int, d_k: int, d_v: int, kv: int, vocabulary: int, tokens: int, rows: int
) -> tuple[float, float]:
    """Of a turn's forward, and of its backward to the output of the lowest edit module: 2 a weight that a token meets.

    A Mistral or Llama: queries and outputs (d_v, d_v), keys and values (d_v, kv), three maps (d_v, d_k) a layer. Edited
    are the last `edited` layers' down projections. The backward forms gradients of activations alone, in the layers
    above the lowest of them. Logits at `rows` tokens. Norms, and attention's products of short texts, are left out.
    """
    layer = 2 * d_v * d_v + 2 * d_v * kv + 3 * d_v * d_k
    head = 2.0 * vocabulary * d_v * rows
    return 2.0 * layer * layers * tokens + head, 2.0 * layer * (edited - 1) * tokens + head


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
    """Flops by precision, bytes, waits and seconds of each part, summed over the times that it was measured."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.part = ""
        self.parts: dict[str, dict[str, float]] = {}

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        self.part, watch = part, Stopwatch(self.device)
        self.parts.setdefault(part, dict.fromkeys(COUNTED, 0.0))
        with watch.measure(part), _Lists(self), self:
            yield
        self.parts[part]["seconds"] += watch.seconds[part]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name, into = func._schema.name.removeprefix("aten::").rstrip("_"), self.parts[self.part]
        tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor)]
        if name in READ:
            into["waits"] += tensors[0].device.type == self.device.type
        elif name not in VIEWS:
            into["waits"] += name in ("_to_copy", "copy") and len({one.device for one in tensors}) > 1
            into["bytes"] += sum(one.numel() * one.element_size() for one in tensors)
            flops = flops_of(name, args, result)
            into["float64" if flops and tensors[0].dtype is torch.float64 else "other"] += flops
        return result


class _Lists(TorchFunctionMode):
    """Counts lists that are read on a CPU, where they are no operation; on other devices they are copies."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist and self.counter.device.type == "cpu":
            self.counter.parts[self.counter.part]["waits"] += 1
        return func(*args, **(kwargs or {}))


def spectrum(d_v: int, device: torch.device) -> Tensor:  # (d_v,)
    """Eigenvalues of the covariance of made value gradients."""
    return 1 / torch.arange(1, d_v + 1, device=device)


def start_at(rule: StableEdit, rows: int) -> None:
    """As after a decomposition when so many rows had been seen."""
    for group in rule.normalizers:
        normalizer = rule.normalizers[group]
        assert isinstance(normalizer, LifelongNormalizer)
        variances = spectrum(normalizer.value_mean.numel(), rule.device)
        normalizer.count.fill_(rows)
        normalizer.key_scatter.fill_(rows)
        normalizer.value_scatter.copy_((torch.diag(variances) if normalizer.full else variances) * rows)
        if normalizer.full:
            normalizer.whitening(0.0, rule.settings.whitening_floor, "shift")


def small_model(arguments: argparse.Namespace, shrink: int) -> LanguageModel:
    """The edited layers alone."""
    sizes = {
        "vocab_size": arguments.vocabulary // shrink,
        "hidden_size": arguments.d_v // shrink,
        "intermediate_size": arguments.d_k // shrink,
        "num_hidden_layers": arguments.modules,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
    }
    plain = build(Shape(sizes, 0.0, 0, 0, 0), DTYPES[arguments.half], torch.device(arguments.device))
    return editable(plain, arguments.modules)


def made_turn(index: int, tokens: int, rows: int) -> Turn:
    ids = tuple(range(tokens // FACTS + 1))  # the last predicts nothing
    sequences = (TokenSequence(ids, len(ids) - rows // FACTS),) * FACTS
    records = tuple(EditRecord(place, Question("", "")) for place in range(FACTS))
    return Turn(index, Phase.EDIT, records, sequences, mini_batch_weights(sequences, MINI_BATCH))


def a_turn(
    whitens: bool, arguments: argparse.Namespace, shrink: int
) -> tuple[dict[str, dict[str, float]], list[float]]:
    """Each part's counts, and the steps of the root in each of the turns."""
    device = torch.device(arguments.device)
    count, tokens = arguments.rows // shrink, arguments.tokens // shrink
    model = small_model(arguments, shrink)
    generator = torch.Generator(device).manual_seed(0)
    drawn = partial(torch.randn, generator=generator, device=device)

    def captures() -> dict[str, Capture]:  # rows of heavy-tailed length
        return {
            name: Capture(drawn(count, d_k), drawn(count, 1).abs() * drawn(count, d_v) * spectrum(d_v, device) ** 0.5)
            for name, (d_k, d_v) in model.shapes.items()
        }

    mode, alpha = ("stable", 10.0) if whitens else ("original", 1.0)
    settings = StableEditSettings(
        1e-6, alpha, 512 // shrink, mode, "shape", 0.01, "shift", 0.0,  # type: ignore[arg-type]
        "newton" if whitens else "auto",
    )  # fmt: skip
    rule = StableEdit(model.shapes, settings, device)
    start_at(rule, arguments.turn * arguments.modules * count)
    diagnostics = TurnDiagnostics(device, device)
    counter = Counter(device)
    steps: list[float] = []
    for index in range(BEFORE + MEASURED):
        if index == BEFORE:
            counter.parts.clear()
            steps.clear()
        turn, made = made_turn(index, tokens, count), captures()
        with counter.measure("bare"):
            bare(model, turn.sequences, Cut(model.compute_tokens, model.overhead))
        with counter.measure(CAPTURE):
            model.capture(turn)
        with counter.measure("statistics"):
            rule.begin(Phase.EDIT)
            rule._observe(made, Phase.EDIT)
        with counter.measure("whitening, the root"):
            whitenings = rule._whitenings(Phase.EDIT)
        with counter.measure("value shifts and solve"):
            updates = rule._updates(made, whitenings)
        with counter.measure("apply"):
            changes = model.apply(updates)
        with counter.measure("the turn's line"):
            diagnostics.line(turn, Edit(1.0, updates, changes, {}), rule, 1.0)  # type: ignore[arg-type]
        with counter.measure(CHECKSUMS):
            model.checksums()
        for whitening in whitenings.values():
            steps.append(whitening.details["whitening_steps"] or 0.0)
    alone = counter.parts.pop("bare")
    counter.parts[CAPTURE] = {key: value - alone[key] for key, value in counter.parts[CAPTURE].items()}
    scale = {"float64": shrink**3, "other": shrink**3, "bytes": shrink**2}
    return {
        part: {key: value * scale.get(key, 1) / MEASURED for key, value in found.items()}
        for part, found in counter.parts.items()
    }, steps


def show(part: str, found: dict[str, float], own: float) -> None:
    flops = found["float64"] + found["other"]
    print(
        f"  {part:<26} {found['float64']:10.2e}  {found['other']:10.2e}  {flops / own:10.2%} "
        f"{found['bytes']:10.2e} {found['waits']:7.1f} {found['seconds']:9.3f}"
    )


def main() -> None:
    shape = {"layers": 32, "d_k": 14336, "d_v": 4096, "kv": 1024, "vocabulary": 32768, "tokens": 2000, "rows": 400}
    parser = parser_with(__doc__, modules=4, **shape, turn=40, half="bf16", shrink=8, device="cpu")
    arguments = parser.parse_args()
    if arguments.turn * (RENEWED_AT - 1) < BEFORE + MEASURED:
        parser.error(f"--turn {arguments.turn}: the turns after it would decompose; set a later one")
    shrink = arguments.shrink
    edited_modules.TOGETHER //= shrink**2
    forward, backward = own_flops(edited=arguments.modules, **{name: getattr(arguments, name) for name in shape})
    own = forward + backward
    print(f"the model's own work, {arguments.tokens} tokens: {own:.2e} flops, of which forward {forward:.2e}")
    for name, whitens in (("ultraedit", False), ("stableedit", True)):
        parts, steps = a_turn(whitens, arguments, shrink)
        print(f"{name}: {arguments.modules} modules of {arguments.d_k} x {arguments.d_v}, {arguments.rows} rows each")
        if steps:
            print(f"  the root takes {statistics.mean(steps):.1f} steps on average, {max(steps):.0f} at most")
        print("  part                        flops f64  flops else  of the own      bytes   waits   seconds")
        for part, found in parts.items():
            show(part, found, own)
        one_process = [found for part, found in parts.items() if part != CHECKSUMS]
        show("together, one process", {key: sum(found[key] for found in one_process) for key in COUNTED}, own)


if __name__ == "__main__":
    main()
