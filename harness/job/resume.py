"""Which run a command goes on with, what it must have in common with it, and where the loop stood."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from config.schema import RunConfig, quoted
from editor.base import Editor
from harness.job.loading import load_model
from harness.job.plan import Plan
from harness.ranks import Ranks
from harness.run import (
    NOT_IN_RUN_ID,
    Checkpoint,
    Checkpoints,
    Groups,
    NoRecord,
    RunFolder,
    git_state,
    leave_out,
    leaves,
    read_run,
    run_id,
    versions,
)
from harness.watch import TurnDiagnostics
from model import LanguageModel
from model.source import ModelSource

log = logging.getLogger(__name__)

NEWEST = "auto"  # what `resume` is where no folder is named
DATA = {
    "eval": "dataset.valid_path",
    "train": "dataset.train_path",
    "network": "editor.load_checkpoint",
    "perplexity": "evaluation.perplexity",
    "glue": "glue.rows",
    "corpus": "corpus.path",
    "questions": "dataset.train_path",
}
MOST_NAMED = 8  # keys that fit into an error message
NEVER_RUNS = ("checkpoints", "wandb")  # folders that hold no run and may hold many files


# ---------------------------------------------------------------------------------------------------------------------
# Which run


@contextlib.contextmanager
def earlier_run(
    resume: str | None, roots: Sequence[Path], about: Mapping[str, Any], folder: Path, ranks: Ranks
) -> Iterator[RunFolder | None]:
    """The run to go on with, or that is finished, locked inside the context; None to begin a new one.

    `resume` is null, auto or a run folder; auto takes, below `roots`, the newest run of the same id that is finished or
    has a checkpoint, else the newest of that id. `about` is what `run.json` would say of a new run in `folder`.
    ValueError, naming each key that differs, where the folder holds another run, or none. Rank 0 looks, for all.
    """
    with contextlib.ExitStack() as stack:
        path = _wanted(resume, roots, about, folder) if ranks.is_first else None
        found = None if path is None else stack.enter_context(RunFolder.open(path))
        run = ranks.broadcast(lambda: None if found is None else found.run)
        yield found if run is None or ranks.is_first else NoRecord(folder, run)


def _wanted(resume: str | None, roots: Sequence[Path], about: Mapping[str, Any], folder: Path) -> Path | None:
    path = None
    if resume == NEWEST:
        path = _newest(roots, about)
        if path is None and (folder / "run.json").exists():
            _require_same(
                f"hydra.run.dir={folder}",
                read_run(folder),
                about,
                "choose a new folder for this one (of a sweep, hydra.sweep.dir)",
            )
    elif resume is not None:
        path = Path(resume).expanduser()
        _require_same(f"resume={resume}", read_run(path), about, "leave resume out")
    return path


def _newest(roots: Sequence[Path], about: Mapping[str, Any]) -> Path | None:
    wanted = run_id(about["config"], about["inputs"], about["model"]["revision"])
    runs = sorted(_runs_below(roots), key=lambda found: (found[1]["started"], found[0]), reverse=True)
    same = [(path, run) for path, run in runs if run["run_id"] == wanted]
    for path, run in same:
        if run["status"] == "finished" or any((path / "checkpoints").glob("*_*")):
            return path
    if same:
        return same[0][0]
    where = ", ".join(map(str, roots))
    log.info("resume=%s: no run of this configuration and data below %s; this is the first", NEWEST, where)
    for path, run in runs:
        if run["inputs"] != about["inputs"] and not differences(run["config"], about["config"]):
            log.warning("%s holds a run of this configuration, but %s", path, _changed_data(run, about))
            break
    return None


def _runs_below(roots: Sequence[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    seen: set[Path] = set()
    for root in roots:
        for folder, below, files in os.walk(root):
            path = Path(folder)
            below[:] = [] if path in seen else [name for name in below if name not in NEVER_RUNS and name[0] != "."]
            if "run.json" in files and path not in seen:
                try:
                    yield path, read_run(path)
                except ValueError as error:
                    log.warning("%s; left out", error)
            seen.add(path)


# ---------------------------------------------------------------------------------------------------------------------
# What must be the same


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys of two configurations that differ and can change a number, with both values."""
    old, new = (dict(leaves(leave_out(config, NOT_IN_RUN_ID), ".")) for config in (before, now))
    keys = [key for key in {**new, **old} if (key in old, old.get(key)) != (key in new, new.get(key))]
    return [f"{key}={_shown(old, key)} there and {_shown(new, key)} here" for key in keys]


def _shown(leaves: Mapping[str, Any], key: str) -> str:
    if key not in leaves:
        return "not known"
    return "null" if leaves[key] is None else str(leaves[key])


def _require_same(option: str, run: Mapping[str, Any], about: Mapping[str, Any], remedy: str) -> None:
    different = differences(run["config"], about["config"])
    if different:
        more = f", and {len(different) - MOST_NAMED} more" if len(different) > MOST_NAMED else ""
        named = ", ".join(different[:MOST_NAMED])
        raise ValueError(f"{option}: another run, {named}{more}; set them as they were, or {remedy}")
    if run["inputs"] != about["inputs"]:
        raise ValueError(
            f"{option}: {_changed_data(run, about)}; bring the file back that the run was begun with, or {remedy}"
        )


def _changed_data(run: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    now = about["inputs"]
    names = [name for name in {**run["inputs"], **now} if run["inputs"].get(name) != now.get(name)]
    return ", ".join(
        f"the file of {DATA[name]} has changed since (SHA-256 {run['inputs'].get(name, '')[:8]}, now "
        f"{now.get(name, '')[:8]})"
        for name in names
    )


def require_weights(
    cfg: RunConfig, plan: Plan, run_folder: RunFolder, about: Mapping[str, Any], evaluated: ModelSource | None
) -> None:
    """ValueError where a finished run was one of other weights; they are read only where their files have changed."""
    sources: list[tuple[str, ModelSource | None, Any, Any]] = [
        ("model.name_or_path", None, run_folder.run["model"], about["model"])
    ]
    if evaluated is not None:
        was = run_folder.run["model"]["evaluated"]
        if "fingerprint" in was:  # else it is the base model
            sources.append(("evaluate", evaluated, was, about["model"]["evaluated"]))
    for option, source, was, now in sources:
        if now["files"] is None or was.get("files") != now["files"]:
            require_model(option, was, {**now, "fingerprint": load_model(cfg, plan, source).fingerprint()})
            was["files"] = now["files"]
            run_folder.note()


def require_model(option: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """ValueError, naming the option, where a model has other weights than those that the run began with."""
    if was["fingerprint"] != now["fingerprint"]:
        raise ValueError(
            f"{option}={was['name']}: other weights than those that the run began with (fingerprint "
            f"{was['fingerprint']}, now {now['fingerprint']}); bring them back, or leave resume out"
        )


def changed_circumstances(run: Mapping[str, Any], device: str) -> list[str]:
    """What else may change the last bits of a number, a line each; a run goes on with it, and the user is told."""
    before, code = run["git"] or {}, git_state() or {}
    pairs = {
        "device": (run["device"], device),
        **{name: (was, versions().get(name)) for name, was in run["versions"].items()},
        "git commit": (before.get("commit"), code.get("commit")),
    }
    told = [f"{name} was {was} when the run began, and is {now}" for name, (was, now) in pairs.items() if was != now]
    is_known = "changes" in before or not before.get("dirty")  # older code did not write down how files differed
    if before.get("commit") == code.get("commit") and is_known and before.get("changes") != code.get("changes"):
        told.append("files of the code differ from the git commit otherwise than when the run began")
    return told


# ---------------------------------------------------------------------------------------------------------------------
# Going on


def newest_checkpoint(folder: RunFolder) -> Checkpoint | None:
    """Where a run goes on from. ValueError for another run's checkpoint, or one of a newer format."""
    checkpoints = _checkpoints(folder, keep=1)
    newest = checkpoints["turn"].newest() or checkpoints["training"].newest()
    if newest is not None and newest.state["run_id"] != folder.run["run_id"]:
        raise ValueError(f"{newest.path}: of run {newest.state['run_id']}, not {folder.run['run_id']}; take it away")
    return newest


def _checkpoints(folder: RunFolder, keep: int) -> dict[str, Checkpoints]:
    return {kind: Checkpoints(folder.path / "checkpoints", kind, keep) for kind in ("turn", "training")}


class LoopState:
    """What the turns so far have left behind beside lines: edited weights, statistics, past updates, seconds spent."""

    def __init__(
        self, folder: RunFolder, model: LanguageModel, editor: Editor, diagnostics: TurnDiagnostics, keep: int
    ) -> None:
        """As before the first turn; `keep` checkpoints stay."""
        self.folder, self.model, self.editor, self.diagnostics = folder, model, editor, diagnostics
        self.checkpoints = _checkpoints(folder, keep)
        self.done = 0  # turns
        self.seconds: dict[str, float] = {}  # of everything that is no turn
        self.trained = 0  # training turns that a checkpoint in the middle of meta-training has behind it ...
        self.training: dict[str, Tensor] = {}  # ... and what they left behind

    @property
    def begun(self) -> bool:
        """Whether the base model's scores lie behind it."""
        return self.done > 0 or self.trained > 0

    @property
    def fingerprint(self) -> str:
        """Of the weights as they were loaded."""
        return self.folder.run["model"]["fingerprint"]

    def cost(self) -> dict[str, Any]:
        return {**self.folder.cost(), "seconds": self.seconds}

    def save_if_due(self, every: int, total: int) -> None:
        """A checkpoint every so many turns and after the last of `total`; none where `every` is 0."""
        if every and (self.done % every == 0 or self.done == total):
            self.save()

    def save(self) -> None:
        """A checkpoint after the turns done, at the lines that the last of them wrote."""
        past, memory = self.diagnostics.state()
        masters = {name: edited.master for name, edited in self.model.edited.items()}
        groups = {"model": masters, "editor": self.editor.state_dict(), "diagnostics": past}
        self._save("turn", self.done, groups, {"diagnostics": memory, "in_weights": not self.model.is_wrapped})
        self.checkpoints["training"].discard_all()  # the network is in the editor's state

    def save_training(self, trained: int, training: Mapping[str, Tensor]) -> None:
        """A checkpoint after that many turns of meta-training, which come before the first of the stream."""
        self._save("training", trained, {"training": training}, {})

    def _save(self, kind: str, place: int, groups: Groups, more: Mapping[str, Any]) -> None:
        start = time.perf_counter()
        self.folder.sync()
        about = {"run_id": self.folder.run["run_id"], "lengths": self.folder.mark, "seconds": self.seconds}
        self.checkpoints[kind].save(place, groups, {**about, **more})
        self.seconds["checkpoints"] = self.seconds.get("checkpoints", 0.0) + time.perf_counter() - start

    def restore(self, checkpoint: Checkpoint | None, about: Mapping[str, Any], ranks: Ranks) -> None:
        """Everything as rank 0's checkpoint has it, or as before the first turn. ValueError for another model."""
        run = self.folder.run
        require_model("model.name_or_path", run["model"], about["model"])
        for line in changed_circumstances(run, about["device"]):
            log.warning("%s: the last bits of numbers may differ from here on", line)
        place, state, groups = _of_first(ranks, checkpoint)
        if place is None:
            self.folder.go_on({}, 0, about["overrides"])
            log.info("the run in %s has no checkpoint: it begins anew", self.folder.path)
            return
        if "training" in groups:
            self.trained, self.training = place, groups["training"]
        else:
            self.done = place
        self.checkpoints["training" if self.trained else "turn"].latest = place
        self.folder.go_on(state["lengths"], self.done, about["overrides"])
        self.seconds |= state["seconds"]
        if self.trained:
            log.info("going on after turn %d of meta-training in %s", self.trained, self.folder.path)
            return
        self.model.restore(groups["model"])
        self.editor.load_state_dict(groups.get("editor", {}))
        self.diagnostics.load_state(groups.get("diagnostics", {}), state["diagnostics"])
        log.info("going on after turn %d of the run in %s", self.done, self.folder.path)

    def how_to_go_on(self, program: Sequence[str], overrides: Sequence[str]) -> str:
        """What whoever stopped the run has to type; `program` is what it was started with, up to its settings."""
        path = str(self.folder.path)
        if not re.fullmatch(r"[\w./-]+", path, re.ASCII):  # else Hydra reads it as it stands
            path = quoted(path)
        kept = [line for line in overrides if not line.startswith("resume=")]
        command = shlex.join([*program, *kept, f"resume={path}"])
        latest = self.checkpoints["turn"].latest
        trained = self.checkpoints["training"].latest
        where = f"turn {trained} of meta-training" if trained is not None and latest is None else f"turn {latest or 0}"
        return f"to go on from {where}: {command}"


def _of_first(
    ranks: Ranks, checkpoint: Checkpoint | None
) -> tuple[int | None, dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Place, state and tensors of rank 0's checkpoint, on every rank; no place where it has none."""
    groups = {} if checkpoint is None else checkpoint.tensors()
    own = {(group, name): tensor for group, tensors in groups.items() for name, tensor in tensors.items()}
    about = (None, {}) if checkpoint is None else (checkpoint.place, checkpoint.state)
    found: list[Any] = []

    def take(rank: int, said: Any, tensors: Sequence[Tensor]) -> None:
        if rank == 0:
            found.extend(said[:2])
            for (group, name), tensor in zip(said[2], tensors, strict=True):
                groups.setdefault(group, {})[name] = tensor

    ranks.all_gather_tensors(lambda: ((*about, list(own)), list(own.values())), take)
    return found[0], found[1], groups


def move_into(folder: Path, fresh: Path, link: bool = False) -> None:
    """Log into the run's own folder from here on, what was logged so far included.

    The folder that Hydra made for this command goes, unless more is in it; with `link`, a link takes its place.
    """
    if folder.resolve() == fresh.resolve():
        return
    logs = []
    for handler in list(logging.getLogger().handlers):
        if isinstance(handler, logging.FileHandler) and Path(handler.baseFilename).parent == fresh:
            logs.append(_move_log(handler, folder))
    if {path.name for path in fresh.iterdir()} <= {".hydra", *logs}:
        shutil.rmtree(fresh)
        if link:
            fresh.symlink_to(os.path.relpath(folder.resolve(), fresh.parent.resolve()))


def _move_log(handler: logging.FileHandler, folder: Path) -> str:
    before = Path(handler.baseFilename)
    handler.close()
    if not (before.parent / "run.json").is_file():  # else it is the log of the run that has its folder there
        with (folder / before.name).open("a", encoding="utf-8") as file:
            file.write(before.read_text(encoding="utf-8"))
    moved = logging.FileHandler(folder / before.name, encoding="utf-8")
    moved.setFormatter(handler.formatter)
    moved.setLevel(handler.level)
    logging.getLogger().removeHandler(handler)
    logging.getLogger().addHandler(moved)
    return before.name
