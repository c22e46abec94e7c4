"""The bar of a run over its turns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from data.progress import Bar, progress_bar


class TurnBar:
    """Progress over the turns of a stream, with the edits made so far and what the turns are for."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar

    def advance(self, *, edits_total: int, phase: str) -> None:
        """A turn is done; `edits_total` edits are in the model since the run began."""
        self._bar.advance(1, f"{edits_total:,} edits, {phase.replace('_', '-')}")


@contextmanager
def turn_bar(total: int, *, done: int = 0) -> Iterator[TurnBar]:
    """Over `total` turns, `done` of which a resumed run has behind it."""
    with progress_bar("editing", total, "turns", done=done, keep=True) as bar:
        yield TurnBar(bar)
