"""SIGINT and SIGTERM while a run goes on: the turn is finished first."""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Self

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO = 0.5  # seconds: a terminal and whatever launched the run may both pass the same Ctrl-C on


def ignore_signals() -> None:
    """From now on SIGINT and SIGTERM are another process's concern: nothing below takes them up again."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _own_signals() -> tuple[signal.Signals, ...]:
    """Those that are this process's concern."""
    return () if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN else SIGNALS


_asked: list[int] = []  # signals that were to end this process; it has outlived them where it reads this


def end_on(number: int) -> None:
    """From now on that signal ends the process at once, as long as there is no turn to finish.

    Python drops what is raised while it takes an object apart: see `end_if_asked`.
    """
    if number in _own_signals():
        signal.signal(number, _end)


def _end(number: int, _frame: FrameType | None) -> None:
    _asked.append(number)
    with suppress(OSError, RuntimeError):  # nobody may be listening any more, or somebody be writing just now
        sys.stderr.write(f"{signal.Signals(number).name}: ending; the same command with resume=auto goes on\n")
    raise SystemExit(128 + number)  # run.json and wandb are told on the way out


def end_if_asked() -> None:
    """End where a signal was to end this process and Python dropped what that raised."""
    if _asked:
        raise SystemExit(128 + _asked.pop())


@contextmanager
def postponed() -> Iterator[None]:
    """A signal that comes inside is handled when that is over; a second one ends the process there and then."""
    come: list[tuple[int, float]] = []

    def keep(number: int, _frame: FrameType | None) -> None:
        if come and time.monotonic() - come[0][1] >= ECHO:
            raise SystemExit(128 + number)
        come.append((number, time.monotonic()))

    before = {number: signal.signal(number, keep) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for first, _ in come[:1]:
        signal.raise_signal(first)


class Interrupted(SystemExit):
    """The run is to end, and its state is that of a whole turn; `code` is 128 + the signal, as shells have it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number).name


class Interruption:
    """Raises Interrupted on the first signal: at once, or at the end of `held()`. A second one stops there and then."""

    def __init__(self) -> None:
        self._first: int | None = None
        self._at = 0.0
        self._held = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        end_if_asked()
        self._before = {number: signal.signal(number, self._on_signal) for number in _own_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """What is inside is done whole."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._first is not None:
            raise Interrupted(self._first)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._first is not None:
            if time.monotonic() - self._at < ECHO:
                return
            raise SystemExit(128 + number)
        self._first, self._at = number, time.monotonic()
        if not self._held:
            raise Interrupted(number)
        log.warning("%s: finishing the turn first; a second one stops at once", signal.Signals(number).name)
