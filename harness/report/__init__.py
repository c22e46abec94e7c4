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

from data.disk import write_atomically
from harness.report import hidden_figure, method_figures, page, score_figures, trade_figure
from harness.report.drawing import STYLE, Named, Picture, named_runs
from harness.report.page import Tables
from harness.report.paired import Difference, Scores, average, compare, holm, record_scores
from harness.report.runs import Run, open_runs

DRAWINGS = (  # in the order of the page
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


def write_report(folders: Sequence[Path], target: Path | None = None) -> Path:
    """Write report.html and its pictures into `target`; the path of the page.

    Without `target`, one run's report goes into its folder, that of several into report/ in the folder they share.
    ValueError, in one line, where a folder holds no run or a file of a run is damaged, before anything is written.
    """
    runs = open_runs(folders)
    named = named_runs(runs)
    with matplotlib.rc_context(STYLE):
        drawn = [(picture, page.png(picture)) for draw in DRAWINGS if (picture := draw(named)) is not None]
    text = page.page(named, drawn, tables(named))
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


def tables(runs: Sequence[Named]) -> Tables:
    """What is told of configurations: averages over their seeds, and paired differences from the first."""
    groups: dict[str, list[Run]] = {}
    for named in runs:
        groups.setdefault(named.configuration, []).append(named.run)
    found = Tables({}, {}, {}, {})
    if len(runs) == 1:
        return found
    first, *_ = groups
    base = [record_scores(run.lines("records.jsonl"), "base") for run in groups[first]]
    reference = final_scores(groups[first])
    found.base.update(average(base))
    for label, members in groups.items():
        own = reference if label == first else final_scores(members)
        found.averages[label] = average(own)
        if label != first:
            found.differences[label] = compared(groups[first], reference, members, own)
    found.adjusted.update(adjusted(found.differences))
    return found


def final_scores(runs: Sequence[Run]) -> list[Scores]:
    return [record_scores(run.lines("records.jsonl"), "final") for run in runs]


def compared(
    first: Sequence[Run], reference: Sequence[Scores], second: Sequence[Run], own: Sequence[Scores]
) -> Mapping[str, Difference] | str:
    """Paired differences within each seed that both have; every run with every run where they have none in common."""
    data = [runs[0].about.get("inputs", {}).get("eval") for runs in (first, second)]
    if data[0] != data[1]:
        return "its facts come from another file"
    if not any(reference) or not any(own):
        return f"{'it' if any(reference) else 'the first'} has no final scores of single records"
    pairs = [(a, b) for a in range(len(first)) for b in range(len(second))]
    same_seed = [(a, b) for a, b in pairs if first[a].seed == second[b].seed]
    return compare([(reference[a], own[b]) for a, b in same_seed or pairs]) or "no record was scored in both"


def adjusted(differences: Mapping[str, Mapping[str, Difference] | str]) -> dict[tuple[str, str], float]:
    """(label, score) -> p-value, adjusted for all tests of that score."""
    tests: dict[str, dict[str, float]] = {}
    for label, found in differences.items():
        for score, difference in found.items() if not isinstance(found, str) else ():
            if difference.p is not None:
                tests.setdefault(score, {})[label] = difference.p
    return {
        (label, score): p
        for score, one in tests.items()
        for label, p in zip(one, holm(list(one.values())), strict=True)
    }
