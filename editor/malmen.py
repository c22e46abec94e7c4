"""MALMEN (arXiv 2311.04661): a ridge update towards what a hypernetwork proposes, each turn judged by itself."""

from __future__ import annotations

from typing import ClassVar

from editor.hypernetwork import ALONE, RidgeEditor, RidgeSettings


class MALMEN(RidgeEditor):
    """D_i = -eta_m (k_i . k'_i) g'_i; DeltaW = (K^T K + lambda_m I)^(-1) K^T D."""

    Settings: ClassVar = RidgeSettings
    horizon = ALONE
