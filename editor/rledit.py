"""RLEdit (ICML 2025): MALMEN's update, judged over a trajectory of turns that stay in the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from editor.hypernetwork import Horizon, RidgeEditor, RidgeSettings


@dataclass(frozen=True)
class RLEditSettings(RidgeSettings):
    """The keys of the same names in the configuration.

    A turn answers for `back_depth` turns, itself included, one of age a weighing `time_decay`^a, and for `reg_coef`
    ||DeltaW||^2; the optimiser steps once a trajectory, as published, or once a turn. A trajectory is
    `trajectory_length` turns (None: a pass over the training file).
    """

    reg_coef: float
    time_decay: float
    back_depth: int
    update_every: Literal["trajectory", "turn"]
    trajectory_length: int | None


class RLEdit(RidgeEditor):
    """A policy (the network) whose actions (the updates) add up in the model, and whose reward looks back.

    Untrained it is a baseline of its own: lifelong normalisation before MALMEN's closed form.
    """

    Settings: ClassVar = RLEditSettings

    def __init__(self, shapes: Mapping[str, tuple[int, int]], settings: RLEditSettings, device: torch.device) -> None:
        super().__init__(shapes, settings, device)
        self.horizon = Horizon(
            settings.trajectory_length,
            settings.back_depth,
            settings.time_decay,
            settings.reg_coef,
            step_every_turn=settings.update_every == "turn",
        )
