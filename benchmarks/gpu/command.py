"""Whether editing works on this device, and what it costs, on a model of a known shape with random weights.

    python -m benchmarks.gpu [--device cuda] [--shape mistral-7b] [--turns 20] [--facts 100] [--out FILE.json]

No data and no model's files are read, and of the packages it asks for torch, transformers, tokenizers, numpy,
safetensors, psutil, rich, tqdm and xxhash alone. Each editor makes three runs: one with a checkpoint in the middle, one
that is timed, one from that checkpoint on. Milliseconds an edit are medians over the turns of edits, the device
synchronised at both ends of each part; ratios are medians too, of a turn to the bare work on it (benchmarks/bare.py),
done right after it. Where a check fails, the exit code is 1. Targets are judged on the card that they are for, on the
mean turn, which those that decompose count in, and decide nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from benchmarks.bare import Cut
from benchmarks.common import DTYPES
from benchmarks.gpu import checks
from benchmarks.gpu.checks import Check
from benchmarks.gpu.cost import GIB, bare_cost, one_editor, targets
from benchmarks.gpu.made import SHAPES, Facts, build, editable, weights_of
from benchmarks.gpu.runs import METHODS, Course
from data.disk import write_atomically
from harness.run import prepare_libraries, use_deterministic_algorithms
from harness.run.command import Parser
from model import LanguageModel


@dataclass(frozen=True)
class Options:
    device: torch.device
    shape: str
    turns: int
    facts: int
    dtype: str
    editors: tuple[str, ...]
    out: Path | None


def main(arguments: Sequence[str] | None = None) -> None:
    """A mistake of the user's ends in one line, and exit code 1; so does a check that fails, in a line each."""
    transformers.logging.set_verbosity_error()
    try:
        found = work(parse(arguments))
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    failed = [check for check in found if not check.passed]
    if failed:
        sys.exit("\n".join(map(str, failed)))


def parse(arguments: Sequence[str] | None = None) -> Options:
    parser = Parser("benchmarks.gpu", __doc__)
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: a GPU where there is one")
    parser.add_argument("--shape", choices=SHAPES, help="default: mistral-7b on a GPU, small on a CPU")
    parser.add_argument("--turns", type=int, default=20, help="of edits; default 20")
    parser.add_argument("--facts", type=int, default=100, help="a turn; default 100")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--editors", nargs="+", choices=METHODS, default=list(METHODS), help="default: all of them")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where to write all that was found")
    chosen = parser.parse_args(arguments)
    device = device_of(chosen.device)
    on_gpu = device.type == "cuda"
    shape = chosen.shape or ("mistral-7b" if on_gpu else "small")
    dtype = chosen.dtype or ("bf16" if on_gpu else "fp32")
    if chosen.turns < 2:
        raise ValueError(f"--turns {chosen.turns}: must be 2 or more, for a run that is resumed has two halves")
    if chosen.facts < 1:
        raise ValueError(f"--facts {chosen.facts}: must be 1 or more")
    if chosen.out is not None and not chosen.out.parent.is_dir():
        raise ValueError(f"--out {chosen.out}: no such folder; make it first, or choose another")
    if chosen.out is not None and chosen.out.is_dir():
        raise ValueError(f"--out {chosen.out}: a folder; give the name of a file")
    require_room(device, shape, dtype)
    return Options(device, shape, chosen.turns, chosen.facts, dtype, tuple(dict.fromkeys(chosen.editors)), chosen.out)


def device_of(named: str | None) -> torch.device:
    if named is None:
        named = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(named)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {named}: must be cpu, cuda or cuda:N")
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ValueError(f"--device {named}: this machine has {gpus} GPUs that torch can use; choose another, or cpu")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else torch.device("cpu")


def require_room(device: torch.device, shape: str, dtype: str) -> None:
    """ValueError where not even the weights fit."""
    needed = weights_of(SHAPES[shape]) * DTYPES[dtype].itemsize
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"--shape {shape}: its weights take {needed / GIB:.1f} GiB in {dtype}, and {device} has "
            f"{free / GIB:.1f} GiB left; choose --shape small" + (", or --dtype bf16" if dtype != "bf16" else "")
        )


# ---------------------------------------------------------------------------------------------------------------------
# All of it, in order


def work(options: Options) -> list[Check]:
    """The checks; what else was found is printed, and stands in the file from the moment that it is known."""
    prepare_libraries()
    if options.device.type == "cuda":  # as a run does
        torch.cuda.set_device(options.device)
        use_deterministic_algorithms()
    shape = SHAPES[options.shape]
    facts = Facts(options.facts, shape.sizes["vocab_size"])
    found: list[Check] = []
    report: dict[str, Any] = {
        "options": {**asdict(options), "device": str(options.device), "out": str(options.out)},
        "machine": about_machine(options.device),
        "editors": {},
        "checks": [],
    }

    def tell(check: Check) -> None:
        found.append(check)
        report["checks"].append(asdict(check))
        print(f"  {check}", flush=True)

    def keep() -> None:
        if options.out is not None:
            write_atomically(options.out, json.dumps(report, indent=1) + "\n")

    keep()
    tell(checks.one_layer(shape, facts, options.device))
    course = Course(editable(build(shape, DTYPES[options.dtype], options.device)), shape, facts, options.turns)
    report["model"] = about_model(course.model)
    for check in checks.refusals(course):
        tell(check)
    report["bare"] = bare_cost(course)
    cut = Cut(report["bare"]["budget"], report["bare"]["overhead"])
    keep()
    for name in options.editors:
        report["editors"][name] = one_editor(course, name, cut, tell)
        keep()
    report["targets"] = targets(report, course)
    keep()
    print(f"{sum(check.passed for check in found)} of {len(found)} checks passed")
    return found


def about_machine(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"device": "CPU", "threads": torch.get_num_threads()}
    if device.type == "cuda":
        found = {"device": torch.cuda.get_device_name(device), "CUDA": torch.version.cuda}
    found |= {"torch": torch.__version__, "transformers": transformers.__version__}
    print(", ".join(f"{key} {value}" for key, value in found.items()), flush=True)
    return found


def about_model(model: LanguageModel) -> dict[str, Any]:
    weights = sum(weight.numel() for weight in model.model.parameters())
    dtype = str(model.model.dtype).removeprefix("torch.")
    modules = [f"{name} ({d_k} x {d_v})" for name, (d_k, d_v) in model.shapes.items()]
    print(f"model: {weights:,} random weights in {dtype}; edited are {', '.join(modules)}", flush=True)
    return {"weights": weights, "dtype": dtype, "modules": modules}
