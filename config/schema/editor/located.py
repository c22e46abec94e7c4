"""Locate, then edit: ROME, MEMIT and AlphaEdit."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from config.schema.checks import at_least, not_negative, positive
from config.schema.editor.base import CAPTURE_KEYS, MINI_BATCH, EditorConfig


class FactToken(Enum):
    """The position that holds a fact: the last token of the subject, or of the prompt."""

    subject_last = "subject_last"
    last = "last"


@dataclass
class LocateConfig(EditorConfig):
    """What ROME, MEMIT and AlphaEdit share: where a fact is, and how its target vector is found (DESIGN section 1)."""

    lr: float = 1.0
    """Has no effect: the step size of target vectors is v_lr."""
    fact_token: FactToken = FactToken.subject_last
    prefixes: int = 5
    """Generated texts that a fact is also put behind, one at a time, while its target vector and key are found."""
    prefix_tokens: int = 10
    """Tokens of each, after its first word."""
    v_num_grad_steps: int = 25
    """Steps of Adam for a target vector."""
    v_lr: float = 0.5
    """Their size."""
    v_weight_decay: float = 0.5
    """Weight of ||delta||^2 / ||h||^2."""
    kl_factor: float = 0.0625
    """Weight of the KL of what follows "{subject} is a"."""
    clamp_norm_factor: float = 0.75
    """Most that ||delta|| may be, in units of ||h||."""
    v_loss_stop: float = 0.05
    """A fact whose loss is smaller, in nats, is left; 0 = all steps."""

    MOST_PREFIXES: ClassVar[int] = 20

    def mistakes(self) -> list[str]:
        fewer = f"editor.prefixes={self.prefixes}: there are first words for {self.MOST_PREFIXES}; set that or less"
        return [
            *super().mistakes(),
            *at_least("editor.prefixes", self.prefixes, 0, "0 puts facts as they stand"),
            *([fewer] if self.prefixes > self.MOST_PREFIXES else []),
            *at_least("editor.prefix_tokens", self.prefix_tokens, 1),
            *at_least("editor.v_num_grad_steps", self.v_num_grad_steps, 1),
            *positive("editor.v_lr", self.v_lr),
            *not_negative("editor.v_weight_decay", self.v_weight_decay),
            *not_negative("editor.kl_factor", self.kl_factor),
            *positive("editor.clamp_norm_factor", self.clamp_norm_factor),
            *not_negative("editor.v_loss_stop", self.v_loss_stop),
        ]

    def unused(self) -> tuple[str, ...]:
        return ("lr", *CAPTURE_KEYS)

    def step_key(self) -> str:
        return "editor.v_lr"

    def unused_elsewhere(self) -> tuple[str, ...]:
        return (MINI_BATCH,)

    def ignored(self) -> dict[str, str]:
        return super().ignored() | ({} if self.prefixes else {"prefix_tokens": "editor.prefixes=0"})

    def asks_for_text(self) -> bool:
        return True


@dataclass
class RomeConfig(LocateConfig):
    """ROME: a fact at a time into one module."""

    moment_ridge: float = 1e-6
    """Added to the diagonal of the keys' second moments, in units of their mean eigenvalue, so that they are
    invertible in finite precision, or over little text."""

    def mistakes(self) -> list[str]:
        return [*super().mistakes(), *not_negative("editor.moment_ridge", self.moment_ridge)]

    def has_one_module(self) -> bool:
        return True


@dataclass
class MemitConfig(LocateConfig):
    """MEMIT: a turn's facts into several layers."""

    mom2_update_weight: float = 15_000.0
    """lambda, the weight of the keys' second moments over text."""
    moment_ridge: float = 1e-6
    """Added to their diagonal, in units of their mean eigenvalue."""
    keep_keys: bool = False
    """Whether keys of earlier turns are to stay where they are; false = as published."""

    def mistakes(self) -> list[str]:
        return [
            *super().mistakes(),
            *positive("editor.mom2_update_weight", self.mom2_update_weight),
            *not_negative("editor.moment_ridge", self.moment_ridge),
        ]


@dataclass
class AlphaEditConfig(LocateConfig):
    """AlphaEdit: MEMIT within the null space of keys over text."""

    nullspace_threshold: float = 0.02
    """Eigenvalues of the keys' second moments below it span the null space."""
    L2: float = 10.0
    """Ridge."""
    keep_keys: bool = True
    """Whether keys of earlier turns are to stay where they are; true = as published."""

    def mistakes(self) -> list[str]:
        return [
            *super().mistakes(),
            *positive("editor.nullspace_threshold", self.nullspace_threshold),
            *positive("editor.L2", self.L2),
        ]
