"""Where numbers go, and what a run keeps and draws beside its scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from config.schema.checks import Section, at_least, filled


class Wandb(Enum):
    """Whether Weights & Biases is told while the run goes, gets files to `wandb sync` later, or nothing."""

    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass
class TrackerConfig(Section):
    """Where numbers go besides the run folder."""

    wandb: Wandb = Wandb.offline
    project: str = "stableedit"
    entity: str | None = None
    """User or team at Weights & Biases; null = whoever is logged in."""
    group: str | None = None
    """Runs of one group stand together; null = dataset/model."""
    tags: list[str] = field(default_factory=list)

    def mistakes(self) -> list[str]:
        return [*filled("tracker.project", self.project), *filled("tracker.group", self.group)]


@dataclass
class DiagnosticsConfig(Section):
    """What a run keeps, and draws, beside its scores."""

    previous: int = 4
    """Turns before whose updates each new one is compared with, beside a random one from before those; their factors
    stay in memory, or whole updates where they have none (fine-tuning), those of previous + 1 turns. 0 = none, and no
    comparison."""
    hidden_states: int = 100
    """Records whose hidden states are kept before and after editing, for the report; 0 = none."""
    report: bool = True
    """Draw report.html at the end; python -m harness.report draws it at any time."""

    def mistakes(self) -> list[str]:
        return [
            *at_least("diagnostics.previous", self.previous, 0, "0 compares no updates"),
            *at_least("diagnostics.hidden_states", self.hidden_states, 0, "0 keeps none"),
        ]
