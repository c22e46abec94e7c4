"""Where a task's rows come from, and which of them are asked and which may be shown as examples."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from glue_eval.tasks import Example, Task

log = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent / "shipped"
HUB = "hub"
POOL_ROWS = 100
"""The first rows of a file are its few-shot pool: this many, a fifth of the rows where there are fewer than twice as
many. They are never asked, whatever the number of shots, so that scores with different shots are of the same rows."""
HUB_SEED = 42
"""Rows of the hub are taken in an order drawn from this: MMLU's stand there subject by subject."""


@dataclass(frozen=True)
class TaskRows:
    """The rows of a task: those to show and those to ask."""

    task: Task
    source: str  # the file, or the place on the hub
    shots: tuple[Example, ...]
    asked: tuple[Example, ...]
    places: tuple[str, ...]  # of the rows asked, for messages
    sha256: str  # over shots and asked rows as the source has them
    rows: int  # in the source


def read_task(task: Task, origin: str | Path | None, few_shot: int, limit: int | None) -> TaskRows:
    """Rows from a folder that holds `<task>.jsonl`, from the hub (`hub`), or, where `origin` is None, the shipped ones.

    Every row is checked. `few_shot` rows of the pool are shown, in their order; `limit` rows behind the pool are asked,
    None = all. Raises ValueError, naming file and line, for the first thing that is wrong.
    """
    source, rows = _hub_rows(task) if origin == HUB else _file_rows(task, Path(origin or SHIPPED))
    if origin is None:
        log.warning("%s: the %d shipped rows serve; a folder of files, or %r, brings more", task.name, len(rows), HUB)
        source = f"shipped/{task.name}.jsonl"
    checked = [(place, row, _checked(task, row, place)) for place, row in rows]
    pool = POOL_ROWS if len(checked) >= 2 * POOL_ROWS else len(checked) // 5
    if few_shot > pool:
        raise ValueError(
            f"{few_shot} examples are asked for, but the few-shot pool of {task.name} has {pool} of the {len(checked)} "
            f"rows of {source}; ask for {pool} or fewer, or bring a file with more rows"
        )
    asked = checked[pool : None if limit is None else pool + limit]
    used = json.dumps([row for _, row, _ in [*checked[:few_shot], *asked]], sort_keys=True, ensure_ascii=False)
    return TaskRows(
        task,
        source,
        tuple(example for *_, example in checked[:few_shot]),
        tuple(example for *_, example in asked),
        tuple(place for place, *_ in asked),
        hashlib.sha256(used.encode()).hexdigest(),
        len(checked),
    )


def _checked(task: Task, row: Any, place: str) -> Example:
    try:
        return task.example(row)
    except ValueError as error:
        raise ValueError(f"{place}: {error}; mend the row or take it out") from error


def _file_rows(task: Task, folder: Path) -> tuple[str, list[tuple[str, Any]]]:
    path = folder / f"{task.name}.jsonl"
    if not folder.is_dir():
        raise ValueError(f"rows folder {folder}: no such folder; name one that holds {path.name}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; bring the rows of {task.name} there, or leave the task out")
    try:
        rows = [(f"{path}, line {number}", row) for number, row in _json_lines(path)]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is no UTF-8 text (byte {error.start}); fetch or save the file again") from error
    if not rows:
        raise ValueError(f"{path}: holds no rows")
    return str(path), rows


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1 and line.startswith("version https://git-lfs"):
                raise ValueError(f"{path}: a Git LFS pointer, not the data; run `git lfs pull` where it came from")
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: broken JSON ({error.msg}, column {error.colno}); a row stands on one line"
                ) from error
            except RecursionError as error:
                raise ValueError(
                    f"{path}, line {number}: brackets nest too deep; mend the row or take it out"
                ) from error


def _hub_rows(task: Task) -> tuple[str, list[tuple[str, Any]]]:
    if task.hub is None:
        raise ValueError(f"{task.name}: no place on the hub is known for it; bring a file, or leave the task out")
    source = f"{task.hub.path}/{task.hub.config}/{task.hub.split}"
    try:
        found = datasets.load_dataset(task.hub.path, task.hub.config, split=task.hub.split)
    except Exception as error:  # of the hub's own kinds and of those of whichever HTTP library it uses
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{task.name}: {source} cannot be fetched ({first}); bring a folder with the rows") from error
    return source, [(f"{source}, row {number}", dict(row)) for number, row in enumerate(found.shuffle(seed=HUB_SEED))]
