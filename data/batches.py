"""Sequences -> padded compute batches. What shares a batch changes speed and memory, never a result."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from data.records import TokenBatch, TokenSequence

# Stands where a sequence has ended. Which token it is changes nothing: attention is causal and padding is on the right.
PADDING = 0


def compute_batches(
    sequences: Sequence[TokenSequence], token_budget: int, overhead: int | None = None
) -> Iterator[TokenBatch]:
    """Cut the sequences, longest first, into batches of at most `token_budget` padded tokens.

    Each batch is as full as it can be or, with `overhead`, what a batch costs beside its tokens and in tokens, they are
    cut where padded tokens and overheads together are least. A sequence longer than the budget gets a batch of its own.
    Each loses its last token, which predicts nothing.
    """
    lengths = np.array([len(sequence.ids) - 1 for sequence in sequences], dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    most = np.maximum(1, token_budget // lengths[order])  # sequences of a batch that begins here
    ends = _full(most) if overhead is None else _cheapest(lengths[order], most, overhead)
    for start, end in pairwise([0, *ends]):
        yield padded(sequences, order[start:end])


def _full(most: np.ndarray) -> list[int]:  # (N,)
    """Where batches end that are as full as they can be."""
    ends = [0]
    while ends[-1] < len(most):
        ends.append(min(ends[-1] + int(most[ends[-1]]), len(most)))
    return ends[1:]


def _cheapest(lengths: np.ndarray, most: np.ndarray, overhead: int) -> list[int]:  # (N,) descending, (N,)
    """Where batches end whose padded tokens and overheads add up to the least: a shortest path over places to cut."""
    count = len(lengths)
    cost, begin = np.full(count + 1, np.inf), np.zeros(count + 1, dtype=np.int64)  # of the cheapest cut that ends here
    cost[0], sizes = 0, np.arange(1, count + 1)
    for start in range(count):
        reach = slice(start + 1, min(start + int(most[start]), count) + 1)
        through = cost[start] + overhead + lengths[start] * sizes[: reach.stop - reach.start]
        cheaper = through < cost[reach]
        cost[reach][cheaper], begin[reach][cheaper] = through[cheaper], start
    ends = [count] if count else []
    while ends and begin[ends[-1]]:
        ends.append(int(begin[ends[-1]]))
    return ends[::-1]


def every_position(batch: TokenBatch) -> tuple[Tensor, Tensor]:  # (N,), (N,) int64
    """Rows and positions of all its tokens, sequence by sequence, without padding."""
    inside = torch.arange(batch.input_ids.shape[1]) < batch.lengths[:, None]
    rows, positions = inside.nonzero(as_tuple=True)
    return rows, positions


def on_device(batch: TokenBatch, device: torch.device, *others: Tensor) -> tuple[TokenBatch, list[Tensor]]:
    """A batch, and other tensors of 8-byte numbers that go with it, by one copy for all of them.

    On a GPU that comes from pinned memory, for the host waits for every copy that does not.
    """
    if device.type == "cpu":
        return batch, list(others)
    tensors = [*(getattr(batch, field.name) for field in dataclasses.fields(batch)), *others]
    packed = pack(tensors, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    found, own = unpack(packed, tensors), len(tensors) - len(others)
    return TokenBatch(*found[:own]), found[own:]


def pack(tensors: Sequence[Tensor], pin_memory: bool = False) -> Tensor:  # int64
    """The bits of tensors of 8-byte numbers, one after another."""
    packed = torch.empty(sum(tensor.numel() for tensor in tensors), dtype=torch.int64, pin_memory=pin_memory)
    return torch.cat([tensor.reshape(-1).view(torch.int64) for tensor in tensors], out=packed)


def unpack(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of what `pack` made of tensors of these types and shapes, wherever it lies now."""
    pieces = packed.split([tensor.numel() for tensor in like])
    return [piece.view(one.dtype).view(one.shape) for piece, one in zip(pieces, like, strict=True)]


def padded(
    sequences: Sequence[TokenSequence],
    members: Sequence[int] | np.ndarray,  # (B,)
) -> TokenBatch:
    """One batch of these of the sequences, padded on the right."""
    chosen = [sequences[member] for member in members]
    lengths = np.array([len(sequence.ids) - 1 for sequence in chosen], dtype=np.int64)
    answers = np.array([sequence.answer_length for sequence in chosen], dtype=np.int64)
    input_ids = np.full((len(chosen), int(lengths.max())), PADDING, dtype=np.int64)
    for row, sequence in enumerate(chosen):
        input_ids[row, : lengths[row]] = sequence.ids[:-1]
    rows = np.repeat(np.arange(len(chosen)), answers)
    within = np.arange(len(rows)) - np.repeat(answers.cumsum() - answers, answers)
    return TokenBatch(
        input_ids=torch.from_numpy(input_ids),
        lengths=torch.from_numpy(lengths),
        members=torch.from_numpy(np.asarray(members, dtype=np.int64)),
        rows=torch.from_numpy(rows),
        positions=torch.from_numpy((lengths - answers)[rows] + within),
        targets=torch.from_numpy(np.concatenate([sequence.ids[sequence.answer_start :] for sequence in chosen])),
    )
