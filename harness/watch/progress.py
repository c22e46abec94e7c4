"""The bars of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from data.progress import Bar, progress_bar


class TurnBar:
    """Progress over the turns of a stream, with the edits made so far and what the turns are for."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar

    def advance(self, *, edits_total: int, phase: str) -> None:
        """A turn is done; `edits_total` edits are in the model since the run began."""
        self._bar.advance(1, f"{edits_total:,} edits, {phase.replace('_', '-')}")


class RunProgress:
    @contextmanager
    def turns(self, total: int, *, done: int = 0) -> Iterator[TurnBar]:
        """A bar over `total` turns, `done` of which a resumed run has behind it."""
        with progress_bar("editing", total, "turns", done=done, keep=True) as bar:
            yield TurnBar(bar)

    def training(self, total: int, *, done: int = 0) -> AbstractContextManager[Bar]:
        """A bar over the turns that train an editor's network."""
        return progress_bar("training the editor", total, "turns", done=done, keep=True)

    def evaluation(self, what: str, total: int, *, unit: str = "questions") -> AbstractContextManager[Bar]:
        """A bar over an evaluation, `what` as in "base model"; on a terminal it goes away when it is done."""
        return progress_bar(f"evaluating {what}", total, unit)
