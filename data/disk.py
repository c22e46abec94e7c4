"""Files that are on the disk, and the ones they are said to be."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LFS_HEAD = b"version https://git-lfs"  # what a Git LFS pointer begins with, which stands where a file should be


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """A file's bytes, or what was created and renamed in a folder, outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_or_absent(path: Path) -> Iterator[Path]:
    """A path to write to, which is renamed to `path` at the end, or removed where that fails.

    No other process, on any machine, writes to one of that name.
    """
    part = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write beside, sync, rename: a reader finds the old file or the new one, never half of either."""
    with whole_or_absent(path) as part, part.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
