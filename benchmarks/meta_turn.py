"""What a turn of meta-training costs beside the language model's own work, as ratios measured in one run:

    python -m benchmarks.meta_turn [--facts 100] [--rounds 5] [--rank 128] [--blocks 2] [--device cuda] [--half bf16]

The bare cost is what the equations ask of the language model and nothing else: capture (forward, and backward to the
outputs of the edit modules), rephrases and localities on the edited model (forward, and backward to the edited
weights), localities on the unedited one (forward), for RLEdit the second and third once more for each turn that it
answers for. Batches are those in which bare capture is fastest; rounds and ratios are as in benchmarks/turn.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import transformers

from benchmarks.bare import Cut, bare, bare_loss, best_cut
from benchmarks.common import race, ratio
from benchmarks.turn import build, parser_of
from data.records import TokenSequence, TrainingTurn
from data.stream import tokenize
from editor.hypernetwork import HyperNetworkEditor, HyperNetworkSettings, RidgeSettings
from editor.malmen import MALMEN
from editor.mend import MEND
from editor.meta_train import MetaSettings, MetaTrainer
from editor.rledit import RLEdit, RLEditSettings
from model import LanguageModel

BACK_DEPTH = 2


def bare_to_weights(model: LanguageModel, sequences: Sequence[TokenSequence], cut: Cut) -> None:
    """A forward, and the backward to the edited weights."""
    weights = [edited.weight.requires_grad_(True) for edited in model.edited.values()]
    for batch in cut.batches(sequences):
        torch.autograd.grad(bare_loss(model, batch), weights)
    for weight in weights:
        weight.requires_grad_(False)


def bare_turn(model: LanguageModel, turn: TrainingTurn, cut: Cut, depth: int) -> None:
    bare(model, turn.edits.sequences, cut)
    bare(model, turn.localities, cut, backward=False)
    for _ in range(depth):
        bare_to_weights(model, turn.rephrases, cut)
        bare_to_weights(model, turn.localities, cut)


def main() -> None:
    transformers.logging.disable_progress_bar()
    parser = parser_of(__doc__)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=2)
    arguments = parser.parse_args()
    model, edits = build(arguments)
    questions = {
        probe: tuple(
            tokenize([q for r in edits.records if (q := getattr(r, probe)) is not None], model.tokenizer, "joint")
        )
        for probe in ("rephrase", "locality")
    }
    # of a pass that never ends, so that RLEdit's window stays full from the second round on
    turn = TrainingTurn(
        edits, questions["rephrase"], questions["locality"], epoch=0, index_in_epoch=0, epoch_turns=10**9
    )
    print(f"a turn of meta-training: {len(edits.sequences)} facts, {len(turn.rephrases)} rephrases, "
          f"{len(turn.localities)} localities")  # fmt: skip
    cut = best_cut(model, edits.sequences)

    shapes, device = model.shapes, model.device
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
        trainer = MetaTrainer(model, editor, MetaSettings(1e-9, 0.6, 1.0))
        asked = partial(bare_turn, model, turn, cut, editor.horizon.back_depth)
        times = race({"bare": asked, name: partial(trainer.turn, turn)}, device, arguments.rounds)
        print(f"  bare, as {name:<19} {statistics.median(times['bare']):8.3f} s")
        taken = statistics.median(times[name])
        print(f"  {name:<28} {taken:8.3f} s   {ratio(times, name, 'bare'):.3f} x bare", flush=True)


if __name__ == "__main__":
    main()
