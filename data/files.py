"""Files to records: found, streamed once into an Arrow copy that is checked row by row, memory-mapped from then on."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import mmap
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

import datasets
import ijson
import pyarrow
from datasets.arrow_writer import ArrowWriter

from data.dataset import JSON_KINDS, Dataset, ToRecord
from data.disk import LFS_HEAD, sha256_of, whole_or_absent, write_atomically
from data.json_stream import HalfCharacterError, NestingError, first_byte, json_values
from data.records import EditRecord
from data.stream import NORMALISATION_GROWTH

logger = logging.getLogger(__name__)

FORMAT = 1  # to be raised when readers take other fields of a row or check it otherwise: older copies are left alone
BATCH_ROWS = 1024
ROWS_A_PAGE = 64  # a page that is touched brings its neighbours along, 64 KiB in all: about so many rows
PATH_KEYS = {"train": "dataset.train_path", "eval": "dataset.valid_path"}


# --------------------------------------------------------------------------------------------------------------------
# Which file


def resolve_file(dataset: Dataset, split: str, path: str | Path | None, raw_dir: Path, sample_dir: Path) -> Path:
    """The file of a split, train or eval: the one asked for, else the full one, else the shipped sample.

    That the sample serves is logged at WARNING. Raises ValueError where the file asked for is not there, and where
    the data set has no sample to fall back on.
    """
    key = PATH_KEYS[split]
    if path is not None:
        asked = Path(path).expanduser()
        if not asked.is_file():
            at = "" if asked.is_absolute() else f" ({asked.absolute()})"
            raise ValueError(f"{key}={path}: no such file{at}; set it to a JSON or JSON Lines file, or to null")
        return asked
    candidates = [raw_dir / name for name in dataset.raw_files.get(split, ())]
    if found := next((file for file in candidates if file.is_file()), None):
        return found
    if split not in dataset.sample_files:
        raise ValueError(f"{key}=null: dataset={dataset.name} ships no {split} file; set {key} to your file")
    sample = sample_dir / dataset.sample_files[split]
    if dataset.fetchable:
        remedy = f"`python -m data.prepare {dataset.name}` fetches the full file"
    else:
        remedy = f"bring the full file as {candidates[0]}"
    logger.warning("%s: the small sample %s serves as %s data; %s", dataset.name, sample.name, split, remedy)
    return sample


# --------------------------------------------------------------------------------------------------------------------
# Records of a file


class RecordFile(Sequence[EditRecord]):
    """The records of a data file, parsed on access from a memory-mapped copy."""

    def __init__(self, path: Path, sha256: str, copy: ArrowCopy, to_record: ToRecord, seed: int) -> None:
        self.path, self.sha256 = path, sha256
        self.most_tokens = copy.about.most_tokens  # that any of its questions can have, its answer included
        self._copy, self._to_record, self._seed = copy, to_record, seed

    def __len__(self) -> int:
        return len(self._copy)

    @overload
    def __getitem__(self, place: int) -> EditRecord: ...
    @overload
    def __getitem__(self, place: slice) -> list[EditRecord]: ...
    def __getitem__(self, place: int | slice) -> EditRecord | list[EditRecord]:
        if isinstance(place, slice):
            rows = range(*place.indices(len(self)))
            return self._records(rows.start, rows.stop) if rows.step == 1 else [self[index] for index in rows]
        index = place + len(self) if place < 0 else place
        if not 0 <= index < len(self):
            raise IndexError(f"row {place} of {self.path}, which has {len(self)}")
        return self._records(index, index + 1)[0]

    def __iter__(self) -> Iterator[EditRecord]:
        starts = range(0, len(self), BATCH_ROWS)
        return itertools.chain.from_iterable(self[start : start + BATCH_ROWS] for start in starts)

    def _records(self, start: int, stop: int) -> list[EditRecord]:
        texts = self._copy.texts(start, stop)
        return [self._to_record(json.loads(text), index, self._seed) for index, text in enumerate(texts, start)]


def open_records(path: str | Path, dataset: Dataset, *, cache_dir: Path, seed: int) -> RecordFile:
    """The records of a JSON array or JSON Lines file, every row of it checked.

    The first call streams the file into an Arrow copy in `cache_dir`, named by the file's content and how it is read;
    later ones map that copy, or make it again where it is damaged. A reader's choice among several texts follows
    `seed` and is not in the copy. Raises ValueError, naming file and row, for the first mistake.
    """
    path = Path(path)
    _check_head(path)
    sha256 = sha256_of(path)
    reading = json.dumps([FORMAT, sha256, dataset.name, dataset.fields, dataset.variant])
    name = f"{dataset.name}-{hashlib.sha256(reading.encode()).hexdigest()[:16]}.arrow"
    file = Path(cache_dir) / name
    about = _about(file)
    if about is None:
        about = _convert(path, dataset, file)
    return RecordFile(path, sha256, ArrowCopy(file, about), dataset.to_record, seed)


# --------------------------------------------------------------------------------------------------------------------
# The Arrow copy


@dataclass(frozen=True)
class AboutCopy:
    """What is known of a copy without reading its rows; lies beside it as JSON."""

    sha256: str
    most_tokens: int


class ArrowCopy:
    """The JSON texts of a file's rows, memory-mapped.

    Pages that were read go back to the system, which keeps them cached, so memory does not grow to the file's size.
    """

    def __init__(self, path: Path, about: AboutCopy) -> None:
        self.about = about
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        table = pyarrow.ipc.open_stream(pyarrow.py_buffer(self._map)).read_all()  # maps: nothing is copied
        self._rows: pyarrow.ChunkedArray = table.column("row")
        self._release()

    def __len__(self) -> int:
        return len(self._rows)

    def texts(self, start: int, stop: int) -> list[str]:
        texts = self._rows.slice(start, stop - start).to_pylist()
        self._touched += max(len(texts), ROWS_A_PAGE)
        if self._touched >= BATCH_ROWS:
            self._release()
        return texts

    def _release(self) -> None:
        self._map.madvise(mmap.MADV_DONTNEED)
        self._touched = 0  # rows since then


def _about(copy: Path) -> AboutCopy | None:
    """What lies beside a copy; None where there is no copy, or it is not what was written."""
    about_path = _about_path(copy)
    if not (copy.is_file() and about_path.is_file()):
        return None
    try:
        about = AboutCopy(**json.loads(about_path.read_text()))
        if about.sha256 == sha256_of(copy):
            return about
    except (ValueError, TypeError):  # no JSON, or another one
        pass
    logger.warning("%s: damaged, not what was written; it is made again", copy)
    return None


def _about_path(copy: Path) -> Path:
    return copy.with_suffix(".json")


def _convert(path: Path, dataset: Dataset, copy: Path) -> AboutCopy:
    """Write the Arrow copy beside its place and rename it, then what is known of it: without that it does not count.

    A row is kept as the JSON text of its fields: rows of one file may differ in form, and what is absent, null or of
    the wrong type in the file must still be so in the copy.
    """
    most_tokens = 0
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        features = datasets.Features({"row": datasets.Value("string")})
        with whole_or_absent(copy) as part:
            with ArrowWriter(path=str(part), features=features) as writer:
                for batch in _batches(_checked_rows(path, dataset)):
                    writer.write_batch({"row": batch}, writer_batch_size=BATCH_ROWS)
                    most_tokens = max(most_tokens, *map(_most_tokens, batch))
                writer.finalize()
            about = AboutCopy(sha256_of(part), most_tokens)
        write_atomically(_about_path(copy), json.dumps(asdict(about)))
    except OSError as error:
        raise ValueError(
            f"cannot keep a converted copy of {path} in {copy.parent}: {error.strerror or error}; "
            "make the folder writable, with room for about the size of the file"
        ) from error
    return about


def _most_tokens(row: str) -> int:
    """An upper bound on the tokens of any question made of a row, given as ASCII JSON.

    A token stands for at least one byte of normalised text; prompt and answer are each within the row.
    """
    return 2 * len(row) * (NORMALISATION_GROWTH if "\\u" in row else 1)


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(itertools.islice(texts, BATCH_ROWS)):
        yield batch


def _checked_rows(path: Path, dataset: Dataset) -> Iterator[str]:
    """The JSON text of each row's fields, once the reader has found nothing wrong with them."""
    index = -1
    for index, row in enumerate(_rows(path)):
        if not isinstance(row, dict):
            raise ValueError(f"file {path}, row {index}: {JSON_KINDS[type(row)]}, not an object with fields")
        try:
            dataset.to_record(row, index, 0)
        except ValueError as error:
            raise ValueError(f"file {path}, row {index}: {error}") from error
        yield json.dumps({name: row[name] for name in dataset.fields if name in row})
    if index < 0:
        raise ValueError(f"file {path}: holds no rows")


def _rows(path: Path) -> Iterator[Any]:
    """`json_values`, with one line for what is wrong."""
    index = 0
    try:
        for value in json_values(path):
            yield value
            index += 1
    except NestingError as error:
        raise ValueError(f"file {path}: {error}, and a row needs a handful; mend or fetch the file again") from error
    except HalfCharacterError as error:
        raise ValueError(f"file {path}: {error}, as if a text was cut there; mend or fetch the file again") from error
    except (ijson.JSONError, UnicodeDecodeError) as error:
        raise ValueError(f"file {path}, row {index}: {_broken(error)}; mend or fetch the file again") from error


def _broken(error: ijson.JSONError | UnicodeDecodeError) -> str:
    """What the parser has to say, its first line: the others draw the place with spaces."""
    if isinstance(error, UnicodeDecodeError):  # as of \udc00, the second half of a character without its first
        return "a text that is no Unicode, as if cut in the middle of a character"
    reason = error.args[0] if error.args else ""
    reason = reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
    if "premature EOF" in reason:
        return "the file ends in the middle of the JSON, as if cut off"
    no_number = "lexical error" in reason and re.search(r"[:\[,]\s*-?(NaN|Infinity)\b", reason)
    remedy = "; NaN and Infinity are no JSON: write null" if no_number else ""
    return f"broken JSON ({reason.strip().splitlines()[0].rstrip('.') if reason.strip() else 'unreadable'}{remedy})"


def _check_head(path: Path) -> None:
    """ValueError where the file is missing, empty, a Git LFS pointer, or begins like neither JSON form."""
    if not path.is_file():
        raise ValueError(f"file {path}: no such file")
    with path.open("rb") as file:
        first = first_byte(file)
        head = file.read(len(LFS_HEAD))
    if not first:
        raise ValueError(f"file {path}: is empty")
    if head == LFS_HEAD:
        raise ValueError(
            f"file {path}: a Git LFS pointer, not the data; run `git lfs pull` where it came from, or fetch the full "
            "files with `python -m data.prepare`"
        )
    if first not in (b"[", b"{"):
        raise ValueError(f"file {path}: neither a JSON array nor JSON Lines; it begins with {head[:20]!r}")
