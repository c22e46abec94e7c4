"""The record of a run: the files of its folder, and what names it.

with RunFolder.create(path, config=..., ...) as folder:
    folder.append_turn(line)
    folder.write_results(results)
    folder.finish()
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
import secrets
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, Literal, Self

from data.disk import sha256_of, write_atomically
from data.records import Phase
from harness.run.lock import FolderLock

Stage = Literal["base", "eval", "final", "retention"]

# Settings that say where output goes, or from where the same bytes are read (the data's hashes are in the run id
# already): two runs that differ only in these are the same run.
NOT_IN_RUN_ID: Final = (
    "tracker",
    "diagnostics.report",
    "checkpoint_every",
    "keep",
    "resume",
    "model_cache",
    "model_cache_dir",
    "editor.cache_dir",
    "editor.save_checkpoint",
    "editor.load_checkpoint",
    "dataset.train_path",
    "dataset.valid_path",
)
EXAMPLES_FILE: Final = "examples.json"
LINES: Final = ("turns.jsonl", "scores.jsonl", "records.jsonl")
LOGGED: Final = ("turns.jsonl", "scores.jsonl")  # those whose lines wandb gets, one step each
TRAINING_PHASES: Final = ("meta_train", "meta_valid")  # phases of turns.jsonl that count turns of their own
PACKAGES: Final = ("torch", "transformers", "tokenizers", "hydra-core", "datasets", "numpy", "stableedit")
CODE: Final = ("*.py", "*.yaml")  # and presets: what a result comes from
PROJECT: Final = Path(__file__).resolve().parents[2]
ERROR_LENGTH: Final = 500
INTERRUPTED: Final = (130, 143)  # 128 + SIGINT and SIGTERM, as shells have it


def canonical_json(value: Any, what: str, *, indent: int | None = None) -> str:
    """`value` as JSON with sorted keys: equal values give equal bytes.

    ValueError, naming `what` and the key, for a number that is not finite; TypeError for anything that is not JSON.
    """
    _check(value, what)
    return json.dumps(value, sort_keys=True, ensure_ascii=False, indent=indent)


def digest_of(value: Any, what: str) -> str:
    """SHA-256 of `canonical_json`, in hex."""
    return hashlib.sha256(canonical_json(value, what).encode()).hexdigest()


def _check(value: Any, key: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} is {value}: only finite numbers are recorded")
    if isinstance(value, Mapping):
        for name, item in value.items():
            if not isinstance(name, str):
                raise TypeError(f"{key} has the key {name!r}; JSON keys are strings")
            _check(item, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            _check(item, f"{key}[{place}]")
    elif not (value is None or isinstance(value, str | int | float)):
        raise TypeError(f"{key} is a {type(value).__name__}, which JSON does not hold")


def run_id(config: Mapping[str, Any], inputs: Mapping[str, str], revision: str | None) -> str:
    """What was run, in 16 hex digits: SHA-256 of config but for `NOT_IN_RUN_ID`, hashes of the data, model revision."""
    identity = {"config": leave_out(config, NOT_IN_RUN_ID), "inputs": dict(inputs), "revision": revision}
    return digest_of(identity, "config")[:16]


def leave_out(config: Mapping[str, Any], places: Iterable[str], prefix: str = "") -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if f"{prefix}{key}" not in places}
    return {
        key: leave_out(value, places, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in kept.items()
    }


def leaves(tree: Mapping[str, Any], separator: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What nested mappings hold, each with its path."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, separator, f"{prefix}{name}{separator}")
        else:
            yield f"{prefix}{name}", value


def git_state(folder: Path = PROJECT) -> dict[str, Any] | None:
    """Commit of the checkout whose root `folder` is, whether files differ from it, and a digest of how code does.

    None where it is no such root.
    """
    root = _git(folder, "rev-parse", "--show-toplevel")
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain")
    if root is None or commit is None or changes is None or Path(root).resolve() != folder.resolve():
        return None
    return {"commit": commit, "dirty": bool(changes)} | ({"changes": _changes(folder)} if changes else {})


def _changes(folder: Path) -> str | None:
    """SHA-256 of how code and presets differ from the commit, in 16 hex digits; None where they do not."""
    plain = ("diff", "--no-ext-diff", "--no-textconv", "--no-color", "--full-index", "HEAD", "--", *CODE)
    texts = [_git(folder, *plain) or ""]
    for name in (_git(folder, "ls-files", "-z", "--others", "--exclude-standard", *CODE) or "").split("\0"):
        if name and (path := folder / name).is_file():
            texts.append(f"{name} {sha256_of(path)}")
    whole = "\n".join(texts)
    return hashlib.sha256(whole.encode(errors="surrogateescape")).hexdigest()[:16] if whole else None


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="surrogateescape", timeout=30, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):  # no git on this machine, or a checkout it can't look at
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@functools.cache
def versions() -> Mapping[str, str | None]:
    """Versions of Python and of `PACKAGES`; None for what is not installed as a package."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def one_line(error: BaseException | str) -> str:
    """An error as one line for `run.json`: its type and the first line of its message."""
    if isinstance(error, BaseException) and exit_code(error) in INTERRUPTED:
        return "interrupted"
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    if isinstance(error, str):
        return first[:ERROR_LENGTH]
    return f"{type(error).__name__}: {first}".rstrip(": ")[:ERROR_LENGTH]


def exit_code(error: BaseException | None) -> int:
    """What a process ends with that this error ends."""
    if error is None:
        return 0
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 1


def read_run(folder: Path) -> dict[str, Any]:
    """What `run.json` in that folder holds; ValueError where there is none, or none that can be read."""
    try:
        return json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder}: holds no run (no run.json); name the folder of a run") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / 'run.json'}: cannot be read ({one_line(error)})") from error


def read_examples(folder: Path) -> list[dict[str, Any]]:
    """What `examples.json` in that folder holds; nothing where the run was to keep none, or has not come to its end."""
    path = folder / EXAMPLES_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def count_lines(path: Path) -> int:
    """Lines of a file that may not be there."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(1 for _ in file)


class RunFolder:
    """The files of a run (DESIGN section 6): `run.json`, `turns.jsonl`, `scores.jsonl`, `records.jsonl`,
    `examples.json`, `results.json`. Lines are on disk when the call that wrote them returns; whole files are written
    atomically.

    As a context manager: nobody else may write there until it is left.
    """

    def __init__(self, path: Path, run: dict[str, Any], lock: FolderLock) -> None:
        self.path = path
        self.run = run  # what run.json holds
        self.mark: dict[str, int] = {}  # bytes of each file of lines when the last turn was over
        self._lock = lock

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        config: Mapping[str, Any],
        overrides: Sequence[str],
        inputs: Mapping[str, str],  # name -> SHA-256 of a data file
        model: Mapping[str, Any],  # name, revision, fingerprint
        device: str,
        hydra: Mapping[str, str] | None = None,  # content of each file of .hydra/
    ) -> RunFolder:
        """Start the record of a run in `path`; ValueError where that holds a run already, or cannot be written to."""
        path = Path(path).absolute()
        run = {
            "run_id": run_id(config, inputs, model.get("revision")),
            "status": "running",
            "error": None,
            "started": _now(),
            "finished": None,
            "resumed": [],
            "config": dict(config),
            "overrides": list(overrides),
            "inputs": dict(inputs),
            "model": dict(model),
            "device": device,
            "platform": platform.platform(),
            "versions": versions(),
            "git": git_state(),
            "wandb_id": secrets.token_hex(4),
        }
        _check(run, "run.json")
        try:
            path.mkdir(parents=True, exist_ok=True)
            folder = cls(path, run, FolderLock(path))
            folder._start(hydra or {})
        except OSError as error:
            raise ValueError(
                f"hydra.run.dir={path}: not writable ({error.strerror}); choose a folder you can write to"
            ) from error
        return folder

    def _start(self, hydra: Mapping[str, str]) -> None:
        try:
            if (self.path / "run.json").exists():
                raise ValueError(
                    f"hydra.run.dir={self.path}: run.json is there already; choose a new folder for this run "
                    "(of a sweep, hydra.sweep.dir), or go on with that one, resume=auto"
                )
            for name, text in hydra.items():
                (self.path / ".hydra").mkdir(exist_ok=True)
                write_atomically(self.path / ".hydra" / name, text)
            self._write_run()
        except BaseException:
            self._lock.release()
            raise

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The record of an earlier run, as it was left; ValueError where there is none, or where it goes on."""
        path = path.absolute()
        read_run(path)  # a folder that holds no run gets no lock
        folder = cls(path, {}, FolderLock(path))
        folder.run = {"resumed": [], "wandb_id": secrets.token_hex(4)} | read_run(path)
        return folder

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def go_on(self, lengths: Mapping[str, int], turn: int, overrides: Sequence[str]) -> None:
        """Continue from `turn`: files of lines are cut to these lengths; ValueError, before, where one is shorter."""
        held = self._lengths()
        for name, length in lengths.items():
            if held[name] < length:
                raise ValueError(
                    f"{self.path / name}: holds {held[name]} bytes, but held {length} after turn {turn}; "
                    "put the whole file back, or begin a new run without resume"
                )
        for name, length in held.items():
            if length > lengths.get(name, 0):
                os.truncate(self.path / name, lengths.get(name, 0))
        self.mark = dict(lengths)
        self.run |= {"status": "running", "error": None, "finished": None}
        self.run["resumed"] = [*self.run["resumed"], {"at": _now(), "turn": turn, "overrides": list(overrides)}]
        self._write_run()

    def sync(self) -> None:
        """Lines that were written outlive a power cut."""
        for name in LINES:
            if (self.path / name).exists():
                with (self.path / name).open("rb") as file:
                    os.fsync(file.fileno())

    def _lengths(self) -> dict[str, int]:
        return {name: file.stat().st_size if (file := self.path / name).exists() else 0 for name in LINES}

    def append_turn(self, line: Mapping[str, Any]) -> None:
        """Add a turn to `turns.jsonl`; a checkpoint of it goes back to what the files hold now."""
        self._append("turns.jsonl", [line])
        self.mark = self._lengths()

    def append_scores(self, line: Mapping[str, Any]) -> None:
        """Add an evaluation to `scores.jsonl`: `turn`, `stage` (base, eval, final), `scores`."""
        self._append("scores.jsonl", [line])

    def append_records(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Add the scores of single records to `records.jsonl`."""
        self._append("records.jsonl", lines)

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Write `results.json`; the same results give the same bytes."""
        self._write("results.json", results)

    def write_examples(self, examples: Sequence[Mapping[str, Any]]) -> None:
        """Write `examples.json`: questions, wanted answers, and the words of the base and of the edited model."""
        self._write(EXAMPLES_FILE, examples)

    def write_downstream(self, turn: int, results: Mapping[str, Any]) -> None:
        """Write `glue/turn_<t>.json`, t turns being done: scores by task."""
        self._write(f"glue/turn_{turn}.json", results)

    def has_downstream(self, turn: int) -> bool:
        """Whether the tasks were scored after `turn` turns."""
        return (self.path / f"glue/turn_{turn}.json").is_file()

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        """The objects of a file of lines, one at a time: 20,000 turns are not held in memory."""
        with (self.path / name).open(encoding="utf-8") as file:
            yield from map(json.loads, file)

    def scores(self, stage: Stage) -> dict[str, Any]:
        """The last evaluation of that stage in `scores.jsonl`."""
        return [line["scores"] for line in self.lines("scores.jsonl") if line["stage"] == stage][-1]

    def results(self) -> dict[str, Any]:
        """What `results.json` holds; ValueError where it is gone."""
        try:
            return json.loads((self.path / "results.json").read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ValueError(
                f"{error.filename}: is gone, though run.json has the run as finished; begin it anew without resume"
            ) from None

    def logged(self) -> int:
        """Lines and files that were written to where wandb's numbers come from."""
        files = len(list((self.path / "glue").glob("turn_*.json")))
        return files + sum(count_lines(self.path / name) for name in LOGGED)

    def cost(self) -> dict[str, Any]:
        """What the turns in `turns.jsonl` cost, for `results["cost"]`; ValueError before the first turn.

        turns, warm_up_turns, edits (those of edit turns), seconds_per_turn (means of capture, update, apply, total)
        and peak_memory (the largest of each number under `memory`). Turns of meta-training are counted by themselves,
        as training_turns and training_seconds, where there were any; turns that were passed over are not.
        """
        turns = warm_up = edits = trained = 0
        training_seconds = 0.0
        seconds: dict[str, float] = {}
        peak: dict[str, float] = {}
        for line in self.lines("turns.jsonl"):
            for name, value in (line.get("memory") or {}).items():
                peak[name] = max(peak.get(name, value), value)
            if line["phase"] in TRAINING_PHASES:
                trained += line["phase"] == TRAINING_PHASES[0]
                training_seconds += line["seconds"]["total"]
                continue
            if line.get("passed_over"):
                continue
            turns += 1
            warm_up += line["phase"] == Phase.WARM_UP.value
            edits += line["edits"] if line["phase"] == Phase.EDIT.value else 0
            for name, value in line["seconds"].items():
                seconds[name] = seconds.get(name, 0.0) + value
        if not turns:
            raise ValueError(f"{self.path / 'turns.jsonl'} holds no turn")
        training = {"training_turns": trained, "training_seconds": training_seconds} if trained else {}
        return {
            **training,
            "turns": turns,
            "warm_up_turns": warm_up,
            "edits": edits,
            "seconds_per_turn": {name: total / turns for name, total in seconds.items()},
            "peak_memory": peak,
        }

    def is_drawn(self) -> bool:
        """Whether there is a report, and of these results."""
        report = self.path / "report.html"
        return report.exists() and report.stat().st_mtime_ns >= (self.path / "results.json").stat().st_mtime_ns

    def note(self, **entries: Any) -> None:
        """Write these into `run.json` too."""
        self.run |= entries
        self._write_run()

    def finish(self) -> None:
        self._end("finished", None)

    def fail(self, error: BaseException | str) -> None:
        """Mark the run failed, or interrupted, with one line that says why."""
        line = one_line(error)
        self._end("interrupted" if line == "interrupted" else "failed", line)

    def _end(self, status: str, error: str | None) -> None:
        self.note(status=status, error=error, finished=_now())

    def _write(self, name: str, content: Any) -> None:
        path = self.path / name
        if path.parent != self.path:
            path.parent.mkdir(exist_ok=True)
        write_atomically(path, canonical_json(content, path.name, indent=2) + "\n")

    def _write_run(self) -> None:
        # In the order above, not sorted: people open this file to see first what it was and how it ended.
        _check(self.run, "run.json")
        write_atomically(self.path / "run.json", json.dumps(self.run, indent=2, ensure_ascii=False) + "\n")

    def _append(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        with (self.path / name).open("a", encoding="utf-8", newline="\n") as file:
            for line in lines:
                _check(line, name)
                # not sorted: `turn` stays first, and the order is the writer's own, so it is the same in every run
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()


class NoRecord(RunFolder):
    """The record of a run in the hands of a process that does not keep it: nothing is written, and nothing missing."""

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        """`path`: a folder of this process's own, for what it may want one for; `run`: what run.json holds."""
        self.path, self.run, self.mark = path, run, {}

    def __exit__(self, *_: object) -> None: ...

    def go_on(self, lengths: Mapping[str, int], turn: int, overrides: Sequence[str]) -> None: ...

    def has_downstream(self, turn: int) -> bool:
        return True

    def scores(self, stage: Stage) -> dict[str, Any]:
        return {}

    def results(self) -> dict[str, Any]:
        return {}

    def cost(self) -> dict[str, Any]:
        return {}

    def _write(self, name: str, content: Any) -> None: ...

    def _write_run(self) -> None: ...

    def _append(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None: ...
