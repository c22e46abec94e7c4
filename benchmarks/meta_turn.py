"""What a turn of meta-training costs beside the language model's own work, as ratios measured in one run:

    python -m benchmarks.meta_turn [--facts 100] [--rounds 5] [--rank 128] [--blocks 2] [--device cuda] [--half bf16]

The bare cost is what the equations ask of the language model and nothing else: capture (forward, and backward to the
outputs of the edit modules), rephrases and localities on the edited model (forward, and backward to the edited
weights), localities on the unedited one (forward), for RLEdit the second and third once more for each turn that it
answers for. Batches are those in which bare capture is fastest; rounds and ratios are as in benchmarks/turn.py.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import transformers
from torch.nn import functional

from benchmarks.bare import Bench, bare, best_budget, ratio
from benchmarks.turn import build, parser_of
from data.batches import compute_batches
from data.records import TokenSequence, TrainingTurn
from data.stream import tokenize
from editor.hypernetwork import HyperNetworkEditor, HyperNetworkSettings, RidgeSettings
from editor.malmen import MALMEN
from editor.mend import MEND
from editor.meta_train import MetaSettings, MetaTrainer
from editor.rledit import RLEdit, RLEditSettings
from model import LanguageModel

BACK_DEPTH = 2


def bare_to_weights(model: LanguageModel, sequences: Sequence[TokenSequence], budget: int) -> None:
    """A forward, and the backward to the edited weights, in plain torch."""
    weights = [edited.weight.requires_grad_(True) for edited in model.edited.values()]
    for batch in compute_batches(sequences, budget):
        hidden = model.model.base_model(input_ids=batch.input_ids.to(model.device), use_cache=False).last_hidden_state
        at = (batch.rows.to(model.device), batch.positions.to(model.device))
        logits = model.model.get_output_embeddings()(hidden[at])
        loss = functional.cross_entropy(logits.float(), batch.targets.to(model.device), reduction="sum")
        torch.autograd.grad(loss, weights)
    for weight in weights:
        weight.requires_grad_(False)


def bare_turn(model: LanguageModel, turn: TrainingTurn, budget: int, depth: int) -> None:
    bare(model, turn.edits.sequences, budget)
    bare(model, turn.localities, budget, backward=False)
    for _ in range(depth):
        bare_to_weights(model, turn.rephrases, budget)
        bare_to_weights(model, turn.localities, budget)


def trainer(bench: Bench, editor: HyperNetworkEditor) -> MetaTrainer:
    return MetaTrainer(bench.model, editor, MetaSettings(1e-9, 0.6, 1.0))


def main() -> None:
    transformers.logging.disable_progress_bar()
    parser = parser_of(__doc__)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=2)
    arguments: argparse.Namespace = parser.parse_args()
    bench = build(arguments)
    questions = {
        probe: tuple(
            tokenize(
                [q for r in bench.turn.records if (q := getattr(r, probe)) is not None], bench.model.tokenizer, "joint"
            )
        )
        for probe in ("rephrase", "locality")
    }
    # of a pass that never ends, so that RLEdit's window stays full from the second round on
    turn = TrainingTurn(bench.turn, questions["rephrase"], questions["locality"], epoch=0, place=0, of=10**9)
    print(f"a turn of meta-training: {len(turn.edits.sequences)} facts, {len(turn.rephrases)} rephrases, "
          f"{len(turn.localities)} localities")  # fmt: skip
    budget = best_budget(bench, turn.edits.sequences)

    shapes, device = bench.model.shapes, bench.model.device
    network: dict[str, Any] = {"lr": 1e-9, "batch_size": 512, "statistics_scope": "shape"}
    network |= {"rank": arguments.rank, "n_blocks": arguments.blocks, "seed": 0}
    horizon: dict[str, Any] = {"reg_coef": 1e-4, "time_decay": 0.95, "back_depth": BACK_DEPTH}
    horizon |= {"trajectory_length": None, "update_every": "turn"}
    editors: dict[str, HyperNetworkEditor] = {
        "mend": MEND(shapes, HyperNetworkSettings(**network), device),
        "malmen": MALMEN(shapes, RidgeSettings(**network, alpha=1.0), device),
        "rledit": RLEdit(shapes, RLEditSettings(**network, **horizon, alpha=1.0), device),
    }
    for name, editor in editors.items():
        asked = partial(bare_turn, bench.model, turn, budget, editor.horizon.back_depth)
        times = bench.race({"bare": asked, name: partial(trainer(bench, editor).turn, turn)})
        print(f"  bare, as {name:<19} {statistics.median(times['bare']):8.3f} s")
        taken = statistics.median(times[name])
        print(f"  {name:<28} {taken:8.3f} s   {ratio(times, name, 'bare'):.3f} x bare", flush=True)


if __name__ == "__main__":
    main()
