"""What a run shows while it works and when it is done: progress bars, the result table, and examples.

On a terminal the bars are drawn on stderr, and log records appear above them. Anywhere else (a file, a pipe, a batch
system's log) progress is plain log lines, now and then, without control characters.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self, TextIO, cast
from unicodedata import category

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.file_proxy import FileProxy
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from harness.run.folder import read_examples

log = logging.getLogger(__name__)

LOG_SHARE: Final = 0.1  # of the work between two log lines, where there is no terminal ...
LOG_SECONDS: Final = 60.0  # ... or this much time, whichever is shorter

SCORES: Final = {
    "ES": "efficacy",
    "GS": "generalization",
    "LS": "specificity",
    "PS": "personas",
    "MS": "multi-hop",
}
FORMS: Final = {
    "": "",
    "seq": "all tokens",
    "gen": "generated",
    "contains": "",  # says it itself
    "agree": "as base",
    "forgetting": "",
}
PROBES: Final = {"edit": "edited questions", "rephrase": "rephrases of them", "locality": "unrelated questions"}
EXAMPLE_TEXTS: Final = ("question", "wanted", "base", "edited")
NOT_SHARES: Final = {"kl"}  # forms that are no share of something, so no percent


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
    def training(self, total: int, *, done: int = 0) -> Iterator[Bar]:
        """A bar over the turns that train an editor's network."""
        with self._bar("training the editor", total, "turns", done, keep=True) as bar:
            yield bar

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
    originals |= {id(_behind_proxy(s)) for s in (sys.stderr, sys.stdout) if s.isatty()}
    changed = [(handler, handler.stream) for handler in _stream_handlers() if id(handler.stream) in originals]
    for handler, own in changed:
        handler.setStream(cast(TextIO, FileProxy(console, own)))
    try:
        yield
    finally:
        for handler, own in changed:
            handler.setStream(own)


def _behind_proxy(stream: Any) -> Any:
    return stream.rich_proxied_file if isinstance(stream, FileProxy) else stream


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
    """Print the result table, the run's examples and where it lies.

    Where `stream` (stdout) is no terminal, in 80 columns and without colour.
    """
    stream = stream or sys.stdout
    console = Console(file=stream, force_terminal=stream.isatty())
    console.print(result_table(results))
    if examples := read_examples(run_folder):
        console.print(example_table(examples))
    console.print(Text(f"  run folder   {run_folder}"), soft_wrap=True)  # never cut or broken: it will be copied


def example_table(examples: Sequence[Mapping[str, Any]]) -> Table:
    """What was wanted, and what the model wrote before and after its edits; each text is cut to its column."""
    table = Table(box=SIMPLE, padding=0, expand=True, title=" what the model says", title_justify="left")
    table.title_style = "italic"
    for heading, share in {"question": 5, "wanted": 2, "base model": 3, "edited model": 3}.items():
        table.add_column(heading, ratio=share, no_wrap=True, overflow="ellipsis")
    for probe, group in groupby(examples, key=itemgetter("probe")):
        table.add_section()
        table.add_row(Text(PROBES[probe], style="italic"))
        for one in group:
            table.add_row(*(as_said(" ".join(one[key].split())) for key in EXAMPLE_TEXTS))
    return table


def printable(text: str) -> str:
    """A model's words, without what a terminal would take for commands."""
    return "".join("\N{REPLACEMENT CHARACTER}" if category(c) == "Cc" and c not in "\n\t" else c for c in text)


def as_said(text: str) -> Text:
    """The same as a cell of a table, without blanks around it; where nothing was said, that."""
    return Text(printable(text).strip()) if text.strip() else Text("(nothing)", style="italic")


def result_table(results: Mapping[str, Any]) -> Group:
    """The scores of the base and of the edited model with their 95% intervals, and what the run cost.

    `results` is what `results.json` holds; a part that is missing is left out of the table.
    """
    forgotten = {f"{name}_forgetting": kept["forgetting"] for name, kept in results.get("retention", {}).items()}
    scores = _score_table(results.get("base", {}), {**results.get("final", {}), **forgotten})
    return Group(scores, *([_cost_table(results["cost"])] if results.get("cost") else []))


def _score_table(base: Mapping[str, Any], final: Mapping[str, Any]) -> Table:
    # no padding: with its one column of space between cells the table just fits 80 columns at 100.0 [100.0, 100.0]
    table = Table(
        box=SIMPLE, padding=0, title=" percent, with 95% intervals", title_justify="left", title_style="italic"
    )
    table.add_column("score", overflow="fold")
    for heading in ("base model", "edited model", "change", "records"):
        table.add_column(heading, justify="right", overflow="fold")
    kinds = {name: _kind(name) for name in {*base, *final}}
    for place, name in enumerate(ordered := sorted(kinds, key=kinds.__getitem__)):
        if place and kinds[name][0] != kinds[ordered[place - 1]][0]:
            table.add_section()
        table.add_row(*_score_row(name, base.get(name), final.get(name)))
    return table


def _kind(name: str) -> tuple[int, str, int, str]:
    """Place of a score in the table: the plain forms of percent scores, their other forms, then everything else."""
    score, _, form = name.partition("_")
    if not _is_percent(name):
        return len(FORMS) + 1, "", 0, name
    place = list(FORMS).index(form) if form in FORMS else len(FORMS)
    return place, form, list(SCORES).index(score), name


def _is_percent(name: str) -> bool:
    score, _, form = name.partition("_")
    return score in SCORES and form not in NOT_SHARES


def _score_row(name: str, base: Any, final: Any) -> list[Text]:
    scale, digits = (100.0, 1) if _is_percent(name) else (1.0, 3)
    before, after = _mean(base), _mean(final)
    change = "" if before is None or after is None else f"{scale * (after - before):+.{digits}f}"
    counts = [f"{score['n']:,}" for score in (final, base) if isinstance(score, Mapping) and "n" in score]
    return [
        Text(_label(name)),
        Text(_score_cell(base, scale, digits)),
        Text(_score_cell(final, scale, digits), style="bold"),
        Text(change),
        Text(counts[0] if counts else ""),
    ]


def _label(name: str) -> str:
    score, _, form = name.partition("_")
    words = FORMS.get(form) or SCORES.get(score) if form in FORMS else None
    return f"{name}  {words}" if words else name


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
        table.add_row(Text(f"  {label}"), Text(value, overflow="fold"))
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
        yield "peak memory", ", ".join(_memory(name, value) for name, value in peak.items() if value)
    for name, value in rest.items():
        yield name.replace("_", " "), str(value)


def _memory(name: str, value: float) -> str:
    words = name.removesuffix("_bytes").replace("_", " ")
    return f"{words} {value / 2**30:.2f} GiB" if name.endswith("_bytes") else f"{words} {value:,}"
