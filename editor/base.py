"""What every editor is, as the loop sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from data.records import Capture, LowRankUpdate, Phase


class Editor(Protocol):
    """Turns what a turn's facts did inside the model into weight updates.

    An editor knows module names and shapes, never a model or a data set; it opens no file and logs nothing. What must
    survive a restart is in `state_dict`.
    """

    def update(self, captures: Mapping[str, Capture], phase: Phase) -> dict[str, LowRankUpdate]:
        """The update of each captured module; called once a turn, in the order of the stream."""
        ...

    def statistics(self) -> dict[str, dict[str, float | None]]:
        """Numbers worth a line in the turns file, by group of modules that share them."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...
