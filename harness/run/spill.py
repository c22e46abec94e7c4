"""Captures on disk, for turns that do not fit in memory (`editor.cache_dir`)."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from torch import Tensor


class CaptureFolder:
    """A folder of memory-mapped captures, one file a module and side, written over each turn and removed at the end.

    Space is reserved when a file is made: a disk that is full says so there, not as a crash of the mapping.
    """

    def __init__(self, parent: Path) -> None:
        """Make the folder below `parent`; ValueError where that cannot be written."""
        self.parent = parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix="captures-", dir=parent))
        except OSError as error:
            raise ValueError(
                f"editor.cache_dir={parent}: cannot be written ({error.strerror}); choose another folder or null"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder)

    def require(self, shapes: Mapping[str, tuple[int, int]], rows: int, kept: int) -> None:
        """Raise ValueError where the captures of turns of `rows` tokens will not fit on the disk.

        The updates of `kept` turns before still read their keys while a turn is captured; its files are new ones.
        """
        needed = 4 * rows * sum((kept + 1) * d_k + 2 * d_v for d_k, d_v in shapes.values())
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"editor.cache_dir={self.parent}: a turn's captures and the keys of earlier ones take "
                f"{needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; free some, choose another folder, or "
                "null to keep them in memory"
            )

    def allocate(self, name: str, shape: tuple[int, int]) -> Tensor:
        """A float32 tensor of that shape, backed by a new file."""
        path = self.folder / name
        path.unlink(missing_ok=True)
        size = 4 * shape[0] * shape[1]
        with path.open("wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, max(size, 1))
            except OSError as error:
                raise ValueError(
                    f"editor.cache_dir={self.parent}: no room for {size / 2**20:.0f} MiB ({error.strerror}); "
                    "free some, choose another folder, or null to keep captures in memory"
                ) from error
        return torch.from_file(str(path), shared=True, size=shape[0] * shape[1]).view(shape)
