"""Editors that learn by steps of an optimiser: fine-tuning, and the memories beside the weights."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from config.schema.checks import at_least, fraction, not_negative, positive
from config.schema.editor.base import CAPTURE_KEYS, MINI_BATCH, EditorConfig


class Order(Enum):
    """Whether a mini-batch takes all of its steps before the next one begins, or all take a step in each epoch."""

    depth = "depth"
    breadth = "breadth"


class AnswerLoss(Enum):
    """What predicts the answer's tokens: those before each, teacher-forced, or the prompt's last one all of them."""

    tokens = "tokens"
    prompt_last = "prompt_last"


@dataclass
class SteppingConfig(EditorConfig):
    """Editors that write a turn's facts by gradient steps of their own, of size editor.lr."""

    num_steps: int = 25
    """Steps, at most: of each mini-batch of facts; GRACE's is the turn."""
    stop_loss: float = 0.01
    """Nats a token: where the loss is smaller, no step is taken any more; 0 = all num_steps."""

    def mistakes(self) -> list[str]:
        return [
            *super().mistakes(),
            *at_least("editor.num_steps", self.num_steps, 1),
            *not_negative("editor.stop_loss", self.stop_loss),
        ]

    def unused(self) -> tuple[str, ...]:
        return CAPTURE_KEYS

    def unused_elsewhere(self) -> tuple[str, ...]:
        return (MINI_BATCH,)


@dataclass
class FineTuningConfig(SteppingConfig):
    """FT-L, FT-M and LocFT-BF: Adam on the weights of the edit modules."""

    facts_per_step: int | None = 1
    """Facts a mini-batch; null = all of the turn."""
    order: Order = Order.depth
    answer_loss: AnswerLoss = AnswerLoss.tokens
    norm_constraint: float | None = None
    """Largest |entry| of what a turn changes in a weight; null = no bound."""

    def mistakes(self) -> list[str]:
        return [
            *super().mistakes(),
            *at_least("editor.facts_per_step", self.facts_per_step, 1, "null takes all facts of the turn"),
            *positive("editor.norm_constraint", self.norm_constraint),
        ]

    def unused_elsewhere(self) -> tuple[str, ...]:
        return (MINI_BATCH, "editor_device")


@dataclass
class MemoryConfig(SteppingConfig):
    """Editors that keep what they learn beside the weights of one edit module."""

    num_steps: int = 100
    stop_loss: float = 0.0

    def has_one_module(self) -> bool:
        return True


@dataclass
class GraceConfig(MemoryConfig):
    """GRACE: a codebook of inputs, and what is put out near them."""

    eps_init: float = 1.0
    """Radius of a new entry, in the unit of the module's inputs (Euclidean)."""

    def mistakes(self) -> list[str]:
        return [*super().mistakes(), *positive("editor.eps_init", self.eps_init)]


@dataclass
class WiseConfig(MemoryConfig):
    """WISE: a side memory of one module, and a router."""

    facts_per_step: int | None = 1
    """Facts a mini-batch, which takes all its steps before the next begins; null = all that a shard has."""
    alpha: float = 5.0
    """Unrelated inputs should have a smaller activation ||a (W' - W)||."""
    beta: float = 20.0
    """Edited ones should have a larger one."""
    gamma: float = 10.0
    """And one that much larger than unrelated ones."""
    shards: int = 2
    """Parts of a turn's facts, each trained in a subspace of its own."""
    mask_ratio: float = 0.2
    """Part of the side memory's entries that a shard may change, in (0, 1]."""
    merge_density: float = 0.53
    """Part of the entries that a shard changed that TIES keeps, the largest, in (0, 1]."""
    merge_weight: float = 1.0
    """Factor of what was merged."""
    route_ratio: float = 1.0
    """Part of the least activation of an edited input above which the side memory is taken, in (0, 1]; 1 = the paper's,
    0.88 = as released."""
    unrelated: int = 64
    """Inputs kept of each warm-up turn: those are what unrelated text is known by."""

    def mistakes(self) -> list[str]:
        return [
            *super().mistakes(),
            *at_least("editor.facts_per_step", self.facts_per_step, 1, "null takes all facts of a shard"),
            *not_negative("editor.alpha", self.alpha),
            *positive("editor.beta", self.beta),
            *not_negative("editor.gamma", self.gamma),
            *at_least("editor.shards", self.shards, 1),
            *fraction("editor.mask_ratio", self.mask_ratio),
            *fraction("editor.merge_density", self.merge_density),
            *positive("editor.merge_weight", self.merge_weight),
            *fraction("editor.route_ratio", self.route_ratio),
            *at_least("editor.unrelated", self.unrelated, 1),
        ]

    def needs_warm_up(self) -> str | None:
        return "editor=wise, which knows unrelated text from warm-up turns,"
