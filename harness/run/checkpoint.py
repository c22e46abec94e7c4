"""Checkpoints: tensors and a JSON state in a folder that is complete or absent, and verified before it is used.

    checkpoints = Checkpoints(run_folder / "checkpoints", "turn", keep=2)
    checkpoints.save(50, {"model": masters, "editor": buffers}, {"seconds": 3.5})
    ...
    found = checkpoints.newest()
    found.place, found.state, found.tensors()["model"]

`turn_50/tensors.safetensors` holds each tensor as <group>/<name>; `turn_50/state.json` the state, and checksums of
both files. Whoever saves must be the only process that writes there (harness/run/lock.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from data.disk import sync, write_atomically

log = logging.getLogger(__name__)

FORMAT: Final = 2  # of state.json; `sha256` is the checksum of all else in it, in this format and in every later one
# Of the tensors' file, by format. SHA-256 of a gigabyte takes longer than a good disk does to write it; against damage,
# if not against forgers, XXH3 serves as well.
CHECKSUMS: Final[dict[int, Callable[[], Any]]] = {1: hashlib.sha256, 2: xxhash.xxh3_128}
STATE, TENSORS = "state.json", "tensors.safetensors"
DTYPES: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Groups = Mapping[str, Mapping[str, Tensor]]
"""Tensors by the name of whose they are, without '/', and their own name."""


class DamagedError(ValueError):
    """A checkpoint that is not what was written."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose bytes are those that were written."""

    path: Path
    place: int
    state: dict[str, Any]
    digest: str  # checksum of its tensors' file

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The groups as they were saved, in memory of their own: products follow the alignment of what they are of."""
        groups: dict[str, dict[str, Tensor]] = {}
        for group, name, tensor in self._each():
            groups.setdefault(group, {})[name] = tensor.clone()
        return groups

    def of_group(self, wanted: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors of one group with their names, one at a time: all of them may be large."""
        return ((name, tensor) for _, name, tensor in self._each(wanted))

    def _each(self, wanted: str | None = None) -> Iterator[tuple[str, str, Tensor]]:
        with safe_open(self.path / TENSORS, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  not a mapping
                group, _, name = key.partition("/")
                if wanted in (None, group):
                    yield group, name, file.get_tensor(key)


class Checkpoints:
    """The checkpoints of one kind in a folder, each at a place that counts up, as <kind>_<place>/."""

    def __init__(self, folder: Path, kind: str, keep: int) -> None:
        self.folder, self.kind, self.keep = folder, kind, keep
        self.latest: int | None = None  # the place of the newest one known to be whole

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint; damaged ones are passed over, at WARNING. ValueError for a newer format."""
        for place in reversed(self.places()):
            try:
                found = read(self._path(place))
            except DamagedError as error:
                log.warning("%s; looking for one before it", error)
            else:
                self.latest = place
                return found
        return None

    def at(self, place: int) -> Checkpoint:
        """That checkpoint. DamagedError where it is not what was written; ValueError, naming others, without one."""
        places = self.places()
        if place not in places:
            there = ", ".join(map(str, places)) or "none"
            raise ValueError(f"{self.folder}: no checkpoint of {self.kind} {place}; those there are: {there}")
        return read(self._path(place))

    def places(self) -> list[int]:
        """Where there are checkpoints, in order, damaged ones included."""
        names = (path.name.removeprefix(f"{self.kind}_") for path in self.folder.glob(f"{self.kind}_*"))
        return sorted(int(name) for name in names if name.isdecimal())

    def save(self, place: int, groups: Groups, state: Mapping[str, Any]) -> None:
        """Write beside, sync, rename; then all go but the last `keep`. Nothing where the newest stands here already.

        ValueError, in one line, where the disk refuses; the checkpoints before it are then as they were.
        """
        if place == self.latest:
            return
        self._clear()
        target = self._path(place)
        beside = self.folder / f".{target.name}.new"
        try:
            beside.mkdir(parents=True)
            tensors = {f"{group}/{name}": tensor for group, own in groups.items() for name, tensor in own.items()}
            digest = write_safetensors(beside / TENSORS, tensors)
            _write_state(beside / STATE, {"format": FORMAT, "place": place, "tensors": digest, "state": dict(state)})
            sync(beside)
            if target.exists():  # a damaged one
                self._discard(target)
            beside.rename(target)
            sync(self.folder)
        except OSError as error:
            shutil.rmtree(beside, ignore_errors=True)
            raise self._not_written(target, error) from error
        self.latest = place
        self._prune()

    def discard_all(self) -> None:
        """Remove them all: what comes after them stands by itself."""
        for place in self.places():
            self._discard(self._path(place))
        self.latest = None

    def _path(self, place: int) -> Path:
        return self.folder / f"{self.kind}_{place}"

    def _clear(self) -> None:
        """What a process that was killed left: nobody else writes here."""
        for left in self.folder.glob(f".{self.kind}_*"):
            shutil.rmtree(left)

    def _prune(self) -> None:
        """Those before the last `keep` go; and those of a later place, for they were passed over as damaged."""
        places = self.places()
        upto = places.index(self.latest) + 1 if self.latest is not None else 0
        for place in [*places[: max(0, upto - self.keep)], *places[upto:]]:
            self._discard(self._path(place))

    def _discard(self, path: Path) -> None:
        """Renamed first, so that a process killed meanwhile leaves no half of one."""
        gone = path.with_name(f".{path.name}.gone")
        path.rename(gone)
        shutil.rmtree(gone)

    def _not_written(self, target: Path, error: OSError) -> ValueError:
        before = "there is none before it" if self.latest is None else f"that of {self.kind} {self.latest} is whole"
        return ValueError(
            f"{target}: the checkpoint could not be written ({error.strerror}); {before}; "
            f"make room, and go on with resume={self.folder.parent}"
        )


def read(path: Path) -> Checkpoint:
    """The checkpoint in a folder, every byte verified: DamagedError for another one, ValueError for a newer format."""
    about = _read_state(path / STATE)
    if about["format"] > FORMAT:
        raise ValueError(
            f"{path}: a checkpoint of format {about['format']}, which a newer version of this program wrote; this one "
            f"reads up to format {FORMAT}: go on with that version"
        )
    file = path / TENSORS
    if not file.is_file() or _checksum_of(file, about["format"]) != about["tensors"]:
        raise DamagedError(f"{file}: damaged, not the bytes that were written")
    return Checkpoint(path, about["place"], about["state"], about["tensors"])


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write the tensors, sync, and return the file's checksum.

    The safetensors format is a length, a JSON header and the bytes. Its own writer does not sync, and while the disk is
    at that, which takes longer, another core reads the bytes back from memory for their checksum.
    """
    ordered = {name: tensors[name].detach() for name in sorted(tensors, key=lambda n: (-tensors[n].itemsize, n))}
    with path.open("wb") as file, ThreadPoolExecutor(1) as meanwhile:
        file.write(_header(ordered, metadata))
        for tensor in ordered.values():
            file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        checksum = meanwhile.submit(_checksum_of, path, FORMAT)
        os.fsync(file.fileno())
        return checksum.result()


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    return len(text).to_bytes(8, "little") + text


def _write_state(path: Path, about: dict[str, Any]) -> None:
    write_atomically(path, json.dumps({**about, "sha256": _digest(about)}, allow_nan=False))


def _read_state(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_bytes())
        if isinstance(about, dict) and about.pop("sha256", None) == _digest(about):
            return about
    except (FileNotFoundError, ValueError):  # gone, cut, or no JSON any more
        pass
    raise DamagedError(f"{path}: damaged, not what was written")


def _checksum_of(path: Path, written_by: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, CHECKSUMS[written_by]).hexdigest()


def _digest(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
