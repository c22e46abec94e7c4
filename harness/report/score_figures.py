"""Pictures of what runs scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from harness.console import FORMS, NOT_SHARES, SCORES
from harness.report.drawing import GREY, Look, Named, Picture, interval, legend_above, look, panel_grid, percent_axis
from harness.report.runs import Run

FORM_WORDS: Final = FORMS | {"": "token by token"}


@dataclass(frozen=True)
class ScoreLine:
    """A score of a run over its evaluations, and how it is drawn."""

    run: Run
    score: str
    label: str
    look: Look
    base_colour: str


def is_share(name: str) -> bool:
    """Whether a score is a share of something, and so a percentage."""
    score, _, form = name.partition("_")
    return score in SCORES and form not in NOT_SHARES


def order(name: str) -> tuple[bool, int]:
    """Token accuracy first, then its other forms, then what is no share."""
    form = name.partition("_")[2]
    return not is_share(name), list(FORMS).index(form) if form in FORMS else len(FORMS)


def scores_over_edits(runs: Sequence[Named]) -> Picture | None:
    names = list(dict.fromkeys(name for named in runs for line in named.run.scores for name in line["scores"]))
    names.sort(key=order)
    panels = one_runs_panels(runs[0].run, names) if len(runs) == 1 else all_runs_panels(runs, names)
    if not panels:
        return None
    figure, axes = panel_grid(len(panels), 3)
    for ax, (title, lines) in zip(axes, panels.items(), strict=True):
        for line in lines:
            draw_score(ax, line)
        ax.set_title(title)
        ax.set_xlabel("facts edited")
        ax.set_xlim(left=0)
        if is_share(lines[0].score):
            percent_axis(ax)
    base = Line2D([], [], color="black" if len(runs) == 1 else GREY, linestyle=":", linewidth=1.6, label="base model")
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
    panels: dict[str, list[ScoreLine]] = {}
    for name in names:
        score, _, form = name.partition("_")
        style = look(order(name)[1] if is_share(name) else 0)
        title, label = (f"{score}  {SCORES[score]}", FORM_WORDS.get(form, form)) if is_share(name) else (name, name)
        panels.setdefault(title, []).append(ScoreLine(run, name, label, style, style["color"]))
    return panels


def all_runs_panels(runs: Sequence[Named], names: Sequence[str]) -> dict[str, list[ScoreLine]]:
    """A panel a score, the runs as lines."""
    return {name: [ScoreLine(named.run, name, named.label, named.look, GREY) for named in runs] for name in names}


def draw_score(ax: Axes, line: ScoreLine) -> None:
    found = [one for one in line.run.scores if one["scores"].get(line.score) is not None]
    for one in found:
        if one["stage"] == "base":
            mean, *_ = interval(one["scores"][line.score])
            ax.axhline(mean, color=line.base_colour, linestyle=":", linewidth=1.6, zorder=1)
    after = [(line.run.edits_after(one["turn"]), *interval(one["scores"][line.score])) for one in found
             if one["stage"] != "base"]  # fmt: skip
    if after:
        edits, mean, low, high = np.array(after).T
        colour = line.look["color"]
        if len(after) == 1:
            ax.errorbar(edits, mean, [mean - low, high - mean], color=colour, marker="o", capsize=4, label=line.label)
            return
        ax.fill_between(edits, low, high, color=colour, alpha=0.18, linewidth=0)
        ax.plot(edits, mean, **line.look, marker="o", label=line.label)
