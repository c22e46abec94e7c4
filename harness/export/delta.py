"""What edits changed, in one file: the difference of each edited module's weight from the base model's.

    write_delta(path, origin, ((name, difference(original, master)) for ...))
    delta = read_delta(path)
    master = added(original, delta.difference(name))  # bit for bit the weight that was edited, in its own precision
    original = removed(weight, delta.difference(name))  # bit for bit the base model's, from the master or the weight

The file is safetensors: `<module>.weight` is W_t - W_0 in the module's own layout, ready for anyone's arithmetic.
Floating-point sums are rounded, so that adding it, or taking it off, misses the last bits of those few entries that
an edit changed by more than about their own size; `<module>.added` and `.removed` say where, and what belongs there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.disk import sync, whole_or_absent
from harness.run import DamagedError, write_safetensors
from model import INTEGERS

FORMAT: Final = 1  # `sha256` is the checksum of all else in the file, in this format and in every later one


# ---------------------------------------------------------------------------------------------------------------------
# One module


@dataclass(frozen=True)
class Entries:
    """Single entries of a tensor."""

    at: Tensor  # (n,) int64, places in the flattened tensor
    values: Tensor  # (n,)

    def put_into(self, tensor: Tensor) -> Tensor:
        tensor.view(-1)[self.at] = self.values
        return tensor


@dataclass(frozen=True)
class Difference:
    """The difference of an edited weight from what it was; all three in the weight's own layout."""

    change: Tensor  # float32, or float64 where the weight is
    added: Entries  # of the master, in its precision, where original + change is not it
    removed: Entries  # of the original, where the master or the weight - change is not it


def difference(original: Tensor, master: Tensor) -> Difference:
    """What turns `original` into `master`, which took the edits, and `master`, also as the model rounds it, back."""
    change = _precise(master) - _precise(original)
    not_added = _differ(_sum(original, change, master.dtype), master)
    not_removed = _differ(_sum(master, -change, original.dtype), original)
    not_removed |= _differ(_sum(master.to(original.dtype), -change, original.dtype), original)
    return Difference(change, _entries(master, not_added), _entries(original, not_removed))


def added(original: Tensor, edit: Difference) -> Tensor:
    """The master, bit for bit."""
    return edit.added.put_into(_sum(original, edit.change, edit.added.values.dtype))


def removed(edited: Tensor, edit: Difference) -> Tensor:
    """The original, bit for bit; `edited` is the master or the weight rounded from it."""
    return edit.removed.put_into(_sum(edited, -edit.change, edit.removed.values.dtype))


def _precise(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _sum(weight: Tensor, change: Tensor, dtype: torch.dtype) -> Tensor:
    return (_precise(weight) + change).to(dtype)


def _differ(one: Tensor, other: Tensor) -> Tensor:
    """Where two tensors differ in a bit: 0 and -0 do, a NaN and itself do not."""
    bits = INTEGERS[one.itemsize]
    return one.view(bits) != other.view(bits)


def _entries(tensor: Tensor, chosen: Tensor) -> Entries:
    at = chosen.flatten().nonzero()[:, 0]
    return Entries(at, tensor.flatten()[at])


# ---------------------------------------------------------------------------------------------------------------------
# The file


@dataclass(frozen=True)
class Origin:
    """What a delta was made from; fingerprints are those of all weights of a model."""

    base: str  # name or folder, as the run had it
    revision: str | None
    class_name: str
    base_fingerprint: str
    edited_fingerprint: str
    run_id: str
    turn: int  # turns done
    modules: dict[str, tuple[int, int]]  # (d_k, d_v) by name
    dtype: str  # of the model
    master_dtype: str  # of the weights that took the edits
    prompt_form: str = "raw"  # how the run put its questions; older files do not say


@dataclass(frozen=True)
class Delta:
    """A delta file whose bytes are those that were written."""

    path: Path
    origin: Origin

    def difference(self, module: str) -> Difference:
        with safe_open(self.path, framework="pt") as file:
            entries = [
                Entries(*(file.get_tensor(f"{module}.{which}.{part}") for part in ("at", "values")))
                for which in ("added", "removed")
            ]
            return Difference(file.get_tensor(f"{module}.weight"), *entries)


def write_delta(path: Path, origin: Origin, differences: Mapping[str, Difference]) -> None:
    """Write the file, which is to be new; ValueError where the disk refuses, and then there is none."""
    tensors = {}
    for name, edit in differences.items():
        tensors[f"{name}.weight"] = edit.change
        for which, entries in {"added": edit.added, "removed": edit.removed}.items():
            tensors |= {f"{name}.{which}.at": entries.at, f"{name}.{which}.values": entries.values}
    about = {"delta_format": str(FORMAT), "origin": json.dumps(asdict(origin))}
    digest = _digest(about, ((name, tensors[name]) for name in sorted(tensors)))
    try:
        with whole_or_absent(path) as part:
            write_safetensors(part, tensors, {**about, "sha256": digest})
    except OSError as error:
        raise ValueError(
            f"{path}: the delta could not be written ({error.strerror}); make room, or choose another place"
        ) from error
    sync(path.parent)


def read_delta(path: Path) -> Delta:
    """A delta, every byte of it verified. DamagedError where that fails; ValueError for no file, or a newer format."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; name a file that `--delta` wrote")
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            _require_format(path, about)
            written = about.pop("sha256", None)
            digest = _digest(about, ((name, file.get_tensor(name)) for name in sorted(file.keys())))
    except SafetensorError as error:
        raise DamagedError(f"{path}: damaged, or no safetensors file ({error})") from error
    if digest != written:
        raise DamagedError(f"{path}: damaged, not the bytes that were written")
    origin = json.loads(about["origin"])
    modules = {name: (d_k, d_v) for name, (d_k, d_v) in origin["modules"].items()}
    return Delta(path, Origin(**{**origin, "modules": modules}))


def _require_format(path: Path, about: Mapping[str, Any]) -> None:
    number = about.get("delta_format", "")
    if not number.isdecimal():
        raise ValueError(f"{path}: a safetensors file, but no delta; name a file that `--delta` wrote")
    if int(number) > FORMAT:
        raise ValueError(
            f"{path}: a delta of format {number}, which a newer version of this program wrote; this one reads up to "
            f"format {FORMAT}: take that version"
        )


def _digest(about: Mapping[str, str], tensors: Iterator[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in tensors:
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
