"""What a turn costs the language model alone, in plain torch: a forward, and the backward to the edit modules.

Logits at answer positions only; nothing of the harness but the choice of batches.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.common import race
from data.batches import compute_batches, on_device
from data.records import TokenBatch, TokenSequence
from model import LanguageModel
from model.tracing import hooks


class Cut(NamedTuple):
    """How sequences fall into compute batches (`compute_batches`)."""

    budget: int  # padded tokens of a batch
    overhead: int | None = None  # what another batch counts as; None = batches are filled

    def __str__(self) -> str:
        return f"{self.budget}" if self.overhead is None else f"{self.budget}, cut at {self.overhead}"

    def batches(self, sequences: Sequence[TokenSequence]) -> Iterator[TokenBatch]:
        return compute_batches(sequences, self.budget, self.overhead)


# What is tried: on a GPU, filled batches of a turn of 100 facts are one, of which a third is padding.
CUTS = {
    "cpu": [Cut(budget) for budget in (256, 384, 512, 768, 1024)],
    "cuda": [Cut(8192, overhead) for overhead in (None, 256, 128, 64, 32)],
}


def bare_logits(model: LanguageModel, ids: Tensor, rows: Tensor, positions: Tensor) -> Tensor:  # (M, V)
    """Of token ids (B, L), at the rows and positions (M,) that are asked about."""
    hidden = model.model.base_model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
    return model.model.get_output_embeddings()(hidden[rows.to(model.device), positions.to(model.device)])


def bare_loss(model: LanguageModel, batch: TokenBatch) -> Tensor:  # ()
    """The cross-entropy of the answer tokens."""
    here, _ = on_device(batch, model.device)
    logits = bare_logits(model, here.input_ids, here.rows, here.positions)
    return functional.cross_entropy(logits.float(), here.targets, reduction="sum")


def bare_batch(model: LanguageModel, batch: TokenBatch, backward: bool) -> None:
    """A forward, and the backward to the outputs of the edit modules."""
    if not backward:
        here, _ = on_device(batch, model.device)
        bare_logits(model, here.input_ids, here.rows, here.positions)
        return
    outputs: list[Tensor] = []

    def begin(_module: object, _inputs: object, output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_(True)
        outputs.append(output)

    with hooks({edited.module: begin for edited in model.edited.values()}):
        loss = bare_loss(model, batch)
    torch.autograd.grad(loss, outputs)


def bare(model: LanguageModel, sequences: Sequence[TokenSequence], cut: Cut, backward: bool = True) -> None:
    with torch.set_grad_enabled(backward):
        for batch in cut.batches(sequences):
            bare_batch(model, batch, backward)


def best_cut(model: LanguageModel, sequences: Sequence[TokenSequence]) -> Cut:
    """In which the bare work is fastest."""
    cuts = {f"bare in batches of {cut}": cut for cut in CUTS[model.device.type]}
    work = {name: partial(bare, model, sequences, cut) for name, cut in cuts.items()}
    medians = {name: statistics.median(times) for name, times in race(work, model.device, rounds=2).items()}
    for name, median in medians.items():
        print(f"  {name:<36} {median:8.3f} s", flush=True)
    return cuts[min(medians, key=medians.__getitem__)]
