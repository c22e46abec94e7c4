"""Progress of long work: a bar on a terminal and in a notebook, a log line now and then anywhere else."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Final, TypeAlias

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

log = logging.getLogger(__name__)

LOG_SHARE: Final = 0.1  # of the work between two log lines ...
LOG_SECONDS: Final = 60.0  # ... or this much time, whichever is shorter ...
LEAST_SECONDS: Final = 10.0  # ... but never less than this
WITHIN_SECONDS: Final = 0.5  # between two looks at how far a unit is
QUIET_SECONDS: Final = 3.0  # before a bar is drawn of work that is often short
IN_NOTEBOOK: Final = any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)


@contextmanager
def progress_bar(
    what: str,
    total: int | None,  # None: not known
    unit: str,
    *,
    done: int = 0,  # by an earlier run
    keep: bool = False,  # on the terminal when the work is done
    scale: bool = False,  # 1.2MB rather than 1,200,000 B
    quiet: bool = False,  # nothing is said of the first seconds, which are often all it takes
) -> Iterator[Bar]:
    """A bar on stderr, below the log lines; where bars cannot be drawn, log lines in its place."""
    unit = unit if scale else f" {unit}"
    if not _can_draw():
        yield _LoggedBar(what, total, unit, done, scale, quiet)
        return
    with (
        logging_redirect_tqdm(_loggers_on_console()),
        _DrawnBar(
            desc=what,
            total=total,
            unit=unit,
            initial=done,
            leave=keep,
            unit_scale=scale,
            delay=QUIET_SECONDS if quiet else 0,
            dynamic_ncols=True,
            smoothing=0,  # turns take seconds to minutes, and an evaluation may lie between two
        ) as bar,
    ):
        yield bar


def _can_draw() -> bool:
    """A terminal that cannot move its cursor gets lines, as a file does."""
    return IN_NOTEBOOK or (sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"))


def _loggers_on_console() -> list[logging.Logger]:
    """All loggers, not the root alone: libraries give theirs handlers of their own."""
    known = [logging.root, *logging.root.manager.loggerDict.values()]
    loggers = [one for one in known if isinstance(one, logging.Logger)]
    console = (sys.stdout, sys.stderr)
    return [one for one in loggers if any(getattr(handler, "stream", None) in console for handler in one.handlers)]


class _DrawnBar(tqdm):
    _note = ""
    _looked_at = -WITHIN_SECONDS

    def advance(self, n: int = 1, note: str = "") -> None:
        """`n` units are done; `note` is shown beside the bar until the next one."""
        self._note = note
        self.set_postfix_str(note, refresh=False)
        self.update(n)

    def within(self, share: float) -> None:
        """So much of the next unit is done."""
        if monotonic() - self._looked_at >= WITHIN_SECONDS:
            self._looked_at = monotonic()
            self.set_postfix_str(_joined(self._note, _of_the_next(share)))

    def finish(self) -> None:
        """All that is left is done at once."""
        self.advance((self.total or self.n) - self.n)

    def restart(self, total: int | None, done: int) -> None:
        """Begin again, with `done` of `total` units behind it."""
        self.reset(total)
        self.initial = self.n = self.last_print_n = done  # what is there already says nothing about the speed


class _LoggedBar:
    def __init__(self, what: str, total: int | None, unit: str, done: int, scale: bool, quiet: bool) -> None:
        self._what, self._unit = what, unit
        self._number = tqdm.format_sizeof if scale else "{:,}".format
        self._quiet_until = monotonic() + LEAST_SECONDS * quiet
        self._said_at = self._quiet_until - LOG_SECONDS  # the first line is due at once
        self._note = ""
        self.restart(total, done)

    def restart(self, total: int | None, done: int) -> None:
        self._total = total
        self._done = self._said = self._start = done
        self._started = monotonic()

    def advance(self, n: int = 1, note: str = "") -> None:
        self._done += n
        self._note = note
        if self._done == self._total == self._said:
            return  # said so already
        now = monotonic()
        waited = now - self._said_at
        much = self._total is None or self._done - self._said >= LOG_SHARE * self._total
        due = waited >= LOG_SECONDS or (much and waited >= LEAST_SECONDS) or self._done == self._total
        if due and now >= self._quiet_until:
            self._said, self._said_at = self._done, now
            log.info("%s", self._line(now - self._started))

    def within(self, share: float) -> None:
        now = monotonic()
        if share and now - max(self._said_at, self._started) >= LOG_SECONDS:
            self._said_at = now
            log.info("%s", self._line(now - self._started, share))

    def finish(self) -> None:
        """All that is left is done at once; where that was not known, nothing is."""
        if self._total is None:
            self._total = self._done
        elif self._total == self._done:
            return
        self.advance(self._total - self._done)

    def _line(self, elapsed: float, share: float = 0.0) -> str:
        """`share`: of the next unit."""
        of = "" if self._total is None else f" of {self._number(self._total)}"
        line = _joined(f"{self._what}: {self._number(self._done)}{of}{self._unit}", self._note)
        done = self._done + share
        if share:
            line = _joined(line, _of_the_next(share))
        if self._done == self._total:
            return _joined(line, f"done in {duration(elapsed)}")
        if self._total is not None:
            line = _joined(line, f"{duration(elapsed / (done - self._start) * (self._total - done))} left")
        return line


Bar: TypeAlias = _DrawnBar | _LoggedBar


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _of_the_next(share: float) -> str:
    return f"{share:.0%} of the next"


def duration(seconds: float) -> str:
    """Seconds as people say them: 0.25 s, 42 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
