"""What methods wrote, and what it cost, over edits and by age: a curve a method, the mean over its seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from harness.report.drawing import (
    GREY,
    MOST_BANDS,
    Named,
    Picture,
    by_configuration,
    interval,
    legend_above,
    marker,
    not_shown,
    panel_grid,
)
from harness.report.score_figures import (
    TITLES,
    age_axis,
    base_line,
    draw_points,
    facts_axis,
    finish_panel,
    points_over_edits,
    scores_by_age,
)
from harness.watch import SCORE_NAMES, is_share

MOST_TIMES: Final = 1000.0
"""The least on an axis that is no share: what is larger lies beyond its edge, so that the others can be told apart."""

Points = Mapping[float, Any]  # x -> score


def written_over_edits(runs: Sequence[Named]) -> Picture | None:
    """What the edited models say by themselves, of runs that were scored on the way."""
    return _over_edits("written", "Whole answers written, over edits", ("ES_gen", "GS_gen"), runs)


def harm_over_edits(runs: Sequence[Named]) -> Picture | None:
    """What editing did to the rest, of runs that were scored on the way."""
    return _over_edits("harm", "Harm done, over edits", ("LS_agree", "perplexity"), runs)


def edits_by_age(runs: Sequence[Named]) -> Picture | None:
    """Retention of the edits, of runs that asked them again."""
    found = {named.label: ages["ES"] for named in runs if "ES" in (ages := scores_by_age(named.run))}
    asked = [named for named in runs if named.label in found]
    if not asked:
        return None
    figure, (ax,) = panel_grid(1, 1)
    every = age_axis(ax, found.values())
    points = {name: {float(every.index(age)): score for age, score in own.items()} for name, own in found.items()}
    told = _draw(ax, asked, points)
    finish_panel(ax, f"ES  {SCORE_NAMES['ES']}", share=True)
    legend_above(figure, extra=_legend(asked))
    caption = (
        "Token accuracy on a fixed sample of each turn's facts, asked again when so many more turns had gone by (0: "
        f"right after their own). {told} Only the early turns' facts reach a great age."
    )
    return Picture("age", "Edited facts by their age", caption, figure)


def _over_edits(name: str, title: str, scores: Sequence[str], runs: Sequence[Named]) -> Picture | None:
    """A panel a score that any of the runs has."""
    asked = [named for named in runs if any(line["stage"] == "eval" for line in named.run.evaluations)]
    there = [one for one in scores if any(one in line["scores"] for named in asked for line in named.run.evaluations)]
    if not there:
        return None
    figure, axes = panel_grid(len(there), 3)
    notes: dict[str, None] = {}
    for ax, score in zip(axes, there, strict=True):
        found = {named.label: points_over_edits(named.run, score) for named in asked}
        for named in asked:
            base_line(ax, named.run, score, GREY)
        notes[_draw(ax, asked, found)] = None
        finish_panel(ax, TITLES.get(score, score), is_share(score))
        if not is_share(score):
            notes[_cut(ax, asked, found)] = None
        facts_axis(ax)
    notes["The base model is asked about all facts of a run."] = None
    notes[not_shown("scored on the way", dict.fromkeys(one.configuration for one in runs if one not in asked))] = None
    base = Line2D([], [], color=GREY, linestyle=":", linewidth=1.6, label="base model")
    legend_above(figure, extra=[*_legend(asked), base])
    return Picture(name, title, f"Mean over the facts written so far. {' '.join(filter(None, notes))}", figure)


def _draw(ax: Axes, runs: Sequence[Named], points: Mapping[str, Points]) -> str:
    """A curve a method, through what all of its runs have a score of, and behind it its runs; what to say of it."""
    methods = by_configuration(named for named in runs if points[named.label])
    bands = len(methods) <= MOST_BANDS
    for own in methods.values():
        every = [points[named.label] for named in own]
        if len(own) > 1:
            for named, one in zip(own, every, strict=True):
                x = sorted(one)
                ax.plot(x, [interval(one[at])[0] for at in x], **{**named.look, "linewidth": 0.8, "alpha": 0.45})
            shared = set.intersection(*map(set, every))
            every = [{at: float(np.mean([interval(one[at])[0] for one in every])) for at in shared}]
        draw_points(ax, every[0], own[0].look, None, bands=bands and len(own) == 1)
    told = "Bands are 95% bootstrap intervals, of methods with one seed." if bands else "Intervals are in the tables."
    several = any(len(own) > 1 for own in methods.values())
    return f"{'Of a method with several seeds their mean, the seeds pale behind it. ' * several}{told}"


def _legend(runs: Sequence[Named]) -> list[Line2D]:
    """Methods by their names."""
    methods = by_configuration(runs)
    return [Line2D([], [], **own[0].look, marker=marker(own[0].look), label=name) for name, own in methods.items()]


def _cut(ax: Axes, runs: Sequence[Named], points: Mapping[str, Points]) -> str:
    """End the axis where what lies above would hide the rest; a sentence that names it, with its largest."""
    means = {one.label: [interval(score)[0] for score in points[one.label].values()] for one in runs}
    top = MOST_TIMES * min((min(own) for own in means.values() if own), default=float("inf"))
    largest: dict[str, float] = {}
    for named in runs:
        if (most := max(means[named.label], default=0.0)) > top:
            largest[named.configuration] = max(most, largest.get(named.configuration, 0.0))
    if not largest:
        return ""
    ax.set_ylim(top=top)
    return f"Beyond the upper edge: {'; '.join(f'{name}, up to {most:,.4g}' for name, most in largest.items())}."
