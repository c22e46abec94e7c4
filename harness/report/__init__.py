"""Pictures and tables of one run, or of several side by side:

    python -m harness.report RUN [RUN ...] [--to FOLDER]

writes report.html, which needs nothing beside it, and its pictures as PNG files. A run that is still going, or that
failed, is drawn as far as it came. This package alone knows matplotlib; a run imports it when it is over.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

from harness.report import hidden_figure, method_figures, page, score_figures
from harness.report.drawing import STYLE, Named, Picture, look
from harness.report.paired import Difference, Scores, compare, final_scores, holm
from harness.report.runs import Run, labels, open_runs
from harness.tracking import write_atomically

DRAWINGS = (  # in the order of the page
    score_figures.scores_over_edits,
    score_figures.retention_by_age,
    score_figures.glue_over_edits,
    method_figures.updates_over_turns,
    method_figures.statistics_over_turns,
    hidden_figure.hidden_states,
    method_figures.meta_training,
    method_figures.time_over_turns,
)


def write_report(folders: Sequence[Path], target: Path | None = None) -> Path:
    """Write report.html and its pictures into `target`; the path of the page.

    Without `target`, one run's report goes into its folder, that of several into report/ in the folder they share.
    ValueError, in one line, where a folder holds no run or a file of a run is damaged, before anything is written.
    """
    runs = open_runs(folders)
    named = [Named(label, run, look(place)) for place, (label, run) in enumerate(zip(labels(runs), runs, strict=True))]
    with matplotlib.rc_context(STYLE):
        drawn = [(picture, page.png(picture)) for draw in DRAWINGS if (picture := draw(named)) is not None]
    differences = against_first(named)
    text = page.page(named, drawn, differences, adjusted(differences))
    target = target or (runs[0].folder if len(runs) == 1 else shared_folder(runs) / "report")
    return write_files(target, text, drawn)


def write_files(target: Path, text: str, drawn: Sequence[tuple[Picture, bytes]]) -> Path:
    try:
        target.mkdir(parents=True, exist_ok=True)
        for picture, png in drawn:
            (target / f"{picture.name}.png").write_bytes(png)
        write_atomically(target / "report.html", text)
    except OSError as error:
        raise ValueError(f"{target}: cannot be written ({error.strerror}); choose a folder with --to") from error
    return target / "report.html"


def shared_folder(runs: Sequence[Run]) -> Path:
    return Path(os.path.commonpath([run.folder for run in runs]))


def against_first(runs: Sequence[Named]) -> dict[str, Mapping[str, Difference] | str]:
    """Each later run's paired differences from the first, or the reason why there are none."""
    if len(runs) < 2:
        return {}
    first, scores = runs[0], final_scores(runs[0].run.lines("records.jsonl"))
    return {named.label: compared(first.run, scores, named.run) for named in runs[1:]}


def compared(first: Run, scores: Scores, second: Run) -> Mapping[str, Difference] | str:
    data = [run.about.get("inputs", {}).get("eval") for run in (first, second)]
    if data[0] != data[1]:
        return "its facts come from another file"
    others = final_scores(second.lines("records.jsonl"))
    if not scores or not others:
        return f"{'the first run' if not scores else 'it'} has no final scores of single records"
    return compare(scores, others) or "no record was scored in both runs"


def adjusted(differences: Mapping[str, Mapping[str, Difference] | str]) -> dict[tuple[str, str], float]:
    """p-values of all tests of the table, adjusted for their number."""
    tests = {
        (label, score): difference.p
        for label, found in differences.items()
        if not isinstance(found, str)
        for score, difference in found.items()
    }
    return dict(zip(tests, holm(list(tests.values())), strict=True))
