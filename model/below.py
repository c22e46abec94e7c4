"""The blocks below all edits put out the same for a text, whatever is edited: they read it once a turn.

Later passes and steps of the turn start from the block of the lowest edit module. Where the edits lie near the top,
that leaves a small part of a forward.

Letters: B texts, L tokens, d size of the residual stream.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

# Tokens that are kept at most: of a turn of 100 facts, ten times over; of a 7B model in bf16, 256 MiB.
KEPT_TOKENS = 32_768


class BlocksBelow:
    """Blocks that come one after another, from a model's first on, and what the last of them put out for texts."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.blocks = blocks
        self._kept: dict[Hashable, Tensor] = {}  # (L, d) by text
        self._room = KEPT_TOKENS
        self._beside: tuple[Any, ...] | None = None  # what a block puts out beside the stream; None = no tuple

    @property
    def in_use(self) -> bool:
        """Whether blocks are left out: not in inference mode, whose tensors no graph takes."""
        return bool(self.blocks) and not torch.is_inference_mode_enabled()

    @contextlib.contextmanager
    def read_once(
        self,
        texts: Sequence[Hashable],  # (B,)
        lengths: Sequence[int],  # (B,) tokens
    ) -> Iterator[None]:
        """Around a forward on these texts, padded on the right: the blocks take part where a text is new.

        Where it is not `in_use`, texts are not looked at.
        """
        if not self.in_use:
            yield
            return
        known = all(text in self._kept for text in texts)
        with self._left_out(texts) if known else self._keeping(texts, lengths):
            yield

    @contextlib.contextmanager
    def _keeping(self, texts: Sequence[Hashable], lengths: Sequence[int]) -> Iterator[None]:
        def keep(_block: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor | tuple[Any, ...]) -> None:
            stream = output[0] if isinstance(output, tuple) else output  # (B, L, d)
            self._beside = output[1:] if isinstance(output, tuple) else None
            for text, length, row in zip(texts, lengths, stream.detach(), strict=True):
                if text not in self._kept and length <= self._room:
                    self._kept[text] = row[:length].clone()
                    self._room -= length

        with self.blocks[-1].register_forward_hook(keep):
            yield

    @contextlib.contextmanager
    def _left_out(self, texts: Sequence[Hashable]) -> Iterator[None]:
        stream = pad_sequence([self._kept[text] for text in texts], batch_first=True)
        output = stream if self._beside is None else (stream, *self._beside)
        before = [vars(block).get("forward") for block in self.blocks]  # where a library has put one of its own
        for block in self.blocks:
            block.forward = lambda *_, **__: output
        try:
            yield
        finally:
            for block, forward in zip(self.blocks, before, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward


def blocks_below(model: Any, names: Sequence[str]) -> list[nn.Module]:
    """The layers before the first that holds one of these modules.

    Empty where one lies in no layer, and in a model that hands more from layer to layer than the residual stream.
    """
    found = [layer_of(model, name) for name in names]
    inside = [place for place in found if place is not None]
    if not inside or len(inside) < len(found) or any(layers is not inside[0][0] for layers, _ in inside):
        return []
    blocks = list(inside[0][0][: min(place for _, place in inside)])
    return blocks if blocks and _can_be_left_out(model, blocks) else []


def layer_of(model: nn.Module, name: str) -> tuple[nn.ModuleList, int] | None:
    """The outermost list of layers on the way to a module, and which of them holds it."""
    path = name.split(".")
    for length in range(1, len(path)):
        layers = model.get_submodule(".".join(path[:length]))
        if isinstance(layers, nn.ModuleList):
            return layers, int(path[length])
    return None


@torch.no_grad()
def _can_be_left_out(model: Any, blocks: Sequence[nn.Module]) -> bool:
    """By trying: whether a text's logits are the same when the blocks have read it, and another text since.

    Not where they, or what hears of them, fails: upper layers may ask lower ones for more than the stream, which may
    have more than one row a token. What the model cannot do at all, it says in its next forward.
    """
    device = next(model.parameters()).device
    below = BlocksBelow(blocks)
    logits = []
    for text in ((0, 1, 2, 3), (3, 2, 1), (0, 1, 2, 3)):
        try:
            with below.read_once([text], [len(text)]):
                logits.append(model(input_ids=torch.tensor([text], device=device), use_cache=False).logits)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # of a model's own code, which may raise anything
            return False
    return bool((logits[2] - logits[0]).norm() <= 1e-3 * logits[0].norm())
