"""What was written against the harm that it did: a curve a configuration, a point a step size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes

from harness.report.drawing import PERCENT, Named, Picture, interval, legend_above, look, marker, panel_grid
from harness.report.runs import Run, but_for_the_step

WRITTEN: Final = {"ES_gen": "edited facts said exactly", "ES_seq": "edited answers, all tokens"}
"""What counts as written: the first of these that every run has."""


def written_against_harm(runs: Sequence[Named]) -> Picture | None:
    """None where no two finished runs differ in their step size alone, or scores are missing."""
    done = [named.run for named in runs if named.run.finished and "LS_agree" in named.run.results["final"]]
    score = next((name for name in WRITTEN if done and all(name in run.results["final"] for run in done)), None)
    curves = dict(zip(map(id, done), but_for_the_step(done), strict=True))
    steps = {(curves[id(run)], step_of(run)) for run in done}
    if score is None or len(steps) == len({curve for curve, _ in steps}):
        return None
    with_text = all("perplexity" in run.results["final"] for run in done)
    figure, axes = panel_grid(1 + with_text, 2)
    for place, name in enumerate(dict.fromkeys(curves.values())):
        own = [run for run in done if curves[id(run)] == name]
        for ax, harm in zip(axes, (moved, perplexity), strict=False):
            draw(ax, own, harm, score, name, look(place))
    for ax in axes:
        ax.yaxis.set_major_formatter(PERCENT)
        ax.set_title(WRITTEN[score])
    axes[0].xaxis.set_major_formatter(PERCENT)
    axes[0].set_xlabel("unrelated first choices moved")
    if with_text:
        axes[1].set_xlabel("perplexity of a fixed text")
    legend_above(figure, *axes)
    return Picture(
        "written_against_harm",
        "What was written against the harm done",
        "Each mark is a run with its 95% interval over records, each curve joins the step sizes of a configuration by "
        "their means over seeds. Up is better, and so is left: compare curves at equal harm, never at equal step.",
        figure,
    )


def draw(ax: Axes, runs: Sequence[Run], harm: Any, score: str, name: str, style: Any) -> None:
    colour = style["color"]
    for run in runs:
        mean, low, high = interval(run.results["final"][score])
        x, left, right = harm(run)
        ax.errorbar(
            x, mean, yerr=[[mean - low], [high - mean]], xerr=[[x - left], [right - x]], color=colour,
            marker=marker(style), linestyle="none", linewidth=0.8, alpha=0.45,
        )  # fmt: skip
    by_step: dict[float, list[tuple[float, float]]] = {}
    for run in runs:
        by_step.setdefault(step_of(run), []).append((harm(run)[0], interval(run.results["final"][score])[0]))
    points = np.array([np.mean(by_step[step], axis=0) for step in sorted(by_step)])
    ax.plot(points[:, 0], points[:, 1], label=name, marker=marker(style), **style)
    for step, (x, y) in zip(sorted(by_step), points, strict=True):
        ax.annotate(f"{step:g}", (x, y), textcoords="offset points", xytext=(5, 5), fontsize=9, color=colour)


def step_of(run: Run) -> float:
    return float(run.about["config"]["editor"]["lr"])


def moved(run: Run) -> tuple[float, float, float]:
    """1 - LS_agree, with its interval."""
    mean, low, high = interval(run.results["final"]["LS_agree"])
    return 1 - mean, 1 - high, 1 - low


def perplexity(run: Run) -> tuple[float, float, float]:
    return interval(run.results["final"]["perplexity"])
