"""Pictures of what runs scored."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from harness.report.drawing import (
    DASHES,
    GREY,
    LETTERS,
    MARKERS,
    MOST_BANDS,
    PERCENT,
    Look,
    Named,
    Picture,
    count_axis,
    fit_values,
    interval,
    legend_above,
    log_axis,
    look,
    marker,
    panel_grid,
    percent_axis,
    span_widely,
)
from harness.report.runs import Run, read_json
from harness.watch import FORM_NAMES, SCORE_NAMES, is_share, score_words

FORM_WORDS: Final = FORM_NAMES | {"": "token by token", "contains": "generated text contains it"}
TITLES: Final = {"LS_kl": "LS_kl  KL from base, nats", "perplexity": "perplexity of a fixed text"}
STAGES: Final = ("base", "final")
BASE: Final = {"color": "#6b6b6b"}
ROW: Final = 0.3  # inches a row of a dot plot
GLUE_WAYS: Final = {"likelihood": "likelihood of the labels", "generation": "generated answer"}
LS_NOTE: Final = (
    "LS is accuracy on the true answers of unrelated questions: compare it with the base model's, not with 100%."
)
GLUE_NOTE: Final = (
    "A generated answer can be invalid, which counts as wrong; the likelihood of the labels is the number to trust."
)


@dataclass(frozen=True)
class ScoreLine:
    """A score of a run over its evaluations, and how it is drawn."""

    run: Run
    score: str
    label: str | None
    look: Look
    base_colour: str


def order(name: str) -> tuple[bool, int, str, int]:
    """Token accuracy first, then its other forms, then what is no share; edits before rephrases before localities."""
    score, _, form = name.partition("_")
    place = list(FORM_NAMES).index(form) if form in FORM_NAMES else len(FORM_NAMES)
    return not is_share(name), place, form, list(SCORE_NAMES).index(score) if score in SCORE_NAMES else len(SCORE_NAMES)


def scores(runs: Sequence[Named]) -> Picture | None:
    """Over edits where there are evaluations on the way; else, of one run, before and after."""
    stages = {line["stage"] for named in runs for line in named.run.evaluations}
    if "eval" in stages or (stages and "final" not in stages):
        return scores_over_edits(runs)
    return before_and_after(runs[0]) if len(runs) == 1 and stages else None


def scores_over_edits(runs: Sequence[Named]) -> Picture | None:
    """A panel a score, or of one run a protocol; None where there is nothing to draw."""
    names = list(dict.fromkeys(name for named in runs for line in named.run.evaluations for name in line["scores"]))
    names.sort(key=order)
    panels = one_runs_panels(runs[0].run, names) if len(runs) == 1 else all_runs_panels(runs, names)
    if not panels:
        return None
    figure, axes = panel_grid(len(panels), 3)
    for ax, (heading, lines) in zip(axes, panels.items(), strict=True):
        for line in lines:
            draw_score(ax, line, bands=len(lines) <= MOST_BANDS)
        finish_panel(ax, heading, is_share(lines[0].score))
        facts_axis(ax)
    colours = {line.base_colour for lines in panels.values() for line in lines}
    base_colour = colours.pop() if len(colours) == 1 else "black"  # with several, each line's base has its own
    base = Line2D([], [], color=base_colour, linestyle=":", linewidth=1.6, label="base model")
    legend_above(figure, *axes, extra=[base])
    return Picture(
        "scores",
        "Scores over edits",
        f"Mean over the facts written so far; {bands_note(*map(len, panels.values()))} The base model is asked about "
        f"all facts of the run. {LS_NOTE}",
        figure,
    )


def one_runs_panels(run: Run, names: Sequence[str]) -> dict[str, list[ScoreLine]]:
    """A panel a protocol, its forms as lines; what is no share has a panel of its own."""
    forms = list(dict.fromkeys(name.partition("_")[2] for name in names if is_share(name)))
    panels: dict[str, list[ScoreLine]] = {}
    for name in names:
        score, _, form = name.partition("_")
        style = look(forms.index(form) if is_share(name) else 0)
        title, label = TITLES.get(name, name), None
        if is_share(name):
            title, label = f"{score}  {SCORE_NAMES[score]}", FORM_WORDS.get(form) or form
        panels.setdefault(title, []).append(ScoreLine(run, name, label, style, style["color"]))
    return panels


def all_runs_panels(runs: Sequence[Named], names: Sequence[str]) -> dict[str, list[ScoreLine]]:
    """A panel a score, the runs as lines."""
    return {
        TITLES.get(name, name): [ScoreLine(named.run, name, named.label, named.look, GREY) for named in runs]
        for name in names
    }


def bands_note(*curves: int) -> str:  # of each panel
    if max(curves) <= MOST_BANDS:
        return "bands are 95% bootstrap intervals."
    if min(curves) > MOST_BANDS:
        return f"intervals of more than {MOST_BANDS} curves would hide each other, and are in the tables."
    return (
        f"bands are 95% bootstrap intervals, where there are no more than {MOST_BANDS} curves; all are in the tables."
    )


def draw_score(ax: Axes, line: ScoreLine, bands: bool) -> None:
    base_line(ax, line.run, line.score, line.base_colour)
    draw_points(ax, points_over_edits(line.run, line.score), line.look, line.label, bands)


def base_line(ax: Axes, run: Run, score: str, colour: str) -> None:
    """What the base model scored on the run's facts, where it was asked."""
    for one in run.evaluations:
        if one["stage"] == "base" and one["scores"].get(score) is not None:
            ax.axhline(interval(one["scores"][score])[0], color=colour, linestyle=":", linewidth=1.6, zorder=1)


def points_over_edits(run: Run, score: str) -> dict[float, Any]:
    """{facts edited: score} of the edited model."""
    return {
        run.edits_after(one["turn"]): one["scores"][score]
        for one in run.evaluations
        if one["stage"] != "base" and one["scores"].get(score) is not None
    }


def draw_points(ax: Axes, points: Mapping[float, Any], style: Look, label: str | None, bands: bool) -> None:
    """Scores over x with their intervals as a band; one alone with an error bar."""
    if not points:
        return
    x = sorted(points)  # results.json has ages in the order of their digits
    mean, low, high = np.array([interval(points[at]) for at in x]).T
    if len(x) == 1:
        errors = [mean - low, high - mean]
        ax.errorbar(x, mean, errors, color=style["color"], marker=marker(style), capsize=4, label=label)
        return
    if bands:
        ax.fill_between(x, low, high, color=style["color"], alpha=0.13, linewidth=0)
    ax.plot(x, mean, **style, marker=marker(style), label=label)


def finish_panel(ax: Axes, title: str, share: bool) -> None:
    ax.set_title(title)
    if share:
        percent_axis(ax)
    else:
        fit_values(ax)


def facts_axis(ax: Axes) -> None:
    count_axis(ax, "facts edited")
    ax.set_xlim(left=min(0.0, ax.get_xlim()[0]))


# ---------------------------------------------------------------------------------------------------------------------
# Base and final scores


def before_and_after(named: Named) -> Picture:
    """A row a score that is a share: the base model's, and the edited model's."""
    stages = {stage: named.run.results.get(stage, {}) for stage in STAGES}
    names = sorted({name for found in stages.values() for name in found if is_share(name)}, key=order)
    figure = Figure(figsize=(8, 1.4 + ROW * len(names)))
    ax = figure.subplots()
    for stage, style, label in (("base", BASE, "base model"), ("final", named.look, "edited model")):
        rows = {row: stages[stage][name] for row, name in enumerate(names) if stages[stage].get(name) is not None}
        draw_row_points(ax, rows, style["color"], MARKERS[stage == "base"], label)
    rows_axis(ax, [f"{name}  {score_words(name)}" for name in names])
    ax.xaxis.set_major_formatter(PERCENT)
    legend_above(figure, ax)
    others = sorted({name for found in stages.values() for name in found if not is_share(name)}, key=order)
    more = f" {' and '.join(others)}, no shares, are in the table." if others else ""
    return Picture("scores", "Scores", f"Means over records with 95% bootstrap intervals. {LS_NOTE}{more}", figure)


def comparison(runs: Sequence[Named]) -> Picture | None:
    """A panel a score, a row a run: what its edited model scored, and the base model."""
    shown = [named for named in runs if named.run.results.get("final")]
    if len(runs) < 2 or not shown:
        return None
    every = sorted({name for named in shown for name in named.run.results["final"]}, key=order)
    names = [name for name in every if any(_mean(named, stage, name) for named in shown for stage in STAGES)]
    if not names:
        return None
    figure, axes = panel_grid(len(names), 3)
    rows = math.ceil(len(names) / 3)
    label_width = max(len(named.label) for named in shown) / LETTERS + 0.4
    figure.set_size_inches(label_width + 2.9 * min(3, len(names)), rows * (ROW * len(shown) + 1.1) + 0.6)
    for place, (ax, name) in enumerate(zip(axes, names, strict=True)):
        rows_axis(ax, [named.label for named in shown])
        draw_comparison(ax, shown, name)
        ax.tick_params(labelleft=place % 3 == 0)
    base = Line2D([], [], color=BASE["color"], linestyle=":", linewidth=1.6, label="base model, on the run's facts")
    legend_above(figure, extra=[base])
    left_out = [name for name in every if name not in names]
    zero = f" Left out, being 0 for every run and for the base model: {', '.join(left_out)}." if left_out else ""
    return Picture(
        "comparison",
        "Final scores",
        "Means over records with 95% bootstrap intervals, each run's own; runs that differ in the seed alone have one "
        f"colour. Runs on the same facts are told apart more sharply by the paired differences above. {LS_NOTE}{zero}",
        figure,
    )


def draw_comparison(ax: Axes, runs: Sequence[Named], name: str) -> None:
    """Of the base model a piece of line a row, which is one line where all runs have the same."""
    for row, named in enumerate(runs):
        if (score := named.run.results["final"].get(name)) is not None:
            draw_row_points(ax, {row: score}, named.look["color"], marker(named.look), None)
    bases = np.array([_mean(named, "base", name) for named in runs], dtype=float)  # NaN where there is none
    edges = np.arange(len(runs))[:, None] + [-0.5, 0.5]
    ax.plot(np.repeat(bases, 2), edges.flat, color=BASE["color"], linestyle=":", linewidth=1.6, zorder=1)
    ax.set_title(TITLES.get(name, name))
    if is_share(name):
        ax.xaxis.set_major_formatter(PERCENT)
    means = np.array([*bases, *(_mean(named, "final", name) for named in runs)], dtype=float)
    there = means[np.isfinite(means)]
    if not is_share(name) and span_widely(there):
        log_axis(ax, "x", there.min(), there.max())


def _mean(named: Named, stage: str, name: str) -> float | None:
    score = named.run.results.get(stage, {}).get(name)
    return None if score is None else interval(score)[0]


def draw_row_points(ax: Axes, scores: Mapping[int, Any], colour: str, shape: str, label: str | None) -> None:
    """Scores by row, each with its interval."""
    mean, low, high = np.array([interval(score) for score in scores.values()]).reshape(-1, 3).T
    errors = [mean - low, high - mean]
    ax.errorbar(
        mean, list(scores), xerr=errors, label=label, color=colour, marker=shape, linestyle="", capsize=3, markersize=6
    )


def rows_axis(ax: Axes, names: Sequence[str]) -> None:
    """A row a name, the first on top."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
    ax.tick_params(axis="y", length=0)


# ---------------------------------------------------------------------------------------------------------------------
# Retention


def retention_by_age(runs: Sequence[Named]) -> Picture | None:
    """A panel a protocol."""
    curves = {named.label: (named, ages) for named in runs if (ages := scores_by_age(named.run))}
    if not curves:
        return None
    protocols = list(dict.fromkeys(protocol for _, ages in curves.values() for protocol in ages))
    every = [one for _, ages in curves.values() for one in ages.values()]
    figure, axes = panel_grid(len(protocols), 3)
    for ax, protocol in zip(axes, protocols, strict=True):
        every_age = age_axis(ax, every)
        for label, (named, ages) in curves.items():
            points = {float(every_age.index(age)): score for age, score in ages.get(protocol, {}).items()}
            draw_points(ax, points, named.look, label if len(runs) > 1 else None, bands=len(curves) <= MOST_BANDS)
        finish_panel(ax, f"{protocol}  {SCORE_NAMES.get(protocol, '')}", share=True)
    legend_above(figure, *axes)
    return Picture(
        "retention",
        "Retention by age",
        "Token accuracy on a fixed sample of each turn's facts, asked again when so many more turns had gone by (0: "
        f"right after their own); {bands_note(len(curves))} Only the early turns' facts reach a great age.",
        figure,
    )


def age_axis(ax: Axes, scores: Iterable[Mapping[int, Any]]) -> list[int]:
    """All ages of these scores, which lie equally far apart on the axis."""
    every = sorted({age for one in scores for age in one})
    ax.set_xticks(range(len(every)), [f"{age:,}" for age in every])
    ax.set_xlabel("age of the facts, turns")
    return every


def scores_by_age(run: Run) -> dict[str, dict[int, Any]]:
    """{protocol: {age: score}}, from results.json or, of a run under way, pooled from scores.jsonl."""
    finished = run.results.get("retention")
    if finished:
        return {name: {int(age): score for age, score in one["by_age"].items()} for name, one in finished.items()}
    sums: dict[str, dict[int, tuple[float, int]]] = {}  # of shares and of records: there is a line a turn
    for line in run.lines("scores.jsonl"):
        for name, score in line["scores"].items() if line["stage"] == "retention" else ():
            protocol, _, age = name.partition("_age")
            ages = sums.setdefault(protocol, {})
            total, n = ages.get(int(age), (0.0, 0))
            ages[int(age)] = total + score["mean"] * score["n"], n + score["n"]
    return {name: {age: total / n for age, (total, n) in ages.items()} for name, ages in sums.items()}


# ---------------------------------------------------------------------------------------------------------------------
# GLUE


def glue_over_edits(runs: Sequence[Named]) -> Picture | None:
    """A panel a task; of one run both ways of scoring, of several the likelihood of the labels."""
    found = {named.label: (named, scores) for named in runs if (scores := glue_scores(named.run))}
    tasks = list(dict.fromkeys(task for _, scores in found.values() for task in scores))
    if not tasks:
        return None
    figure, axes = panel_grid(len(tasks), 3)
    for ax, task in zip(axes, tasks, strict=True):
        for label, (named, scores) in found.items():
            ways = scores.get(task, {})
            if len(runs) > 1:
                draw_points(ax, ways.get("likelihood", {}), named.look, label, bands=len(found) <= MOST_BANDS)
            else:
                for place, (way, words) in enumerate(GLUE_WAYS.items()):
                    style = look(place) | {"linestyle": DASHES[place]}  # the two often agree
                    draw_points(ax, ways.get(way, {}), style, words, bands=True)
        finish_panel(ax, task.replace("_", " "), share=True)
        facts_axis(ax)
    legend_above(figure, *axes)
    return Picture(
        "glue",
        "GLUE over edits",
        "Accuracy on tasks that the edits have nothing to do with, at 0 that of the base model; "
        f"{bands_note(len(found))} {GLUE_NOTE if len(runs) == 1 else 'By the likelihood of the labels.'}",
        figure,
    )


def glue_scores(run: Run) -> dict[str, dict[str, dict[float, Any]]]:
    """{task: {way: {facts edited: accuracy}}} from glue/turn_<t>.json."""
    scores: dict[str, dict[str, dict[float, Any]]] = {}
    files = {int(path.stem.removeprefix("turn_")): path for path in (run.folder / "glue").glob("turn_*.json")}
    for turn, path in sorted(files.items()):
        for task, result in read_json(path).items():
            for way in GLUE_WAYS:
                if isinstance(result, Mapping) and way in result:
                    into = scores.setdefault(task, {}).setdefault(way, {})
                    into[run.edits_after(turn)] = result[way]["accuracy"]
    return scores
