"""Pictures of what runs scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from harness.console import FORMS, NOT_SHARES, SCORES
from harness.report.drawing import (
    DASHES,
    GREY,
    Look,
    Named,
    Picture,
    count_axis,
    interval,
    legend_above,
    look,
    panel_grid,
    percent_axis,
)
from harness.report.runs import Run

FORM_WORDS: Final = FORMS | {"": "token by token", "contains": "generated text contains it"}
TITLES: Final = {"LS_kl": "LS_kl  KL from base, nats", "perplexity": "perplexity of a fixed text"}
GLUE_WAYS: Final = {"likelihood": "likelihood of the labels", "generation": "generated answer"}
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


def is_share(name: str) -> bool:
    """Whether a score is a share of something, and so a percentage."""
    score, _, form = name.partition("_")
    return score in SCORES and form not in NOT_SHARES


def order(name: str) -> tuple[bool, int, str]:
    """Token accuracy first, then its other forms, then what is no share."""
    form = name.partition("_")[2]
    return not is_share(name), list(FORMS).index(form) if form in FORMS else len(FORMS), form


def scores_over_edits(runs: Sequence[Named]) -> Picture | None:
    names = list(dict.fromkeys(name for named in runs for line in named.run.evaluations for name in line["scores"]))
    names.sort(key=order)
    panels = one_runs_panels(runs[0].run, names) if len(runs) == 1 else all_runs_panels(runs, names)
    if not panels:
        return None
    figure, axes = panel_grid(len(panels), 3)
    for ax, (title, lines) in zip(axes, panels.items(), strict=True):
        for line in lines:
            draw_score(ax, line)
        finish_panel(ax, title, is_share(lines[0].score))
        facts_axis(ax)
    base = Line2D([], [], color=GREY if len(runs) > 1 else "black", linestyle=":", linewidth=1.6, label="base model")
    legend_above(figure, *axes, extra=[base])
    return Picture(
        "scores",
        "Scores over edits",
        "Mean over the facts written so far; bands are 95% bootstrap intervals over records. The base model is asked "
        "about all facts of the run. LS is accuracy on the true answers of unrelated questions: compare it with the "
        "base model's, not with 100%.",
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
            title, label = f"{score}  {SCORES[score]}", FORM_WORDS.get(form) or form
        panels.setdefault(title, []).append(ScoreLine(run, name, label, style, style["color"]))
    return panels


def all_runs_panels(runs: Sequence[Named], names: Sequence[str]) -> dict[str, list[ScoreLine]]:
    """A panel a score, the runs as lines."""
    return {
        TITLES.get(name, name): [ScoreLine(named.run, name, named.label, named.look, GREY) for named in runs]
        for name in names
    }


def draw_score(ax: Axes, line: ScoreLine) -> None:
    found = [one for one in line.run.evaluations if one["scores"].get(line.score) is not None]
    for one in found:
        if one["stage"] == "base":
            mean, *_ = interval(one["scores"][line.score])
            ax.axhline(mean, color=line.base_colour, linestyle=":", linewidth=1.6, zorder=1)
    points = {line.run.edits_after(one["turn"]): one["scores"][line.score] for one in found if one["stage"] != "base"}
    draw_points(ax, points, line.look, line.label)


def draw_points(ax: Axes, points: Mapping[float, Any], style: Look, label: str | None) -> None:
    """Scores over x with their intervals as a band; one alone with an error bar."""
    if not points:
        return
    x = list(points)
    mean, low, high = np.array([interval(score) for score in points.values()]).T
    if len(x) == 1:
        ax.errorbar(x, mean, [mean - low, high - mean], color=style["color"], marker="o", capsize=4, label=label)
        return
    ax.fill_between(x, low, high, color=style["color"], alpha=0.13, linewidth=0)
    ax.plot(x, mean, **style, marker="o", label=label)


def finish_panel(ax: Axes, title: str, share: bool) -> None:
    ax.set_title(title)
    if share:
        percent_axis(ax)


def facts_axis(ax: Axes) -> None:
    count_axis(ax, "facts edited")
    ax.set_xlim(left=min(0.0, ax.get_xlim()[0]))


# ---------------------------------------------------------------------------------------------------------------------
# Retention


def retention_by_age(runs: Sequence[Named]) -> Picture | None:
    curves = {named.label: (named, ages) for named in runs if (ages := scores_by_age(named.run))}
    if not curves:
        return None
    protocols = list(dict.fromkeys(protocol for _, ages in curves.values() for protocol in ages))
    every_age = sorted({age for _, ages in curves.values() for one in ages.values() for age in one})
    figure, axes = panel_grid(len(protocols), 3)
    for ax, protocol in zip(axes, protocols, strict=True):
        for label, (named, ages) in curves.items():
            points = {float(every_age.index(age)): score for age, score in ages.get(protocol, {}).items()}
            draw_points(ax, points, named.look, label if len(runs) > 1 else None)
        ax.set_xticks(range(len(every_age)), [f"{age:,}" for age in every_age])
        ax.set_xlabel("age of the facts, turns")
        finish_panel(ax, f"{protocol}  {SCORES.get(protocol, '')}", share=True)
    legend_above(figure, *axes)
    return Picture(
        "retention",
        "Retention by age",
        "Token accuracy on a fixed sample of each turn's facts, asked again when so many more turns had gone by (0: "
        "right after their own); bands are 95% bootstrap intervals, there once a run is over. Only the early turns' "
        "facts reach a great age.",
        figure,
    )


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
                draw_points(ax, ways.get("likelihood", {}), named.look, label)
            else:
                for place, (way, words) in enumerate(GLUE_WAYS.items()):
                    style = look(place) | {"linestyle": DASHES[place]}  # the two often agree
                    draw_points(ax, ways.get(way, {}), style, words)
        finish_panel(ax, task.replace("_", " "), share=True)
        facts_axis(ax)
    legend_above(figure, *axes)
    return Picture(
        "glue",
        "GLUE over edits",
        "Accuracy on tasks that the edits have nothing to do with, at 0 that of the base model; bands are 95% "
        "bootstrap intervals over rows. " + (GLUE_NOTE if len(runs) == 1 else "By the likelihood of the labels."),
        figure,
    )


def glue_scores(run: Run) -> dict[str, dict[str, dict[float, Any]]]:
    """{task: {way: {facts edited: accuracy}}} from glue/turn_<t>.json."""
    scores: dict[str, dict[str, dict[float, Any]]] = {}
    files = {int(stem.removeprefix("turn_")): content for stem, content in run.json_files("glue", "turn_*.json")}
    for turn, content in sorted(files.items()):
        for task, result in content.items():
            for way in GLUE_WAYS:
                if isinstance(result, Mapping) and way in result:
                    into = scores.setdefault(task, {}).setdefault(way, {})
                    into[run.edits_after(turn)] = result[way]["accuracy"]
    return scores
