"""MEND, MALMEN and RLEdit: a network makes the updates."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from config.schema.checks import at_least, filled, fraction, not_negative, positive
from config.schema.editor.base import EditorConfig


class UpdateEvery(Enum):
    """When the optimiser of the hypernetwork steps."""

    trajectory = "trajectory"
    turn = "turn"


@dataclass
class HyperNetworkConfig(EditorConfig):
    """MEND, and what MALMEN and RLEdit share with it: a network, trained on the training file, makes the updates."""

    rank: int = 1024
    """Rank r of a block's low-rank map."""
    n_blocks: int = 4
    """Residual blocks."""
    meta_lr: float = 1e-5
    """Step size of the Adam that trains the network."""
    loc_coef: float = 0.6
    """Weight of the locality loss beside the loss of the rephrases."""
    max_grad_norm: float = 1.0
    """Gradients of the network are clipped to this norm."""
    n_epochs: int = 1
    """Passes over the training file; 0 = edit with the untrained network."""
    max_train_turns: int | None = None
    """Turns of dataset.n_edits facts in a pass, at most; null = every full turn of the training file."""
    held_out_turns: int = 0
    """Turns at the end of the training file that are not trained on; their loss is measured before the first pass and
    after each."""
    save_checkpoint: bool = False
    """Keep the trained network in the run folder."""
    load_checkpoint: str | None = None
    """Run or folder whose trained network is used, instead of training; null = train."""

    def mistakes(self) -> list[str]:
        return [
            *super().mistakes(),
            *at_least("editor.rank", self.rank, 1),
            *at_least("editor.n_blocks", self.n_blocks, 1),
            *positive("editor.meta_lr", self.meta_lr),
            *not_negative("editor.loc_coef", self.loc_coef),
            *positive("editor.max_grad_norm", self.max_grad_norm),
            *at_least("editor.n_epochs", self.n_epochs, 0, "0 edits with the untrained network"),
            *at_least("editor.max_train_turns", self.max_train_turns, 1, "null takes every full turn"),
            *at_least("editor.held_out_turns", self.held_out_turns, 0, "0 holds none back"),
            *filled("editor.load_checkpoint", self.load_checkpoint),
        ]

    def trains(self) -> bool:
        """Whether this run trains the network, rather than take it from a checkpoint or as it is."""
        return self.n_epochs > 0 and self.load_checkpoint is None


@dataclass
class RidgeNetworkConfig(HyperNetworkConfig):
    """MALMEN: the network proposes, a ridge solve with a learned ridge disposes."""

    alpha: float = 1.0
    """Where the learned ridge lambda of each module starts."""

    def mistakes(self) -> list[str]:
        return [*super().mistakes(), *positive("editor.alpha", self.alpha)]


@dataclass
class RLEditConfig(RidgeNetworkConfig):
    """MALMEN's network and update, trained on trajectories of turns."""

    reg_coef: float = 1e-4
    """Weight of ||DeltaW||^2."""
    time_decay: float = 0.95
    """A turn of age a weighs time_decay^a, in (0, 1]."""
    back_depth: int = 10
    """Turns, this one included, whose losses a turn answers for."""
    update_every: UpdateEvery = UpdateEvery.trajectory
    trajectory_length: int | None = None
    """Turns that edits stay in the model for while training; null = a whole pass."""

    def mistakes(self) -> list[str]:
        return [
            *super().mistakes(),
            *not_negative("editor.reg_coef", self.reg_coef),
            *fraction("editor.time_decay", self.time_decay),
            *at_least("editor.back_depth", self.back_depth, 1, "1 answers for this turn only"),
            *at_least("editor.trajectory_length", self.trajectory_length, 1, "null takes a whole pass"),
        ]
