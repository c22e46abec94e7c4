"""Whether editing works on this device, and what it costs, on a model of a known shape with random weights.

    python -m benchmarks.gpu [--device cuda] [--shape mistral-7b] [--turns 20] [--facts 100] [--out FILE.json]

It needs no data, no model's files and no Hydra: torch, transformers, numpy and safetensors, and psutil, rich, tqdm and
xxhash, of which the last is not among what these bring along. Each editor edits three times from the first turn: once with
a checkpoint in the middle, once timed, and once from that checkpoint on. Milliseconds are medians over the turns of
edits, per fact, the device synchronised at the ends of each part; ratios are to the bare work on the same turn
(benchmarks/bare.py). Where a check fails, the exit code is 1. Targets are told, for the card they are for, and decide
nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch
import transformers

from benchmarks.bare import Bench, bare, best_budget
from benchmarks.gpu import checks, peak
from benchmarks.gpu.checks import Check
from benchmarks.gpu.made import SHAPES, Facts, Shape, build, editable, weights_of
from benchmarks.gpu.runs import METHODS, Course, Run
from data.batches import compute_batches
from data.disk import write_atomically
from data.records import Phase
from editor.stopwatch import Stopwatch
from harness.run.same_bits import ask_for_the_same_bits, prepare_libraries
from harness.watch.diagnostics import memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDS = 5
PARTS = ("capture", "update", "apply", "line")
GIB = 1 << 30


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see python -m benchmarks.gpu --help")


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
        options = parse(arguments)
        report, found = work(options)
        if options.out is not None:
            write_atomically(options.out, json.dumps(report, indent=1) + "\n")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    failed = [check for check in found if not check.passed]
    if failed:
        sys.exit("\n".join(map(str, failed)))


def parse(arguments: Sequence[str] | None = None) -> Options:
    parser = _Parser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
            f"--shape {shape}: its weights take {needed / GIB:.1f} GiB in {dtype}, and {device} has {free / GIB:.1f} GiB "
            "left; choose --shape small" + (", or --dtype bf16" if dtype != "bf16" else "")
        )


# ---------------------------------------------------------------------------------------------------------------------
# All of it, in order


def work(options: Options) -> tuple[dict[str, Any], list[Check]]:
    """What goes into the file, and the checks."""
    prepare_libraries()
    if options.device.type == "cuda":  # as a run does
        torch.cuda.set_device(options.device)
        ask_for_the_same_bits()
    shape = SHAPES[options.shape]
    facts = Facts(options.facts, shape.sizes["vocab_size"])
    found: list[Check] = []

    def tell(check: Check) -> None:
        found.append(check)
        print(f"  {check}", flush=True)

    about = about_device(options.device)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    tell(checks.one_layer(shape, facts, options.device))
    course = Course(editable(build(shape, DTYPES[options.dtype], options.device)), shape, facts, options.turns)
    report: dict[str, Any] = {"about": about, "options": {key: str(value) for key, value in asdict(options).items()}}
    report["model"] = about_model(course)
    for check in checks.refusals(course):
        tell(check)
    report["bare"] = bare_cost(course, DTYPES[options.dtype])
    report["editors"] = {}
    for name in options.editors:
        report["editors"][name] = one_editor(course, name, report["bare"], tell)
    report["targets"] = targets(report, shape, DTYPES[options.dtype])
    report["checks"] = [asdict(check) for check in found]
    print(f"{sum(check.passed for check in found)} of {len(found)} checks passed")
    return report, found


def about_device(device: torch.device) -> dict[str, Any]:
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), **versions, "CUDA": torch.version.cuda}
    return {"device": "a CPU", "threads": torch.get_num_threads(), **versions}


def about_model(course: Course) -> dict[str, Any]:
    weights = sum(weight.numel() for weight in course.model.model.parameters())
    dtype = str(course.model.model.dtype).removeprefix("torch.")
    modules = {name: f"{d_k} x {d_v}" for name, (d_k, d_v) in course.model.shapes.items()}
    print(
        f"model: {weights / 1e9:.3g}e9 random weights in {dtype}; edited are {len(modules)} maps of {modules.popitem()[1]}"
    )
    return {"weights": weights, "dtype": dtype, "shapes": {n: list(s) for n, s in course.model.shapes.items()}}


def bare_cost(course: Course, dtype: torch.dtype) -> dict[str, Any]:
    """Forward, and forward and backward to the edit modules, over a turn; the forward's share of the card's peak."""
    turn = course.facts.turn(0, Phase.EDIT)
    bench, sequences = Bench(course.model, turn, ROUNDS), turn.sequences
    tokens = sum(len(one.ids) - 1 for one in sequences)
    answers = sum(one.answer_length for one in sequences)
    print(f"the model alone, {len(sequences)} facts: {tokens} tokens, {answers} of answers")
    budget = best_budget(bench, sequences, backward=True)
    padded = sum(batch.input_ids.numel() for batch in compute_batches(sequences, budget))
    times = bench.race(
        {
            "forward": partial(bare, course.model, sequences, budget, False),
            "both": partial(bare, course.model, sequences, budget),
        }
    )
    forward, both = (statistics.median(times[name]) for name in ("forward", "both"))
    flops = peak.forward_flops(course.model, sequences)
    share, of = peak.share_of_peak(flops, forward, course.model.device, dtype)
    reached = f"{share:.1%} {of}" if share is not None else f"no share of a peak: {of}"
    print(f"  forward                      {forward:8.4f} s   {flops / forward / 1e12:.3g} Tflop/s, {reached}")
    print(
        f"  forward and backward         {both:8.4f} s   {padded / tokens - 1:.1%} of the tokens padding, in batches of {budget}"
    )
    return {
        "tokens": tokens, "answer_tokens": answers, "padded_tokens": padded, "budget": budget,
        "forward_seconds": forward, "forward_backward_seconds": both,
        "forward_flops": flops, "share_of_peak": share, "share_of": of,
    }  # fmt: skip


def one_editor(
    course: Course, name: str, bare_seconds: Mapping[str, float], tell: Callable[[Check], None]
) -> dict[str, Any]:
    """Three runs of one editor, one after the other: that with a checkpoint, the one that is timed, the resumed one."""
    device = course.model.device
    with tempfile.TemporaryDirectory() as folder:
        run = Run(course, name)
        half = run.first_edit + course.turns // 2
        run.begin()
        run.go_on(half)
        watch = Stopwatch(device)
        with watch.measure("checkpoint"):
            run.save(Path(folder))
        run.go_on(run.last)
        wanted, wanted_late = run.bits(0), run.bits(half)

        del run
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        timed = Run(course, name)
        timed.begin()
        timed.go_on(timed.last)
        cost = cost_of(timed, bare_seconds) | {"checkpoint_seconds": watch.seconds["checkpoint"]}
        show(name, cost)
        for check in (checks.finite, checks.learned, *([checks.whitened] if timed.method.warms_up else [])):
            tell(check(name, timed))
        tell(checks.same_bits(f"{name}: two runs give the same", timed.bits(0), wanted))

        del timed
        resumed = Run(course, name)
        resumed.restore(Path(folder))
        resumed.go_on(resumed.last)
        tell(
            checks.same_bits(
                f"{name}: resumed after {half} of {resumed.last} turns, the same", resumed.bits(half), wanted_late
            )
        )
    return cost


def cost_of(run: Run, bare_seconds: Mapping[str, float]) -> dict[str, Any]:
    """Of the turns of edits, milliseconds a fact; those of meta-training by themselves, means over its turns."""
    facts, device = run.course.facts.a_turn, run.model.device
    turns = [line["seconds"] for line in run.edit_lines()]
    whole = [sum(seconds.values()) for seconds in turns]
    decomposed = [
        line["turn"]
        for line in run.edit_lines()
        if any(group.get("whitening_decomposed") for group in line["statistics"].values())
    ]
    turn = statistics.median(whole)
    return {
        "ms": {part: 1e3 * statistics.median(seconds[part] for seconds in turns) / facts for part in PARTS},
        "ms_together": 1e3 * turn / facts,
        "ms_mean": 1e3 * statistics.mean(whole) / facts,
        "turns": whole,
        "decomposed_in": decomposed,
        "times_forward": turn / bare_seconds["forward_seconds"],
        "times_forward_backward": turn / bare_seconds["forward_backward_seconds"],
        "peak_bytes": peak_memory(device),
        "training_ms": training_cost(run),
    }


def peak_memory(device: torch.device) -> float:
    found = memory(device)
    return found[f"{device}_peak_bytes".replace(":", "")] if device.type == "cuda" else found["peak_bytes"]


def training_cost(run: Run) -> dict[str, float]:
    turns = [step.seconds for step in run.trained]
    facts = run.course.facts.a_turn
    return {part: 1e3 * statistics.mean(turn[part] for turn in turns) / facts for part in (turns[0] if turns else ())}


def show(name: str, cost: Mapping[str, Any]) -> None:
    parts = ", ".join(f"{part} {ms:.3f}" for part, ms in cost["ms"].items())
    print(f"{name}: {cost['ms_together']:.3f} ms an edit (mean {cost['ms_mean']:.3f}): {parts}")
    print(f"  {cost['times_forward']:.2f} x forward, {cost['times_forward_backward']:.2f} x forward and backward; "
          f"checkpoint {cost['checkpoint_seconds']:.2f} s")  # fmt: skip
    where = "of the GPU, from the run's start" if torch.cuda.is_available() else "of the process, from its start"
    print(f"  peak memory                  {cost['peak_bytes'] / GIB:8.2f} GiB, {where}")
    if cost["training_ms"]:
        parts = ", ".join(f"{part} {ms:.3f}" for part, ms in cost["training_ms"].items())
        print(f"  meta-training                {sum(cost['training_ms'].values()):8.3f} ms a fact: {parts}")
    if cost["decomposed_in"]:
        print(f"  the covariance decomposed in {len(cost['decomposed_in'])} of {len(cost['turns'])} turns")


def targets(report: Mapping[str, Any], shape: Shape, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """What was wanted and what was found, on the card and in the precision that it was wanted for; else nothing."""
    target = shape.target
    if target is None or dtype != torch.bfloat16 or peak.card_of(report["about"]["device"]) != target.card:
        print("no target is judged: those there are, are for the mistral-7b shape in bf16 on an H200")
        return {}
    share = report["bare"]["share_of_peak"]
    found = {
        "share of the peak in the forward": {"at_least": target.share, "found": share, "met": share >= target.share}
    }
    if cost := report["editors"].get(target.editor):
        ms = cost["ms_together"]
        found[f"ms an edit of {target.editor}"] = {"at_most": target.ms, "found": ms, "met": ms <= target.ms}
    for what, judged in found.items():
        wanted = judged.get("at_most", judged.get("at_least"))
        print(
            f"target on an {target.card}: {what}: {judged['found']:.3g}, wanted {wanted:g}: {'met' if judged['met'] else 'missed'}"
        )
    return found
