"""What a report reads: run folders, finished or not, as columns of numbers."""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TextIO

import numpy as np

from harness.run import EXAMPLES_FILE, TRAINING_PHASES

COMPRESSED: Final = ".gz"  # ends the name of a file of lines in a copy (harness/report/copies.py)

Columns = dict[str, np.ndarray]  # path/to/number -> (lines,) float64, NaN where a line lacks it


@dataclass(frozen=True)
class Run:
    """A run folder. What is read more than once is read when it is first asked for."""

    folder: Path
    about: Mapping[str, Any]  # run.json

    @property
    def finished(self) -> bool:
        return self.about["status"] == "finished"

    @property
    def seed(self) -> Any:
        return self.about["config"].get("seed")

    @property
    def unfinished(self) -> str | None:
        """What to tell of a run that has not come to its end; None where it has."""
        if self.finished:
            return None
        turns = len(self.turns.get("turn", ()))
        drawn = f"{turns:,} turn{'s' * (turns != 1)} and {len(self.evaluations)} evaluations are there and are drawn"
        return f"{self.state}; {drawn}"

    @property
    def state(self) -> str:
        """Where the run stands, in words, with the error that ended it."""
        error = f" ({self.about['error']})" if self.about.get("error") else ""
        return f"{'still running, or was killed' if self.about['status'] == 'running' else self.about['status']}{error}"

    @cached_property
    def _lines(self) -> dict[str, Columns]:
        return columns_by_phase(self.lines("turns.jsonl"))

    @cached_property
    def turns(self) -> Columns:
        """The turns that edited the model, warm-up included, in their order; `warm_up` is 1 where they were that."""
        return self._lines.get("turns", {})

    def meta(self, phase: str) -> Columns:
        """The lines of meta-training of that phase; empty where there was none."""
        return self._lines.get(phase, {})

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of scores.jsonl that hold scores of all facts so far, or of the base model."""
        return [line for line in self.lines("scores.jsonl") if line["stage"] in ("base", "eval", "final")]

    @cached_property
    def results(self) -> dict[str, Any]:
        """results.json, or what scores.jsonl holds of it so far."""
        path = self.folder / "results.json"
        if path.is_file():
            return read_json(path)
        return {line["stage"]: line["scores"] for line in self.evaluations if line["stage"] in ("base", "final")}

    @cached_property
    def examples(self) -> list[dict[str, Any]]:
        """examples.json: questions with the words of both models; none where the run has not come to its end."""
        path = self.folder / EXAMPLES_FILE
        return read_json(path) if path.is_file() else []

    def edits_after(self, turn: int) -> float:
        """Facts written by the first `turn` turns of the stream."""
        before = self.turns["edits_total"][self.turns["turn"] < turn] if self.turns else np.empty(0)
        return float(before[-1]) if len(before) else 0.0

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        """The lines of one of the run's files, compressed or not; none where it is not there."""
        path, compressed = self.folder / name, self.folder / f"{name}{COMPRESSED}"
        return read_lines(path if path.is_file() else compressed, may_be_cut=not self.finished)


def open_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in these folders, each a run folder or one that holds run folders (a sweep).

    ValueError, in one line, where there is no run, or its run.json cannot be read.
    """
    folders: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"{path}: no such folder; name run folders, as outputs/zsre/smollm2-135m/stableedit/...")
        found = [path] if (path / "run.json").exists() else sorted(_runs_below(path))
        if not found:
            raise ValueError(f"{path}: holds no run (no run.json in it or below); name run folders")
        folders |= dict.fromkeys(folder.resolve() for folder in found)
    return [Run(folder, _about(folder / "run.json")) for folder in folders]


def _runs_below(root: Path) -> Iterator[Path]:
    """Run folders, and links to them: a sweep that was started again has those for what had been run before.

    ValueError for such a link, a job's number, to a folder that is gone.
    """
    for folder, below, files in os.walk(root):
        for link in (Path(folder, name) for name in files if name.isdigit()):
            if link.is_symlink() and not link.exists():
                raise ValueError(
                    f"{link}: points at a run that is gone ({link.readlink()}); bring it back, or remove the link"
                )
        if "run.json" in files:
            yield Path(folder)
        yield from (
            path for name in below if (path := Path(folder, name)).is_symlink() and (path / "run.json").exists()
        )


def _about(path: Path) -> dict[str, Any]:
    about = read_json(path)
    missing = [key for key in ("status", "config", "run_id") if not isinstance(about, dict) or key not in about]
    if missing:
        raise ValueError(f"{path}: has no {missing[0]}; this is not the run.json of a run")
    return about


def read_json(path: Path) -> Any:
    """ValueError, naming the file, where it is no JSON; a run that starts just now has an empty run.json."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({one_line(error)})") from error


def read_lines(path: Path, *, may_be_cut: bool) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file, if there is one; ValueError, naming file and line, for a damaged line.

    With `may_be_cut`, a last line that was cut short is left out: a run may be writing it.
    """
    if not path.is_file():
        return
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == COMPRESSED else path.open(encoding="utf-8") as file:
        for number, line in enumerate(_text_of(file, path), 1):
            try:
                found = json.loads(line)
            except (ValueError, RecursionError) as error:
                if may_be_cut and not line.endswith("\n"):
                    return
                raise ValueError(f"{path}, line {number}: is no JSON ({one_line(error)})") from error
            if not isinstance(found, dict):
                raise ValueError(f"{path}, line {number}: is a {type(found).__name__}, not an object")
            yield found


def _text_of(file: TextIO, path: Path) -> Iterator[str]:
    try:
        yield from file
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({one_line(error)})") from error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def columns_by_phase(lines: Iterable[Mapping[str, Any]]) -> dict[str, Columns]:
    """The numbers of turns.jsonl as columns: of "turns", and of each phase of `TRAINING_PHASES`."""
    found: dict[str, tuple[list[int], dict[str, array[float]]]] = {}  # arrays: a quarter of a list's memory
    for line in lines:
        phase = line.get("phase", "edit")
        counter, into = found.setdefault(phase if phase in TRAINING_PHASES else "turns", ([0], {}))
        for name, value in numbers({**line, "warm_up": int(phase == "warm_up")}):
            column = into.setdefault(name, array("d"))
            column.extend([math.nan] * (counter[0] - len(column)))
            column.append(value)
        counter[0] += 1
    return {
        phase: {name: np.pad(column, (0, count - len(column)), constant_values=np.nan) for name, column in into.items()}
        for phase, ((count,), into) in found.items()
    }


def numbers(value: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in nested mappings and lists, as path/to/number."""
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix, float(value)
        return
    for name, item in items:
        yield from numbers(item, f"{prefix}/{name}" if prefix else str(name))


def under(table: Columns, prefix: str) -> dict[str, Columns]:
    """The columns `prefix`/name/field as {name: {field: column}}."""
    found: dict[str, Columns] = {}
    for path, column in table.items():
        if path.startswith(f"{prefix}/"):
            name, _, field = path.removeprefix(f"{prefix}/").partition("/")
            found.setdefault(name, {})[field] = column
    return found
