"""MEND (arXiv 2110.11309): DeltaW = -eta_m sum_i k'_i g'_i^T from rows transformed by a hypernetwork.

Letters: N rows of a turn, d_k key size, d_v value size.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from data.records import Capture, LowRankUpdate
from editor.hypernetwork import ALONE, HyperNetworkEditor, HyperNetworkSettings, Proposal


class MEND(HyperNetworkEditor):
    """An outer product a row; each turn is judged by itself."""

    Settings: ClassVar = HyperNetworkSettings
    horizon = ALONE

    def propose(self, name: str, capture: Capture) -> Proposal:
        return _OuterProposal(self, name, capture)


class _OuterProposal:
    def __init__(self, editor: MEND, name: str, capture: Capture) -> None:
        self.editor, self.name, self.capture = editor, name, capture
        with torch.no_grad():
            rows = [(keys, grads) for _, keys, grads in editor.chunks(name, capture)]
            keys, grads = (torch.cat(side) for side in zip(*rows, strict=True))
            self.update = LowRankUpdate(keys.T, -editor.eta(name) * grads)

    def backward(self, gradient: Tensor) -> None:
        """The gradient of <G, DeltaW(h)> = -eta sum_i k'_i^T G g'_i."""
        gradient = gradient.to(self.update.right)
        for _, keys, grads in self.editor.chunks(self.name, self.capture):
            (-self.editor.eta(self.name) * ((keys @ gradient) * grads).sum()).backward()
