"""MEMIT (Meng et al., ICLR 2023, arXiv 2210.07229): a turn's facts into several layers at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from editor.base import EditableModel, LocateInputs
from editor.located import LayerByLayer, SecondMomentFactor
from editor.target_vectors import TargetSettings


@dataclass(frozen=True)
class MEMITSettings(TargetSettings):
    """The keys of the same names in the configuration; those of the target vectors are `TargetSettings`.

    `mom2_update_weight` is lambda; `keep_keys`: whether K_0, the keys of earlier turns, is remembered.
    """

    mom2_update_weight: float
    moment_ridge: float
    keep_keys: bool


class MEMIT(LayerByLayer):
    """DeltaW_l = (lambda C + K_0^T K_0 + K^T K)^(-1) K^T R (equation 14, to which K_0 adds earlier turns).

    In coordinates in which C is the identity that is a ridge solve with lambda: C is factored once a run.
    """

    Settings: ClassVar = MEMITSettings

    def __init__(
        self, model: EditableModel, settings: MEMITSettings, device: torch.device, given: LocateInputs
    ) -> None:
        super().__init__(
            model,
            lambda name: SecondMomentFactor(name, given.second_moments(name), settings.moment_ridge, device),
            settings,
            given,
            ridge=settings.mom2_update_weight,
            ridge_setting="editor.mom2_update_weight",
            keep_keys=settings.keep_keys,
            device=device,
        )
