"""What every editor is, as the loop sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal, Protocol

from torch import Tensor

from data.records import Capture, LossTerm, LowRankUpdate, Phase, TokenSequence

StatisticsScope = Literal["shape", "module"]
"""Running statistics are shared by all modules of a shape, or each module has its own."""


class Editor(Protocol):
    """Turns what a turn's facts did inside the model into weight updates.

    An editor knows module names and shapes, never a model or a data set; it opens no file and logs nothing. What must
    survive a restart is in `state_dict`.
    """

    def update(self, captures: Mapping[str, Capture], phase: Phase) -> dict[str, LowRankUpdate]:
        """The update of each captured module; called once a turn, in the order of the stream."""
        ...

    def statistics(self) -> dict[str, dict[str, float | None]]:
        """Numbers worth a line in the turns file, by group of modules that share them."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> object: ...


def shape_name(shape: tuple[int, int]) -> str:
    """How turns.jsonl, checkpoints and messages name the modules of one shape (d_k, d_v): 1536x576."""
    d_k, d_v = shape
    return f"{d_k}x{d_v}"


def statistics_group(name: str, shape: tuple[int, int], scope: StatisticsScope) -> str:
    """The name that a module's running statistics have: its shape's, where it shares them, or its own."""
    return shape_name(shape) if scope == "shape" else name


class CapturedTurn(Protocol):
    """What a turn's facts did inside the model, by edit module, and the loss they had."""

    @property
    def modules(self) -> Mapping[str, Capture]: ...

    @property
    def loss(self) -> float: ...


class EditableModel(Protocol):
    """The language model, as what trains an editor on it sees it."""

    def apply(self, updates: Mapping[str, LowRankUpdate], turn: int) -> object:
        """Add the updates to the weights of the edit modules."""
        ...

    def snapshot(self) -> dict[str, Tensor]: ...

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Put the weights of a snapshot back, bit for bit."""
        ...

    def restore_original(self) -> None:
        """Put the weights back as they were loaded, bit for bit."""
        ...

    def unedited(self) -> AbstractContextManager[None]:
        """The weights as they were loaded, for as long as the context lasts."""
        ...

    def is_original(self) -> bool:
        """Whether the weights are as they were loaded."""
        ...

    def reference_logits(self, sequences: Sequence[TokenSequence]) -> Tensor:  # (M, V)
        """The logits that predict each answer token, in order."""
        ...

    def losses(self, terms: Sequence[LossTerm]) -> list[float]:
        """Each term's mean loss, not weighted."""
        ...

    def weight_gradients(self, terms: Sequence[LossTerm]) -> tuple[dict[str, Tensor], list[float]]:
        """dL/dW (d_k, d_v) of each edit module for the weighted sum of the terms, and each term's mean loss."""
        ...
