"""What a report reads: run folders, finished or not, as columns of numbers."""

from __future__ import annotations

import json
import math
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from harness.run import EXAMPLES_FILE, TRAINING_PHASES

Columns = dict[str, np.ndarray]  # path/to/number -> (lines,) float64, NaN where a line lacks it

# Beginnings of overrides that say nothing of what was edited, and how.
NOT_A_LABEL: Final = (
    *("hydra.", "tracker.", "evaluation.", "diagnostics.", "glue.", "downstream_eval_steps"),
    *("checkpoint_every", "keep", "resume", "model_cache", "editor.save_checkpoint"),
)


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
        """The lines of one of the run's files; none where it is not there."""
        return read_lines(self.folder / name, may_be_cut=not self.finished)


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
    """Run folders, and links to them: a sweep that was started again has those for what had been run before."""
    for folder, below, files in os.walk(root):
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
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                found = json.loads(line)
            except (ValueError, RecursionError) as error:
                if may_be_cut and not line.endswith("\n"):
                    return
                raise ValueError(f"{path}, line {number}: is no JSON ({one_line(error)})") from error
            if not isinstance(found, dict):
                raise ValueError(f"{path}, line {number}: is a {type(found).__name__}, not an object")
            yield found


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


# ---------------------------------------------------------------------------------------------------------------------
# Names that tell runs, and modules, apart


def labels(runs: Sequence[Run]) -> list[str]:
    """A short name for each run: its editor, and of its overrides those that not all runs share. No name is twice."""
    return _numbered(_names(runs, [_overrides(run) for run in runs]))


def configurations(runs: Sequence[Run]) -> list[str]:
    """The name of each run's configuration: of all that was chosen but the seed. Runs that repeat a seed are apart."""
    chosen = [{key: value for key, value in _overrides(run).items() if key != "seed"} for run in runs]
    facts = [run.about.get("inputs", {}).get("eval") for run in runs]
    names = _names(runs, chosen)
    keys = [(name, tuple(sorted(one.items())), data) for name, one, data in zip(names, chosen, facts, strict=True)]
    seeded = [(key, run.seed) for key, run in zip(keys, runs, strict=True)]
    apart = [(key, seeded[:place].count(seeded[place])) for place, key in enumerate(keys)]
    distinct = list(dict.fromkeys(apart))
    name_of = dict(zip(distinct, _numbered([name for (name, *_), _ in distinct]), strict=True))
    return [name_of[one] for one in apart]


def but_for_the_step(runs: Sequence[Run]) -> list[str]:
    """What runs have in common that differ in step size and seed alone."""
    left_out = ("seed", "model.lr", "editor.lr")
    return _names(runs, [{key: value for key, value in _overrides(run).items() if key not in left_out} for run in runs])


def shared_choices(runs: Sequence[Run]) -> list[str]:
    """What was chosen alike in all of them, but the seed and the editor, and so is in no name."""
    shared = set.intersection(*(set(_overrides(run).items()) for run in runs))
    return _told({key: value for key, value in sorted(shared) if key != "seed"}, set())


def _names(runs: Sequence[Run], chosen: Sequence[Mapping[str, str]]) -> list[str]:
    shared = set.intersection(*(set(one.items()) for one in chosen)) if chosen else set()
    return [
        " ".join([str(run.about["config"]["editor"]["name"]), *_told(one, shared)])
        for run, one in zip(runs, chosen, strict=True)
    ]


def _numbered(names: Sequence[str]) -> list[str]:
    return [
        name if names.count(name) == 1 else f"{name} #{names[: place + 1].count(name)}"
        for place, name in enumerate(names)
    ]


def _overrides(run: Run) -> dict[str, str]:
    pairs = (str(override).lstrip("+").partition("=") for override in run.about.get("overrides", ()))
    return {key: value for key, _, value in pairs if not key.startswith(NOT_A_LABEL)}


def _told(overrides: Mapping[str, str], shared: set[tuple[str, str]]) -> list[str]:
    """Values alone where the value says enough (a word), else key=value; of a path, its last part. The seed is last."""
    told = []
    for key, value in sorted(overrides.items(), key=lambda item: item[0] == "seed"):
        if (key, value) in shared or key == "editor":
            continue
        short = value.rsplit("/", 1)[-1]
        told.append(short if key in ("ablation", "experiment", "dataset", "model") else f"{key.split('.')[-1]}={short}")
    return told


def short_module_names(names: Sequence[str]) -> dict[str, str]:
    """Module names without what all of them share, but for the part before the first difference: `layers.28`."""
    parts = [name.split(".") for name in names]
    if len(parts) < 2:
        return {name: ".".join(split[-3:]) for name, split in zip(names, parts, strict=True)}
    least = min(map(len, parts))
    start = next(i for i in range(least + 1) if i == least or len({split[i] for split in parts}) > 1)
    end = next(i for i in range(least - start + 1) if i == least - start or len({split[-1 - i] for split in parts}) > 1)
    return {
        name: ".".join(split[max(start - 1, 0) : len(split) - end]) for name, split in zip(names, parts, strict=True)
    }
