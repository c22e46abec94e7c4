"""What the model has inside at one position of each sequence, and what another value there does to a loss.

Letters: n sequences, B of them and L tokens in a compute batch, M answer tokens, d_k key size, d_v value size of an
edit module, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from data.batches import PADDING, compute_batches
from data.records import TokenBatch, TokenSequence, first_rows
from model.edited import EditModule
from model.text import TextModel
from model.tracing import count_within, head_sees, same_bits

Seen = Callable[[tuple[Tensor, ...], Tensor], Tensor]
"""(inputs, output) of a module -> the one to be read, (B, L, d) or (B L, d)."""


class PositionModel(TextModel):
    """The part of `LanguageModel` that reads and moves what it has inside."""

    precise: torch.dtype
    edited: Mapping[str, EditModule]

    def batches(self, sequences: Sequence[TokenSequence]) -> Iterator[TokenBatch]:
        """The compute batches of this model for these sequences."""
        return compute_batches(sequences, self.compute_tokens)

    def _logits(self, batch: TokenBatch) -> Tensor:  # (M, V)
        """Logits at the answer positions only.

        The head sees only the rows it is asked about: a hook picks them from its input, so whatever a model does to its
        logits afterwards is kept. No attention mask is needed: padding stands on the right and attention is causal.
        """
        at = (batch.rows.to(self.device), batch.positions.to(self.device))
        with head_sees(self.model, *at):
            logits = self.model(input_ids=batch.input_ids.to(self.device), use_cache=False).logits
        assert logits.shape[:2] == (1, len(batch.rows)), "the model's head is not the module it names as such"
        return logits[0].to(self.device)

    # -- what is there

    def keys_at(
        self,
        sequences: Sequence[TokenSequence],
        positions: Sequence[int],  # one of each sequence
        names: Sequence[str] | None = None,  # edit modules; None = all
    ) -> dict[str, Tensor]:  # (n, d_k)
        """Inputs of edit modules at those positions."""
        wanted = {name: self.edited[name].module for name in (self.edited if names is None else names)}
        return self._read_at(sequences, positions, wanted, lambda inputs, _: inputs[0])

    def values_at(self, name: str, sequences: Sequence[TokenSequence], positions: Sequence[int]) -> Tensor:  # (n, d_v)
        """What an edit module puts out at those positions."""
        wanted = {name: self.edited[name].module}
        return self._read_at(sequences, positions, wanted, lambda _, output: output)[name]

    def hidden_at(self, name: str, sequences: Sequence[TokenSequence], positions: Sequence[int]) -> Tensor:  # (n, d_v)
        """The residual stream behind the block that holds an edit module, at those positions."""
        wanted = {name: self._block_of(name)}
        return self._read_at(sequences, positions, wanted, lambda _, output: output)[name]

    @torch.no_grad()
    def _read_at(
        self, sequences: Sequence[TokenSequence], positions: Sequence[int], wanted: Mapping[str, nn.Module], seen: Seen
    ) -> dict[str, Tensor]:  # (n, d) in full precision
        # what stands behind a position says nothing at it
        cut = [TokenSequence((*s.ids[: at + 1], PADDING), at + 1) for s, at in zip(sequences, positions, strict=True)]
        found: dict[str, Tensor] = {}
        for batch in self.batches(cut):

            def keep(name: str, tensor: Tensor, batch: TokenBatch = batch) -> None:
                at = batch.rows.to(tensor.device), batch.positions.to(tensor.device)
                rows = tensor.reshape(*batch.input_ids.shape, -1)[at]
                if name not in found:
                    found[name] = rows.new_empty((len(cut), rows.shape[1]), dtype=self.precise, device=self.device)
                found[name][batch.members.to(self.device)] = rows.to(found[name])

            with _hooks({module: _reader(name, seen, keep) for name, module in wanted.items()}):
                self._logits(batch)
        require_ran(wanted, found)
        return found

    @torch.no_grad()
    def token_keys(self, sequences: Sequence[TokenSequence]) -> Iterator[dict[str, Tensor]]:  # (N, d_k)
        """Inputs of the edit modules at all tokens but each sequence's last, a compute batch at a time."""
        wanted = {name: edited.module for name, edited in self.edited.items()}
        for batch in self.batches(sequences):
            found: dict[str, Tensor] = {}
            inside = torch.arange(batch.input_ids.shape[1]) < batch.lengths[:, None]  # (B, L)

            def keep(name: str, tensor: Tensor, found: dict[str, Tensor] = found, inside: Tensor = inside) -> None:
                rows = tensor.reshape(*inside.shape, -1)[inside.to(tensor.device)]
                found[name] = rows.to(self.device, self.precise)

            with _hooks({module: _reader(name, lambda inputs, _: inputs[0], keep) for name, module in wanted.items()}):
                self._logits(batch)
            require_ran(wanted, found)
            yield found

    def _block_of(self, name: str) -> nn.Module:
        """The layer that holds a module: the member of the outermost list of modules on the way to it."""
        path = name.split(".")
        for length in range(1, len(path)):
            if isinstance(self.model.get_submodule(".".join(path[:length])), nn.ModuleList):
                return self.model.get_submodule(".".join(path[: length + 1]))
        raise ValueError(f"model.edit_modules: {name!r} lies in no list of layers, so no residual stream is behind it")

    # -- what another value does

    def loss_with_offset(
        self,
        name: str,  # of an edit module
        sequences: Sequence[TokenSequence],
        positions: Sequence[int],  # one of each sequence, before its last token
        offsets: Tensor,  # (n, d_v)
        *,
        reference: Tensor | None = None,  # (M, V) logits of `reference_logits`
        replace: bool = False,
    ) -> tuple[Tensor, Tensor]:  # (n,), (n, d_v)
        """Each sequence's loss with its offset added to the module's output at its position; dloss/doffset.

        The loss is the mean of -log p over the sequence's answer tokens or, with `reference`, of KL(reference || model)
        there. Behind a residual block the offset is one of the layer's output, too. With `replace`, the offset is what
        the module puts out there. Graph and gradients end at the offsets: nothing below them is differentiated.
        """
        first_row = first_rows(sequences)
        lengths = first_row.diff()
        losses = torch.zeros(len(sequences), dtype=self.precise, device=self.device)
        gradients = torch.zeros_like(offsets)
        where = torch.tensor(positions, dtype=torch.int64)
        with same_bits():
            for batch in self.batches(sequences):
                here = batch.members.to(offsets.device)
                moved = offsets[here].detach().to(self.device, self.precise).requires_grad_(True)
                with _hooks({self.edited[name].module: _mover(where[batch.members], moved, batch, replace)}):
                    logits = self._logits(batch).to(self.precise)
                if not logits.requires_grad:
                    require_ran([name], [])
                expected = None if reference is None else reference[places(batch, first_row).to(reference.device)]
                each = _token_losses(logits, batch, expected) / lengths[batch.members][batch.rows].to(self.device)
                own = each.new_zeros(len(batch.members)).index_add(0, batch.rows.to(self.device), each)
                (gradient,) = torch.autograd.grad(own.sum(), moved)
                losses[batch.members.to(self.device)] = own.detach()
                gradients[here] = gradient.to(gradients)
        return losses, gradients


def places(
    batch: TokenBatch,
    first_row: Tensor,  # of `first_rows`
) -> Tensor:  # (M,)
    """Where the batch's answer tokens stand when those of all sequences are counted in order."""
    return first_row[batch.members][batch.rows] + count_within(batch.rows)


def _token_losses(
    logits: Tensor,  # (M, V)
    batch: TokenBatch,
    reference: Tensor | None,  # (M, V)
) -> Tensor:  # (M,)
    if reference is None:
        return functional.cross_entropy(logits, batch.targets.to(logits.device), reduction="none")
    expected = reference.to(logits).log_softmax(-1)
    return functional.kl_div(logits.log_softmax(-1), expected, reduction="none", log_target=True).sum(-1)


@contextlib.contextmanager
def _hooks(hooks: Mapping[nn.Module, Callable[..., object]]) -> Iterator[None]:
    """On each module's forward, as long as the context lasts."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _reader(name: str, seen: Seen, keep: Callable[[str, Tensor], None]) -> Callable[..., None]:
    def read(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        keep(name, seen(inputs, output[0] if isinstance(output, tuple) else output))

    return read


def _mover(
    positions: Tensor,  # (B,)
    offsets: Tensor,  # (B, d_v)
    batch: TokenBatch,
    replace: bool,
) -> Callable[..., Tensor]:
    def move(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        at = torch.arange(len(positions), device=output.device), positions.to(output.device)
        moved = output.reshape(*batch.input_ids.shape, -1).clone()  # (B, L, d_v); some families flatten (B, L)
        there = offsets.to(output.device)
        moved[at] = (there if replace else moved[at] + there).to(output.dtype)
        return moved.reshape(output.shape)

    return move


def require_ran(wanted: Iterable[str], found: Collection[str]) -> None:
    """ValueError where an edit module was not called."""
    silent = [name for name in wanted if name not in found]
    if silent:
        raise ValueError(f"model.edit_modules: {silent[0]!r} takes no part in a forward on text; leave it out")
