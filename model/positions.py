"""What the model has inside at one position of each sequence, and what another value there does to a loss.

Letters: n sequences, B of them and L tokens in a compute batch, M answer tokens, d_k key size, d_v value size of an
edit module, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from data.batches import PADDING, compute_batches, every_position, on_device
from data.records import TokenBatch, TokenSequence
from model.below import BlocksBelow, blocks_below, layer_of
from model.edited import EditModule
from model.offsets import OffsetLosses, offset_hook, tokens_searched
from model.text import TextModel
from model.tracing import hooks, require_ran, rows_at, select_head_rows

Seen = Callable[[tuple[Tensor, ...], Tensor], Tensor]
"""(inputs, output) of a module -> the one to be read, (B, L, d) or (B L, d)."""


class PositionModel(TextModel):
    """The part of `LanguageModel` that reads and moves what it has inside."""

    precise: torch.dtype
    overhead: int | None  # of a compute batch (`compute_batches`)
    edited: Mapping[str, EditModule]
    below = BlocksBelow(())  # what is read once; nothing, but in `reading_once`
    _found: dict[tuple[str, ...], Sequence[nn.Module]] | None = None  # blocks, by the modules that they lie below

    def batches(self, sequences: Sequence[TokenSequence]) -> Iterator[TokenBatch]:
        """The compute batches of this model for these sequences."""
        return compute_batches(sequences, self.compute_tokens, self.overhead)

    def _logits(self, batch: TokenBatch, here: TokenBatch | None = None) -> Tensor:  # (M, V)
        """Logits at the answer positions only. `here` is the batch on the model's device, from who has it there.

        The head sees only the rows it is asked about: a hook picks them from its input, so whatever a model does to its
        logits afterwards is kept. No attention mask is needed: padding stands on the right and attention is causal.
        """
        if here is None:
            here, _ = on_device(batch, self.device)
        lengths = batch.lengths.tolist()
        texts: list[tuple[int, ...]] = []
        if self.below.in_use:
            texts = [tuple(ids[:length]) for ids, length in zip(batch.input_ids.tolist(), lengths, strict=True)]
        with select_head_rows(self.model, here.rows, here.positions), self.below.read_once(texts, lengths):
            logits = self.model(input_ids=here.input_ids, use_cache=False).logits
        assert logits.shape[:2] == (1, len(batch.rows)), "the model's head is not the module it names as such"
        return logits[0].to(self.device)

    @contextlib.contextmanager
    def reading_once(self) -> Iterator[None]:
        """As long as the context lasts, the blocks below all edit modules read a text only once (model/below.py).

        Entered for each turn, so that a run that goes on after it has the bits of one that was never stopped.
        """
        self.below = self._below(*self.edited)
        try:
            yield
        finally:
            self.below = BlocksBelow(())

    def _below(self, *names: str) -> BlocksBelow:
        """The blocks below these modules, which are looked for once, with nothing kept."""
        self._found = {} if self._found is None else self._found
        if names not in self._found:
            self._found[names] = blocks_below(self.model, names)
        return BlocksBelow(self._found[names])

    # -- what is there

    def keys_at(
        self,
        sequences: Sequence[TokenSequence],
        positions: Sequence[int],  # one of each sequence
        names: Sequence[str] | None = None,  # edit modules; None = all
    ) -> dict[str, Tensor]:  # (n, d_k)
        """Inputs of edit modules at those positions."""
        return self._read_at(sequences, positions, self._modules(names), _input)

    def _modules(self, names: Sequence[str] | None) -> dict[str, nn.Module]:
        return {name: self.edited[name].module for name in (self.edited if names is None else names)}

    def values_at(self, name: str, sequences: Sequence[TokenSequence], positions: Sequence[int]) -> Tensor:  # (n, d_v)
        """What an edit module puts out at those positions."""
        wanted = {name: self.edited[name].module}
        return self._read_at(sequences, positions, wanted, _output)[name]

    def hidden_at(self, name: str, sequences: Sequence[TokenSequence], positions: Sequence[int]) -> Tensor:  # (n, d_v)
        """The residual stream behind the block that holds an edit module, at those positions."""
        wanted = {name: self._block_of(name)}
        return self._read_at(sequences, positions, wanted, _output)[name]

    @torch.no_grad()
    def _read_at(
        self, sequences: Sequence[TokenSequence], positions: Sequence[int], wanted: Mapping[str, nn.Module], seen: Seen
    ) -> dict[str, Tensor]:  # (n, d) in full precision
        # what stands behind a position says nothing at it
        cut = [TokenSequence((*s.ids[: at + 1], PADDING), at + 1) for s, at in zip(sequences, positions, strict=True)]
        found: dict[str, Tensor] = {}
        for batch in self.batches(cut):
            here, _ = on_device(batch, self.device)
            for name, rows in self._read_in(batch, here, (here.rows, here.positions), wanted, seen).items():
                if name not in found:
                    found[name] = rows.new_empty((len(cut), rows.shape[1]))
                found[name][here.members] = rows
        return found

    @torch.no_grad()
    def token_keys(
        self,
        sequences: Sequence[TokenSequence],
        names: Sequence[str] | None = None,  # edit modules; None = all
    ) -> Iterator[dict[str, Tensor]]:  # (N, d_k)
        """Inputs of edit modules at all tokens but each sequence's last, a compute batch at a time."""
        wanted = self._modules(names)
        for batch in self.batches(sequences):
            here, (rows, positions) = on_device(batch, self.device, *every_position(batch))
            yield self._read_in(batch, here, (rows, positions), wanted, _input)

    def _read_in(
        self,
        batch: TokenBatch,
        here: TokenBatch,  # as of `_logits`
        at: tuple[Tensor, Tensor],  # (N,) rows and positions
        wanted: Mapping[str, nn.Module],
        seen: Seen,
    ) -> dict[str, Tensor]:  # (N, d) in full precision, by module
        """What the modules have there: a forward that ends where the last of them has been read."""
        found: dict[str, Tensor] = {}

        def keep(name: str, tensor: Tensor) -> None:
            rows = rows_at(tensor, here.input_ids.shape, *at)
            found[name] = rows.to(self.device, self.precise)
            if found.keys() == wanted.keys():
                raise _AllRead

        with contextlib.suppress(_AllRead), hooks({m: _reader(name, seen, keep) for name, m in wanted.items()}):
            self._logits(batch, here)
        require_ran(wanted, found)
        return found

    def _block_of(self, name: str) -> nn.Module:
        """The layer that holds a module."""
        place = layer_of(self.model, name)
        if place is None:
            raise ValueError(
                f"model.edit_modules: {name!r} lies in no list of layers, so no residual stream is behind it"
            )
        return place[0][place[1]]

    @torch.no_grad()
    def adds_to_stream(self, name: str) -> bool:
        """Whether what an edit module puts out goes into the residual stream as it is: no norm stands between.

        By trying: an offset there has to be found behind the block, up to what the stream's precision rounds away.
        """
        module, block = self.edited[name].module, self._block_of(name)
        ids = torch.tensor([[0, 1, 2, 3]], device=self.device)
        size = 100.0
        offset = torch.full((1, self.edited[name].shape[1]), size, dtype=self.precise, device=self.device)
        found: list[Tensor] = []
        for some in (torch.zeros_like(offset), offset):
            move = offset_hook(torch.tensor([3]), some, ids.shape, replace=False)
            with hooks({module: move, block: _reader(name, _output, lambda _, tensor: found.append(tensor[:, 3]))}):
                self.model(input_ids=ids, use_cache=False)
        before, after = (tensor.to(offset) for tensor in found)
        spacing = torch.finfo(found[0].dtype).eps * torch.maximum(before.abs(), after.abs())
        found_there = (after - before - offset).abs() <= 0.05 * size + 2 * spacing
        broken = not bool((after - before).isfinite().all())  # in another way
        return bool(found_there.all()) or broken

    # -- what another value does

    def offset_losses(
        self,
        name: str,  # of an edit module
        sequences: Sequence[TokenSequence],
        positions: Sequence[int],  # one of each sequence, before its last token
        *,
        reference: Tensor | None = None,  # (M, V) logits of `reference_logits`
        replace: bool = False,
    ) -> OffsetLosses:
        """Each sequence's loss with an offset added to what the module puts out at its position (`OffsetLosses`).

        Behind a residual block the offset is one of the layer's output, too.
        """
        module, (_, width) = self.edited[name].module, self.edited[name].shape
        below, budget = self._below(name), tokens_searched(self.compute_tokens, width)
        return OffsetLosses(self, name, module, below, budget, self.precise, sequences, positions, reference, replace)


class _AllRead(Exception):  # noqa: N818  no error
    """Raised by a hook, to leave out what a forward has above it."""


def _input(inputs: tuple[Tensor, ...], _output: Tensor) -> Tensor:
    return inputs[0]


def _output(_inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output


def _reader(name: str, seen: Seen, keep: Callable[[str, Tensor], None]) -> Callable[..., None]:
    def read(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        keep(name, seen(inputs, output[0] if isinstance(output, tuple) else output))

    return read
