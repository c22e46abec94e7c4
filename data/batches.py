"""Sequences -> padded compute batches. What shares a batch changes speed and memory, never a result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from data.records import TokenBatch, TokenSequence

# Stands where a sequence has ended. Which token it is changes nothing: attention is causal and padding is on the right.
PADDING = 0


def compute_batches(
    sequences: Sequence[TokenSequence], token_budget: int, most_padding: int | None = None
) -> Iterator[TokenBatch]:
    """Cut the sequences, longest first, into batches of at most `token_budget` padded tokens.

    With `most_padding` a batch also ends before more than so many of them are padding. A sequence longer than the
    budget gets a batch of its own. Each loses its last token, which predicts nothing.
    """
    lengths = np.array([len(sequence.ids) - 1 for sequence in sequences], dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        longest = int(lengths[order[start]])
        members = order[start : start + max(1, token_budget // longest)]
        if most_padding is not None:
            members = members[(longest - lengths[members]).cumsum() <= most_padding]
        yield padded(sequences, members)
        start += len(members)


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
