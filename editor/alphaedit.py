"""AlphaEdit (Fang et al., ICLR 2025, arXiv 2410.02355): MEMIT within the null space of what the model knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from editor.base import EditableModel, LocateInputs
from editor.located import LayerByLayer, NullSpace, null_space
from editor.target_vectors import TargetSettings


@dataclass(frozen=True)
class AlphaEditSettings(TargetSettings):
    """The keys of the same names in the configuration; those of the target vectors are `TargetSettings`.

    `L2` is the ridge; `keep_keys`: whether K_0, the keys of earlier turns, is remembered, as published.
    """

    nullspace_threshold: float
    L2: float
    keep_keys: bool


class AlphaEdit(LayerByLayer):
    """DeltaW_l = (P (K_0^T K_0 + K^T K) + L2 I)^(-1) P K^T R, P onto the eigenvectors of C below the threshold.

    With Q = K P that is (Q_0^T Q_0 + Q^T Q + L2 I)^(-1) Q^T R: symmetric, and within the null space, where keys over
    text hardly reach.
    """

    Settings: ClassVar = AlphaEditSettings

    def __init__(
        self, model: EditableModel, settings: AlphaEditSettings, device: torch.device, given: LocateInputs
    ) -> None:
        threshold = settings.nullspace_threshold

        def coordinates(name: str) -> NullSpace:
            parts = given.of_moments(
                name, f"null space below {threshold!r}", lambda moments: null_space(name, moments, threshold, device)
            )
            return NullSpace(**{part: tensor.to(device) for part, tensor in parts.items()})

        super().__init__(
            model,
            coordinates,
            settings,
            given,
            ridge=settings.L2,
            ridge_setting="editor.L2",
            keep_keys=settings.keep_keys,
            device=device,
        )
