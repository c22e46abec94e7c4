"""Fetch the full data sets: `python -m data.prepare [dataset ...] [--to data/raw]`.

Every file arrives as `<file>.part`, is resumed where a connection was cut, is checked (size, SHA-256, every row
parsed) and only then renamed: a file under its own name is complete. Nothing that lies there already is overwritten.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import httpx
import ijson
import pyarrow
import pyarrow.parquet as parquet
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from data.disk import sha256_of, sync, write_atomically

log = logging.getLogger(__name__)
T = TypeVar("T")

HOSTS = {
    "huggingface": "https://huggingface.co",
    "github": "https://media.githubusercontent.com",
    "rome": "https://rome.baulab.info",
}
LFS_HEAD = b"version https://git-lfs"
SPARE_BYTES = 64 << 20  # left free on the disk: a file system filled to the last byte breaks other programs
LONGEST_WAIT_S = 60.0


class FetchError(RuntimeError):
    """A source that cannot give the file; the message is one line that names the URL or the file."""


class TransientError(FetchError):
    """A failure that another try may mend, after `retry_after` seconds where the host named a time."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Remote:
    """One thing to download; what its publisher does not state is None."""

    url: str
    size: int | None = None  # bytes
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class UrlSource:
    """A file at a fixed path of a host, published as it is wanted here."""

    host: str
    path: str
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class HubSource:
    """Files of a Hugging Face data set repository whose rows, one file after the other, make the wanted file.

    Their sizes and hashes are asked of the repository's listing. Without `paths` the listing must leave no doubt which
    file is meant: the wanted name, or the only JSON file, or the Parquet shards of the one split `train`.
    """

    repo: str
    paths: tuple[str, ...] = ()
    rows: int | None = None


@dataclass(frozen=True, slots=True)
class DataFile:
    """A full file, its place below data/raw, the fields of its rows (DESIGN section 4), and who has it, best first."""

    dataset: str
    path: str
    fields: tuple[str, ...]
    sources: tuple[UrlSource | HubSource, ...]
    nullable: tuple[str, ...] = ()

    @property
    def pinned(self) -> dict[str, int | None]:
        """SHA-256 -> size of every copy whose hash is public."""
        return {s.sha256: s.size for s in self.sources if isinstance(s, UrlSource) and s.sha256}


def _lfs(path: str, size: int, sha256: str) -> UrlSource:
    """Size and hash are those of the Git LFS pointers in MINE-USTC/StableEdit, commit 0b11e4c."""
    return UrlSource("github", f"media/MINE-USTC/StableEdit/main/data/raw/{path}", size, sha256)


# Release order of the eight snapshots: the stream of edits is chronological. 502,382 rows together.
WIKIBIGEDIT_SNAPSHOTS = tuple(
    f"wiki_big_edit_{first}_{last}.json"
    for first, last in itertools.pairwise(
        ("20240201", "20240220", "20240301", "20240320", "20240401", "20240501", "20240601", "20240620", "20240701")
    )
)
_ZSRE = ("src", "rephrase", "ans", "loc", "loc_ans")
_FEVER = ("prompt", "equiv_prompt", "alt", "unrel_prompt", "unrel_ans")
_WIKI = ("update", "rephrase", "ans", "personas", "loc", "loc_ans")
_ULTRA = ("prompt", "rephrase_prompt", "ans", "loc", "loc_ans")


def _file(path: str, fields: tuple[str, ...], size: int, sha256: str, *first: HubSource) -> DataFile:
    dataset = path.split("/")[0]
    nullable = ("mhop", "mhop_ans") if fields is _WIKI else ()
    return DataFile(dataset, path, fields, (*first, _lfs(path, size, sha256)), nullable)


FILES = (
    _file("zsre/zsre_train.json", _ZSRE, 59688351, "db0a0dd7d5b2b74cc92c1572e2d04545fc65aeff0146b4466596b050df48a562"),
    _file(
        "zsre/zsre_eval_20k.json", _ZSRE, 7360316, "81cd16d2f1d5f59a267f17237c1d3c2f0608fec71c5856cf8b1f6af3b63cb940"
    ),
    _file(
        "zsre/zsre_eval_100k.json", _ZSRE, 36786886, "5cda0c27b0e845144110940582789269695a409b61cfb2ddb0b93fb4b6a4f5f9"
    ),
    _file(
        "fever/fever_train.json", _FEVER, 87653077, "3b5049113e8a67882ebc3977f715c5e5e3415728e46df89eb268a5070526233b"
    ),
    _file(
        "fever/fever_eval_20k.json",
        _FEVER,
        18922817,
        "cf068646881ac4af2abae5ec4a87c77c31be3399aefaff3761f058d378fa077c",
    ),
    _file(
        "fever/fever_eval_100k.json",
        _FEVER,
        92873449,
        "0b50fdbb91afbf905342f0621201cb5369e95224cfe261106be7f52239f37cbc",
    ),
    _file(
        "wikibigedit/wikibigedit_train_17k.json",
        _WIKI,
        8395410,
        "a3069b6b1b4c21618025f932ba5c87f6cedbc9f618f7530bed1c2360a21c5dc1",
    ),
    _file(
        "wikibigedit/wikibigedit_eval_17k.json",
        _WIKI,
        11017427,
        "9268a9658b5e633c0c233d2102ea1f1f0d6db126a6d953c86f8e4619639367da",
    ),
    _file(
        "wikibigedit/wikibigedit.json",
        _WIKI,
        250648693,
        "546ba3aa8204b41200ad015bbfe2ffda9e46095b0796e5bc347e9c3546d03fc7",
        HubSource("lukasthede/WikiBigEdit", WIKIBIGEDIT_SNAPSHOTS, 502382),
    ),
    _file(
        "ultraeditbench/UltraEditBench_train_20k.json",
        _ULTRA,
        8535320,
        "04ce2ae7fdda92dda42b054321e887e5f70352bf380ba364450e9d1e1fe31427",
    ),
    _file(
        "ultraeditbench/UltraEditBench_2M.json",
        _ULTRA,
        800506139,
        "b5ebb3fda5bd59a23cc7e5aa29a2eb7371e4488cc3def5038dc8b6c211eca0f1",
        HubSource("XiaojieGu/UltraEditBench"),
    ),
    DataFile(
        "knowns",
        "known_1000.json",
        ("prompt", "prediction"),
        (
            UrlSource("github", "media/MINE-USTC/StableEdit/main/data/raw/known_1000.json"),
            UrlSource("rome", "data/dsets/known_1000.json"),
        ),
    ),
)


# --------------------------------------------------------------------------------------------------- what a file holds


def check_head(path: Path) -> None:
    """FetchError where the first bytes are a Git LFS pointer, a web page, or no JSON array, object or Parquet file."""
    with path.open("rb") as file:
        head = file.read(512).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(LFS_HEAD):
        raise FetchError(f"{path}: a Git LFS pointer, not the data (its host's LFS quota may be used up)")
    if head[:14].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise FetchError(f"{path}: a web page, not the data")
    if not head.startswith((b"[", b"{", b"PAR1")):
        raise FetchError(f"{path}: neither a JSON array nor JSON Lines; it begins with {head[:20]!r}")


def _json_rows(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        start = file.read(3)
        file.seek(3 if start == b"\xef\xbb\xbf" else 0)
        body = file.tell()
        is_array = file.read(512).lstrip().startswith(b"[")
        file.seek(body)
        yield from ijson.items(file, "item" if is_array else "", multiple_values=not is_array, use_float=True)


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def _parquet_rows(path: Path) -> Iterator[Any]:
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(1024):
            yield from batch.to_pylist()


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON array, JSON Lines or Parquet file, streamed; FetchError names file and row if broken."""
    check_head(path)
    row_number = 0
    try:
        for row in _parquet_rows(path) if _is_parquet(path) else _json_rows(path):
            if not isinstance(row, dict):
                raise FetchError(f"{path}, row {row_number}: not an object but {type(row).__name__}")
            yield row
            row_number += 1
    except (ijson.JSONError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:120]
        raise FetchError(f"{path}, after row {row_number}: broken or cut off ({reason})") from error


def _require(row: Mapping[str, Any], fields: Sequence[str], where: str) -> None:
    missing = [name for name in fields if name not in row]
    if missing:
        raise FetchError(f"{where}: no field {', '.join(missing)}; it has {', '.join(map(str, row))}")


def count_rows(path: Path, fields: Sequence[str]) -> int:
    """Rows of the file, all parsed; the first must hold `fields`. FetchError for an empty or broken file."""
    count = 0
    for row in read_rows(path):
        if count == 0:
            _require(row, fields, f"{path}, row 0")
        count += 1
    if count == 0:
        raise FetchError(f"{path}: holds no rows")
    return count


def convert(parts: Sequence[Path], target: Path, file: DataFile) -> int:
    """Write the rows of `parts`, one after the other, as one JSON array of `file`'s fields; the number of rows.

    Streams: resident memory does not grow with the files. A nullable field that a row lacks becomes null.
    FetchError where a row lacks another field, or where there are no rows.
    """
    count = 0
    with target.open("w", encoding="utf-8") as out:
        for part in parts:
            for number, row in enumerate(read_rows(part)):
                _require(row, file.fields, f"{part}, row {number}")
                kept = {name: row.get(name) for name in (*file.fields, *file.nullable)}
                out.write(("[\n" if count == 0 else ",\n") + json.dumps(kept))
                count += 1
        out.write("\n]\n")
    if count == 0:
        raise FetchError(f"{', '.join(map(str, parts))}: no rows")
    return count


# ------------------------------------------------------------------------------------------------------------ download


def check_space(folder: Path, needed: int) -> None:
    """OSError where the disk of `folder` cannot take `needed` more bytes and keep SPARE_BYTES free."""
    free = shutil.disk_usage(folder).free
    if needed + SPARE_BYTES > free:
        raise OSError(
            f"{folder}: {_megabytes(needed)} to write, {_megabytes(free)} free; make room or choose another --to folder"
        )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sidecar(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _sidecar(part).unlink(missing_ok=True)


class Downloader:
    """Brings a Remote to a file and checks its size and hash; goes on where an earlier try stopped."""

    def __init__(self, client: httpx.Client, progress: Progress, backoff_s: float = 1.0, tries: int = 5) -> None:
        self._client = client
        self._progress = progress
        self._backoff_s = backoff_s
        self._tries = tries

    def fetch(self, remote: Remote, part: Path) -> None:
        """Bring `remote` to `part`, verified and on disk.

        Transient failures (cut connection, 429, 5xx) are tried again after backoff_s * 2**k seconds, or what the server
        asks for; the count starts again whenever the file has grown. FetchError where the host has no such file,
        where it gives something else, or after `tries` fruitless tries; then the part stays for a later run.
        """
        part.parent.mkdir(parents=True, exist_ok=True)
        for last in (False, True):
            joined = self._transfer(remote, part)
            try:
                self._verify(remote, part)
                break
            except FetchError as error:
                _discard(part)
                if last or not joined:
                    raise
                # Bytes kept from an earlier try may be to blame: once more, from the first byte.
                log.warning("%s; fetching it again from the start", error)
        _sidecar(part).unlink(missing_ok=True)

    def get_json(self, url: str) -> Any:
        """The JSON document at `url`, with the same retries."""
        return self._retrying(url, lambda: self._get_json_once(url), lambda: 0)

    def _get_json_once(self, url: str) -> Any:
        response = self._client.get(url)
        _check_status(response, url)
        try:
            return response.json()
        except ValueError as error:
            raise FetchError(f"{url}: not JSON") from error

    def _transfer(self, remote: Remote, part: Path) -> bool:
        """Whether the file was put together from more than one answer."""
        task = self._progress.add_task(part.name.removesuffix(".part"), total=remote.size)
        try:
            return self._retrying(remote.url, lambda: self._attempt(remote, part, task), lambda: _size(part))
        finally:
            self._progress.remove_task(task)

    def _retrying(self, url: str, attempt: Callable[[], T], grown_to: Callable[[], int]) -> T:
        failures, best = 0, grown_to()
        while True:
            try:
                return attempt()
            except (TransientError, httpx.TransportError) as error:
                size = grown_to()
                failures, best = (1, size) if size > best else (failures + 1, best)
                self._wait(url, error, failures)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise FetchError(f"{url}: {error}") from error

    def _wait(self, url: str, error: Exception, failures: int) -> None:
        reason = str(error) or type(error).__name__
        if failures >= self._tries:
            raise TransientError(f"{url}: gave up after {failures} tries in a row ({reason})") from error
        wait = self._backoff_s * 2 ** (failures - 1)
        if isinstance(error, TransientError) and error.retry_after is not None:
            wait = error.retry_after
        log.info("%s: %s; trying again in %.1f s", url, reason, min(wait, LONGEST_WAIT_S))
        time.sleep(min(wait, LONGEST_WAIT_S))

    @staticmethod
    def _resume_point(remote: Remote, part: Path) -> tuple[int, str | None]:
        """Bytes of `part` worth keeping, and the strong validator they came with.

        Without a validator bytes are kept only where a known hash will judge the whole file.
        """
        saved = _read_sidecar(part)
        etag = saved.get("etag") or None if saved.get("url") == remote.url else None
        # another host's copy of the same bytes may be continued here: the hash decides in the end
        same_bytes = remote.sha256 is not None and saved.get("sha256") == remote.sha256
        return (_size(part) if etag or same_bytes else 0), etag

    def _attempt(self, remote: Remote, part: Path, task: TaskID) -> bool:
        offset, etag = self._resume_point(remote, part)
        if offset and offset == remote.size:
            return True
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        if offset and etag:
            headers["If-Range"] = etag
        with self._client.stream("GET", remote.url, headers=headers) as response:
            if response.status_code == 416 and response.headers.get("Content-Range") == f"bytes */{offset}":
                return True  # nothing lies beyond what is here
            start, total = _check_answer(response, remote, offset, part)
            check_space(part.parent, (total or 0) - start)
            _save_validator(response, remote, part)
            self._progress.update(task, total=total, completed=start)
            self._write(response, part, start, task)
        if total is not None and _size(part) != total:
            raise TransientError(f"{_size(part)} of {total} bytes arrived")
        return start > 0

    def _write(self, response: httpx.Response, part: Path, start: int, task: TaskID) -> None:
        with part.open("ab" if start else "wb") as file:  # start is 0 or the size of the part
            for chunk in response.iter_raw():
                file.write(chunk)
                self._progress.advance(task, len(chunk))
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def _verify(remote: Remote, part: Path) -> None:
        try:
            check_head(part)
        except FetchError as error:
            raise FetchError(f"{remote.url}: {str(error).removeprefix(f'{part}: ')}") from error
        if remote.size is not None and _size(part) != remote.size:
            raise FetchError(f"{remote.url}: {_size(part)} bytes arrived, {remote.size} expected")
        if remote.sha256 is not None and (actual := sha256_of(part)) != remote.sha256:
            raise FetchError(f"{remote.url}: SHA-256 is {actual}, not the published {remote.sha256}")


def _check_status(response: httpx.Response, url: str) -> None:
    status = response.status_code
    if status == 429 or status >= 500 or status in (408, 416):
        after = response.headers.get("Retry-After", "")  # its other form, a date, is not worth a clock's trust
        raise TransientError(f"HTTP {status} {response.reason_phrase}", float(after) if after.isdigit() else None)
    if status == 404:
        raise FetchError(f"{url}: 404, there is no such file (any more)")
    if status not in (200, 206):
        raise FetchError(f"{url}: HTTP {status} {response.reason_phrase}")


def _check_answer(response: httpx.Response, remote: Remote, offset: int, part: Path) -> tuple[int, int | None]:
    """Where the body's first byte belongs in the file, and the size the file is to have (None: not announced).

    A pointer or a page is recognised before its length is complained about: that says more.
    """
    if response.status_code == 416:
        _discard(part)  # the file on the host is another, shorter one
    _check_status(response, remote.url)
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise FetchError(f"{remote.url}: sent compressed though asked not to; resuming and sizes would be wrong")
    if response.headers.get("Content-Type", "").startswith("text/html"):
        # told from the header, so that a log-in page does not wipe out the bytes an earlier run brought
        raise FetchError(f"{remote.url}: a web page, not the data")
    try:
        start, total = _announced(response, offset)
    except TransientError:
        _discard(part)
        raise
    if remote.size is not None and total is not None and total != remote.size:
        if total <= 1024 and response.read().startswith(LFS_HEAD):
            raise FetchError(f"{remote.url}: a Git LFS pointer, not the data (its host's LFS quota may be used up)")
        raise FetchError(f"{remote.url}: the host announces {total} bytes, {remote.size} expected")
    return start, total


def _announced(response: httpx.Response, offset: int) -> tuple[int, int | None]:
    if response.status_code == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != offset:
            raise TransientError(f"answered a request for the bytes from {offset} with other bytes")
        return offset, None if match[2] == "*" else int(match[2])
    length = response.headers.get("Content-Length")
    return 0, int(length) if length else None


def _save_validator(response: httpx.Response, remote: Remote, part: Path) -> None:
    etag = response.headers.get("ETag", "")
    strong = etag if etag.startswith('"') else ""  # a weak one does not promise the same bytes (RFC 9110, 13.1.5)
    saved = {"url": remote.url, "etag": strong, "sha256": remote.sha256}
    _sidecar(part).write_text(json.dumps(saved), encoding="utf-8")


def _read_sidecar(part: Path) -> dict[str, Any]:
    if not _sidecar(part).exists():
        return {}
    try:
        return dict(json.loads(_sidecar(part).read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        log.info("%s is broken, as after a crash; %s starts again", _sidecar(part), part)
        return {}


# -------------------------------------------------------------------------------------------------- one file, all files


@dataclass(frozen=True, slots=True)
class Settings:
    """Where files go, where hosts are, and whether a differing file may be set aside."""

    raw_dir: Path
    hosts: Mapping[str, str]
    force: bool = False


def remotes_of(
    source: UrlSource | HubSource, file: DataFile, hosts: Mapping[str, str], loader: Downloader
) -> list[Remote]:
    """What must be downloaded from this source, in order. FetchError where a repository leaves open which files."""
    if isinstance(source, UrlSource):
        return [Remote(f"{hosts[source.host]}/{source.path}", source.size, source.sha256)]
    base = hosts["huggingface"]
    listed = _hub_listing(loader.get_json(f"{base}/api/datasets/{source.repo}/tree/main?recursive=true"), source.repo)
    paths = source.paths or _pick(tuple(listed), file, source.repo)
    missing = [path for path in paths if path not in listed]
    if missing:
        raise FetchError(f"{base}/datasets/{source.repo}: no file {', '.join(missing)}; it holds {', '.join(listed)}")
    return [Remote(f"{base}/datasets/{source.repo}/resolve/main/{path}", *listed[path]) for path in paths]


def _hub_listing(entries: Any, repo: str) -> dict[str, tuple[int | None, str | None]]:
    """path -> (size, SHA-256) of a repository's files; only files in LFS have a SHA-256 there."""
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise FetchError(f"Hugging Face listing of {repo}: not a list of files")
    files = [entry for entry in entries if entry.get("type") == "file"]
    return {entry["path"]: (entry.get("size"), (entry.get("lfs") or {}).get("oid")) for entry in files}


def _pick(paths: Sequence[str], file: DataFile, repo: str) -> tuple[str, ...]:
    name = Path(file.path).name
    named = tuple(path for path in paths if Path(path).name == name)
    lone = tuple(path for path in paths if path.endswith((".json", ".jsonl")))
    shards = tuple(sorted(path for path in paths if re.search(r"(^|/)train-\d+-of-\d+\.parquet$", path)))
    if len(named) == 1:
        return named
    if len(lone) == 1:
        return lone
    if shards and not lone:
        return shards
    raise FetchError(f"Hugging Face {repo}: cannot tell which file is {name}; it holds {', '.join(paths) or 'nothing'}")


def prepare_file(file: DataFile, settings: Settings, loader: Downloader) -> Path:
    """The verified file below `raw_dir`, fetched unless it is there.

    A file that is there and is no published copy is left alone (ValueError); with `force` it is renamed `<file>.old`,
    once the new one is complete. FetchError when no source could give the file; OSError when the disk could not.
    """
    target = settings.raw_dir / file.path
    if target.exists() and _is_ours(target, file, settings.force):
        return target
    part, receipt = _fetch_any(file, target, settings, loader)
    write_atomically(_receipt_path(target), json.dumps(receipt, indent=1) + "\n")
    if target.exists():
        aside = _aside(target)
        target.rename(aside)
        log.info("%s: the old file is kept as %s", target, aside.name)
    part.rename(target)
    sync(target.parent)
    return target


def _is_ours(target: Path, file: DataFile, force: bool) -> bool:
    """Whether `target` is a file to keep; False where force allows replacing it."""
    actual = sha256_of(target)
    known = {*file.pinned, *_receipt_hash(target)}
    if actual in known:
        log.info("%s: already there, SHA-256 as published or as fetched", target)
        return True
    if force:
        return False
    reason = f"its SHA-256 is {actual}"
    try:
        rows = count_rows(target, file.fields)
    except FetchError as error:
        reason = str(error).removeprefix(f"{target}: ")
    else:
        if not known:
            log.info("%s: already there, %d rows; no published hash to compare with", target, rows)
            return True
    raise ValueError(
        f"{target}: already there, but not the published file ({reason}); left as it is. "
        "--force fetches the published one and keeps this one as .old"
    )


def _fetch_any(file: DataFile, target: Path, settings: Settings, loader: Downloader) -> tuple[Path, dict[str, Any]]:
    failures: list[str] = []
    for source in file.sources:
        try:
            return _fetch_from(source, file, target, settings, loader)
        except FetchError as error:
            failures.append(str(error))
            if len(failures) < len(file.sources):
                log.warning("%s; trying the next source", error)
    raise FetchError(f"{file.path} could not be fetched: {'; '.join(failures)}. Bring it yourself as {target}")


def _fetch_from(
    source: UrlSource | HubSource, file: DataFile, target: Path, settings: Settings, loader: Downloader
) -> tuple[Path, dict[str, Any]]:
    remotes = remotes_of(source, file, settings.hosts, loader)
    part = target.with_name(target.name + ".part")
    hashed = all(remote.sha256 for remote in remotes)
    if len(remotes) == 1 and not remotes[0].url.endswith(".parquet"):
        log.info("fetching %s from %s (%s)", file.path, remotes[0].url, _what_is_known(hashed))
        loader.fetch(remotes[0], part)
        rows = _checked_count(part, file)
    else:
        rows = _fetch_and_convert(remotes, part, file, loader)
    if isinstance(source, HubSource) and source.rows is not None and rows != source.rows:
        part.unlink()
        raise FetchError(f"{source.repo}: {rows} rows, {source.rows} expected")
    log.info("%s: %d rows, %s (%s)", file.path, rows, _megabytes(_size(part)), _what_is_known(hashed))
    return part, {
        "sha256": sha256_of(part),
        "bytes": _size(part),
        "rows": rows,
        "sources": [{"url": remote.url, "sha256": remote.sha256} for remote in remotes],
        "fetched_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _what_is_known(hashed: bool) -> str:
    return "SHA-256 published" if hashed else "no SHA-256 published: only its rows can be checked"


def _checked_count(part: Path, file: DataFile) -> int:
    try:
        return count_rows(part, file.fields)
    except FetchError:
        part.unlink()  # complete, and not what is wanted: nothing to resume
        raise


def _fetch_and_convert(remotes: Sequence[Remote], part: Path, file: DataFile, loader: Downloader) -> int:
    folder = part.with_name(part.name + "s")
    pieces = []
    for remote in remotes:
        piece = folder / remote.url.split("/resolve/main/")[-1].replace("/", "__")
        if not (remote.sha256 and piece.exists() and sha256_of(piece) == remote.sha256):
            log.info("fetching %s for %s (%s)", remote.url, file.path, _what_is_known(bool(remote.sha256)))
            unfinished = piece.with_name(piece.name + ".part")
            loader.fetch(remote, unfinished)
            unfinished.rename(piece)
        pieces.append(piece)
    check_space(part.parent, sum(map(_size, pieces)))
    _discard(part)  # what another source left
    try:
        rows = convert(pieces, part, file)
    except FetchError:
        part.unlink(missing_ok=True)
        raise
    sync(part)
    shutil.rmtree(folder)
    return rows


def _receipt_path(target: Path) -> Path:
    return target.with_name(target.name + ".fetched.json")


def _receipt_hash(target: Path) -> set[str]:
    path = _receipt_path(target)
    if not path.exists():
        return set()
    try:
        return {json.loads(path.read_text(encoding="utf-8"))["sha256"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a receipt of data.prepare ({error}); delete it and run again") from error


def _aside(target: Path) -> Path:
    names = itertools.chain((".old",), (f".old{n}" for n in itertools.count(2)))
    return next(path for name in names if not (path := target.with_name(target.name + name)).exists())


def prepare(files: Sequence[DataFile], settings: Settings, loader: Downloader) -> list[str]:
    """Fetch what is missing of `files`; one line for every file that could not be had, none when all is well."""
    problems = []
    for file in files:
        try:
            prepare_file(file, settings, loader)
        except (FetchError, ValueError, OSError) as error:
            problem = str(error)
            if isinstance(error, OSError) and error.errno is not None:  # the system's own, which may name no file
                problem = f"{file.path} in {settings.raw_dir}: {error}"
            log.error("%s", problem)
            problems.append(problem)
    return problems


# -------------------------------------------------------------------------------------------------------- command line


def select_files(names: Sequence[str]) -> list[DataFile]:
    """The files of the named data sets (`zsre`) or paths (`zsre/zsre_train.json`), all for no name; ValueError else."""
    chosen: list[DataFile] = []
    for name in names:
        found = [file for file in FILES if name in (file.dataset, file.path)]
        if not found:
            known = sorted({file.dataset for file in FILES})
            close = difflib.get_close_matches(name, [*known, *(file.path for file in FILES)], n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ValueError(f"dataset {name!r} has no published full file; {hint}known: {', '.join(known)}")
        chosen += [file for file in found if file not in chosen]
    return chosen or list(FILES)


def parse_hosts(endpoints: Sequence[str]) -> dict[str, str]:
    """HOSTS with `huggingface=URL`, `github=URL` or, for every host, a plain URL in their place; ValueError else."""
    hosts = dict(HOSTS)
    if os.environ.get("HF_ENDPOINT"):
        hosts["huggingface"] = os.environ["HF_ENDPOINT"].rstrip("/")
    for endpoint in endpoints:
        match = re.fullmatch(r"(?:(\w+)=)?(https?://[^\s/]+\S*?)/*", endpoint)
        if match is None or (match[1] and match[1] not in HOSTS):
            raise ValueError(
                f"--endpoint {endpoint}: expected https://host or one of {', '.join(HOSTS)}, =, https://host"
            )
        hosts.update({match[1]: match[2]} if match[1] else dict.fromkeys(HOSTS, match[2]))
    return hosts


def list_files(files: Sequence[DataFile], raw_dir: Path) -> Table:
    """What is published and what of it lies in `raw_dir`."""
    table = Table("dataset", "file", "size", "SHA-256", "state")
    for file in files:
        target = raw_dir / file.path
        part = target.with_name(target.name + ".part")
        state = "there" if target.exists() else f"{_megabytes(_size(part))} fetched" if part.exists() else "missing"
        sizes = [_megabytes(size) for size in file.pinned.values() if size]
        table.add_row(
            file.dataset,
            str(target),
            sizes[0] if sizes else "unknown",
            (next(iter(file.pinned), "unknown"))[:12],
            state,
        )
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description="Fetch and verify the full data sets.")
    parser.add_argument("datasets", nargs="*", metavar="dataset", help="data set or file, e.g. zsre; none = all")
    parser.add_argument("--to", type=Path, default=Path("data/raw"), metavar="FOLDER", help="default: data/raw")
    parser.add_argument(
        "--endpoint",
        nargs="+",
        action="extend",
        default=[],
        metavar="URL",
        help="mirror: URL, huggingface=URL, github=URL",
    )
    parser.add_argument("--list", action="store_true", help="say what is published and what is here; fetch nothing")
    parser.add_argument("--force", action="store_true", help="replace a file that differs; the old one is kept as .old")
    return parser


class _ConsoleHandler(logging.Handler):
    """Log lines above the progress bars, never wrapped: a URL stays in one piece."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(self.format(record), soft_wrap=True, markup=False, highlight=False)


def open_client() -> httpx.Client:
    # identity: sizes, hashes and ranges are those of the file, not of a compressed transfer
    headers = {"Accept-Encoding": "identity", "User-Agent": "stableedit-prepare"}
    return httpx.Client(headers=headers, follow_redirects=True, timeout=httpx.Timeout(60, connect=15))


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


def run(arguments: argparse.Namespace, console: Console) -> int:
    files, hosts = select_files(arguments.datasets), parse_hosts(arguments.endpoint)
    if arguments.list:
        console.print(list_files(files, arguments.to))
        return 0
    settings = Settings(arguments.to, hosts, arguments.force)
    with open_client() as client, _progress(console) as progress:
        return 1 if prepare(files, settings, Downloader(client, progress)) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 all there, 1 a file could not be had, 2 a wrong argument, 130 interrupted."""
    parsed = _parser().parse_args(arguments)
    console = Console(stderr=not parsed.list, width=None if sys.stderr.isatty() else 160)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", handlers=[_ConsoleHandler(console)])
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it reports every request at INFO
    try:
        return run(parsed, console)
    except ValueError as error:
        log.error("%s", error)
        return 2
    except KeyboardInterrupt:
        log.error("interrupted; what has arrived is kept and the same command goes on from there")
        return 130


if __name__ == "__main__":
    sys.exit(main())
