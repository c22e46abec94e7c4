"""What the model alone costs, and what each editor costs beside it; printed as it is found.

Milliseconds are per fact.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.bare import Cut, bare, best_cut
from benchmarks.common import race, seconds
from benchmarks.gpu import checks, peak
from benchmarks.gpu.checks import Check
from benchmarks.gpu.runs import Course, Run
from data.records import Phase, Turn
from editor.stopwatch import Stopwatch
from harness.watch import memory
from model import LanguageModel

ROUNDS = 5
PARTS = ("capture", "update", "apply", "line")
GIB = 1 << 30


def bare_cost(course: Course) -> dict[str, Any]:
    """Forward, and forward and backward to the edit modules, over a turn; the forward's share of the card's peak."""
    model, turn = course.model, course.facts.turn(0, Phase.EDIT)
    sequences = turn.sequences
    tokens = sum(len(one.ids) - 1 for one in sequences)
    answers = sum(one.answer_length for one in sequences)
    print(f"the model alone, {len(sequences)} facts: {tokens} tokens, {answers} of answers")
    cut = best_cut(model, sequences)
    padded = sum(batch.input_ids.numel() for batch in cut.batches(sequences))
    work = {backward: partial(bare, model, sequences, cut, backward) for backward in (False, True)}
    times = race({"forward": work[False], "both": work[True]}, model.device, ROUNDS)
    forward, both = (statistics.median(times[name]) for name in ("forward", "both"))
    flops = peak.forward_flops(model, sequences)
    share, of = peak.share_of_peak(flops, forward, model.device, model.model.dtype)
    reached = f"{share:.1%} {of}" if share is not None else f"no share of a peak, for {of}"
    padding = f"{padded / tokens - 1:.1%} padding, in batches of {cut}"
    print(f"  forward                      {forward:8.4f} s   {flops / forward / 1e12:.3g} Tflop/s; {reached}")
    print(f"  forward and backward         {both:8.4f} s   {padding}", flush=True)
    return {
        "tokens": tokens, "answer_tokens": answers, "padded_tokens": padded, **cut._asdict(),
        "forward_seconds": forward, "forward_backward_seconds": both,
        "forward_flops": flops, "share_of_peak": share, "share_of": of,
    }  # fmt: skip


class Beside:
    """Seconds of the bare work on each turn of edits, right after it: what makes a machine slower does so for both."""

    def __init__(self, model: LanguageModel, cut: Cut) -> None:
        self.model, self.cut = model, cut
        self.seconds: dict[str, list[float]] = {"forward": [], "both": []}

    def take(self, turn: Turn) -> None:
        if turn.phase is Phase.EDIT:
            work = partial(bare, self.model, turn.sequences, self.cut)
            self.seconds["forward"].append(seconds(partial(work, False), self.model.device))
            self.seconds["both"].append(seconds(work, self.model.device))


def one_editor(course: Course, name: str, cut: Cut, tell: Callable[[Check], None]) -> dict[str, Any]:
    """Three runs, one after the other: with a checkpoint in the middle, the one that is timed, the resumed one.

    `cut` is that of the bare work that the timed one is compared with.
    """
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

        del run  # its editor, before the peak is taken
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        run = Run(course, name)
        run.begin()
        beside = Beside(course.model, cut)
        run.go_on(run.last, beside.take)
        cost = {**cost_of(run, beside), "checkpoint_seconds": watch.seconds["checkpoint"]}
        show(name, cost, device)
        tell(checks.finite(name, run))
        tell(checks.learned(name, run))
        if run.method.warms_up:
            tell(checks.whitened(name, run))
        tell(checks.same_bits(f"{name}: two runs give the same", run.bits(0), wanted))

        del run
        run = Run(course, name)
        run.restore(Path(folder))
        run.go_on(run.last)
        what = f"{name}: resumed after turn {half} of {run.last}, it gives the same"
        tell(checks.same_bits(what, run.bits(half), wanted_late))
    return cost


def cost_of(run: Run, beside: Beside) -> dict[str, Any]:
    """Of the turns of edits, milliseconds a fact; those of meta-training by themselves, means over its turns."""
    facts, device = run.course.facts.a_turn, run.model.device
    turns = [line["seconds"] for line in run.edit_lines()]
    whole = [sum(seconds.values()) for seconds in turns]
    decomposed = [
        line["turn"]
        for line in run.edit_lines()
        if any(group.get("whitening_decomposed") for group in line["statistics"].values())
    ]
    ratios = {
        name: statistics.median(turn / alone for turn, alone in zip(whole, times, strict=True))
        for name, times in beside.seconds.items()
    }
    return {
        "ms": {part: 1e3 * statistics.median(seconds[part] for seconds in turns) / facts for part in PARTS},
        "ms_together": 1e3 * statistics.median(whole) / facts,
        "ms_mean": 1e3 * statistics.mean(whole) / facts,
        "turns": whole,
        "decomposed_in": decomposed,
        "times_forward": ratios["forward"],
        "times_forward_backward": ratios["both"],
        "peak_bytes": peak_memory(device),
        "training_ms": training_cost(run),
    }


def peak_memory(device: torch.device) -> float:  # bytes
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory()["peak_bytes"]


def training_cost(run: Run) -> dict[str, float]:
    turns = [step.seconds for step in run.trained]
    facts = run.course.facts.a_turn
    return {part: 1e3 * statistics.mean(turn[part] for turn in turns) / facts for part in (turns[0] if turns else ())}


def show(name: str, cost: Mapping[str, Any], device: torch.device) -> None:
    print(f"{name}: {cost['ms_together']:.3f} ms an edit: {_listed(cost['ms'])}; mean {cost['ms_mean']:.3f}")
    forward, both = cost["times_forward"], cost["times_forward_backward"]
    print(f"  a turn is                    {forward:8.2f} x the forward, {both:.2f} x forward and backward")
    print(f"  covariances decomposed in    {len(cost['decomposed_in']):8d} of {len(cost['turns'])} turns")
    if cost["training_ms"]:
        together = sum(cost["training_ms"].values())
        print(f"  meta-training                {together:8.3f} ms a fact: {_listed(cost['training_ms'])}")
    print(f"  a checkpoint                 {cost['checkpoint_seconds']:8.3f} s")
    whose = (
        "allocated on the GPU, the model among it"
        if device.type == "cuda"
        else "resident in this process since it began"
    )
    print(f"  peak memory                  {cost['peak_bytes'] / GIB:8.2f} GiB {whose}", flush=True)


def _listed(parts: Mapping[str, float]) -> str:
    return ", ".join(f"{part} {ms:.3f}" for part, ms in parts.items())


def targets(report: Mapping[str, Any], course: Course) -> dict[str, dict[str, Any]]:
    """What was wanted and what was found, on the card and in the precision that it was wanted for; else nothing."""
    target, name = course.shape.target, report["machine"]["device"]
    if target is None or course.model.model.dtype != torch.bfloat16 or peak.card_of(name) != target.card:
        print("no target is judged: there are none for this shape, this precision and this device")
        return {}
    found = {"the forward's share of the peak": (report["bare"]["share_of_peak"], "at least", target.share)}
    if cost := report["editors"].get(target.editor):
        found[f"ms an edit of {target.editor}, mean"] = (cost["ms_mean"], "at most", target.ms)
    judged = {}
    for what, (value, bound, wanted) in found.items():
        met = value <= wanted if bound == "at most" else value >= wanted
        judged[what] = {"found": value, bound: wanted, "met": met}
        print(f"target on an {target.card}: {what} {value:.3g}, {bound} {wanted:g}: {'met' if met else 'missed'}")
    return judged
