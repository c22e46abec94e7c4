"""Where a run's numbers go: the files of the run folder first, then wandb.

The run folder is the record; wandb is a copy that is nicer to look at. Every number is written to a file before wandb
sees it, so a run with `tracker.wandb=disabled`, or one that loses its network, is complete on disk.

    with RunFolder.create(path, ...) as folder, Tracker(folder, WandbSettings(mode="offline")) as tracker:
        tracker.turn(line)
        tracker.scores(turn, scores, stage="final")
        tracker.results(results)

This is the only file that knows wandb, and it imports it only when a run wants it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import secrets
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any, Final, Literal, Protocol, Self

from data.disk import write_atomically
from data.records import Phase
from harness.lock import FolderLock

log = logging.getLogger(__name__)

WandbMode = Literal["online", "offline", "disabled"]
Stage = Literal["base", "eval", "final", "retention"]
Scores = Mapping[str, Any]  # {"ES": {"mean", "low", "high", "n"}, ...}; a score without an interval is a plain number

# Settings that say where output goes, or from where the same bytes are read (the data's hashes are in the run id
# already): two runs that differ only in these are the same run.
PLACES: Final = (
    "tracker",
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
LINES: Final = ("turns.jsonl", "scores.jsonl", "records.jsonl")
LOGGED: Final = ("turns.jsonl", "scores.jsonl")  # those whose lines wandb gets, one step each
TRAINING: Final = ("meta_train", "meta_valid")  # phases of turns.jsonl that count turns of their own
PACKAGES: Final = ("torch", "transformers", "tokenizers", "hydra-core", "datasets", "numpy", "stableedit")
PROJECT: Final = Path(__file__).resolve().parent.parent
TAG_LENGTH: Final = 64  # wandb refuses longer tags
ERROR_LENGTH: Final = 500
INTERRUPTED: Final = (130, 143)  # 128 + SIGINT and SIGTERM, as shells have it


def canonical_json(value: Any, what: str, *, indent: int | None = None) -> str:
    """`value` as JSON with sorted keys: equal values give equal bytes.

    ValueError, naming `what` and the key, for a number that is not finite (JSON has none; a reader would fail on it,
    and in a run it is a fault of ours); TypeError for anything that is not JSON.
    """
    _check(value, what)
    separators = (",", ": ") if indent else (", ", ": ")
    return json.dumps(value, sort_keys=True, ensure_ascii=False, indent=indent, separators=separators)


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
    """What was run, in 16 hex digits: SHA-256 over config without `PLACES`, hashes of the data, model revision."""
    identity = {"config": leave_out(config, PLACES), "inputs": dict(inputs), "revision": revision}
    return hashlib.sha256(canonical_json(identity, "config").encode()).hexdigest()[:16]


def leave_out(config: Mapping[str, Any], places: Iterable[str], prefix: str = "") -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if f"{prefix}{key}" not in places}
    return {
        key: leave_out(value, places, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in kept.items()
    }


def git_state(folder: Path = PROJECT) -> dict[str, Any] | None:
    """Commit of the checkout rooted at `folder` and whether its files differ from it; None where it is no checkout.

    A folder *inside* another repository (an installed copy below someone's own checkout) is no checkout of ours.
    """
    root = _git(folder, "rev-parse", "--show-toplevel")
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain")
    if root is None or commit is None or changes is None or Path(root).resolve() != folder.resolve():
        return None
    return {"commit": commit, "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):  # no git on this machine, or a checkout it can't look at
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions() -> dict[str, str | None]:
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
    if isinstance(error, BaseException) and _exit_code(error) in INTERRUPTED:
        return "interrupted"
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    if isinstance(error, str):
        return first[:ERROR_LENGTH]
    return f"{type(error).__name__}: {first}".rstrip(": ")[:ERROR_LENGTH]


def read_run(folder: Path) -> dict[str, Any]:
    """What `run.json` in that folder holds; ValueError where there is none, or none that can be read."""
    try:
        return json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder}: holds no run (no run.json); name the folder of a run") from None
    except ValueError as error:
        raise ValueError(f"{folder / 'run.json'}: cannot be read ({one_line(error)})") from error


def count_lines(path: Path) -> int:
    """Lines of a file that may not be there."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(1 for _ in file)


class RunFolder:
    """The files of a run (DESIGN section 6): `run.json`, `turns.jsonl`, `scores.jsonl`, `records.jsonl`,
    `results.json`. Lines are on disk when the call that wrote them returns; whole files are written atomically.

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
    ) -> RunFolder:
        """Start the record of a run in `path`, which is made where it is missing.

        ValueError where the folder holds a run already, or cannot be written to.
        """
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
            folder._start()
        except OSError as error:
            raise ValueError(
                f"hydra.run.dir={path}: not writable ({error.strerror}); choose a folder you can write to"
            ) from error
        return folder

    def _start(self) -> None:
        try:
            if (self.path / "run.json").exists():
                raise ValueError(
                    f"hydra.run.dir={self.path}: run.json is there already; choose a new folder for this run, "
                    "or go on with that one, resume=auto"
                )
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
        """Continue from `turn`, at which the files of lines had these lengths: what came later is cut off.

        ValueError, before anything is cut, where one of them is shorter.
        """
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
        write_atomically(self.path / "results.json", canonical_json(results, "results.json", indent=2) + "\n")

    def write_downstream(self, turn: int, results: Mapping[str, Any]) -> None:
        """Write `glue/turn_<t>.json`, t turns being done: scores by task."""
        path = self._downstream(turn)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, canonical_json(results, path.name, indent=2) + "\n")

    def has_downstream(self, turn: int) -> bool:
        """Whether the tasks were scored after `turn` turns."""
        return self._downstream(turn).is_file()

    def _downstream(self, turn: int) -> Path:
        return self.path / "glue" / f"turn_{turn}.json"

    def turns(self) -> Iterator[dict[str, Any]]:
        """The lines of `turns.jsonl`, one at a time: a run of 20,000 turns is not held in memory."""
        with (self.path / "turns.jsonl").open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)

    def scores(self, stage: Stage) -> dict[str, Any]:
        """The last evaluation of that stage in `scores.jsonl`."""
        with (self.path / "scores.jsonl").open(encoding="utf-8") as file:
            return [line["scores"] for line in map(json.loads, file) if line["stage"] == stage][-1]

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
        as training_turns and training_seconds, where there were any.
        """
        turns = warm_up = edits = trained = 0
        training_seconds = 0.0
        seconds: dict[str, float] = {}
        peak: dict[str, float] = {}
        for line in self.turns():
            for name, value in (line.get("memory") or {}).items():
                peak[name] = max(peak.get(name, value), value)
            if line["phase"] in TRAINING:
                trained += line["phase"] == TRAINING[0]
                training_seconds += line["seconds"]["total"]
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

    def finish(self) -> None:
        """Mark the run finished."""
        self._end("finished", None)

    def fail(self, error: BaseException | str) -> None:
        """Mark the run failed, or interrupted, with one line that says why."""
        line = one_line(error)
        self._end("interrupted" if line == "interrupted" else "failed", line)

    def _end(self, status: str, error: str | None) -> None:
        self.run |= {"status": status, "error": error, "finished": _now()}
        self._write_run()

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


@dataclass(frozen=True, slots=True)
class WandbSettings:
    """The `tracker` group of the config. `group` None = data set and model, so that editors and seeds compare."""

    mode: WandbMode = "offline"
    project: str = "stableedit"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()


class _Sink(Protocol):
    """Where the tracker sends what the run folder already holds."""

    def log(self, metrics: Mapping[str, float]) -> None: ...
    def summarize(self, metrics: Mapping[str, float]) -> None: ...
    def close(self, exit_code: int) -> None: ...


class _NullSink:
    """wandb disabled: the callers need no `if`."""

    def log(self, metrics: Mapping[str, float]) -> None: ...
    def summarize(self, metrics: Mapping[str, float]) -> None: ...
    def close(self, exit_code: int) -> None: ...


class _WandbSink:
    """One wandb run, set up so that a fresh dashboard reads well: every chart over `turn`, one section a prefix."""

    def __init__(self, run: Any, step: int) -> None:
        self._run = run
        self._step = step  # a resumed run says what it says again under the same numbers as before
        run.define_metric("turn", hidden=True)
        run.define_metric("*", step_metric="turn")
        for section, summary in {"time": "mean", "memory": "max", "update": "last,max"}.items():
            run.define_metric(f"{section}/*", step_metric="turn", summary=summary)
        self._defined: set[str] = set()

    def log(self, metrics: Mapping[str, float]) -> None:
        for name in sorted({*metrics} - self._defined):
            phase = name.partition("/")[0]
            if phase in TRAINING:  # by name, which outdoes every pattern
                self._run.define_metric(name, step_metric=f"{phase}/turn", hidden=name == f"{phase}/turn")
            elif name.endswith(
                ("_low", "_high")
            ):  # kept for custom charts, but no chart of their own beside each score
                self._run.define_metric(name, step_metric="turn", hidden=True)
        self._defined |= {*metrics}
        self._run.log(dict(metrics), step=self._step)
        self._step += 1

    def summarize(self, metrics: Mapping[str, float]) -> None:
        self._run.summary.update(dict(metrics))

    def close(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


def check_wandb(mode: WandbMode) -> None:
    """Stop a run that asks for wandb's server without a login, before anything slow is built and without a prompt.

    Looks only at this machine (environment, netrc, wandb's settings): whether the server accepts the key is seen
    when the run starts. ValueError names the setting and the ways out.
    """
    if mode != "online":
        return
    import wandb
    from wandb.sdk.lib import wbauth

    settings = wandb.setup(wandb.Settings(silent=True)).settings
    try:
        key = settings.api_key or wbauth.read_netrc_auth(host=settings.base_url)
    except wandb.Error as error:
        raise _wandb_problem(error) from error
    if key and (malformed := wbauth.check_api_key(key)):
        raise _wandb_problem(malformed)
    if not (key or settings.identity_token_file):
        raise _wandb_problem("no login found")


def _wandb_problem(problem: BaseException | str) -> ValueError:
    remedy = "run `wandb login` or set WANDB_API_KEY, or set tracker.wandb=offline and send the run with `wandb sync`"
    return ValueError(f"tracker.wandb=online: {one_line(problem)}; {remedy}")


@contextmanager
def _service_environment(folder: Path, mode: WandbMode) -> Iterator[None]:
    """What wandb's service reads while it starts, where the user has not chosen otherwise.

    Its logs go into the run folder instead of the user's cache folder; and an offline run sends no telemetry either,
    which wandb's offline mode alone does not see to (it looks the server up when a run ends).
    """
    wanted = {"WANDB_CACHE_DIR": str(folder)} | ({"WANDB_ERROR_REPORTING": "false"} if mode == "offline" else {})
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _open_sink(folder: RunFolder, settings: WandbSettings) -> _Sink:
    if settings.mode == "disabled":
        return _NullSink()
    with _service_environment(folder.path / "wandb" / "cache", settings.mode):
        run = _start_wandb(folder, settings)
    if settings.mode == "online":
        log.info("wandb: %s", run.url)
    else:
        log.info("wandb: offline; `wandb sync %s` sends the run", Path(run.dir).parent)
    return _WandbSink(run, folder.logged())


def _start_wandb(folder: RunFolder, settings: WandbSettings) -> Any:
    check_wandb(settings.mode)
    import wandb

    # silent: wandb's own lines would tear the progress bar; what the user needs to know is logged by the caller
    wandb.setup(wandb.Settings(silent=True))
    try:
        return wandb.init(
            **_identity(folder.run, settings),
            id=folder.run["wandb_id"],
            resume="allow" if folder.run["resumed"] and settings.mode == "online" else None,
            dir=str(folder.path),
            config=_wandb_config(folder.run),
            settings=wandb.Settings(mode=settings.mode, silent=True, console="off", disable_code=True, save_code=False),
            reinit="create_new",
        )
    except wandb.Error as error:
        if settings.mode == "offline":  # no login or server involved: nothing the user has to set right
            raise
        raise _wandb_problem(error) from error


def _identity(run: Mapping[str, Any], settings: WandbSettings) -> dict[str, Any]:
    """How the run is found again among others."""
    config = run["config"]
    dataset, editor = config["dataset"]["name"], config["editor"]["name"]
    model = PurePath(config["model"]["name_or_path"]).name
    tags = (dataset, model, editor, *settings.tags)
    return {
        "project": settings.project,
        "entity": settings.entity,
        "group": settings.group or f"{dataset}-{model}",
        "job_type": "edit",
        "name": f"{editor}-{dataset}-{model}-{run['run_id'][:6]}",
        "tags": list(dict.fromkeys(tag[:TAG_LENGTH] for tag in tags)),
    }


def _wandb_config(run: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved config as the user knows it, and under `run` what else made the numbers."""
    facts = ("run_id", "overrides", "inputs", "device", "versions", "git")
    return {**run["config"], "run": {key: run[key] for key in facts} | {"model": run["model"]}}


class Tracker:
    """Sends each number of a run to its folder and to wandb, and ends both, also when the run crashes.

    As a context manager: leaving with an exception marks the run failed in both (wandb exit code not 0), and the
    exception goes on.
    """

    def __init__(self, folder: RunFolder, settings: WandbSettings) -> None:
        self.folder = folder
        self._settings = settings
        self._sink: _Sink = _NullSink()

    def __enter__(self) -> Self:
        try:
            self._sink = _open_sink(self.folder, self._settings)
        except BaseException as error:
            self._fail(error)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        code = _exit_code(error)
        try:
            if error is None or code == 0:
                self.folder.finish()
            else:
                self._fail(error)
        finally:
            self._sink.close(code)

    def turn(self, line: Mapping[str, Any]) -> None:
        """Record a turn: a line of `turns.jsonl` (DESIGN section 6). ValueError where a number is not finite."""
        self.folder.append_turn(line)
        self._sink.log(turn_metrics(line))

    def scores(self, turn: int, scores: Scores, stage: Stage) -> None:
        """Record an evaluation after `turn` turns: a line of `scores.jsonl`, a point of each score's curve."""
        self.folder.append_scores({"turn": turn, "stage": stage, "scores": dict(scores)})
        self._sink.log({"turn": turn, **score_metrics(scores)})

    def downstream(self, turn: int, results: Mapping[str, Any]) -> None:
        """Record the tasks' scores after `turn` turns: `glue/turn_<t>.json`, a point of each task's accuracies."""
        self.folder.write_downstream(turn, results)
        ways = ("likelihood", "generation")
        means = {task: {way: found[way]["accuracy"]["mean"] for way in ways} for task, found in results.items()}
        self._sink.log({"turn": turn, **dict(_numbers({"glue": means}))})

    def results(self, results: Mapping[str, Any]) -> None:
        """Record the end of a run: `results.json`, and in wandb's summary base/, final/, change/ and cost/."""
        self.folder.write_results(results)
        base, final = _means(results.get("base", {})), _means(results.get("final", {}))
        change = {name: final[name] - base[name] for name in final if name in base}
        parts = {"base": base, "final": final, "change": change, "cost": results.get("cost", {})}
        self._sink.summarize(dict(_numbers(parts)))

    def _fail(self, error: BaseException) -> None:
        try:
            self.folder.fail(error)
        except OSError:  # a full disk may be the very error under way, and that one must reach the user
            log.exception("run.json could not be marked failed")


def _exit_code(error: BaseException | None) -> int:
    if error is None:
        return 0
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 1


def turn_metrics(line: Mapping[str, Any]) -> dict[str, float]:
    """A line of `turns.jsonl` as wandb metrics: the prefix before the first slash becomes a section of charts.

    update/all sums a turn up over its modules: Frobenius norm of the whole update, and the module with the largest
    cosine to the update before it and with the largest drift from the model's own weights. Lines of meta-training
    have sections of their own, over their own count of turns.
    """
    if line["phase"] in TRAINING:
        kept = ("turn", "loss", "meta_loss", "grad_norm", "seconds")
        return dict(_numbers({line["phase"]: {name: line.get(name) for name in kept}}))
    update = {
        name: {key.removeprefix("update_"): value for key, value in module.items()}
        for name, module in line.get("modules", {}).items()
    }
    parts = {
        "edit": {"loss": line.get("loss"), "answer_tokens": line.get("answer_tokens")},
        "progress": {"edits": line.get("edits_total"), "warm_up": int(line["phase"] == Phase.WARM_UP.value)},
        "time": line.get("seconds", {}),
        "memory": line.get("memory", {}),
        "statistics": line.get("statistics", {}),
        "update": {"all": _over_modules(update), **update},
    }
    return {"turn": line["turn"], **dict(_numbers(parts))}


def _over_modules(update: Mapping[str, Mapping[str, float | None]]) -> dict[str, float]:
    def column(name: str) -> list[float]:
        return [value for module in update.values() if (value := module.get(name)) is not None]

    summary: dict[str, float] = {}
    if norms := column("norm"):
        summary["norm"] = math.sqrt(sum(norm**2 for norm in norms))
    if cosines := column("cosine_previous"):
        summary["cosine_previous"] = max(cosines, key=abs)
    if drifts := column("drift"):
        summary["drift"] = max(drifts)
    return summary


def score_metrics(scores: Scores) -> dict[str, float]:
    """Scores as wandb metrics: scores/ES, scores/ES_low, scores/ES_high."""
    metrics: dict[str, float | None] = {}
    for name, score in scores.items():
        if isinstance(score, Mapping):
            metrics |= {f"{name}{suffix}": score.get(key) for suffix, key in _SCORE_PARTS.items()}
        else:
            metrics[name] = score
    return dict(_numbers({"scores": metrics}))


_SCORE_PARTS: Final = {"": "mean", "_low": "low", "_high": "high"}


def _means(scores: Scores) -> dict[str, float]:
    means = {name: score.get("mean") if isinstance(score, Mapping) else score for name, score in scores.items()}
    return {name: mean for name, mean in means.items() if isinstance(mean, int | float)}


def _numbers(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in nested mappings, as path/to/number; null and text are for the files only."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value
