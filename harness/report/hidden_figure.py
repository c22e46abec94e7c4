"""The picture of hidden states before and after editing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from safetensors.numpy import load_file

from harness.report.drawing import COLOURS, GREY, Named, Picture, legend_above
from harness.report.projection import project

FILE: Final = "hidden_states.safetensors"
PANELS: Final = {"edit": "edited questions", "locality": "unrelated questions"}
MOMENTS: Final = {"base": ("before editing", COLOURS[0], "o"), "edited": ("after editing", COLOURS[1], "^")}


def hidden_states(runs: Sequence[Named]) -> Picture | None:
    """A row a run, a panel a kind of question, each with limits of its own."""
    shown = [(named, load_file(path)) for named in runs if (path := named.run.folder / FILE).is_file()]
    if not shown:
        return None
    figure = Figure(figsize=(9, 4.3 * len(shown) + 0.6))
    grid = figure.subplots(len(shown), len(PANELS), squeeze=False)
    methods = [draw_run(row, states) for row, (_, states) in zip(grid, shown, strict=True)]
    for row, (named, _) in zip(grid, shown, strict=True):
        row[0].set_ylabel(f"{named.label}\nsecond axis" if len(shown) > 1 else "second axis")
    legend_above(figure, *grid.flat)
    missing = " The run has not been edited to its end, so only its start is drawn." * any(
        not any(name.startswith("edited/") for name in states) for _, states in shown
    )
    return Picture(
        "hidden_states",
        "Hidden states before and after editing",
        "What the head reads where the first token of an answer is predicted, in two dimensions by "
        f"{'; '.join(dict.fromkeys(methods))}, fitted to all points of a run together. A line joins the same question "
        f"before and after. Edits should move the edited questions and leave the unrelated ones alone.{missing}",
        figure,
    )


def draw_run(row: Sequence[Axes], states: Mapping[str, np.ndarray]) -> str:
    """Draw one run's panels; says how the points were projected."""
    names = list(states)
    points, method = project(np.concatenate([states[name] for name in names]))
    ends = np.cumsum([len(states[name]) for name in names])
    placed = dict(zip(names, np.split(points, ends[:-1]), strict=True))
    for ax, (field, title) in zip(row, PANELS.items(), strict=True):
        pair = [placed[f"{moment}/{field}"] for moment in MOMENTS if f"{moment}/{field}" in placed]
        if len(pair) == len(MOMENTS):
            x, y = np.stack(pair).transpose(2, 0, 1)  # (moments, questions) each: a line a question
            ax.plot(x, y, color=GREY, linewidth=0.7, alpha=0.5, zorder=1)
        for moment, (label, colour, marker) in MOMENTS.items():
            if f"{moment}/{field}" in placed:
                x, y = placed[f"{moment}/{field}"].T
                ax.scatter(x, y, s=22, color=colour, marker=marker, alpha=0.6, linewidth=0, label=label)
        ax.set_title(title)
        ax.set_xlabel("first axis")
        ax.tick_params(labelleft=False, labelbottom=False, length=0)
    return method
