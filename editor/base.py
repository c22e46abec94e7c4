"""What every editor is, as the loop sees it, and what it sees of the language model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from data.records import (
    Allocate,
    Capture,
    FactContexts,
    LossTerm,
    LowRankUpdate,
    Phase,
    TokenSequence,
    Turn,
    TurnCapture,
    WeightChange,
)

StatisticsScope = Literal["shape", "module"]
"""Running statistics are shared by all modules of a shape, or each module has its own."""


@dataclass(frozen=True)
class Edit:
    """What an editor did with the facts of a turn."""

    loss: float | None  # of the facts before, nats a token; None where the turn was passed over
    updates: Mapping[str, LowRankUpdate]  # of the whole turn; empty where no weight changed
    changes: Mapping[str, WeightChange]  # what they did, by the same names
    seconds: Mapping[str, float]  # by part, devices synchronised
    details: Mapping[str, Any] = field(default_factory=dict)  # what else is worth a place in the turn's line


class State(Protocol):
    """What must survive a restart, and what is worth a line in turns.jsonl."""

    def statistics(self) -> dict[str, dict[str, float | None]]:
        """Numbers by group of modules that share them."""

    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> object: ...


class Editor(State, Protocol):
    """Writes the facts of a turn into the model.

    An editor knows module names and shapes, never a model's family or a data set; it opens no file and logs nothing.
    """

    def edit(self, model: EditableModel, turn: Turn) -> Edit:
        """The model has the facts afterwards; called once a turn, in the order of the stream."""


class UpdateRule(State, Protocol):
    """The rule of a gradient-capture editor: weight updates from what a turn's facts did inside the model.

    `editor.capture.CaptureEditor` makes an Editor of it.
    """

    def update(self, captures: Mapping[str, Capture], phase: Phase) -> dict[str, LowRankUpdate]:
        """The update of each captured module; called once a pass, in the order of the stream."""


@runtime_checkable
class TurnRule(Protocol):
    """A rule that is to know where a turn begins, of which it otherwise sees passes alone."""

    def begin(self, phase: Phase) -> bool:
        """Called before a turn's first pass; False leaves the turn out, as where warm-up turns have been enough."""


def shape_name(shape: tuple[int, int]) -> str:
    """How turns.jsonl, checkpoints and messages name the modules of one shape (d_k, d_v): 1536x576."""
    d_k, d_v = shape
    return f"{d_k}x{d_v}"


def statistics_group(name: str, shape: tuple[int, int], scope: StatisticsScope) -> str:
    """The name that a module's running statistics have: its shape's, where it shares them, or its own."""
    return shape_name(shape) if scope == "shape" else name


SecondMoments = Callable[[str], Tensor]
"""Module -> C = E[k k^T] (d_k, d_k) of its keys over text."""


OfMoments = Callable[[Tensor], Mapping[str, Tensor]]
"""What follows from a C, and takes so long that it is worth keeping."""


@dataclass(frozen=True)
class LocateInputs:
    """What locate-then-edit editors are given beside the model: they read no text and open no file."""

    contexts: Callable[[Turn], Sequence[FactContexts]]  # of each fact of a turn
    second_moments: SecondMoments
    keep: Callable[[str, Tensor, OfMoments], Mapping[str, Tensor]] | None = None

    def of_moments(
        self,
        name: str,  # of the module
        what: str,  # it is, with all that decides it beside C
        make: OfMoments,
    ) -> Mapping[str, Tensor]:
        """What `make` makes of a module's C, or made of it in an earlier run."""
        moments = self.second_moments(name)
        return make(moments) if self.keep is None else self.keep(what, moments, make)


class OffsetLosses(Protocol):
    """Losses at any offsets, of all the sequences or of those `chosen` (m of them)."""

    def __call__(
        self,
        offsets: Tensor,  # (m, d_v)
        chosen: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:  # (m,), (m, d_v)
        """Each sequence's loss, and dloss/doffset."""


class EditableModel(Protocol):
    """The language model, as editors and what trains them see it."""

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(d_k, d_v) of each edit module."""

    @property
    def devices(self) -> Sequence[torch.device]: ...

    @property
    def input_noise(self) -> float:
        """By how much of its norm a module's input moves with what shares its compute batch: as far as was seen."""

    def tell(self, share: float) -> None:
        """So much of the turn's work is done: an editor whose turns may be long says so to whoever waits."""

    def capture(self, turn: Turn, every_token: bool = False, allocate: Allocate | None = None) -> TurnCapture:
        """Keys and value gradients of the turn's facts at each edit module (DESIGN section 1)."""

    def apply(self, updates: Mapping[str, LowRankUpdate]) -> dict[str, WeightChange]:
        """Add the updates to the weights of the edit modules: all of them, or, with a FloatingPointError, none."""

    def wrap(self, name: str, forward: Callable[[Tensor, Tensor], Tensor]) -> None:
        """From now on `forward(inputs, outputs)` is what an edit module puts out: for edits beside the weights."""

    def keys_at(
        self,
        sequences: Sequence[TokenSequence],
        positions: Sequence[int],  # one of each sequence
        names: Sequence[str] | None = None,  # None = all
    ) -> dict[str, Tensor]:  # (n, d_k)
        """Inputs of edit modules at one position of each sequence."""

    def values_at(self, name: str, sequences: Sequence[TokenSequence], positions: Sequence[int]) -> Tensor:  # (n, d_v)
        """What an edit module puts out there."""

    def hidden_at(self, name: str, sequences: Sequence[TokenSequence], positions: Sequence[int]) -> Tensor:  # (n, d_v)
        """The residual stream there, behind the block that holds an edit module."""

    def adds_to_stream(self, name: str) -> bool:
        """Whether what an edit module puts out goes into the residual stream as it is: no norm stands between."""

    def offset_losses(
        self,
        name: str,
        sequences: Sequence[TokenSequence],
        positions: Sequence[int],
        *,
        reference: Tensor | None = None,  # (M, V) of `reference_logits`
        replace: bool = False,
    ) -> OffsetLosses:
        """Each sequence's loss as a function of an offset to what an edit module puts out there.

        The loss is the mean over its answer tokens of -log p or, with `reference`, of KL(reference || model). With
        `replace`, the offset is what the module puts out. Holds for the weights that the model has now.
        """

    def snapshot(self) -> dict[str, Tensor]: ...

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Put the weights of a snapshot back, bit for bit."""

    def restore_original(self) -> None:
        """Put the weights back as they were loaded, bit for bit."""

    def unedited(self) -> AbstractContextManager[None]:
        """The weights as they were loaded, for as long as the context lasts."""

    def is_original(self) -> bool:
        """Whether the weights are as they were loaded."""

    def reference_logits(self, sequences: Sequence[TokenSequence]) -> Tensor:  # (M, V)
        """The logits that predict each answer token, in order."""

    def losses(self, terms: Sequence[LossTerm]) -> list[float]:
        """Each term's mean loss, not weighted."""

    def weight_gradients(self, terms: Sequence[LossTerm]) -> tuple[dict[str, Tensor], list[float]]:
        """dL/dW (d_k, d_v) of each edit module for the weighted sum of the terms, and each term's mean loss."""


def finite_loss(model: EditableModel, term: LossTerm) -> float:
    """The term's mean loss on the model as it is now; FloatingPointError where that is not finite."""
    (loss,) = model.losses([term])
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss of the turn's facts is {loss} after the edit; set a smaller editor.lr")
    return loss
