"""What was written against the harm that it did: a curve over step sizes, or a mark a method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from matplotlib.axes import Axes

from harness.report.drawing import (
    PERCENT,
    Look,
    Named,
    Picture,
    by_configuration,
    interval,
    legend_above,
    log_axis,
    look,
    marker,
    not_shown,
    panel_grid,
)
from harness.report.names import but_for_the_step
from harness.report.runs import Run

Member = TypeVar("Member")
Scores = Mapping[str, Any]  # of a run, by name, as in results.json

WRITTEN: Final = {"ES_gen": "edited facts said exactly", "ES_seq": "edited answers, all tokens"}
"""What counts as written: the first of these that every run has."""
WRECKED: Final = 20.0
"""Times the least perplexity: what is larger stands at the edge, so that the others can be told apart."""


def written_against_harm(runs: Sequence[Named]) -> Picture | None:
    """A curve a configuration, a point a step size; None where no two finished runs differ in their step size alone."""
    done = [one.run for one in runs if one.run.finished and "LS_agree" in one.run.results.get("final", {})]
    names = but_for_the_step(done)
    steps = {(name, step_of(run)) for name, run in zip(names, done, strict=True)}
    if len(steps) == len(set(names)):
        return None
    curves = [
        Curve(
            name,
            look(place),
            _grouped((f"{step_of(run):g}", run.results["final"]) for run in sorted(own, key=step_of)),
        )
        for place, (name, own) in enumerate(_grouped(zip(names, done, strict=True)).items())
    ]
    return drawn(
        "written_against_harm",
        curves,
        [run.results["final"] for run in done],
        "Each mark is a run with its 95% interval over records, each curve joins the step sizes of a configuration by "
        "their means over seeds. Up is better, and so is left: compare curves at equal harm, never at equal step.",
    )


def methods_against_harm(runs: Sequence[Named], scores: Mapping[Path, Scores]) -> Picture | None:
    """A mark a method, its mean over seeds, with its seeds behind it; None for one method alone.

    `scores`: of each run, by its folder, those that count.
    """
    done = [named for named in runs if "LS_agree" in scores[named.run.folder]]
    methods = by_configuration(done)
    if len(methods) < 2:
        return None
    curves = [
        Curve(name, own[0].look, {"": [scores[named.run.folder] for named in own]}) for name, own in methods.items()
    ]
    return drawn(
        "methods_against_harm",
        curves,
        [scores[named.run.folder] for named in done],
        "Each large mark is a method's mean over seeds, the pale ones its runs with 95% intervals over records. Up is "
        "better, and so is left: a method is better than another where it is above it at equal harm. "
        f"{not_shown('scored so', dict.fromkeys(named.configuration for named in runs if named not in done))}".strip(),
    )


@dataclass(frozen=True)
class Curve:
    """Points that belong together: what is written beside each, and the scores of its runs."""

    name: str
    style: Look
    points: Mapping[str, Sequence[Scores]]


def _grouped(named: Iterable[tuple[str, Member]]) -> dict[str, list[Member]]:
    groups: dict[str, list[Member]] = {}
    for name, one in named:
        groups.setdefault(name, []).append(one)
    return groups


def drawn(name: str, curves: Sequence[Curve], runs: Sequence[Scores], caption: str) -> Picture | None:
    """None where scores are missing."""
    score = next((one for one in WRITTEN if all(one in scores for scores in runs)), None)
    if score is None:
        return None
    with_text = all("perplexity" in scores for scores in runs)
    figure, axes = panel_grid(1 + with_text, 2)
    edge = WRECKED * min(perplexity(scores)[0] for scores in runs) if with_text else math.inf

    for curve in curves:
        for ax, harm, most in zip(axes, (moved, perplexity), (math.inf, edge), strict=False):
            draw(ax, curve, harm, score, most)
    for ax in axes:
        ax.yaxis.set_major_formatter(PERCENT)
        ax.set_title(WRITTEN[score])
    axes[0].xaxis.set_major_formatter(PERCENT)
    axes[0].set_xlabel("unrelated first choices moved")
    if with_text:
        axes[1].set_xlabel("perplexity of a fixed text")
        harms = [min(perplexity(scores)[0], edge) for scores in runs]
        if max(harms) > 4 * min(harms) > 0:
            log_axis(axes[1], "x", min(harms), max(harms))
        if wrecked := _beyond(edge, curves):
            caption += f" At the right edge, for its perplexity is larger still: {wrecked}."
    legend_above(figure, *axes)
    return Picture(name, "What was written against the harm done", caption, figure)


def _beyond(edge: float, curves: Sequence[Curve]) -> str:
    """The curves with means past the edge, and the largest of each."""
    largest = {
        curve.name: max(float(np.mean([perplexity(scores)[0] for scores in own])) for own in curve.points.values())
        for curve in curves
    }
    return "; ".join(f"{name}, {mean:,.4g}" for name, mean in largest.items() if mean > edge)


def draw(ax: Axes, curve: Curve, harm: Callable[[Scores], tuple[float, float, float]], score: str, most: float) -> None:
    """Harm beyond `most` stands there; a mean is taken before."""
    colour, shape = curve.style["color"], marker(curve.style)
    means = []
    for own in curve.points.values():
        x, left, right = np.array([harm(scores) for scores in own]).T
        y, low, high = np.array([interval(scores[score]) for scores in own]).T
        means.append((min(x.mean(), most), y.mean()))
        x, left, right = (np.minimum(one, most) for one in (x, left, right))
        ax.errorbar(
            x, y, yerr=[y - low, high - y], xerr=[x - left, right - x], color=colour,
            marker=shape, linestyle="none", linewidth=0.8, alpha=0.45,
        )  # fmt: skip
    line = {**curve.style} if len(means) > 1 else {**curve.style, "linestyle": "none", "markersize": 9}
    ax.plot(*np.array(means).T, label=curve.name, marker=shape, **line)
    for word, (x, y) in zip(curve.points, means, strict=True):
        ax.annotate(word, (x, y), textcoords="offset points", xytext=(5, 5), fontsize=9, color=colour)


def step_of(run: Run) -> float:
    return float(run.about["config"]["editor"]["lr"])


def moved(scores: Scores) -> tuple[float, float, float]:
    """1 - LS_agree, with its interval."""
    mean, low, high = interval(scores["LS_agree"])
    return 1 - mean, 1 - high, 1 - low


def perplexity(scores: Scores) -> tuple[float, float, float]:
    return interval(scores["perplexity"])
