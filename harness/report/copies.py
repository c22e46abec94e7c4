"""Copies of finished runs that hold what reports and leaderboards read of them, to be kept beside a paper.

Numbers and settings alone: no sentence of a data set, no word of a model, no path of a machine. A run of 1,000 edits
that was scored on 200 records is 30 kB. To reports a copy is a run folder; it cannot be asked, resumed or exported.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from harness.report.runs import COMPRESSED, Run, open_runs, read_json
from harness.run import LINES

KEPT: Final = (
    "run_id",
    "status",
    "started",
    "finished",
    "resumed",
    "config",
    "overrides",
    "inputs",
    "model",
    "device",
    "versions",
    "git",
)
"""Of run.json."""
WORDS: Final = ("text",)
"""Of a line: what a model wrote, or was to write."""


def numbers_of(folders: Sequence[Path], target: Path) -> dict[Path, dict[str, bytes]]:
    """By the folder of its copy, below `target`, the files of each run in these folders.

    A run that is named itself goes into a folder of its name; those of a folder keep their places below it.

    ValueError, in one line, where there is no run, one is not finished or damaged, two would be one copy, or the place
    of one is taken by what is no copy of it.
    """
    copies: dict[Path, dict[str, bytes]] = {}
    of: dict[Path, Path] = {}
    for given, run in ((folder, run) for folder in folders for run in open_runs([folder])):
        place = target / _below(given, run.folder)
        if of.setdefault(place, run.folder) != run.folder:
            raise ValueError(
                f"{of[place]} and {run.folder} would both be copied to {place}; name a folder that has both"
            )
        if not run.finished:
            raise ValueError(f"{run.folder}: {run.state}; only finished runs are copied: leave it out, or finish it")
        _check_place(place, run)
        copies[place] = _files(run)
    return copies


def _below(given: Path, folder: Path) -> Path:
    """Its place in what was given, or its name, where it was given itself or is reached by a link."""
    root = given.resolve()
    return folder.relative_to(root) if folder != root and folder.is_relative_to(root) else Path(folder.name)


def _check_place(place: Path, run: Run) -> None:
    """An earlier copy of the run may be written again, and nothing else."""
    if not place.exists():
        return
    earlier = place / "run.json"
    if (
        place.resolve() == run.folder
        or not earlier.is_file()
        or read_json(earlier).get("run_id") != run.about["run_id"]
    ):
        raise ValueError(f"{place}: is there, and no copy of {run.folder}; choose another folder with --to")


def _files(run: Run) -> dict[str, bytes]:
    about = {key: without_machine(run.about[key]) for key in KEPT if key in run.about}
    files = {"run.json": _json(about), "results.json": _json(run.results)}
    for name in LINES:
        files[f"{name}{COMPRESSED}"] = _packed(run.lines(name))
    return files


def without_machine(value: Any) -> Any:
    """Of absolute paths, and of settings that are one, the last part; all else as it is."""
    if isinstance(value, Mapping):
        return {key: without_machine(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_machine(item) for item in value]
    if not isinstance(value, str):
        return value
    key, equals, path = value.rpartition("=")
    return f"{key}{equals}{Path(path).name}" if path.startswith(("/", "~")) else value


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _packed(lines: Iterable[Mapping[str, Any]]) -> bytes:
    """The same lines give the same bytes: no time stands in them."""
    return gzip.compress("".join(_written(lines)).encode(), mtime=0)


def _written(lines: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for line in lines:
        kept = {key: value for key, value in line.items() if key not in WORDS}
        yield json.dumps(kept, separators=(",", ":")) + "\n"
