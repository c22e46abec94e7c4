"""What an offset at one position of each sequence does to its loss, at any number of offsets.

No offset moves what stands before its position, which is read once and its keys and values kept, nor the blocks below
its own. So each costs the forward and backward of the tokens from the position on, through the blocks from its own on.

Letters: n sequences, B of them in a batch, T tokens from the position on (a tail), M answer tokens, d_v value size of
an edit module, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from data.batches import on_device, padded
from data.records import TokenSequence, row_offsets
from model.below import BlocksBelow
from model.text import KEPT, CachedPrompts, TextModel
from model.tracing import answer_row_indices, hooks, require_ran, same_bits

# Hidden numbers, tokens times width, that a search differentiates at one time: for its backward all
# layers keep hundreds of such arrays. 2,048 tokens of a 7B suffice for products that do not wait for memory.
SEARCHED = 1 << 23


def tokens_searched(compute_tokens: int, width: int) -> int:
    """Of a batch of tails, at most."""
    return min(compute_tokens, max(1, SEARCHED // width))


class OffsetLosses:
    """Each sequence's loss and its gradient, as functions of an offset to what a module puts out at its position.

    The loss is the mean of -log p over the sequence's answer tokens or, with `reference`, of KL(reference || model)
    there. With `replace`, the offset takes the place of the module's output. Nothing below the offsets is
    differentiated. Holds for the weights that the model has now.
    """

    def __init__(
        self,
        model: TextModel,
        name: str,  # of the edit module
        module: nn.Module,
        below: BlocksBelow,
        budget: int,  # tokens of a batch of tails
        precise: torch.dtype,  # of losses and gradients
        sequences: Sequence[TokenSequence],
        positions: Sequence[int],  # one of each sequence, before its last token, which is not read
        reference: Tensor | None,  # (M, V)
        replace: bool,
    ) -> None:
        self.model, self.name, self.module, self.below = model, name, module, below
        self.budget, self.precise, self.replace = budget, precise, replace
        self.expected = None if reference is None else reference.to(precise).log_softmax(-1)
        self.first_row = row_offsets(sequences)
        keeps = model.can_extend(max((len(s.ids) for s in sequences), default=0))
        self.cuts = [at if keeps else 0 for at in positions]
        self.tails = [
            TokenSequence(s.ids[cut:], s.answer_start - cut) for s, cut in zip(sequences, self.cuts, strict=True)
        ]
        self.at = torch.tensor(positions) - torch.tensor(self.cuts)  # (n,) where the offset is in each tail
        self.before = list(self._prefilled(sequences))

    def __call__(
        self,
        offsets: Tensor,  # (m, d_v)
        chosen: Sequence[int] | None = None,  # (m,) sequences; None = all
    ) -> tuple[Tensor, Tensor]:  # (m,), (m, d_v)
        """ValueError where the module takes no part in a forward on text."""
        wanted = range(len(self.tails)) if chosen is None else chosen
        row_of = {member: i for i, member in enumerate(wanted)}
        losses = torch.zeros(len(row_of), dtype=self.precise, device=self.model.device)
        gradients = torch.zeros_like(offsets)
        with same_bits():
            for before in self.before:
                rows = [row for row, member in enumerate(before.members) if member in row_of]
                if not rows:
                    continue
                cached = before.part(None if len(rows) == len(before.members) else rows)
                here = torch.tensor([row_of[member] for member in cached.members])
                loss, gradient = self._of(cached, offsets[here.to(offsets.device)])
                losses[here.to(losses.device)] = loss
                gradients[here.to(offsets.device)] = gradient.to(gradients)
        return losses, gradients

    def _of(self, cached: CachedPrompts, offsets: Tensor) -> tuple[Tensor, Tensor]:  # (B,), (B, d_v)
        batch = padded(self.tails, cached.members)
        lengths = torch.tensor([self.tails[member].answer_length for member in cached.members])
        beside = self.at[batch.members], lengths[batch.rows], answer_row_indices(batch, self.first_row)
        here, (at, count, answer_rows) = on_device(batch, self.model.device, *beside)
        moved = offsets.detach().to(self.model.device, self.precise).requires_grad_(True)
        move = offset_hook(at, moved, batch.input_ids.shape, self.replace)
        once = self.below.read_once(cached.members, batch.lengths.tolist())
        with torch.enable_grad(), hooks({self.module: move}), once:
            logits = self.model.extend(cached, here.input_ids, (here.rows, here.positions))
            require_ran([self.name], [self.name] * logits.requires_grad)
            each = self._token_losses(logits.to(self.precise), here.targets, answer_rows)
            own = each.new_zeros(len(cached.members)).index_add(0, here.rows, each / count)
            (gradient,) = torch.autograd.grad(own.sum(), moved)
        return own.detach(), gradient

    def _token_losses(self, logits: Tensor, targets: Tensor, answer_rows: Tensor) -> Tensor:  # (M, V) -> (M,)
        if self.expected is None:
            return functional.cross_entropy(logits, targets, reduction="none")
        expected = self.expected[answer_rows.to(self.expected.device)].to(logits)
        return functional.kl_div(logits.log_softmax(-1), expected, reduction="none", log_target=True).sum(-1)

    @torch.no_grad()
    def _prefilled(self, sequences: Sequence[TokenSequence]) -> Iterator[CachedPrompts]:
        """What comes before, in batches: those with the longest tails first, and last those with nothing before."""
        cuts, ends = self.cuts, [len(tail.ids) - 1 for tail in self.tails]  # the last token is predicted
        order = sorted(range(len(sequences)), key=lambda i: (cuts[i] == 0, -ends[i], -cuts[i]))
        while order:
            size = self._fitting(order, ends)
            cached = self.model.prefill([sequences[i].ids[: cuts[i]] for i in order[:size]])
            yield dataclasses.replace(cached, members=order[:size], logits=torch.empty(0))  # which nobody reads
            order = order[size:]

    def _fitting(self, order: Sequence[int], ends: Sequence[int]) -> int:
        """How many of the sequences, from the first on, a batch takes: all with something before, or none."""
        first, budget, longest = order[0], self.budget, 0
        for size, i in enumerate(order):
            longest = max(longest, self.cuts[i])
            tokens, kept = (size + 1) * ends[first], (size + 1) * (longest + ends[first])
            unlike = (self.cuts[i] == 0) != (self.cuts[first] == 0)
            if size and (tokens > budget or kept > KEPT * budget or unlike):
                return size
        return len(order)


def offset_hook(
    at: Tensor,  # (B,)
    offsets: Tensor,  # (B, d_v)
    shape: torch.Size,  # (B, T)
    replace: bool,
) -> Callable[..., Tensor]:
    """A forward hook that adds an offset to what a module puts out at one position of each row, or puts it there."""

    def move(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        where = torch.arange(len(at), device=output.device), at.to(output.device)
        moved = output.reshape(*shape, -1).clone()  # (B, T, d_v); some families flatten (B, T)
        there = offsets.to(output.device)
        moved[where] = (there if replace else moved[where] + there).to(output.dtype)
        return moved.reshape(output.shape)

    return move
