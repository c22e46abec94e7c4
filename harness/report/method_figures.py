"""Pictures of what the method did: its updates, its statistics, its time, its training (DESIGN section 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any, Final

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from harness.report.drawing import (
    COLOURS,
    GREY,
    MOST_POINTS,
    Look,
    Named,
    Picture,
    count_axis,
    curve,
    fit_values,
    legend_above,
    legend_beside,
    log_axis,
    look,
    panel_grid,
    percent_axis,
    shade_warm_up,
    values_of,
    with_columns,
)
from harness.report.names import short_module_names
from harness.report.runs import Columns, under

MOST_LINES: Final = len(COLOURS)  # of more modules than this the whole update alone is drawn
MOMENTS: Final = {
    "value_mean_change": r"$\mu$ of value gradients",
    "value_std_change": r"$\sigma$ of value gradients",
    "value_covariance_change": r"$\Sigma$ of value gradients",
    "key_mean_change": r"$\mu$ of keys",
    "key_std_change": r"$\sigma$ of keys",
}
PHASES: Final[dict[str, tuple[str, dict[str, Any]]]] = {  # of meta-training: words, look beside the run's
    "meta_valid": ("held-out turns", {"marker": "o"}),
    "meta_train": ("training turns", {"linewidth": 1.0, "alpha": 0.6}),
}
PARTS: Final = {  # of a turn, where its time goes
    "capture": "the language model's forward and backward",
    "keys": "its forward, for what is inside it",
    "targets": "the search for target vectors",
    "solve": "the layers' systems",
    "update": "the editor's own work",
    "train": "steps on copies of a weight",
    "steps": "the optimiser's steps",
    "codebook": "which entries the facts go to",
    "values": "the optimiser's steps on their values",
    "merge": "shards into one weight",
    "apply": "the weights",
    "loss": "the loss of the turn's facts",
}
AREAS: Final = (("", 5), ("///", 1), ("...", 2), ("xxx", 0), ("ooo", 3))
"""Hatch and colour of each part of a turn."""

# ---------------------------------------------------------------------------------------------------------------------
# Updates: size, orthogonality, drift


def updates_over_turns(runs: Sequence[Named]) -> Picture | None:
    shown = with_columns(runs, "modules/")
    if not shown:
        return None
    figure = Figure(figsize=(11, 10))
    norms, cosines, drifts = axes = list(figure.subplots(3, 1, sharex=True))
    for named in shown:
        modules = under(named.run.turns, "modules")
        lines = module_lines(modules) if len(shown) == 1 else {named.label: (whole_update(modules), named.look)}
        for label, (columns, style) in lines.items():
            draw_sizes(norms, drifts, named.run.turns["turn"], columns, label, style)
        draw_cosines(cosines, named, modules, alone=len(shown) == 1)
    norms.set_title(r"size of each update,  $\|\Delta W_t\|$ (Frobenius)")
    cosines.set_title("cosine with earlier updates, all edit modules together")
    drifts.set_title(r"drift from the base model,  $\|W_t - W_0\| \,/\, \|W_0\|$")
    cosines.axhline(0, color="black", linewidth=0.8, zorder=1)
    symmetric(cosines)
    fit_values(norms)
    percent_axis(drifts)
    count_axis(drifts, "turn")
    shaded = shade_warm_up(axes, shown)
    orthogonal = Line2D([], [], color="black", linestyle=":", linewidth=1.5, label="drift if orthogonal")
    if len(shown) > 1:
        legend_above(figure, norms, extra=[*shaded, *cosine_entries(alone=False), orthogonal])
    else:
        legend_beside(norms, shaded)
        legend_beside(cosines, cosine_entries(alone=True))
        legend_beside(drifts, [orthogonal])
    return Picture(
        "updates",
        "Updates: size, orthogonality, drift",
        "What the theory says of a good run: sizes stay bounded, and cosines with earlier updates go to 0. Bounded "
        "updates do not bound the drift from the base model, which grows like the root of their number even where they "
        "are orthogonal (dotted). A drift above its dotted line says that updates push the same way, one below it that "
        "they undo each other.",
        figure,
    )


def draw_sizes(norms: Axes, drifts: Axes, turn: np.ndarray, columns: Columns, label: str, style: Look) -> None:
    curve(norms, turn, columns["update_norm"], label=label, **style)
    if "drift" in columns:
        curve(drifts, turn, columns["drift"], **style)
        curve(drifts, turn, orthogonal_drift(columns), **{**style, "linestyle": ":", "linewidth": 1.5})


def module_lines(modules: Mapping[str, Columns]) -> dict[str, tuple[Columns, Look]]:
    """A line a module or, of more than can be told apart, one for the whole update."""
    if len(modules) > MOST_LINES:
        return {f"all {len(modules)} modules": (whole_update(modules), look(0))}
    names = short_module_names(list(modules))
    return {names[name]: (columns, look(place)) for place, (name, columns) in enumerate(modules.items())}


def whole_update(modules: Mapping[str, Columns]) -> Columns:
    """Norm and drift of all modules' updates, taken as one long vector."""
    whole = {"update_norm": root_sum([one["update_norm"] for one in modules.values()])}
    if all("drift" in one for one in modules.values()):
        starts = [start_norm(one) for one in modules.values()]
        moved = root_sum([one["drift"] * start for one, start in zip(modules.values(), starts, strict=True)])
        whole["drift"] = moved / math.hypot(*starts)
    return whole


def root_sum(columns: Sequence[np.ndarray]) -> np.ndarray:
    return np.sqrt(np.sum(np.square(columns), axis=0))


def start_norm(columns: Columns) -> float:
    """||W_0||: after the first update, that update is all the drift there is."""
    return float(columns["update_norm"][0] / columns["drift"][0])


def orthogonal_drift(columns: Columns) -> np.ndarray:
    """sqrt(sum_s ||DeltaW_s||^2) / ||W_0||, the drift that orthogonal updates of these sizes add up to."""
    return np.sqrt(np.nancumsum(np.square(columns["update_norm"]))) / start_norm(columns)


def draw_cosines(ax: Axes, named: Named, modules: Mapping[str, Columns], alone: bool) -> None:
    """Of one run every lag, of several the first; and of both those with a random turn from before the window."""
    turns = named.run.turns
    turn = turns["turn"]
    lags = sum(path.startswith("cosines/") for path in next(iter(modules.values())))
    shades = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.85, max(lags, 1)))
    for lag in range(1, (lags if alone else min(lags, 1)) + 1):
        cosine = whole_cosine(modules, f"cosines/{lag - 1}", turn - lag, turn)
        style: Look = {"color": shades[lag - 1], "linewidth": 1.6, "label": before(lag)}
        curve(ax, turn, cosine, **(style if alone else named.look))
    if "earlier_turn" in turns:
        cosine = whole_cosine(modules, "cosine_earlier", turns["earlier_turn"], turn)
        every = max(1, len(turn) // MOST_POINTS)
        ax.plot(turn[::every], cosine[::every], "x", color=COLOURS[1] if alone else named.look["color"], markersize=6)


def before(lag: int) -> str:
    return "turn before" if lag == 1 else f"{lag} turns before"


def cosine_entries(alone: bool) -> list[Line2D]:
    """What the cosines are with; of one run, the lines say it themselves."""
    colour, words = (COLOURS[1], "") if alone else ("black", "cosine with ")
    cross = Line2D([], [], color=colour, marker="x", linestyle="", label=f"{words}random earlier turn")
    return [cross] if alone else [Line2D([], [], color=colour, label=f"{words}{before(1)}"), cross]


def whole_cosine(modules: Mapping[str, Columns], field: str, with_turn: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """The cosine of whole updates, all modules as one long vector, from the cosines of the modules.

    sum_m c_m ||t_m|| ||s_m|| / (||t|| ||s||); NaN where turn s is not there.
    """
    row_of = dict(zip(turn.tolist(), range(len(turn)), strict=True))
    rows = np.array([row_of.get(one, -1) for one in with_turn.tolist()])
    norms = np.array([one["update_norm"] for one in modules.values()])  # (modules, turns)
    cosines = np.array([one.get(field, np.full(len(turn), np.nan)) for one in modules.values()])
    total = np.sqrt((norms**2).sum(0))
    with np.errstate(invalid="ignore", divide="ignore"):
        whole = (cosines * norms * norms[:, rows]).sum(0) / (total * total[rows])
    return np.where(rows >= 0, whole, np.nan)


def symmetric(ax: Axes) -> None:
    """Limits alike above and below 0, and never so narrow that noise looks like a trend."""
    values = [np.asarray(line.get_ydata(), dtype=float) for line in ax.get_lines()]
    largest = max((float(np.nanmax(np.abs(one))) for one in values if np.isfinite(one).any()), default=0.0)
    reach = min(1.05, max(0.1, 1.15 * largest))
    ax.set_ylim(-reach, reach)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def statistics_over_turns(runs: Sequence[Named]) -> Picture | None:
    shown = [named for named in with_columns(runs, "statistics/") if has_rows(named)]
    if not shown:
        return None
    alone = len(shown) == 1
    figure = Figure(figsize=(11, 8.8))
    (change, spectrum), (floored, spread) = figure.subplots(2, 2)
    for named in shown:
        for group in under(named.run.turns, "statistics").values():
            draw_changes(change, named, group, alone)
            draw_spectrum(spectrum, named, group, alone)
            draw_field(floored, named, group, "floored_fraction", alone)
            draw_field(spread, named, group, "std_mean", alone)
    change.set_title("change a turn, relative" + ("" if alone else r"  ($\sigma$ of value gradients)"))
    spectrum.set_title(r"eigenvalues of $\Sigma^{-1/2}$" if alone else r"condition number of $\Sigma^{-1/2}$")
    floored.set_title("floored eigenvalues")
    spread.set_title(r"mean $\sigma$ of value gradients")
    finish_changes(change)
    say_if_empty(spectrum, "value gradients were not fully whitened")
    say_if_empty(floored, "value gradients were not fully whitened")
    if len(values := values_of(spectrum)):
        log_axis(spectrum, "y", values.min(), values.max())
    if floored.get_lines():
        percent_axis(floored)
    fit_values(spread)
    last = max(named.run.turns["turn"][-1] for named in shown)
    for ax in (spectrum, floored, spread):
        count_axis(ax, "turn")
        ax.set_xlim(-0.04 * last - 0.5, 1.04 * last + 0.5)
    shaded = shade_warm_up([spectrum, floored, spread], shown)
    legend_above(figure, change, spectrum, extra=shaded)
    return Picture(
        "statistics",
        "Normaliser: drift and whitening",
        "Each turn's relative change of the running statistics should fall like 1/n (grey), n the rows seen. "
        "Sigma^(-1/2) whitens the value gradients: its eigenvalues are the gains of their directions, and the floored "
        "fraction is the share of directions whose gain the eigenvalue floor caps. Both exist from the first whitened "
        "turn on.",
        figure,
    )


def has_rows(named: Named) -> bool:
    groups = under(named.run.turns, "statistics").values()
    return any(np.nanmax(group.get("n", np.zeros(1))) > 0 for group in groups)


def draw_field(ax: Axes, named: Named, group: Columns, field: str, alone: bool) -> None:
    if field in group:
        curve(ax, named.run.turns["turn"], group[field], **(look(0) if alone else named.look))


def draw_changes(ax: Axes, named: Named, group: Columns, alone: bool) -> None:
    """Of one run every moment, of several the one that all normalisers have."""
    moments = MOMENTS if alone else {"value_std_change": named.label}
    for place, (field, label) in enumerate(moments.items()):
        if field in group:
            positive = np.where(group[field] > 0, group[field], np.nan)  # frozen statistics change by 0, on a log axis
            curve(ax, group["n"], positive, over_log=True, label=label, **(look(place) if alone else named.look))


def finish_changes(ax: Axes) -> None:
    """Logarithmic axes, and the line that falls like 1/n through the first point of the topmost curve."""
    lines = [points for line in ax.get_lines() if len(points := np.asarray(line.get_xydata(), dtype=float))]
    if lines:
        every = np.concatenate(lines)
        log_axis(ax, "x", every[:, 0].min(), every[:, 0].max())
        log_axis(ax, "y", every[:, 1].min(), every[:, 1].max())
        points = max(lines, key=lambda one: float(one[0, 1]))
        n = np.array([points[0, 0], every[:, 0].max()])
        ax.plot(n, points[0, 1] * points[0, 0] / n, color=GREY, linewidth=1.4, linestyle=":", label="1/n", zorder=1)
    ax.set_xlabel("rows seen, n")


def draw_spectrum(ax: Axes, named: Named, group: Columns, alone: bool) -> None:
    """Of one run quantiles of the eigenvalues, of several largest over smallest."""
    if "whitening_median" not in group:
        return
    turn, colour = named.run.turns["turn"], COLOURS[0]
    if not alone:
        curve(ax, turn, group["whitening_max"] / group["whitening_min"], **named.look)
        return
    there = np.isfinite(group["whitening_median"])
    for low, high, alpha, label in (("min", "max", 0.15, "all eigenvalues"), ("q05", "q95", 0.3, "5% to 95% of them")):
        bottom, top = (group[f"whitening_{one}"][there] for one in (low, high))
        ax.fill_between(turn[there], bottom, top, color=colour, alpha=alpha, linewidth=0, label=label)
    curve(ax, turn, group["whitening_median"], color=colour, label="median eigenvalue")


def say_if_empty(ax: Axes, why: str) -> None:
    if not ax.get_lines():
        ax.text(0.5, 0.5, why, transform=ax.transAxes, ha="center", va="center", color=GREY)


# ---------------------------------------------------------------------------------------------------------------------
# Time, memory, loss


def time_over_turns(runs: Sequence[Named]) -> Picture | None:
    shown = with_columns(runs, "seconds/")
    if not shown:
        return None
    figure = Figure(figsize=(11, 10))
    seconds, memory, loss = axes = list(figure.subplots(3, 1, sharex=True))
    parts = _parts(shown[0].run.turns) if len(shown) == 1 else {}
    for named in shown:
        turns = named.run.turns
        if parts:
            stack = seconds.stackplot(turns["turn"], *parts.values(), labels=list(parts), linewidth=0)
            for area, (hatch, place) in zip(stack, cycle(AREAS), strict=False):
                area.set(facecolor=COLOURS[place], edgecolor="white", hatch=hatch)
        else:
            curve(seconds, turns["turn"], turns["seconds/total"], label=named.label, **named.look)
        draw_memory(memory, named, alone=len(shown) == 1)
        if "loss" in turns:
            curve(loss, turns["turn"], turns["loss"], **(look(0) if len(shown) == 1 else named.look))
    seconds.set_title("seconds a turn, evaluation aside")
    memory.set_title("memory, GiB")
    loss.set_title("loss of the turn's facts before they are written, nats a token")
    for ax in axes:
        ax.set_ylim(bottom=0)
    count_axis(loss, "turn")
    shaded = shade_warm_up(axes, shown)
    if len(shown) > 1:
        legend_above(figure, seconds, extra=shaded)
    else:
        legend_beside(seconds, shaded)
        legend_beside(memory)
    words = [f"{part}: {PARTS[part]}" for part in parts if part in PARTS]
    told = f"Of a turn, {'; '.join(words)}. " if words else ""
    return Picture(
        "time",
        "Time, memory and loss of each turn",
        f"{told}Memory at the last turn should be memory at the second. The loss is that of facts the model has not "
        "been told yet: it falls while edits teach the form of the answers, and rises where they harm the model.",
        figure,
    )


def _parts(turns: Columns) -> dict[str, np.ndarray]:
    """Seconds of each part of the turns, 0 where a turn has it not; in the order in which turns have them."""
    names = [path.removeprefix("seconds/") for path in turns if path.startswith("seconds/")]
    return {name: np.nan_to_num(turns[f"seconds/{name}"]) for name in names if name != "total"}


def draw_memory(ax: Axes, named: Named, alone: bool) -> None:
    turns = named.run.turns
    kinds = [path for path in turns if path.startswith("memory/") and path != "memory/peak_bytes"]
    for place, path in enumerate(kinds):
        words = path.removeprefix("memory/").removesuffix("_bytes").replace("_", " ") + " memory"
        style = {**look(place + 3), "label": words} if alone else {**named.look, "alpha": 1 if place == 0 else 0.5}
        curve(ax, turns["turn"], turns[path] / 2**30, **style)


# ---------------------------------------------------------------------------------------------------------------------
# Meta-training


def meta_training(runs: Sequence[Named]) -> Picture | None:
    shown = [named for named in runs if named.run.meta("meta_train") or named.run.meta("meta_valid")]
    if not shown:
        return None
    terms = list(dict.fromkeys(term for named in shown for term in under(named.run.meta("meta_train"), "meta_loss")))
    with_norm = any("grad_norm" in named.run.meta("meta_train") for named in shown)
    figure, axes = panel_grid(len(terms) + with_norm, 2)
    panels = [*(f"meta_loss/{term}" for term in terms), *(["grad_norm"] if with_norm else [])]
    for ax, path in zip(axes, panels, strict=True):
        for named in shown:
            draw_meta(ax, named, path)
        ax.set_title(path.removeprefix("meta_loss/").replace("_", " ").replace("grad norm", "norm of the gradient"))
        count_axis(ax, "turn of meta-training")
        fit_values(ax)
    phases = [Line2D([], [], color="black", label=label, **style) for label, style in PHASES.values()]
    legend_above(figure, *axes, extra=phases)
    return Picture(
        "meta_training",
        "Meta-training",
        "Losses of the edited model on the training turns (thin) and on held-out turns (with markers): cross-entropy "
        "on the rephrases, KL(unedited || edited) on unrelated questions, and their weighted sum, in nats a token.",
        figure,
    )


def draw_meta(ax: Axes, named: Named, path: str) -> None:
    for phase, (_, style) in PHASES.items():
        lines = named.run.meta(phase)
        if path in lines:
            curve(ax, lines["turn"], lines[path], **{**named.look, **style, "label": named.label})
