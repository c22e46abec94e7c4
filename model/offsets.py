"""What an offset at one position of each sequence does to its loss, at any number of offsets.

What stands before the position, no offset moves: it is read once and its keys and values are kept, so that an offset
costs the forward and backward of what comes from the position on.

Letters: n sequences, B of them in a batch, H tokens before and T from the position on, M answer tokens, d_v value size
of an edit module, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from data.batches import PADDING
from data.records import TokenSequence, first_rows
from model.text import KEPT, Read, TextModel, select
from model.tracing import count_within, require_ran, same_bits


@dataclass
class _Tails:
    """The ends of some sequences, and what the model has read before them."""

    members: list[int]  # (B,) places among the sequences
    ids: Tensor  # (B, T)
    at: Tensor  # (B,) where the offset is
    rows: Tensor  # (M,) of each answer token, sorted
    positions: Tensor  # (M,) that predict them
    targets: Tensor  # (M,)
    before: Read

    def part(self, rows: list[int]) -> _Tails:
        """Some of the rows; the cache's own tensors stay as they are."""
        chosen = torch.tensor(rows)
        place = torch.full((len(self.members),), -1)
        place[chosen] = torch.arange(len(rows))
        tokens = (place[self.rows] >= 0).nonzero().flatten()
        mask, cache = self.before.mask[chosen.to(self.before.mask.device)], self.before.cache
        return _Tails(
            [self.members[row] for row in rows],
            self.ids[chosen],
            self.at[chosen],
            place[self.rows[tokens]],
            self.positions[tokens],
            self.targets[tokens],
            Read(rows, mask, None if cache is None else select(cache, rows), self.before.logits),
        )


class OffsetLosses:
    """Each sequence's loss and its gradient, as functions of an offset to what a module puts out at its position.

    The loss is the mean of -log p over the sequence's answer tokens or, with `reference`, of KL(reference || model)
    there. With `replace`, the offset is what the module puts out. Graph and gradients end at the offsets: nothing below
    them is differentiated. Holds for the weights that the model has now.
    """

    def __init__(
        self,
        model: TextModel,
        name: str,  # of the edit module
        module: nn.Module,
        precise: torch.dtype,  # of losses and gradients
        sequences: Sequence[TokenSequence],
        positions: Sequence[int],  # one of each sequence, before the one that predicts its last token
        reference: Tensor | None,  # (M, V)
        replace: bool,
    ) -> None:
        self.model, self.name, self.module, self.precise = model, name, module, precise
        self.reference, self.replace = reference, replace
        self.first_row = first_rows(sequences)
        self.tails = list(self._read(sequences, positions))

    def __call__(
        self,
        offsets: Tensor,  # (m, d_v)
        chosen: Sequence[int] | None = None,  # (m,) sequences; None = all
    ) -> tuple[Tensor, Tensor]:  # (m,), (m, d_v)
        """ValueError where the module takes no part in a forward on text."""
        wanted = range(len(self.first_row) - 1) if chosen is None else chosen
        place_of = {member: place for place, member in enumerate(wanted)}
        losses = torch.zeros(len(place_of), dtype=self.precise, device=self.model.device)
        gradients = torch.zeros_like(offsets)
        with same_bits():
            for tails in self.tails:
                rows = [row for row, member in enumerate(tails.members) if member in place_of]
                if not rows:
                    continue
                some = tails if len(rows) == len(tails.members) else tails.part(rows)
                here = torch.tensor([place_of[member] for member in some.members])
                loss, gradient = self._of(some, offsets[here.to(offsets.device)])
                losses[here.to(losses.device)] = loss
                gradients[here.to(offsets.device)] = gradient.to(gradients)
        return losses, gradients

    def _of(self, tails: _Tails, offsets: Tensor) -> tuple[Tensor, Tensor]:  # (B,), (B, d_v)
        moved = offsets.detach().to(self.model.device, self.precise).requires_grad_(True)
        before = tails.before
        read = Read(before.members, before.mask, before.cache and select(before.cache, None), before.logits)
        with torch.enable_grad(), hooks({self.module: _mover(tails.at, moved, tails.ids.shape, self.replace)}):
            logits = self.model.read_on(read, tails.ids.to(self.model.device), (tails.rows, tails.positions))
            require_ran([self.name], [self.name] * logits.requires_grad)
            each = self._token_losses(logits.to(self.precise), tails)
            rows = tails.rows.to(each.device)
            counts = torch.bincount(tails.rows, minlength=len(tails.members)).to(each)
            own = each.new_zeros(len(tails.members)).index_add(0, rows, each / counts[rows])
            (gradient,) = torch.autograd.grad(own.sum(), moved)
        return own.detach(), gradient

    def _token_losses(self, logits: Tensor, tails: _Tails) -> Tensor:  # (M, V) -> (M,)
        if self.reference is None:
            return functional.cross_entropy(logits, tails.targets.to(logits.device), reduction="none")
        members = torch.tensor(tails.members)
        rows = self.first_row[members][tails.rows] + count_within(tails.rows)
        expected = self.reference[rows.to(self.reference.device)].to(logits).log_softmax(-1)
        return functional.kl_div(logits.log_softmax(-1), expected, reduction="none", log_target=True).sum(-1)

    # -- what comes before

    @torch.no_grad()
    def _read(self, sequences: Sequence[TokenSequence], positions: Sequence[int]) -> Iterator[_Tails]:
        """Batches, those with the longest ends first; a sequence with nothing before its position is in one of such."""
        keeps = self.model.can_read_on(max((len(s.ids) for s in sequences), default=0))
        begins = [at if keeps else 0 for at in positions]
        ends = [len(s.ids) - 1 - begin for s, begin in zip(sequences, begins, strict=True)]  # the last is predicted
        order = sorted(range(len(sequences)), key=lambda place: (begins[place] == 0, -ends[place], -begins[place]))
        while order:
            first, budget = order[0], self.model.compute_tokens
            size, longest = 0, 0
            for place in order:
                longest = max(longest, begins[place])
                kept = (size + 1) * (longest + ends[first])
                fits = (size + 1) * ends[first] <= budget and kept <= KEPT * budget
                if size and (not fits or (begins[place] == 0) != (begins[first] == 0)):
                    break
                size += 1
            yield self._tails(order[:size], sequences, positions, begins)
            order = order[size:]

    def _tails(
        self,
        members: list[int],
        sequences: Sequence[TokenSequence],
        positions: Sequence[int],
        begins: Sequence[int],
    ) -> _Tails:
        chosen = [sequences[member] for member in members]
        cuts = [begins[member] for member in members]
        ends = [list(s.ids[cut:-1]) for s, cut in zip(chosen, cuts, strict=True)]
        ids = torch.full((len(members), max(map(len, ends))), PADDING)
        for row, own in enumerate(ends):
            ids[row, : len(own)] = torch.tensor(own)
        answers = torch.tensor([s.answer_length for s in chosen])
        rows = torch.arange(len(chosen)).repeat_interleave(answers)
        starts = torch.tensor([s.answer_start - 1 - cut for s, cut in zip(chosen, cuts, strict=True)])
        return _Tails(
            members,
            ids,
            torch.tensor([positions[member] for member in members]) - torch.tensor(cuts),
            rows,
            starts[rows] + count_within(rows),
            torch.tensor([token for s in chosen for token in s.ids[s.answer_start :]]),
            self.model.read_heads([s.ids[:cut] for s, cut in zip(chosen, cuts, strict=True)]),
        )


@contextlib.contextmanager
def hooks(functions: Mapping[nn.Module, Callable[..., object]]) -> Iterator[None]:
    """On each module's forward, as long as the context lasts."""
    handles = [module.register_forward_hook(function) for module, function in functions.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mover(
    at: Tensor,  # (B,)
    offsets: Tensor,  # (B, d_v)
    shape: torch.Size,  # (B, T)
    replace: bool,
) -> Callable[..., Tensor]:
    def move(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        where = torch.arange(len(at), device=output.device), at.to(output.device)
        moved = output.reshape(*shape, -1).clone()  # (B, T, d_v); some families flatten (B, T)
        there = offsets.to(output.device)
        moved[where] = (there if replace else moved[where] + there).to(output.dtype)
        return moved.reshape(output.shape)

    return move
