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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ijson
import pyarrow
import pyarrow.parquet as parquet
from rich.console import Console
from rich.table import Table

from data.catalogue import FILES, HOSTS, DataFile, HubSource, UrlSource
from data.disk import sha256_of, sync, write_atomically
from data.download import (
    Downloader,
    FetchError,
    Remote,
    check_space,
    checked_head,
    discard,
    megabytes,
    open_client,
    size_of,
)
from data.json_stream import HalfCharacterError, NestingError, json_values

log = logging.getLogger(__name__)

# --------------------------------------------------------------------------------------------------- what a file holds


def _parquet_rows(path: Path) -> Iterator[Any]:
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(1024):
            yield from batch.to_pylist()


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON array, JSON Lines or Parquet file, streamed; FetchError names file and row if broken."""
    is_parquet = checked_head(path).startswith(b"PAR1")
    row_number = 0
    try:
        for row in _parquet_rows(path) if is_parquet else json_values(path):
            if not isinstance(row, dict):
                raise FetchError(f"{path}, row {row_number}: not an object but {type(row).__name__}")
            yield row
            row_number += 1
    except (ijson.JSONError, UnicodeDecodeError, NestingError, HalfCharacterError, pyarrow.ArrowException) as error:
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
        try:
            rows = count_rows(part, file.fields)
        except FetchError:
            part.unlink()  # complete, and not what is wanted: nothing to resume
            raise
    else:
        rows = _fetch_and_convert(remotes, part, file, loader)
    if isinstance(source, HubSource) and source.rows is not None and rows != source.rows:
        part.unlink()
        raise FetchError(f"{source.repo}: {rows} rows, {source.rows} expected")
    log.info("%s: %d rows, %s (%s)", file.path, rows, megabytes(size_of(part)), _what_is_known(hashed))
    return part, {
        "sha256": sha256_of(part),
        "bytes": size_of(part),
        "rows": rows,
        "sources": [{"url": remote.url, "sha256": remote.sha256} for remote in remotes],
        "fetched_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _what_is_known(hashed: bool) -> str:
    return "SHA-256 published" if hashed else "no SHA-256 published: only its rows can be checked"


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
    check_space(part.parent, sum(map(size_of, pieces)))
    discard(part)  # what another source left
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


CORPUS = """\
Editors that locate a fact (rome, memit, alphaedit) are told what to leave alone by the keys of text: corpus.path=FILE.
FILE is plain UTF-8 text, or JSON Lines whose rows have the text of a document in a field `text`:

  python - <<'EOF'
  import datasets, json
  rows = datasets.load_dataset("wikimedia/wikipedia", "20231101.en", split="train", streaming=True)
  with open("wikipedia.jsonl", "w", encoding="utf-8") as file:
      file.writelines(json.dumps({"text": row["text"]}) + "\\n" for row in rows.take(100_000))
  EOF

100,000 documents of Wikipedia are what was published; corpus.tokens (default 10,000,000) ends the reading earlier.
Where facts are put as questions (dataset.prompt_form=qa), corpus.questions=0.5 lets training questions count as much as
the text: text says nothing of the keys that such a form has.
The shipped text is warned of, and so are fewer tokens than twice the size of a key (14,336 for Llama-3-8B). Second
moments are computed once for a model, text and module, and kept in the cache; a run that is stopped meanwhile goes on
where it was.
"""


def select_files(names: Sequence[str]) -> list[DataFile]:
    """The files of the named data sets (`zsre`) or paths (`zsre/zsre_train.json`), all for no name; ValueError else."""
    chosen: list[DataFile] = []
    for name in names:
        found = [file for file in FILES if name in (file.dataset, file.path)]
        if not found:
            known = sorted({file.dataset for file in FILES})
            close = difflib.get_close_matches(name, [*known, "corpus", *(file.path for file in FILES)], n=1)
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
        state = "there" if target.exists() else f"{megabytes(size_of(part))} fetched" if part.exists() else "missing"
        sizes = [megabytes(size) for size in file.pinned.values() if size]
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
    parser.add_argument(
        "datasets",
        nargs="*",
        metavar="dataset",
        help="data set or file, e.g. zsre; none = all; corpus = how to bring text",
    )
    parser.add_argument("--to", type=Path, default=Path("data/raw"), metavar="FOLDER", help="default: data/raw")
    parser.add_argument(
        "--endpoint",
        action="append",
        default=[],
        metavar="URL",
        help="mirror: URL, huggingface=URL, github=URL; once for each",
    )
    parser.add_argument("--list", action="store_true", help="say what is published and what is here; fetch nothing")
    parser.add_argument("--force", action="store_true", help="replace a file that differs; the old one is kept as .old")
    return parser


def run(arguments: argparse.Namespace) -> int:
    names = [name for name in arguments.datasets if name != "corpus"]
    files, hosts = select_files(names), parse_hosts(arguments.endpoint)
    if "corpus" in arguments.datasets:
        sys.stdout.write(CORPUS)
        if not names:
            return 0
    if arguments.list:
        Console(width=None if sys.stdout.isatty() else 160).print(list_files(files, arguments.to))
        return 0
    settings = Settings(arguments.to, hosts, arguments.force)
    with open_client() as client:
        return 1 if prepare(files, settings, Downloader(client)) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 all there, 1 a file could not be had, 2 a wrong argument, 130 interrupted."""
    parsed = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it reports every request at INFO
    try:
        return run(parsed)
    except ValueError as error:
        log.error("%s", error)
        return 2
    except KeyboardInterrupt:
        log.error("interrupted; what has arrived is kept and the same command goes on from there")
        return 130


if __name__ == "__main__":
    sys.exit(main())
