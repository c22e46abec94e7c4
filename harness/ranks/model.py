"""A language model whose work the processes of a run share; to whoever asks, it is one model.

Every rank holds the same weights and asks the same questions. They are dealt out by length, so each rank has about as
much to do, and every rank has all answers, in the order of the questions.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from data.records import (
    Allocate,
    Capture,
    LossTerm,
    LowRankUpdate,
    TokenSequence,
    Turn,
    TurnCapture,
    WeightChange,
    row_indices,
    row_offsets,
)
from harness.ranks.group import Ranks
from model import LanguageModel, checksums

P = TypeVar("P")
R = TypeVar("R")


class SharedModel(LanguageModel):
    """A model of which this process computes its share; what is at single positions, all of it (model/positions.py)."""

    def __init__(self, model: LanguageModel, ranks: Ranks) -> None:
        """Takes over `model`, which is not to be used by itself any more."""
        vars(self).update(vars(model))
        self.ranks, self.world_size = ranks, ranks.size

    def map_ranks(self, work: Callable[[LanguageModel, P], R], parts: Sequence[P]) -> list[R]:
        return self.ranks.all_gather(lambda: work(self, parts[self.ranks.rank]))

    def all_ranks(self, holds: bool) -> bool:
        return all(self.ranks.all_gather(lambda: holds))

    def require_same(self, state: Callable[[], Mapping[str, Tensor]]) -> None:
        _require_alike(self.ranks.all_gather(lambda: checksums(state())))

    # -- what all ranks read whole

    _below_alike = LanguageModel.below

    @contextlib.contextmanager
    def reading_once(self) -> Iterator[None]:
        self._below_alike = self._below(*self.edited)
        try:
            with super().reading_once():
                yield
        finally:
            self._below_alike = LanguageModel.below

    def _read_in(self, *arguments: Any) -> dict[str, Tensor]:
        """From what all ranks have kept alike: what each has kept of its share has other bits, by other batches."""
        of_share, self.below = self.below, self._below_alike
        try:
            return super()._read_in(*arguments)
        finally:
            self.below = of_share

    # -- capture

    def capture(self, turn: Turn, every_token: bool = False, allocate: Allocate | None = None) -> TurnCapture:
        shares = self.partition([len(sequence.ids) for sequence in turn.sequences])
        first_row = row_offsets(turn.sequences, every_token).tolist()
        captures = self.empty_captures(first_row[-1], allocate)
        losses: list[tuple[float, float]] = []  # and what each counts for
        of_facts: list[tuple[bool, float, float]] = [(False, 0.0, 0.0)] * len(turn.sequences)
        capture = super().capture

        def own() -> tuple[tuple[float, float, list[tuple[bool, float, float]]], list[Tensor]]:
            part = turn.part(shares[self.ranks.rank])
            if not part.sequences:
                return (0.0, 0.0, []), []
            found = capture(part, every_token)
            weight = sum(w * s.answer_length for w, s in zip(part.loss_weights, part.sequences, strict=True))
            facts = list(zip(found.all_correct, found.mean_token_loss, found.max_token_loss, strict=True))
            return (found.loss, weight, facts), _sides(found.modules)

        def take(
            rank: int, said: tuple[float, float, list[tuple[bool, float, float]]], tensors: Sequence[Tensor]
        ) -> None:
            rows = row_indices(shares[rank], first_row)
            for into, tensor in zip(_sides(captures), tensors, strict=False):  # a rank without a share has none
                into[rows.to(into.device)] = tensor.to(into.device)
            losses.append(said[:2])
            for i, found in zip(shares[rank], said[2], strict=True):
                of_facts[i] = found

        self.ranks.all_gather_tensors(own, take)
        mean = math.fsum(loss * w for loss, w in losses) / math.fsum(w for _, w in losses)
        all_correct, means, largest = zip(*of_facts, strict=True)
        return TurnCapture(captures, mean, all_correct, means, largest)

    # -- scoring and text

    def hidden_states(self, sequences: Sequence[TokenSequence]) -> Tensor:  # (sequences, d) float32, on the CPU
        costs = [sequence.answer_start for sequence in sequences]
        read = super().hidden_states
        # a row that is pickled takes with it all of the tensor that it lies in, so each is a copy
        return torch.stack(
            self._in_order(lambda mine: [row.clone() for row in read(mine)] if mine else [], sequences, costs)
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        watch: Callable[[int], object] = lambda _: None,
    ) -> list[list[int]]:
        self._check_lengths([len(prompt) for prompt in prompts])  # by their indices here, not in a share
        write = super().generate
        costs = [len(prompt) + max_new_tokens for prompt in prompts]
        written = self._in_order(lambda mine: write(mine, max_new_tokens, watch), prompts, costs)
        watch((len(prompts) - len(self.partition(costs)[self.ranks.rank])) * max_new_tokens)  # what the others wrote
        return written

    def label_log_probs(
        self, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[tuple[float, int]]]:
        self._check_labels(prompts, labels)
        score = super().label_log_probs
        costs = [len(prompt) + sum(map(len, own)) for prompt, own in zip(prompts, labels, strict=True)]
        pairs = list(zip(prompts, labels, strict=True))
        return self._in_order(lambda mine: score([p for p, _ in mine], [own for _, own in mine]), pairs, costs)

    def _in_order(self, work: Callable[[list[P]], list[R]], items: Sequence[P], costs: Sequence[int]) -> list[R]:
        """What `work` makes of each item."""
        shares = self.partition(costs)
        found = self.ranks.all_gather(lambda: work([items[i] for i in shares[self.ranks.rank]]))
        by_index = dict(zip(chain(*shares), chain(*found), strict=True))
        return [by_index[i] for i in range(len(items))]

    # -- weight gradients

    def reference_logits(self, sequences: Sequence[TokenSequence]) -> Tensor:  # (M, V)
        costs = [len(sequence.ids) for sequence in sequences]
        read = super().reference_logits

        def rows(mine: list[TokenSequence]) -> list[Tensor]:
            lengths = [sequence.answer_length for sequence in mine]
            return [own.cpu().clone() for own in read(mine).split(lengths)] if mine else []

        return torch.cat(self._in_order(rows, sequences, costs)).to(self.device)

    def weight_gradients(self, terms: Sequence[LossTerm]) -> tuple[dict[str, Tensor], list[float]]:
        parts = self._shares_of_terms(terms)
        differentiate = super().weight_gradients
        total: dict[str, Tensor] = {}

        def own() -> tuple[list[float], list[Tensor]]:
            gradients, losses = differentiate([term for _, term in parts[self.ranks.rank]])
            total.update(gradients)
            return losses, [gradient if gradient.is_contiguous() else gradient.T for gradient in total.values()]

        found = self.ranks.all_reduce(own)
        return total, _summed(terms, parts, found)

    def losses(self, terms: Sequence[LossTerm]) -> list[float]:
        parts = self._shares_of_terms(terms)
        losses = super().losses
        found = self.ranks.all_gather(lambda: losses([term for _, term in parts[self.ranks.rank]]))
        return _summed(terms, parts, found)

    def _shares_of_terms(self, terms: Sequence[LossTerm]) -> list[list[tuple[int, LossTerm]]]:
        """For each rank its part of each term, with the term's index; weighed so that the parts sum to the whole."""
        parts: list[list[tuple[int, LossTerm]]] = [[] for _ in range(self.world_size)]
        for i, term in enumerate(terms):
            shares = self.partition([len(sequence.ids) for sequence in term.sequences])
            for offset, share in enumerate(shares):
                if share:  # terms of a single sequence go round
                    parts[(i + offset) % self.world_size].append((i, _share_of_term(term, share)))
        return parts

    # -- weights

    def apply(self, updates: Mapping[str, LowRankUpdate]) -> dict[str, WeightChange]:
        """As of one model; and ValueError where a rank then holds other bits of a weight than the first one."""
        apply = super().apply

        def own() -> tuple[dict[str, WeightChange], dict[str, int]]:
            return apply(updates), self.checksums()

        found = self.ranks.all_gather(own)
        _require_alike([checksums for _, checksums in found])
        return found[0][0]


def _require_alike(found: Sequence[Mapping[str, int]]) -> None:
    for rank, sums in enumerate(found):
        for name in (name for name in sums if sums[name] != found[0][name]):
            raise ValueError(
                f"rank {rank} holds other bits of {name} than rank 0 after the same update: these machines compute "
                "differently; use machines with the same processors, GPUs and thread counts"
            )


def _sides(captures: Mapping[str, Capture]) -> list[Tensor]:
    return [side for capture in captures.values() for side in (capture.keys, capture.value_grads)]


def _share_of_term(term: LossTerm, share: Sequence[int]) -> LossTerm:
    """Some sequences of a term. Its mean is over their tokens alone, so it weighs as many of the whole's."""
    sequences = tuple(term.sequences[i] for i in share)
    weight = term.weight * _tokens(sequences) / _tokens(term.sequences)
    if term.reference is None:
        return LossTerm(sequences, weight)
    rows = term.reference.split([sequence.answer_length for sequence in term.sequences])
    return LossTerm(sequences, weight, torch.cat([rows[i] for i in share]))


def _summed(
    terms: Sequence[LossTerm], parts: Sequence[Sequence[tuple[int, LossTerm]]], found: Sequence[Sequence[float]]
) -> list[float]:
    """Each term's mean loss from those of its parts."""
    losses = [0.0] * len(terms)
    for part, own in zip(parts, found, strict=True):
        for (i, share), loss in zip(part, own, strict=True):
            losses[i] += loss * _tokens(share.sequences) / _tokens(terms[i].sequences)
    return losses


def _tokens(sequences: Sequence[TokenSequence]) -> int:
    return sum(sequence.answer_length for sequence in sequences)
