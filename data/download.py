"""Downloads that survive a cut connection: resumed, checked, never taken for something they are not."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx

from data.disk import LFS_HEAD, sha256_of
from data.progress import Bar, progress_bar

log = logging.getLogger(__name__)
T = TypeVar("T")

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


def open_client() -> httpx.Client:
    """A client that asks for files as they are: sizes, hashes and ranges are not those of a compressed transfer."""
    headers = {"Accept-Encoding": "identity", "User-Agent": "stableedit-prepare"}
    return httpx.Client(headers=headers, follow_redirects=True, timeout=httpx.Timeout(60, connect=15))


def checked_head(path: Path) -> bytes:
    """The first bytes; FetchError for a Git LFS pointer, a web page, or no JSON array, object or Parquet file."""
    with path.open("rb") as file:
        head = file.read(512).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(LFS_HEAD):
        raise FetchError(f"{path}: a Git LFS pointer, not the data (its host's LFS quota may be used up)")
    if head[:14].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise FetchError(f"{path}: a web page, not the data")
    if not head.startswith((b"[", b"{", b"PAR1")):
        raise FetchError(f"{path}: neither a JSON array nor JSON Lines; it begins with {head[:20]!r}")
    return head


def check_space(folder: Path, needed: int) -> None:
    """OSError where the disk of `folder` cannot take `needed` more bytes and keep SPARE_BYTES free."""
    free = shutil.disk_usage(folder).free
    if needed + SPARE_BYTES > free:
        raise OSError(
            f"{folder}: {megabytes(needed)} to write, {megabytes(free)} free; make room or choose another --to folder"
        )


def megabytes(size: int) -> str:
    """A number of bytes as people read it."""
    return f"{size / 1e6:.1f} MB"


def size_of(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def _sidecar(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def discard(part: Path) -> None:
    """Remove an unfinished download, and what is known of it."""
    part.unlink(missing_ok=True)
    _sidecar(part).unlink(missing_ok=True)


class Downloader:
    """Brings a Remote to a file and checks its size and hash; goes on where an earlier try stopped."""

    def __init__(self, client: httpx.Client, backoff_s: float = 1.0, tries: int = 5) -> None:
        self._client = client
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
                discard(part)
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
        with progress_bar(part.name.removesuffix(".part"), remote.size, "B", scale=True, quiet=True) as bar:
            return self._retrying(remote.url, lambda: self._attempt(remote, part, bar), lambda: size_of(part))

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
        return (size_of(part) if etag or same_bytes else 0), etag

    def _attempt(self, remote: Remote, part: Path, bar: Bar) -> bool:
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
            bar.restart(total, start)
            self._write(response, part, start, bar)
        if total is not None and size_of(part) != total:
            raise TransientError(f"{size_of(part)} of {total} bytes arrived")
        return start > 0

    @staticmethod
    def _write(response: httpx.Response, part: Path, start: int, bar: Bar) -> None:
        with part.open("ab" if start else "wb") as file:  # start is 0 or the size of the part
            for chunk in response.iter_raw():
                file.write(chunk)
                bar.advance(len(chunk))
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def _verify(remote: Remote, part: Path) -> None:
        try:
            checked_head(part)
        except FetchError as error:
            raise FetchError(f"{remote.url}: {str(error).removeprefix(f'{part}: ')}") from error
        if remote.size is not None and size_of(part) != remote.size:
            raise FetchError(f"{remote.url}: {size_of(part)} bytes arrived, {remote.size} expected")
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
        discard(part)  # the file on the host is another, shorter one
    _check_status(response, remote.url)
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise FetchError(f"{remote.url}: sent compressed though asked not to; resuming and sizes would be wrong")
    if response.headers.get("Content-Type", "").startswith("text/html"):
        # told from the header, so that a log-in page does not wipe out the bytes an earlier run brought
        raise FetchError(f"{remote.url}: a web page, not the data")
    try:
        start, total = _announced(response, offset)
    except TransientError:
        discard(part)
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
