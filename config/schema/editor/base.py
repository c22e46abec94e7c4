"""What all editors share."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from config.schema.checks import Section, at_least, filled, positive


class Token(Enum):
    """Positions whose keys and value gradients are captured: of the answer's tokens, or of all."""

    ans = "ans"
    all = "all"


class PreheatMode(Enum):
    """Warm-up turns come before turn 0, T/4, T/2, 3T/4 or T-1 of T edit turns, or not at all.

    adaptive = before turn 0, and only as many as it takes until the value gradients' covariance stands still
    (editor.preheat_least, editor.preheat_tolerance); num_seq_zsre is the most.
    """

    start = "start"
    q1 = "q1"
    middle = "middle"
    q3 = "q3"
    end = "end"
    adaptive = "adaptive"
    none = "none"


class StatisticsScope(Enum):
    """Who shares running statistics: all modules of one shape, or nobody."""

    shape = "shape"
    module = "module"


@dataclass
class EditorConfig(Section):
    """What all editors share."""

    name: str = MISSING
    """Key of editor.EDITORS. Set by the group."""
    lr: float = MISSING
    """Step size gamma; hypernetwork editors start their learned step sizes eta here."""
    batch_size: int = 512
    """Rows a chunk inside the editor; bounds memory, never changes a result."""
    token: Token = Token.ans
    passes: int = 1
    """How often an edit turn is captured and updated; later passes push those facts that the model does not say yet.
    Warm-up turns have one."""
    pass_loss: float | None = None
    """-log p of each of its answer tokens, in nats, below which a fact leaves later passes; null = once each is the
    model's first choice."""
    replay: int = 0
    """Facts of earlier turns that each edit turn asks again; those that the model no longer says are pushed with the
    turn's own."""
    preheat_mode: PreheatMode = PreheatMode.none
    cache_dir: str | None = None
    """Folder that a turn's captures spill to, removed with the run; null = they stay in memory."""
    statistics_scope: StatisticsScope = StatisticsScope.shape

    def mistakes(self) -> list[str]:
        return [
            *positive("editor.lr", self.lr),
            *at_least("editor.batch_size", self.batch_size, 1, "it counts the rows of a chunk"),
            *at_least("editor.passes", self.passes, 1, "1 is as published"),
            *positive("editor.pass_loss", self.pass_loss),
            *at_least("editor.replay", self.replay, 0, "0 is as published"),
            *filled("editor.cache_dir", self.cache_dir),
        ]

    def needs_warm_up(self) -> str | None:
        """The setting that makes no sense without warm-up turns before the first edit; None where there is none."""
        return None

    def unused(self) -> tuple[str, ...]:
        """The keys of all editors that this one does not ask for."""
        return ()

    def step_key(self) -> str:
        """The key of the size of its steps."""
        return "editor.lr"

    def ignored(self) -> dict[str, str]:
        """The keys that have no effect as its other settings stand, each with the setting that is the cause."""
        alone = self.passes == 1 and self.replay == 0 and "pass_loss" not in self.unused()
        return {"pass_loss": "editor.passes=1 and editor.replay=0"} if alone else {}

    def unused_elsewhere(self) -> tuple[str, ...]:
        """The keys of other sections that only other editors ask for, as they are typed."""
        return ()

    def has_one_module(self) -> bool:
        """Whether it is an editor of one module."""
        return False

    def asks_for_text(self) -> bool:
        """Whether it asks for second moments of keys over text."""
        return False

    def preserves_unrelated(self) -> bool:
        """Whether that text is unrelated questions, and not that of corpus.path."""
        return False


CAPTURE_KEYS = ("batch_size", "token", "passes", "pass_loss", "replay", "cache_dir", "statistics_scope")
"""Keys of the gradient-capture family that editors of other families have no use for."""


MINI_BATCH = "dataset.batch_size"
"""Scales captured value gradients, which other families do without."""
