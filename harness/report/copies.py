"""Copies of finished runs that hold the numbers that reports and leaderboards read, to be kept beside a paper.

Settings and numbers alone: no sentence of a data set, no word of a model, no path of a machine, and so neither examples
nor hidden states. A run of 1,000 edits that was scored on 200 records is 40 kB. To reports a copy is a run folder; it
cannot be asked, resumed or exported.
"""

from __future__ import annotations

import gzip
import json
import re
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
WRITTEN: Final = ("run.json", "results.json", *(f"{name}{COMPRESSED}" for name in LINES), "glue")
"""All that stands in a copy."""
PATH: Final = re.compile(r"(?<![\w.~:])(?:file:/+|~|\.\.?)?/[^,\[\]'\"]*")
"""One that says where on a machine something lies; `owner/name` says it not."""
RELATIVE: Final = re.compile(r"(?<![\w.~:/-])[\w.-]+(?:/[\w.-]+){2,}")
"""One from a folder on, which is longer than `owner/name`."""


def numbers_of(folders: Sequence[Path], target: Path) -> dict[Path, dict[str, bytes]]:
    """By the folder of its copy, below `target`, the files of each run in these folders.

    A run that is named itself goes into a folder of its name; those of a folder keep their places below it.

    ValueError, in one line, where there is no run, one is not finished or damaged, two would be one copy, the place
    of one is taken by what is no copy of it, or copies would lie among the runs.
    """
    for folder in folders:
        if target.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"--to {target}: lies in {folder}, whose runs are copied; choose a place beside it")
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
    is_copy = place.is_dir() and {path.name for path in place.iterdir()} <= {*WRITTEN}
    earlier = read_json(place / "run.json") if is_copy and (place / "run.json").is_file() else None
    known = isinstance(earlier, dict) and all(earlier.get(key) == run.about.get(key) for key in ("run_id", "started"))
    if not known:
        raise ValueError(f"{place}: is there, and no copy of {run.folder}; choose another folder with --to")


def _files(run: Run) -> dict[str, bytes]:
    about = {key: without_machine(run.about[key]) for key in KEPT if key in run.about}
    for stop in about.get("resumed", ()):
        stop.pop("overrides", None)  # the run's own, and the folder that it went on from
    files = {"run.json": _json(about), "results.json": _json(without_machine(run.results))}
    for name in LINES:
        files[f"{name}{COMPRESSED}"] = _packed(run.lines(name))
    for path in sorted((run.folder / "glue").glob("turn_*.json")):
        files[f"glue/{path.name}"] = _json(_accuracies(read_json(path)))
    return files


def _accuracies(tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Of each task its metrics, by the way of asking: neither rows nor answers."""
    every = {task: result for task, result in tasks.items() if isinstance(result, Mapping)}
    return {
        task: {way: found for way, found in result.items() if isinstance(found, Mapping) and "accuracy" in found}
        for task, result in every.items()
    }


def without_machine(value: Any) -> Any:
    """Of paths on a machine the last part; all else as it is."""
    if isinstance(value, Mapping):
        return {key: without_machine(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_machine(item) for item in value]
    if not isinstance(value, str):
        return value
    for pattern in (PATH, RELATIVE):
        value = pattern.sub(lambda path: path[0].rstrip("/").rpartition("/")[2], value)
    return value


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _packed(lines: Iterable[Mapping[str, Any]]) -> bytes:
    """The same lines give the same bytes: no time stands in them."""
    return gzip.compress("".join(_written(lines)).encode(), mtime=0)


def _written(lines: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for line in lines:
        kept = {key: value for key, value in line.items() if key not in WORDS}
        yield json.dumps(kept, separators=(",", ":")) + "\n"
