"""The picture of hidden states before and after editing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from safetensors.numpy import load_file

from harness.report.drawing import COLOURS, GREY, Named, Picture, legend_above, panel_grid
from harness.report.projection import project

FILE: Final = "hidden_states.safetensors"
PANELS: Final = {"edit": "edited questions", "locality": "unrelated questions"}
MOST_ROWS: Final = 3  # of a run each
MOMENTS: Final = {"base": ("before editing", COLOURS[0], "o"), "edited": ("after editing", COLOURS[1], "^")}


def hidden_states(runs: Sequence[Named]) -> Picture | None:
    """A panel a run and kind of question, each with limits of its own; two runs a row where there are many."""
    shown = [(named, load_file(path)) for named in runs if (path := named.run.folder / FILE).is_file()]
    if not shown:
        return None
    across = 1 if len(shown) <= MOST_ROWS else 2
    side = 4.3 / across**0.5  # inches
    figure, axes = panel_grid(len(shown) * len(PANELS), across * len(PANELS))
    figure.set_size_inches(1.05 * side * across * len(PANELS), side * math.ceil(len(shown) / across) + 0.6)
    pairs = list(zip(axes[::2], axes[1::2], strict=True))
    methods = [draw_run(pair, states) for pair, (_, states) in zip(pairs, shown, strict=True)]
    for (left, _), (named, _) in zip(pairs, shown, strict=True) if len(shown) > 1 else ():
        left.set_title(f"{named.label}\n{left.get_title(loc='left')}")
    legend_above(figure, *axes)
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
        ax.set(xlabel="first axis", ylabel="second axis")
        ax.tick_params(labelleft=False, labelbottom=False, length=0)
    return method
