"""What all pictures of a report share: their look, curves that stay readable, a legend that covers nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from harness.report.names import configurations, labels
from harness.report.runs import Columns, Run

# Okabe and Ito's colours, which readers with any common colour blindness tell apart; line styles come to their help.
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: Final = ("-", "--", "-.", (0, (1, 1)), (0, (9, 3)), (0, (6, 1, 1, 1, 1, 1)))
MARKERS: Final = ("o", "s", "^", "D", "v", "P")  # of points, beside the line styles
GREY: Final = "#8a8a8a"
WARM_UP: Final = "#ececec"
LETTERS: Final = 10.5  # of a legend, to an inch
LEGEND_ROW: Final = 0.28  # inches
MOST_LEGEND_ROWS: Final = 6  # without a second column
MOST_WIDTH: Final = 11.0  # inches, of a figure that a legend widens
MOST_BANDS: Final = 4  # intervals of more curves than these would hide each other
MOST_POINTS: Final = 400  # of a curve; longer ones are drawn as the median of bins, and the 5% to 95% range as a band
STYLE: Final[Any] = {
    "savefig.dpi": 150,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.08,
    "font.size": 13,
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "lines.linewidth": 2.0,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 12,
}

Look = Mapping[str, Any]


@dataclass(frozen=True)
class Picture:
    """A figure, the name of its file, and what a reader needs to know of it."""

    name: str
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Named:
    """A run's name and look in every picture. Runs of a configuration, which differ in the seed, share a colour."""

    label: str
    configuration: str
    run: Run
    look: Look


def look(place: int, variant: int = 0, variants: int = 1) -> dict[str, Any]:
    """Colour of the series at that place, line style of that one of its `variants`: 42 that differ."""
    dashes = place // len(COLOURS) * variants + variant
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": DASHES[dashes % len(DASHES)]}


def marker(style: Look) -> str:
    """What stands for a single point of that look."""
    return MARKERS[DASHES.index(style["linestyle"])]


def named_runs(runs: Sequence[Run], *, as_scored: bool = True) -> list[Named]:
    """The runs with their names and looks, those of a configuration (see there) side by side, by their seeds."""
    of = configurations(runs, as_scored=as_scored)
    every = list(dict.fromkeys(of))
    variants = max(map(of.count, every))
    named = [
        Named(label, name, run, look(every.index(name), of[:place].count(name), variants))
        for place, (label, name, run) in enumerate(zip(labels(runs), of, runs, strict=True))
    ]
    return sorted(named, key=lambda one: (every.index(one.configuration), one.run.seed))


def by_configuration(runs: Iterable[Named]) -> dict[str, list[Named]]:
    """The runs of each, in their order."""
    groups: dict[str, list[Named]] = {}
    for named in runs:
        groups.setdefault(named.configuration, []).append(named)
    return groups


def curve(ax: Axes, x: np.ndarray, y: np.ndarray, *, over_log: bool = False, **style: Any) -> None:
    """A line over what is finite; a long one as medians of bins, over the band that holds 90% of each bin.

    Bins hold equally many points or, `over_log`, are equally wide on a logarithmic axis.
    """
    there = np.isfinite(x) & np.isfinite(y)
    x, y = x[there], y[there]
    if len(x) <= MOST_POINTS:
        ax.plot(x, y, **({"marker": "o"} if len(x) == 1 else {}) | style)
        return
    ends = np.geomspace(1, len(x), MOST_POINTS + 1) if over_log else np.linspace(0, len(x), MOST_POINTS + 1)
    bins = np.split(np.arange(len(x)), np.unique(ends[1:-1].astype(int)))
    middle = np.array([x[one].mean() for one in bins])
    low, median, high = np.array([np.quantile(y[one], [0.05, 0.5, 0.95]) for one in bins]).T
    ax.fill_between(middle, low, high, color=style.get("color"), alpha=0.2, linewidth=0)
    ax.plot(middle, median, **style)


def panel_grid(count: int, columns: int) -> tuple[Figure, list[Axes]]:
    """`count` panels, `columns` at most in a row."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(3.8 * columns, 6.5), 3.2 * rows + 0.6))
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for empty in axes[count:]:
        empty.remove()
    return figure, axes[:count]


def legend_above(figure: Figure, *axes: Axes, extra: Sequence[Any] = ()) -> None:
    """One legend over the whole figure, each label once, where it covers nothing: the figure grows by what it takes."""
    entries: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    entries |= {handle.get_label(): handle for handle in extra}
    if entries:
        widest = (max(map(len, entries)) + 7) / LETTERS
        width, height = figure.get_size_inches()
        wanted = widest * min(2, math.ceil(len(entries) / MOST_LEGEND_ROWS))  # a second column, where it still fits
        width = max(width, widest, wanted if wanted <= MOST_WIDTH else 0)
        columns = max(1, min(len(entries), int(width / widest)))
        figure.set_size_inches(width, height + (math.ceil(len(entries) / columns) - 1) * LEGEND_ROW)
        figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=columns)


def not_shown(how: str, names: Iterable[str]) -> str:
    """A sentence for a caption, of what a picture cannot show as it was not `how`; empty without any."""
    told = "; ".join(names)
    return f"Not {how}, so not here: {told}." if told else ""


def count_axis(ax: Axes, what: str) -> None:
    ax.set_xlabel(what)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def legend_beside(ax: Axes, extra: Sequence[Any] = ()) -> None:
    handles = [*ax.get_legend_handles_labels()[0], *extra]
    if handles:
        ax.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5))


PERCENT: Final = FuncFormatter(lambda value, _: f"{100 * value:.4g}%")


def percent_axis(ax: Axes) -> None:
    """Shares as percentages, from just below 0, so that a line at 0 is seen, to 1% at least where all are 0."""
    ax.yaxis.set_major_formatter(PERCENT)
    top = ax.get_ylim()[1] if values_of(ax).any() else 0.01
    ax.set_ylim(bottom=-0.02 * top, top=top)


def log_axis(ax: Axes, which: Literal["x", "y"], lowest: float, highest: float) -> None:
    """A logarithmic axis with few labels, in plain numbers."""
    ax.set(**{f"{which}scale": "log"})
    axis: Axis = getattr(ax, f"{which}axis")
    axis.set_major_locator(
        LogLocator(subs=(1.0, 2.0, 5.0) if highest < (100 if which == "y" else 30) * lowest else (1.0,))
    )
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}" if value < 1e6 else f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def fit_values(ax: Axes) -> None:
    """From 0 on; but logarithmic where the values span widely."""
    values = values_of(ax)
    if span_widely(values):
        log_axis(ax, "y", values.min(), values.max())
    elif len(values) and values.min() >= 0:
        ax.set_ylim(bottom=0)


def span_widely(values: np.ndarray) -> bool:
    """Whether finite values, all above 0, span more than a factor of 10: one axis from 0 on would hide the smaller."""
    return bool(len(values) and values.min() > 0 and values.max() > 10 * values.min())


def values_of(ax: Axes) -> np.ndarray:
    """All finite y of the panel's lines."""
    values = np.concatenate([np.empty(0), *(np.asarray(line.get_ydata(), dtype=float) for line in ax.get_lines())])
    return values[np.isfinite(values)]


def shade_warm_up(axes: Sequence[Axes], runs: Sequence[Named]) -> list[Patch]:
    """Grey where every run warmed up, and its entry for the legend; nothing where runs differ in it."""
    spans = {tuple(_warm_up_spans(named.run.turns)) for named in runs}
    shared = next(iter(spans)) if len(spans) == 1 else ()
    for ax in axes:
        for first, last in shared:
            ax.axvspan(first - 0.5, last + 0.5, color=WARM_UP, zorder=0, linewidth=0)
    return [Patch(color=WARM_UP, label="warm-up turns")] if shared else []


def _warm_up_spans(turns: Columns) -> Iterator[tuple[float, float]]:
    for warm_up, group in itertools.groupby(range(len(turns["turn"])), lambda i: turns["warm_up"][i] > 0):
        if warm_up:
            members = list(group)
            yield float(turns["turn"][members[0]]), float(turns["turn"][members[-1]])


def with_columns(runs: Sequence[Named], prefix: str) -> list[Named]:
    """The runs whose turns hold numbers under that prefix."""
    return [named for named in runs if any(path.startswith(prefix) for path in named.run.turns)]


def interval(score: Any) -> tuple[float, float, float]:
    """(mean, low, high) of a score; a plain number is its own interval."""
    if isinstance(score, Mapping):
        return score["mean"], score.get("low", score["mean"]), score.get("high", score["mean"])
    return score, score, score
