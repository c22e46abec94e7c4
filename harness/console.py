"""What a run shows while it works and when it is done: progress bars, and the result table.

On a terminal the bars are drawn on stderr, and log records appear above them. Anywhere else (a file, a pipe, a batch
system's log) progress is plain log lines, now and then, without control characters.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self, TextIO, cast

from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.file_proxy import FileProxy
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

log = logging.getLogger(__name__)

LOG_SHARE: Final = 0.1  # of the work between two log lines, where there is no terminal ...
LOG_SECONDS: Final = 60.0  # ... or this much time, whichever is shorter

# Percent, in this order; everything else that has a mean is shown as the number it is.
SCORES: Final = {
    "ES": "efficacy",
    "GS": "generalization",
    "LS": "specificity",
    "PS": "personas",
    "MS": "multi-hop",
}
FORMS: Final = {
    "": "",
    "_seq": ", all tokens",
    "_gen": ", generated",
    "_gen_contains": ", contained in generated",
    "_agree": ", agreement with base",
}


class Bar(Protocol):
    """Progress of one piece of work."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """`n` units are done; `note` is shown beside the bar until the next one."""


class _LiveBar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def advance(self, n: int = 1, note: str = "") -> None:
        self._progress.update(self._task, advance=n, note=note)


class _LogBar:
    def __init__(self, what: str, total: int, unit: str, done: int, clock: Callable[[], float]) -> None:
        self._what, self._total, self._unit, self._clock = what, total, unit, clock
        self._done = self._start = self._said = done
        self._started = self._said_at = clock()

    def advance(self, n: int = 1, note: str = "") -> None:
        self._done += n
        now = self._clock()
        first = self._said == self._start
        due = self._done - self._said >= LOG_SHARE * self._total or now - self._said_at >= LOG_SECONDS
        if first or due or self._done >= self._total:
            self._said, self._said_at = self._done, now
            log.info("%s", self._line(now - self._started, note))

    def _line(self, elapsed: float, note: str) -> str:
        parts = [f"{self._what}: {self._done:,} of {self._total:,} {self._unit}"]
        if note:
            parts.append(note)
        per_unit = elapsed / (self._done - self._start)
        if self._done < self._total:
            parts.append(f"{duration(per_unit * (self._total - self._done))} left")
        else:
            parts.append(f"done in {duration(elapsed)}")
        return ", ".join(parts)


class TurnBar:
    """Progress over the turns of a stream, with the edits made so far and what the turns are for."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar

    def advance(self, *, edits_total: int, phase: str) -> None:
        """A turn is done; `edits_total` edits are in the model since the run began."""
        self._bar.advance(1, f"{edits_total:,} edits, {phase.replace('_', '-')}")


class RunProgress:
    """The progress of a run, as a context manager; bars are opened inside it.

    `stream` (stderr) decides: a terminal gets bars, anything else log lines.
    """

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream or sys.stderr
        self._clock = clock
        self._progress: Progress | None = None
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        if not self._stream.isatty():
            return self
        console = Console(file=self._stream, force_terminal=True)
        if console.is_dumb_terminal:  # it can't move its cursor
            return self
        self._progress = self._exit.enter_context(_live_progress(console))
        self._exit.enter_context(_logs_above(console, self._stream))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()
        self._progress = None

    @contextmanager
    def turns(self, total: int, *, done: int = 0) -> Iterator[TurnBar]:
        """A bar over `total` turns, `done` of which a resumed run has behind it."""
        with self._bar("editing", total, "turns", done, keep=True) as bar:
            yield TurnBar(bar)

    @contextmanager
    def evaluation(self, what: str, total: int, *, unit: str = "questions") -> Iterator[Bar]:
        """A bar over an evaluation, `what` as in "base model"; on a terminal it goes away when it is done."""
        with self._bar(f"evaluating {what}", total, unit, 0, keep=False) as bar:
            yield bar

    @contextmanager
    def _bar(self, what: str, total: int, unit: str, done: int, *, keep: bool) -> Iterator[Bar]:
        if self._progress is None:
            yield _LogBar(what, total, unit, done, self._clock)
            return
        task = self._progress.add_task(what, total=total, completed=done, unit=unit, note="")
        try:
            yield _LiveBar(self._progress, task)
        finally:
            self._progress.stop_task(task)
            if not keep:
                self._progress.remove_task(task)


def _live_progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        expand=True,
        # stdout may be a file while stderr is a terminal: what is written there must still go there
        redirect_stdout=sys.stdout.isatty(),
        speed_estimate_period=600,  # turns take seconds to minutes, and an evaluation may lie between two
    )


@contextmanager
def _logs_above(console: Console, stream: TextIO) -> Iterator[None]:
    """Log handlers hold the terminal they were made with, so replacing sys.stderr does not reach them: hand them one
    that prints above the bars, and give theirs back at the end."""
    originals = {id(s) for s in (stream, sys.__stderr__, sys.__stdout__) if s is not None and s.isatty()}
    originals |= {id(proxied.rich_proxied_file) for proxied in (sys.stderr, sys.stdout) if _is_proxy(proxied)}
    changed = [(handler, handler.stream) for handler in _stream_handlers() if id(handler.stream) in originals]
    for handler, own in changed:
        handler.setStream(cast(TextIO, FileProxy(console, own)))
    try:
        yield
    finally:
        for handler, own in changed:
            handler.setStream(own)


def _is_proxy(stream: Any) -> bool:
    return isinstance(stream, FileProxy)


def _stream_handlers() -> Iterator[logging.StreamHandler[Any]]:
    named = logging.root.manager.loggerDict.values()
    for logger in (logging.root, *(logger for logger in named if isinstance(logger, logging.Logger))):
        yield from (handler for handler in logger.handlers if isinstance(handler, logging.StreamHandler))


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


def show_results(results: Mapping[str, Any], run_folder: Path, stream: TextIO | None = None) -> None:
    """Print the result table; 80 columns and no colour where `stream` (stdout) is no terminal."""
    stream = stream or sys.stdout
    Console(file=stream, force_terminal=stream.isatty()).print(result_table(results, run_folder))


def result_table(results: Mapping[str, Any], run_folder: Path) -> Group:
    """The scores of the base and of the edited model with their 95% intervals, what the run cost, and where it lies.

    `results` is what `results.json` holds; a part that is missing is left out of the table.
    """
    parts: list[RenderableType] = [_score_table(results.get("base", {}), results.get("final", {}))]
    if cost := results.get("cost"):
        parts.append(_cost_table(cost))
    parts.append(Text(f"  run folder  {run_folder}\n", no_wrap=True, overflow="ignore"))  # whole, to be copied
    return Group(*parts)


def _score_table(base: Mapping[str, Any], final: Mapping[str, Any]) -> Table:
    table = Table(box=SIMPLE, pad_edge=True, title="percent, with 95% intervals", title_justify="left")
    table.add_column("score", no_wrap=True)
    for heading in ("base model", "edited model", "change", "records"):
        table.add_column(heading, justify="right", no_wrap=True)
    previous = ""
    for name in _ordered({*base, *final}):
        form = "_".join(name.split("_")[1:])
        if form != previous and table.rows:
            table.add_section()
        previous = form
        table.add_row(*_score_row(name, base.get(name), final.get(name)))
    return table


def _ordered(names: set[str]) -> list[str]:
    """Percent scores form by form, then whatever else was measured."""
    known = [f"{score}{form}" for form in FORMS for score in SCORES]
    return [name for name in known if name in names] + sorted(names - set(known))


def _score_row(name: str, base: Any, final: Any) -> list[RenderableType]:
    percent = name in {f"{score}{form}" for form in FORMS for score in SCORES}
    scale, digits = (100.0, 1) if percent else (1.0, 3)
    means = [_mean(score) for score in (base, final)]
    change = "" if None in means else f"{scale * (means[1] - means[0]):+.{digits}f}"  # type: ignore[operator]
    counted = [str(f"{score['n']:,}") for score in (final, base) if isinstance(score, Mapping) and "n" in score]
    cells = [_score_cell(score, scale, digits) for score in (base, final)]
    return [Text(_label(name)), Text(cells[0]), Text(cells[1], style="bold"), Text(change), Text((counted or [""])[0])]


def _label(name: str) -> str:
    score, _, form = name.partition("_")
    described = SCORES.get(score)
    return f"{name}  {described}" if described and not form else name


def _mean(score: Any) -> float | None:
    return score.get("mean") if isinstance(score, Mapping) else score


def _score_cell(score: Any, scale: float, digits: int) -> str:
    mean = _mean(score)
    if mean is None:
        return "-"
    text = f"{scale * mean:.{digits}f}"
    if isinstance(score, Mapping) and score.get("low") is not None and score.get("high") is not None:
        text += f" [{scale * score['low']:.{digits}f}, {scale * score['high']:.{digits}f}]"
    return text


def _cost_table(cost: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    for label, value in _cost_lines(cost):
        table.add_row(Text(f"  {label}"), Text(value))
    return table


def _cost_lines(cost: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Known costs in words; others under their own names, so that nothing that was measured is hidden."""
    rest = dict(cost)
    turns, warm_up = rest.pop("turns", None), rest.pop("warm_up_turns", 0)
    if turns is not None:
        yield "turns", f"{turns:,}" + (f", {warm_up:,} of them warm-up" if warm_up else "")
    if (edits := rest.pop("edits", None)) is not None:
        yield "edits", f"{edits:,}"
    if seconds := dict(rest.pop("seconds_per_turn", {})):
        total = seconds.pop("total", sum(seconds.values()))
        shares = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())
        yield "a turn", f"{duration(total)} ({shares})" if shares else duration(total)
    for name, value in dict(rest.pop("seconds", {})).items():
        yield name.replace("_", " "), duration(value)
    if peak := rest.pop("peak_memory", {}):
        yield "peak memory", ", ".join(_memory(name, value) for name, value in peak.items())
    for name, value in rest.items():
        yield name.replace("_", " "), str(value)


def _memory(name: str, value: float) -> str:
    words = name.removesuffix("_bytes").replace("_", " ")
    return f"{words} {value / 2**30:.2f} GiB" if name.endswith("_bytes") else f"{words} {value:,}"
