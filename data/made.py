"""Files of made facts: written once into a cache, and checked by their SHA-256 before they are used again."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.dataset import Dataset
from data.disk import sha256_of, whole_or_absent, write_atomically

logger = logging.getLogger(__name__)

TELLING = 100  # rows whose content names a file: facts that are made another way get another file


def made_file(dataset: Dataset, split: str, count: int, folder: Path) -> Path:
    """A JSON Lines file of `count` rows that the data set makes; damaged, it is made again, which a warning says.

    The file's SHA-256 lies beside it. Raises ValueError where the folder cannot be written to.
    """
    assert dataset.make_rows is not None, f"{dataset.name} makes no rows"
    telling = "".join(map(_line, dataset.make_rows(split, min(count, TELLING))))
    digest = hashlib.sha256(telling.encode()).hexdigest()[:8]
    path = folder / f"{dataset.name}_{split}_{count}_{digest}.jsonl"
    if path.is_file():
        if is_whole(path):
            return path
        logger.warning("%s: damaged, not what was written; it is made again", path)
    logger.info("making %s facts, once, into the cache: %s", f"{count:,}", path.name)
    try:
        _write(path, map(_line, dataset.make_rows(split, count)))
    except OSError as error:
        raise ValueError(
            f"cannot keep the facts of dataset={dataset.name} in {folder}: {error.strerror or error}; make the folder "
            "writable, with room for them, or ask for less with dataset.facts"
        ) from error
    return path


def is_whole(path: Path) -> bool:
    """Whether the file has the SHA-256 that lies beside it."""
    written = _digest_path(path)
    return written.is_file() and written.read_text() == sha256_of(path)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _digest_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _write(path: Path, lines: Iterable[str]) -> None:
    """Write beside and rename: a file that has its SHA-256 beside it was complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with whole_or_absent(path) as part:
        with part.open("wb") as file:
            rest = iter(lines)
            while block := "".join(itertools.islice(rest, 1024)).encode():
                file.write(block)
                digest.update(block)
        # first, so that a process that starts meanwhile finds a whole pair
        write_atomically(_digest_path(path), digest.hexdigest())
