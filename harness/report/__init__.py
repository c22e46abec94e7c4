"""Pictures and tables of one run, or of several side by side:

    python -m harness.report RUN [RUN ...] [--to FOLDER]

writes report.html, which needs nothing beside it, and its pictures as PNG files. A run that is still going, or that
failed, is drawn as far as it came. With --leaderboard it writes one table of methods instead, in four forms, and
pictures over edits and by age. With --numbers it copies what it reads of finished runs, numbers and settings alone, to
be kept beside a paper. This package alone knows matplotlib; a run imports it when it is over.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib

from data.disk import write_atomically
from harness.report import (
    curve_figures,
    hidden_figure,
    leaderboard_files,
    method_figures,
    page,
    score_figures,
    trade_figure,
)
from harness.report.averages import tables
from harness.report.copies import numbers_of
from harness.report.drawing import STYLE, Named, Picture, named_runs
from harness.report.leaderboard import Board, board_of
from harness.report.runs import Run, open_runs

Draw = Callable[[Sequence[Named]], Picture | None]

DRAWINGS: tuple[Draw, ...] = (  # in the order of the page
    score_figures.comparison,
    trade_figure.written_against_harm,
    score_figures.scores,
    score_figures.retention_by_age,
    score_figures.glue_over_edits,
    method_figures.updates_over_turns,
    method_figures.statistics_over_turns,
    hidden_figure.hidden_states,
    method_figures.meta_training,
    method_figures.time_over_turns,
)

CURVES: tuple[Draw, ...] = (  # of all runs on the same facts, however many they edited
    curve_figures.written_over_edits,
    curve_figures.harm_over_edits,
    curve_figures.edits_by_age,
)


def write_report(folders: Sequence[Path], target: Path | None = None) -> Path:
    """Write report.html and its pictures into `target`; the path of the page.

    Without `target`, one run's report goes into its folder, that of several into report/ in the folder they share.
    ValueError, in one line, where a folder holds no run or a file of a run is damaged, before anything is written.
    """
    runs = open_runs(folders)
    named = named_runs(runs)
    drawn = _drawn(named, DRAWINGS)
    text = page.page(named, drawn, tables(named))
    target = target or usual_folder(runs)
    write_files(target, _pngs(drawn) | {"report.html": text})
    return target / "report.html"


def write_leaderboard(folders: Sequence[Path], target: Path | None = None) -> Path:
    """Write leaderboard.html, .md, .csv and .tex where `write_report` would write; the path of the page.

    Runs that were scored on the way are drawn over their edits, and facts that were scored again by their age.

    ValueError, in one line, where a folder holds no run, a file of a run is damaged, or no run came to its end.
    """
    runs = open_runs(folders)
    board = board_of(runs)
    drawn = _board_drawn(board)
    target = target or usual_folder(runs)
    write_files(target, {**_pngs(drawn), **leaderboard_files.files(board, drawn)})
    return target / "leaderboard.html"


def write_numbers(folders: Sequence[Path], target: Path) -> Path:
    """Copy what reports read of finished runs to `target`, a folder a run, without a word of data or model.

    ValueError, in one line, where a run is not finished or damaged, or its place is taken, before anything is written.
    """
    for folder, files in numbers_of(folders, target).items():
        write_files(folder, files)
    return target


def _drawn(runs: Sequence[Named], drawings: Sequence[Draw]) -> list[tuple[Picture, bytes]]:
    """Those pictures that the runs have something for, with their PNG."""
    with matplotlib.rc_context(STYLE):
        return [(picture, page.png(picture)) for draw in drawings if (picture := draw(runs)) is not None]


def _board_drawn(board: Board) -> list[tuple[Picture, bytes]]:
    """Pictures of each group, and curves over all that differ in the number of edits alone; those alike have titles."""
    on_the_same: dict[str, list[Run]] = {}
    found = []
    for group in board.groups:
        ended = [one.run for one in group.members if one.turns is None]
        on_the_same.setdefault(f"{group.data}, {group.model}", []).extend(ended)
        scores = {one.run.folder: one.scores for one in group.members}
        marks = partial(trade_figure.methods_against_harm, scores=scores)
        found += [(group.title, *one) for one in _drawn(_methods([one.run for one in group.members]), [marks])]
    for title, runs in on_the_same.items():
        found += [(title, *one) for one in _drawn(_methods(runs), CURVES)]
    count = Counter(picture.name for _, picture, _ in found)
    return [(_titled(picture, title) if count[picture.name] > 1 else picture, png) for title, picture, png in found]


def _methods(runs: Sequence[Run]) -> list[Named]:
    return named_runs(runs, as_scored=False)


def _titled(picture: Picture, title: str) -> Picture:
    name = f"{picture.name}_{leaderboard_files.slug(title)}"
    return replace(picture, name=name, title=f"{picture.title}: {title}")


def _pngs(drawn: Sequence[tuple[Picture, bytes]]) -> dict[str, bytes]:
    return {f"{picture.name}.png": png for picture, png in drawn}


def write_files(target: Path, files: Mapping[str, str | bytes]) -> None:
    """Each file by its name; pages and tables are whole or not there."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (target / name).parent.mkdir(exist_ok=True)
            if isinstance(content, bytes):
                (target / name).write_bytes(content)
            else:
                write_atomically(target / name, content)
    except OSError as error:
        raise ValueError(f"{target}: cannot be written ({error.strerror}); choose a folder with --to") from error


def usual_folder(runs: Sequence[Run]) -> Path:
    """One run's own folder; of several, report/ in the folder they share."""
    return runs[0].folder if len(runs) == 1 else Path(os.path.commonpath([run.folder for run in runs])) / "report"
