"""What is asked about, and what the answer is made of.

Letters: d_k key size, d_v value size of an edit module.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch

from config.schema import EditPrecision, RunConfig
from harness.job import DTYPES
from model.language_model import COMPUTE_TOKENS
from model.source import Outline

SINGLE, DOUBLE = 4, 8  # bytes of a float32, of a float64
MOMENTS, FACTORS = "second moments", "factoring"  # parts of a run that come before its first turn
BEFORE_TURNS = (MOMENTS, FACTORS)


@dataclass(frozen=True)
class Facts:
    tokens: int  # of a question with its answer
    answer_tokens: int

    @property
    def before(self) -> int:
        """Tokens that stand before the one that predicts the answer's first."""
        return self.tokens - self.answer_tokens - 1


@dataclass(frozen=True)
class Item:
    name: str
    bytes: int
    about: str
    of_editor: bool = False  # it lies where the editor computes
    while_in: str | None = None  # kept for a part of a run only; None: from the first turn on to the end
    from_start: bool = False  # it is there before the first turn, too


@dataclass(frozen=True)
class Asked:
    """The run that is asked about."""

    cfg: RunConfig
    outline: Outline
    facts: Facts
    device: torch.device  # where the model will be

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(d_k, d_v) of each edit module."""
        return self.outline.shapes

    @property
    def number(self) -> int:
        """Bytes of a number that the model computes with."""
        return DTYPES[self.cfg.model.half].itemsize

    @property
    def is_mastered(self) -> bool:
        """Whether float32 masters of the edited weights take the updates."""
        return self.cfg.model.edit_precision is EditPrecision.master and self.number < SINGLE

    @cached_property
    def entries(self) -> int:
        """Of all edited weights together."""
        return sum(map(prod, self.shapes.values()))

    @property
    def copy(self) -> int:
        """Bytes of a snapshot of the edited weights, in the precision that takes the updates."""
        return self.entries * (SINGLE if self.is_mastered else self.number)

    @property
    def turn(self) -> int:
        """Facts of a turn, those of earlier turns included."""
        return self.cfg.dataset.n_edits + self.cfg.editor.replay

    @property
    def budget(self) -> int:
        """Tokens of a compute batch."""
        return self.cfg.model.compute_tokens or COMPUTE_TOKENS.get(self.device.type, COMPUTE_TOKENS["cpu"])

    def batch(self, each: Facts) -> int:
        """Questions that fill a compute batch."""
        return max(1, self.budget // each.tokens)

    def edits(self, where_unknown: int) -> tuple[int, str]:
        """Facts that a run edits, and what that is by; so many of them where num_seq leaves it to the data."""
        if self.cfg.num_seq is None:
            return where_unknown, f"of {where_unknown:,} facts, for num_seq is null"
        return self.cfg.num_seq * self.cfg.dataset.n_edits, f"of num_seq={self.cfg.num_seq} turns"
