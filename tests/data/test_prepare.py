"""data.prepare against a server on this machine that cuts, refuses and lies."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
import pyarrow as pa
import pyarrow.parquet
import pytest

from data import catalogue, download, prepare
from data.catalogue import FILES, DataFile, HubSource, UrlSource
from data.download import Downloader, FetchError, Remote
from data.prepare import Settings, convert, count_rows, main, parse_hosts, prepare_file, read_rows, select_files

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


def _rows(count: int, prefix: str = "r") -> list[dict[str, str]]:
    return [{"q": f"{prefix}{i} \u00e9", "a": str(i), "extra": "x" * 40} for i in range(count)]


BODY = json.dumps(_rows(4000)).encode()


def _sha(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


@dataclass
class Route:
    """A served file and its faults: `cuts` bytes of each of the first answers, `statuses` of the first answers."""

    body: bytes = BODY
    etag: str = '"v1"'
    ranges: bool = True
    content_type: str = "application/json"
    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    shift: int = 0  # a lying Content-Range
    longest: int | None = None  # bytes of an answer to a Range request, which may be fewer than asked for
    announced: bool = True  # False: no Content-Length, the end of the connection is the end of the file


class Server:
    def __init__(self) -> None:
        self.routes: dict[str, Route] = {}
        self.requests: list[tuple[str, str | None, str | None]] = []  # path, Range, If-Range
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                server.requests.append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
                server.answer(self)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        route = self.routes.get(handler.path)
        status = 404 if route is None else route.statuses.pop(0) if route.statuses else 200
        if route is None or status >= 400:
            self._send(
                handler, status, b"<html>no</html>", {"Content-Type": "text/html", **(route.headers if route else {})}
            )
            return
        start, stop = self._start(route, handler), len(route.body)
        if not route.announced:
            handler.send_response(200)
            handler.end_headers()
            handler.wfile.write(route.body)
            handler.close_connection = True
            return
        headers = {"ETag": route.etag, "Content-Type": route.content_type, **route.headers}
        if start >= len(route.body) > 0:
            self._send(handler, 416, b"", {"Content-Range": f"bytes */{len(route.body)}"})
            return
        if start:
            stop = min(len(route.body), start + (route.longest or len(route.body)))
            last = stop - 1
            headers["Content-Range"] = f"bytes {start + route.shift}-{last}/{len(route.body)}"
        self._send(
            handler, 206 if start else 200, route.body[start:stop], headers, route.cuts.pop(0) if route.cuts else None
        )

    @staticmethod
    def _start(route: Route, handler: BaseHTTPRequestHandler) -> int:
        match = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        fresh = handler.headers.get("If-Range", route.etag) == route.etag
        return int(match[1]) if match and route.ranges and fresh else 0

    @staticmethod
    def _send(
        handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str], cut: int | None = None
    ) -> None:
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            handler.close_connection = True


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = Thread(target=lambda: server.http.serve_forever(poll_interval=0.01), daemon=True)
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with download.open_client() as client:
        yield client


@pytest.fixture
def loader(client: httpx.Client) -> Downloader:
    return Downloader(client, backoff_s=0.001, tries=3)


@pytest.fixture
def settings(server: Server, tmp_path: Path) -> Settings:
    return Settings(tmp_path / "raw", parse_hosts([server.url]))


def _file(*sources: UrlSource | HubSource, fields: tuple[str, ...] = ("q", "a")) -> DataFile:
    return DataFile("made", "made/made.json", fields, sources)


PINNED = UrlSource("github", "f.json", len(BODY), _sha(BODY))
UNPINNED = UrlSource("github", "f.json")


def _leftovers(settings: Settings) -> set[str]:
    return {path.name for path in (settings.raw_dir / "made").iterdir()}


# ------------------------------------------------------------------------------------------------------------ download


def test_a_file_arrives_whole_with_a_receipt_and_is_not_fetched_again(server, loader, settings) -> None:
    server.routes["/f.json"] = Route()
    target = prepare_file(_file(UNPINNED), settings, loader)
    assert target.read_bytes() == BODY
    receipt = json.loads((target.parent / "made.json.fetched.json").read_text())
    assert (receipt["sha256"], receipt["rows"], receipt["bytes"]) == (_sha(BODY), 4000, len(BODY))
    assert _leftovers(settings) == {"made.json", "made.json.fetched.json"}
    prepare_file(_file(UNPINNED), settings, loader)
    assert len(server.requests) == 1


def test_a_cut_connection_is_resumed_from_the_byte_it_was_cut_at(server, loader, settings) -> None:
    server.routes["/f.json"] = Route(cuts=[1000, 70000])
    target = prepare_file(_file(UNPINNED), settings, loader)
    assert target.read_bytes() == BODY
    assert server.requests == [
        ("/f.json", None, None),
        ("/f.json", "bytes=1000-", '"v1"'),
        ("/f.json", "bytes=71000-", '"v1"'),
    ]


def test_a_later_run_goes_on_where_an_earlier_one_gave_up(server, loader, settings) -> None:
    route = server.routes["/f.json"] = Route(cuts=[5000, 0, 0, 0])
    with pytest.raises(FetchError, match="gave up after 3 tries"):
        prepare_file(_file(UNPINNED), settings, loader)
    assert (settings.raw_dir / "made/made.json.part").stat().st_size == 5000
    route.cuts.clear()
    server.requests.clear()
    assert prepare_file(_file(UNPINNED), settings, loader).read_bytes() == BODY
    assert server.requests == [("/f.json", "bytes=5000-", '"v1"')]


def test_tries_are_counted_from_the_last_progress(server, loader, settings) -> None:
    server.routes["/f.json"] = Route(cuts=[100] * 10)
    assert prepare_file(_file(UNPINNED), settings, loader).read_bytes() == BODY
    assert len(server.requests) == 11


def test_a_server_that_ignores_range_restarts_cleanly(server, loader, settings) -> None:
    server.routes["/f.json"] = Route(ranges=False, cuts=[50000])
    assert prepare_file(_file(PINNED), settings, loader).read_bytes() == BODY
    assert server.requests[1][1] == "bytes=50000-"


def test_a_file_that_changed_between_two_answers_is_not_pieced_together(server, loader, settings) -> None:
    route = server.routes["/f.json"] = Route(cuts=[5000, 0, 0])
    with pytest.raises(FetchError, match="gave up"):
        prepare_file(_file(UNPINNED), settings, loader)
    route.body, route.etag, route.cuts = json.dumps(_rows(10, "new")).encode(), '"v2"', []
    assert prepare_file(_file(UNPINNED), settings, loader).read_bytes() == route.body


def test_without_a_strong_validator_only_a_known_hash_allows_resuming(server, loader, settings) -> None:
    for source, ranged in ((UNPINNED, None), (PINNED, "bytes=5000-")):
        server.routes["/f.json"] = Route(etag='W/"weak"', cuts=[5000])
        server.requests.clear()
        target = prepare_file(_file(source), settings, loader)
        assert target.read_bytes() == BODY
        assert [request[1:] for request in server.requests] == [(None, None), (ranged, None)]
        shutil.rmtree(target.parent)


def test_bytes_of_another_version_in_the_middle_are_found_by_the_hash_and_fetched_again(
    server, loader, settings
) -> None:
    part = settings.raw_dir / "made/made.json.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"[" + b" " * 999)
    saved = {"url": f"{server.url}/f.json", "etag": "", "sha256": PINNED.sha256}
    part.with_name("made.json.part.etag").write_text(json.dumps(saved))
    server.routes["/f.json"] = Route()
    assert prepare_file(_file(PINNED), settings, loader).read_bytes() == BODY
    assert [request[1] for request in server.requests] == ["bytes=1000-", None]


def test_a_part_that_is_already_whole_needs_no_byte_more(server, loader, settings) -> None:
    part = settings.raw_dir / "made/made.json.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(BODY)
    part.with_name("made.json.part.etag").write_text(json.dumps({"url": f"{server.url}/f.json", "etag": '"v1"'}))
    server.routes["/f.json"] = Route()
    prepare_file(_file(UNPINNED), settings, loader)
    assert server.requests == [("/f.json", f"bytes={len(BODY)}-", '"v1"')]  # answered 416, bytes */size


def test_a_whole_part_of_known_size_is_checked_without_asking_the_host(server, loader, settings) -> None:
    part = settings.raw_dir / "made/made.json.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(BODY)
    part.with_name("made.json.part.etag").write_text(json.dumps({"url": "elsewhere", "sha256": PINNED.sha256}))
    assert prepare_file(_file(PINNED), settings, loader).read_bytes() == BODY
    assert server.requests == []


def test_an_answer_shorter_than_the_range_asked_for_is_continued(server, loader, settings) -> None:
    server.routes["/f.json"] = Route(cuts=[1000], longest=150_000)
    assert prepare_file(_file(UNPINNED), settings, loader).read_bytes() == BODY
    asked = [request[1] for request in server.requests]
    assert asked[:3] == [None, "bytes=1000-", "bytes=151000-"]


def test_a_short_file_without_content_length_is_found_by_its_known_size(server, loader, settings) -> None:
    lines = b"\n".join(json.dumps(row).encode() for row in _rows(9))
    server.routes["/f.json"] = Route(body=lines[: lines.rindex(b"\n")], announced=False)  # whole rows: it parses
    with pytest.raises(FetchError, match=rf"bytes arrived, {len(lines)} expected"):
        prepare_file(_file(replace(UNPINNED, size=len(lines))), settings, loader)


def test_a_log_in_page_does_not_wipe_out_the_bytes_that_are_here(server, loader, settings) -> None:
    route = server.routes["/f.json"] = Route(cuts=[5000, 0, 0])
    with pytest.raises(FetchError, match="gave up"):
        prepare_file(_file(UNPINNED), settings, loader)
    server.routes["/f.json"] = Route(body=b"<html>", etag="", content_type="text/html")
    with pytest.raises(FetchError, match="a web page"):
        prepare_file(_file(UNPINNED), settings, loader)
    server.routes["/f.json"] = route
    prepare_file(_file(UNPINNED), settings, loader)
    assert server.requests[-1] == ("/f.json", "bytes=5000-", '"v1"')


def test_the_bytes_are_on_disk_before_the_file_gets_its_name(server, loader, settings, monkeypatch) -> None:
    server.routes["/f.json"] = Route()
    target = settings.raw_dir / "made/made.json"
    synced: list[tuple[int, bool]] = []
    monkeypatch.setattr(download.os, "fsync", lambda fd: synced.append((os.fstat(fd).st_ino, target.exists())))
    prepare_file(_file(UNPINNED), settings, loader)
    assert (target.stat().st_ino, False) in synced
    assert synced[-1] == (target.parent.stat().st_ino, True)  # then the folder, which holds the name


def test_a_broken_sidecar_and_a_wrong_content_range_only_cost_a_restart(server, loader, settings) -> None:
    part = settings.raw_dir / "made/made.json.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(BODY[:99])
    part.with_name("made.json.part.etag").write_text("{")
    server.routes["/f.json"] = Route(cuts=[5000], shift=1)
    assert prepare_file(_file(UNPINNED), settings, loader).read_bytes() == BODY
    assert [request[1] for request in server.requests] == [None, "bytes=5000-", None]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server, loader, settings, status) -> None:
    server.routes["/f.json"] = Route(statuses=[status, status], headers={"Retry-After": "0"})
    assert prepare_file(_file(UNPINNED), settings, loader).read_bytes() == BODY
    assert len(server.requests) == 3


def test_waits_double_and_the_server_may_name_its_own(server, client, settings, monkeypatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    patient = Downloader(client, backoff_s=1.0, tries=4)
    server.routes["/f.json"] = Route(statuses=[503] * 3)
    prepare_file(_file(UNPINNED), settings, patient)
    server.routes["/g.json"] = Route(statuses=[429], headers={"Retry-After": "7"})
    patient.fetch(Remote(f"{server.url}/g.json"), settings.raw_dir / "g.part")
    assert waits == [1.0, 2.0, 4.0, 7.0]


# ------------------------------------------------------------------------------------------------------------- refusal


@pytest.mark.parametrize(
    ("route", "source", "message"),
    [
        (None, UNPINNED, r"/f\.json: 404"),
        (Route(body=POINTER, content_type="text/plain"), PINNED, "Git LFS pointer"),
        (Route(body=POINTER, content_type="text/plain"), UNPINNED, "Git LFS pointer"),
        (Route(body=BODY[:-1] + b" ]"), PINNED, rf"announces {len(BODY) + 1} bytes, {len(BODY)} expected"),
        (Route(body=BODY.replace(b"r7 ", b"R7 ")), PINNED, "SHA-256 is .* not the published"),
        (Route(body=b"<!DOCTYPE html><p>log in", content_type="text/html; charset=utf-8"), UNPINNED, "a web page"),
        (Route(body=b"\n <html>", content_type="application/json"), UNPINNED, "a web page"),
        (Route(body=b"a,b\n1,2\n", content_type="text/csv"), UNPINNED, "neither a JSON array nor JSON Lines"),
        (Route(body=BODY[:-30]), UNPINNED, r"after row 39\d\d: broken or cut off"),
        (Route(body=b"[]"), UNPINNED, "holds no rows"),
        (Route(body=b"[1, 2]"), UNPINNED, "row 0: not an object but int"),
        (Route(body=b'[{"q": "x"}]'), UNPINNED, "row 0: no field a; it has q"),
        (Route(headers={"Content-Encoding": "gzip"}), UNPINNED, "sent compressed"),
        (Route(statuses=[403]), UNPINNED, "HTTP 403"),
    ],
)
def test_what_is_not_the_data_is_refused_in_one_line_and_leaves_nothing(
    server, loader, settings, route, source, message
) -> None:
    if route is not None:
        server.routes["/f.json"] = replace(route, statuses=list(route.statuses))
    with pytest.raises(FetchError, match=message) as caught:
        prepare_file(_file(source), settings, loader)
    assert "\n" not in str(caught.value)
    assert "made.json" in str(caught.value)
    assert _leftovers(settings) == set()


def test_a_full_disk_is_noticed_before_a_byte_is_written(server, loader, settings, monkeypatch, caplog) -> None:
    server.routes["/f.json"] = Route()
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: usage._replace(free=download.SPARE_BYTES + 1000))
    (problem,) = prepare.prepare([_file(UNPINNED)], settings, loader)
    assert "0.4 MB to write" in problem
    assert "make room" in problem
    assert _leftovers(settings) == set()


def test_a_file_that_differs_is_kept_and_force_sets_it_aside(server, loader, settings) -> None:
    server.routes["/f.json"] = Route()
    target = settings.raw_dir / "made/made.json"
    target.parent.mkdir(parents=True)
    mine = json.dumps(_rows(3, "mine"))
    target.write_text(mine)
    with pytest.raises(ValueError, match="--force"):
        prepare_file(_file(PINNED), settings, loader)
    assert target.read_text() == mine
    assert server.requests == []
    prepare_file(_file(PINNED), replace(settings, force=True), loader)
    assert target.read_bytes() == BODY
    assert (target.parent / "made.json.old").read_text() == mine


def test_force_that_fails_leaves_the_old_file_in_its_place(server, loader, settings) -> None:
    target = settings.raw_dir / "made/made.json"
    target.parent.mkdir(parents=True)
    target.write_text("[]")
    with pytest.raises(FetchError, match="404"):
        prepare_file(_file(PINNED), replace(settings, force=True), loader)
    assert target.read_text() == "[]"


def test_force_does_not_fetch_what_is_there_already(server, loader, settings) -> None:
    target = settings.raw_dir / "made/made.json"
    target.parent.mkdir(parents=True)
    target.write_bytes(BODY)
    prepare_file(_file(PINNED), replace(settings, force=True), loader)
    assert server.requests == []


def test_a_pointer_left_by_a_clone_without_lfs_is_called_by_its_name(server, loader, settings) -> None:
    target = settings.raw_dir / "made/made.json"
    target.parent.mkdir(parents=True)
    target.write_bytes(POINTER)
    with pytest.raises(ValueError, match=r"Git LFS pointer.*--force"):
        prepare_file(_file(PINNED), settings, loader)


def test_a_users_file_without_a_published_hash_is_kept_when_its_rows_are_sound(server, loader, settings) -> None:
    target = settings.raw_dir / "made/made.json"
    target.parent.mkdir(parents=True)
    target.write_text(json.dumps(_rows(3)))
    assert prepare_file(_file(UNPINNED), settings, loader) == target
    target.write_text('[{"q": 1},')
    with pytest.raises(ValueError, match="left as it is"):
        prepare_file(_file(UNPINNED), settings, loader)
    assert server.requests == []


# ---------------------------------------------------------------------------------------------------- sources, convert


def _serve_hub(server: Server, repo: str, files: dict[str, bytes], lie: bool = False) -> None:
    listing = [{"type": "directory", "path": "data"}]
    for path, body in files.items():
        oid = _sha(b"other" if lie else body)
        listing.append({"type": "file", "path": path, "size": len(body), "lfs": {"oid": oid, "size": len(body)}})
        server.routes[f"/datasets/{repo}/resolve/main/{path}"] = Route(body)
    server.routes[f"/api/datasets/{repo}/tree/main?recursive=true"] = Route(json.dumps(listing).encode())


def test_files_of_a_hub_repository_become_one_in_their_order(server, loader, settings) -> None:
    lines = "\n".join(json.dumps(row) for row in _rows(5, "second")).encode()
    _serve_hub(server, "o/r", {"b.json": json.dumps(_rows(7, "first")).encode(), "a.jsonl": lines, "README.md": b"#"})
    file = replace(_file(HubSource("o/r", ("b.json", "a.jsonl"), rows=12)), nullable=("maybe",))
    target = prepare_file(file, settings, loader)
    rows = json.loads(target.read_text())
    assert [row["q"] for row in rows] == [row["q"] for row in (*_rows(7, "first"), *_rows(5, "second"))]
    assert all(row.keys() == {"q", "a", "maybe"} and row["maybe"] is None for row in rows)
    assert _leftovers(settings) == {"made.json", "made.json.fetched.json"}
    receipt = json.loads((target.parent / "made.json.fetched.json").read_text())
    assert [Path(source["url"]).name for source in receipt["sources"]] == ["b.json", "a.jsonl"]


def test_pieces_that_have_arrived_are_not_fetched_again(server, loader, settings) -> None:
    file = _file(HubSource("o/r", ("a.json", "b.json")))
    _serve_hub(server, "o/r", {"a.json": BODY, "b.json": BODY})
    second = server.routes["/datasets/o/r/resolve/main/b.json"]
    second.cuts = [10, 0, 0]
    with pytest.raises(FetchError, match="gave up"):
        prepare_file(file, settings, loader)
    assert count_rows(prepare_file(file, settings, loader), ("q", "a")) == 8000
    asked = Counter(path for path, _, _ in server.requests)
    assert asked["/datasets/o/r/resolve/main/a.json"] == 1


def test_the_hash_of_a_hub_listing_is_checked(server, loader, settings) -> None:
    _serve_hub(server, "o/r", {"made.json": BODY}, lie=True)
    with pytest.raises(FetchError, match="SHA-256"):
        prepare_file(_file(HubSource("o/r")), settings, loader)


def test_a_number_of_rows_other_than_published_is_refused(server, loader, settings) -> None:
    _serve_hub(server, "o/r", {"made.json": BODY})
    with pytest.raises(FetchError, match="4000 rows, 4001 expected"):
        prepare_file(_file(HubSource("o/r", rows=4001)), settings, loader)
    assert _leftovers(settings) == set()


@pytest.mark.parametrize("names", [["made.json", "x.json"], ["README.md", "only.jsonl"]])
def test_the_wanted_file_of_a_hub_repository_is_found(server, loader, settings, names) -> None:
    _serve_hub(server, "o/r", dict.fromkeys(names, BODY))
    assert prepare_file(_file(HubSource("o/r")), settings, loader).read_bytes() == BODY


def test_parquet_shards_are_converted(server, loader, settings, tmp_path) -> None:
    shards = {}
    for number in range(2):
        pa.parquet.write_table(pa.Table.from_pylist(_rows(3, f"s{number}-")), tmp_path / "shard")
        shards[f"data/train-0000{number}-of-00002.parquet"] = (tmp_path / "shard").read_bytes()
    _serve_hub(server, "o/r", shards)
    target = prepare_file(_file(HubSource("o/r")), settings, loader)
    assert [row["q"][:4] for row in read_rows(target)] == ["s0-0", "s0-1", "s0-2", "s1-0", "s1-1", "s1-2"]


def test_an_ambiguous_or_changed_repository_says_what_it_holds(server, loader, settings) -> None:
    _serve_hub(server, "o/r", {"x.json": BODY, "y.json": BODY})
    with pytest.raises(FetchError, match=r"cannot tell which file is made\.json; it holds x\.json, y\.json"):
        prepare_file(_file(HubSource("o/r")), settings, loader)
    with pytest.raises(FetchError, match=r"no file z\.json; it holds x\.json"):
        prepare_file(_file(HubSource("o/r", ("z.json",))), settings, loader)


def test_the_second_source_serves_and_continues_bytes_of_the_same_hash(server, loader, settings) -> None:
    server.routes["/f.json"] = Route(cuts=[5000, 0, 0])
    server.routes["/g.json"] = Route(etag='"elsewhere"')
    assert prepare_file(_file(PINNED, replace(PINNED, path="g.json")), settings, loader).read_bytes() == BODY
    assert server.requests[-1] == ("/g.json", "bytes=5000-", None)


def test_when_no_source_serves_every_reason_is_given(server, loader, settings) -> None:
    with pytest.raises(FetchError, match=r"/api/datasets/o/r.*404.*f\.json: 404.*Bring it yourself"):
        prepare_file(_file(HubSource("o/r"), PINNED), settings, loader)


def test_a_row_without_a_field_stops_a_conversion_with_its_number(tmp_path) -> None:
    (tmp_path / "in.json").write_text('[{"q": "1", "a": "2"}, {"q": "3"}]')
    with pytest.raises(FetchError, match=r"in\.json, row 1: no field a"):
        convert([tmp_path / "in.json"], tmp_path / "out.json", _file())


def test_reading_takes_no_more_memory_for_a_longer_file(tmp_path) -> None:
    peaks = []
    for count in (1500, 6000):  # both longer than the 64 KiB read buffer, which a shorter file would not fill
        path = tmp_path / f"{count}.json"
        path.write_text(json.dumps(_rows(count)))
        tracemalloc.start()
        convert([path], tmp_path / "out.json", _file())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.02 * peaks[0]


def test_json_lines_and_a_byte_order_mark_read_like_an_array(tmp_path) -> None:
    path = tmp_path / "rows"
    expected = _rows(3)
    for text in (json.dumps(expected), "\n".join(map(json.dumps, expected)) + "\n\n"):
        for mark in (b"", b"\xef\xbb\xbf"):
            path.write_bytes(mark + text.encode())
            assert list(read_rows(path)) == expected


# -------------------------------------------------------------------------------------------------------- command line


def test_the_table_of_files_is_sound() -> None:
    pinned = [(file.path, sha256, size) for file in FILES for sha256, size in file.pinned.items()]
    assert len({file.path for file in FILES}) == len(FILES) == 12
    assert len({sha256 for _, sha256, _ in pinned}) == 11
    assert all(re.fullmatch("[0-9a-f]{64}", sha256) and size for _, sha256, size in pinned)
    assert len(catalogue.WIKIBIGEDIT_SNAPSHOTS) == 8
    assert catalogue.WIKIBIGEDIT_SNAPSHOTS[0] == "wiki_big_edit_20240201_20240220.json"
    assert catalogue.WIKIBIGEDIT_SNAPSHOTS[-1] == "wiki_big_edit_20240620_20240701.json"


def test_files_are_chosen_by_data_set_or_path() -> None:
    assert [file.path for file in select_files(["zsre/zsre_eval_20k.json", "knowns", "knowns"])] == [
        "zsre/zsre_eval_20k.json",
        "known_1000.json",
    ]
    assert select_files([]) == list(FILES)
    with pytest.raises(ValueError, match="did you mean wikibigedit"):
        select_files(["wikibigedits"])


def test_endpoints_replace_one_host_or_all(monkeypatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    assert parse_hosts([])["huggingface"] == "https://mirror.example"
    hosts = parse_hosts(["github=http://one:1/base/", "huggingface=https://two"])
    assert (hosts["github"], hosts["huggingface"]) == ("http://one:1/base", "https://two")
    assert set(parse_hosts(["http://all"]).values()) == {"http://all"}
    for wrong in ("ftp://x", "gitlab=https://x", "https://", "huggingface"):
        with pytest.raises(ValueError, match="--endpoint"):
            parse_hosts([wrong])


@pytest.fixture
def one_known_file(monkeypatch) -> None:
    monkeypatch.setattr(prepare, "FILES", (_file(UNPINNED),))


@pytest.mark.usefixtures("one_known_file")
def test_the_command_fetches_lists_and_reports(server, tmp_path, caplog, capsys) -> None:
    caplog.set_level(logging.INFO)
    arguments = ["made", "--to", str(tmp_path), "--endpoint", server.url]
    assert main(arguments) == 1
    assert f"{server.url}/f.json: 404" in caplog.text
    server.routes["/f.json"] = Route()
    assert main(arguments) == 0
    assert "4000 rows" in caplog.text
    assert "no SHA-256 published" in caplog.text
    assert main(["--list", "--to", str(tmp_path)]) == 0
    assert "there" in capsys.readouterr().out
    assert main(["nothing"]) == 2
    assert "dataset 'nothing' has no published full file" in caplog.text


@pytest.mark.usefixtures("one_known_file")
def test_text_is_not_fetched_but_explained_alone_or_beside_data_sets(server, tmp_path, caplog, capsys) -> None:
    assert main(["corpus"]) == 0
    explained = capsys.readouterr().out
    assert "corpus.path=FILE" in explained
    assert server.requests == []
    server.routes["/f.json"] = Route()
    assert main(["made", "corpus", "--to", str(tmp_path), "--endpoint", server.url]) == 0
    assert capsys.readouterr().out == explained
    assert (tmp_path / "made/made.json").is_file()
    assert main(["corpsu"]) == 2
    assert "did you mean corpus?" in caplog.text


@pytest.mark.usefixtures("one_known_file")
def test_a_folder_that_cannot_be_written_is_named(server, tmp_path, caplog) -> None:
    server.routes["/f.json"] = Route()
    (tmp_path / "file").write_text("")
    assert main(["made", "--to", str(tmp_path / "file"), "--endpoint", server.url]) == 1
    assert str(tmp_path / "file") in caplog.text


@pytest.mark.usefixtures("one_known_file")
def test_an_interrupted_download_is_kept(server, tmp_path, monkeypatch, caplog) -> None:
    server.routes["/f.json"] = Route(cuts=[5000])
    with monkeypatch.context() as patch:
        patch.setattr(download.time, "sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["made", "--to", str(tmp_path), "--endpoint", server.url]) == 130
    assert (tmp_path / "made/made.json.part").stat().st_size == 5000
    assert main(["made", "--to", str(tmp_path), "--endpoint", server.url]) == 0
    assert server.requests[-1][1] == "bytes=5000-"
