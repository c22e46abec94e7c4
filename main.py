"""Edit a language model, turn by turn:  python main.py dataset=zsre editor=stableedit

Reads top to bottom: compose, check everything that needs no weights, load, score the base, edit, score, save.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, cast

import hydra
import torch
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from config.compose import check_command_line
from config.schema import (
    EditorConfig,
    EditPrecision,
    Half,
    PreheatMode,
    RunConfig,
    Token,
    TrackerConfig,
    settings_without_effect,
    to_run_config,
)
from data import DATASETS
from data.files import FORMAT, RecordFile, open_records, resolve_file
from data.records import Phase, Turn
from data.stream import AnswerTokens, EditStream, check_context, tokenize
from editor import EDITORS
from editor.base import Editor
from harness.console import Bar, RunProgress, show_results
from harness.diagnostics import Stopwatch, TurnDiagnostics
from harness.evaluate import PROTOCOLS, SCORES_FORMAT, Evaluation, RecordScore, Summary, Tokenize, protocols_of
from harness.places import CACHE, ROOT
from harness.spill import CaptureFolder
from harness.tracking import RunFolder, Stage, Tracker, WandbMode, WandbSettings, canonical_json, check_wandb
from model import Allocate, LanguageModel, ModelSource, Outline, load_tokenizer, locate, outline

log = logging.getLogger(__name__)

RECORD_LINES = 300  # of records.jsonl, written together
SCORING: dict[Stage, str] = {"base": "scoring_base", "eval": "scoring_on_the_way", "final": "scoring_final"}
REFUSALS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
}
"""What a file system says no with."""
DTYPES = {Half.fp32: torch.float32, Half.bf16: torch.bfloat16}


def main() -> None:
    """The command line. A mistake of the user's ends in one line, and exit code 1."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to give the same bits twice
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then leaves errors to us instead of showing a trace
    try:
        check_command_line(sys.argv[1:])
        job()
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(error_line(error))
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)  # 128 + SIGINT, as shells have it


@hydra.main(version_base="1.3", config_path="config", config_name="config")
def job(composed: DictConfig) -> None:
    """One run, or one of a sweep."""
    try:
        run(to_run_config(composed), composed, Path(HydraConfig.get().runtime.output_dir))
    except (ValueError, FloatingPointError, OSError) as error:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise  # the sweep goes on with its other jobs and reports at its end
        sys.exit(error_line(error))


def error_line(error: Exception) -> str:
    """What the user did, or the file system refuses, in one line; any other OSError is a fault of ours and goes on."""
    cause = error.__cause__
    if isinstance(cause, OSError) and str(error).startswith("Unable to configure handler"):
        error = cause  # logging, about the run's main.log
    if not isinstance(error, OSError):
        return f"error: {' '.join(str(error).split())}"
    if error.errno not in REFUSALS:
        raise error
    where = f"{error.filename}: " if error.filename else ""
    return f"error: {where}{error.strerror}; free some space, or choose another folder, as with hydra.run.dir=FOLDER"


def run(cfg: RunConfig, composed: DictConfig, folder: Path) -> None:
    """Look at everything that can be wrong before the model is loaded; then the loop, in the order of its lines."""
    plan = make_plan(cfg)
    with capture_memory(cfg, plan):
        pass  # a folder that cannot hold the captures shows now, not after the base model has been scored
    model = LanguageModel.load(
        plan.source,
        plan.tokenizer,
        plan.outline.shapes,
        dtype=DTYPES[cfg.model.half],
        device=plan.device,
        master=cfg.model.edit_precision is EditPrecision.master,
        compute_tokens=cfg.model.compute_tokens,
    )
    fingerprint = model.fingerprint()
    editor = build_editor(cfg.editor, model.shapes, plan.editor_device)
    evaluation = Evaluation(
        model,
        plan.stream,
        plan.tokenize,
        protocols=protocols_of(cfg.dataset.eval_mhop),
        sample=cfg.evaluation.sample,
        resamples=cfg.evaluation.resamples,
        seed=cfg.seed,
    )
    run_folder = RunFolder.create(
        folder,
        config=plain_config(composed),
        overrides=list(HydraConfig.get().overrides.task),
        inputs={split: file.sha256 for split, file in plan.files.items()},
        model={"name": cfg.model.name_or_path, "revision": cfg.model.revision, "fingerprint": fingerprint},
        device=str(plan.device),
    )
    diagnostics = TurnDiagnostics(plan.device, plan.editor_device)

    with (
        Tracker(run_folder, wandb_settings(cfg.tracker)) as tracker,
        RunProgress() as progress,
        capture_memory(cfg, plan) as allocate,
    ):
        score = Scoring(evaluation, tracker, progress)
        base = score("base", 0, base_cache(cfg, plan, fingerprint))

        with progress.turns(len(plan.stream)) as bar:
            for turn in plan.stream.from_turn(0):
                watch = Stopwatch(plan.device, plan.editor_device)
                with watch.measure("capture"):
                    capture = model.capture(turn, cfg.editor.token is Token.all, allocate)
                with watch.measure("update"), of_turn(turn):
                    updates = editor.update(capture.modules, turn.phase)
                with watch.measure("apply"):
                    changes = model.apply(updates, turn.index)
                line = diagnostics.line(turn, capture, updates, changes, editor, watch.seconds)
                tracker.turn(line)
                bar.advance(edits_total=line["edits_total"], phase=line["phase"])
                if is_due(turn, cfg.evaluation.every, len(plan.stream)):
                    score("eval", turn.index + 1)

        final = score("final", len(plan.stream))
        results = {"base": base, "final": final, "cost": {**run_folder.cost(), "seconds": score.seconds}}
        tracker.results(results)
        if cfg.model_cache:
            target = export_folder(cfg, run_folder.path)
            model.export(target)
            log.info("the edited model is in %s", target)
    show_results(results, run_folder.path)


@contextlib.contextmanager
def of_turn(turn: Turn) -> Iterator[None]:
    """An editor does not know which turn it is in: name it where its numbers fail."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"turn {turn.index}: {error}; the weights are those of the turn before") from error


def is_due(turn: Turn, every: int, total: int) -> bool:
    """Whether what happens every so many turns is due after this one; not in warm-up, and the end has its own line."""
    done = turn.index + 1
    return every > 0 and done % every == 0 and done < total and turn.phase is Phase.EDIT


# ---------------------------------------------------------------------------------------------------------------------
# Before the model is loaded


@dataclass(frozen=True)
class Plan:
    """A run that has passed every check that needs no weights."""

    files: dict[str, RecordFile]  # by split: eval and, with warm-up, train
    stream: EditStream
    tokenizer: Any
    tokenize: Tokenize
    source: ModelSource
    outline: Outline
    device: torch.device
    editor_device: torch.device


def make_plan(cfg: RunConfig) -> Plan:
    """Open the data, read the model's outline, lay out the turns. ValueError, in one line, where something is wrong."""
    for line in settings_without_effect(cfg):
        log.warning("%s", line)
    device, editor_device = devices(cfg)
    check_wandb(wandb_settings(cfg.tracker).mode)
    check_export(cfg)
    files = open_data(cfg)
    source = ModelSource(
        locate(cfg.model.name_or_path, CACHE, cfg.model.revision),
        cfg.model.class_name,
        cfg.model.revision,
        cfg.model.trust_remote_code,
    )
    model_outline = outline(source, cfg.model.edit_modules, cfg.model.auto_layers)
    tokenizer = load_tokenizer(source)
    answer_tokens = cast(AnswerTokens, cfg.dataset.answer_tokens.name)
    stream = EditStream(
        files["eval"],
        files.get("train", ()),
        n_edits=cfg.dataset.n_edits,
        batch_size=cfg.dataset.batch_size,
        num_turns=cfg.num_seq,
        num_warm_up=cfg.dataset.num_warm_up if "train" in files else None,  # without effect, as the user was told
        preheat_mode=cfg.editor.preheat_mode.name,
        tokenizer=tokenizer,
        answer_tokens=answer_tokens,
        seed=cfg.seed,
        shuffle=cfg.dataset.shuffle,
    )
    if model_outline.context_length is not None:
        fits = partial(check_context, tokenizer=tokenizer, context_length=model_outline.context_length)
        fits(stream.edited(), answer_tokens=answer_tokens, file=str(files["eval"].path))
        if "train" in files:
            fits(stream.warmed_up(), answer_tokens=answer_tokens, file=str(files["train"].path))
    as_tokens = partial(tokenize, tokenizer=tokenizer, answer_tokens=answer_tokens)
    return Plan(files, stream, tokenizer, as_tokens, source, model_outline, device, editor_device)


def open_data(cfg: RunConfig) -> dict[str, RecordFile]:
    """The files of a run by split: those to edit and, where there are warm-up turns, those to warm up with."""
    dataset = DATASETS[cfg.dataset.name].with_fields(cfg.dataset.field_map())
    paths = {"eval": cfg.dataset.valid_path}
    if cfg.editor.preheat_mode is not PreheatMode.none:
        paths["train"] = cfg.dataset.train_path
    return {
        split: open_records(
            resolve_file(dataset, split, path, ROOT / "data" / "raw", ROOT / "data" / "sample"),
            dataset,
            cache_dir=CACHE / "arrow",
            seed=cfg.seed,
        )
        for split, path in paths.items()
    }


def devices(cfg: RunConfig) -> tuple[torch.device, torch.device]:
    """Where the model runs and where the editor does; ValueError for a device this machine lacks."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    model = torch.device(found if cfg.model_device == "auto" else cfg.model_device)
    editor = model if cfg.editor_device == "auto" else torch.device(cfg.editor_device)
    for key, device in {"model_device": model, "editor_device": editor}.items():
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"{key}={device}: this machine has {torch.cuda.device_count()} GPUs; choose another, or auto"
            )
    if "cuda" in (model.type, editor.type):
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # all is written over
    return model, editor


def export_folder(cfg: RunConfig, run_folder: Path) -> Path:
    return Path(cfg.model_cache_dir).expanduser() if cfg.model_cache_dir else run_folder / "model"


def check_export(cfg: RunConfig) -> None:
    """ValueError where the edited model is to be saved over something, or where nothing can be saved."""
    if not (cfg.model_cache and cfg.model_cache_dir):
        return
    target = Path(cfg.model_cache_dir).expanduser()
    if target.exists():
        raise ValueError(f"model_cache_dir={cfg.model_cache_dir}: is there already; name a folder that is not")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"model_cache_dir={cfg.model_cache_dir}: cannot be written ({error.strerror}); choose another folder"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# What the loop uses


def build_editor(cfg: EditorConfig, shapes: Mapping[str, tuple[int, int]], device: torch.device) -> Editor:
    """The editor with the settings it names, each under the name that users type."""
    kind = EDITORS[cfg.name]
    values: dict[str, Any] = {key: value.name if isinstance(value, Enum) else value for key, value in vars(cfg).items()}
    return kind(shapes, kind.Settings(**{entry.name: values[entry.name] for entry in fields(kind.Settings)}), device)


def wandb_settings(cfg: TrackerConfig) -> WandbSettings:
    """The tracker's group of the configuration, in words the tracker knows."""
    return WandbSettings(cast(WandbMode, cfg.wandb.name), cfg.project, cfg.entity, cfg.group, tuple(cfg.tags))


def plain_config(composed: DictConfig) -> dict[str, Any]:
    """The resolved configuration as JSON holds it, Enums by the words that users type."""
    plain = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


@contextlib.contextmanager
def capture_memory(cfg: RunConfig, plan: Plan) -> Iterator[Allocate | None]:
    """Where captures are allocated: None = in memory, or a folder that goes with the run."""
    if cfg.editor.cache_dir is None:
        yield None
        return
    with CaptureFolder(Path(cfg.editor.cache_dir)) as folder:
        first = plan.stream.turn(0)
        lengths = (len(s.ids) if cfg.editor.token is Token.all else s.answer_length for s in first.sequences)
        folder.require(plan.outline.shapes, sum(lengths))
        yield folder.allocate


def base_cache(cfg: RunConfig, plan: Plan, fingerprint: str) -> Path:
    """The file that keeps the base model's scores: one for each model, data, and setting that can change a score."""
    identity = {
        "model": fingerprint,
        "tokenizer": hashlib.sha256(plan.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "data": plan.files["eval"].sha256,
        "reading": [FORMAT, cfg.dataset.name, cfg.dataset.field_map(), cfg.seed],
        "questions": [cfg.dataset.answer_tokens.name, cfg.dataset.eval_mhop],
        "records": [cfg.dataset.shuffle, len(plan.stream.edited()), cfg.evaluation.sample],
        "arithmetic": [str(plan.device), cfg.model.half.name, cfg.model.compute_tokens],
        "versions": [SCORES_FORMAT, torch.__version__, transformers.__version__],
    }
    key = hashlib.sha256(canonical_json(identity, "base scores").encode()).hexdigest()[:16]
    return CACHE / "base" / f"{key}.jsonl"


class Scoring:
    """Runs evaluations and sends what they find to the tracker and the bar; keeps the seconds they took."""

    def __init__(self, evaluation: Evaluation, tracker: Tracker, progress: RunProgress) -> None:
        self.evaluation, self.tracker, self.progress = evaluation, tracker, progress
        self.seconds: dict[str, float] = {}
        self._lines: list[dict[str, Any]] = []

    def __call__(self, stage: Stage, done: int, cache: Path | None = None) -> Summary:
        """Score the base model, or the facts that the first `done` turns of the stream wrote."""
        start = time.perf_counter()
        upto = None if stage == "base" else done
        what = "the base model" if stage == "base" else f"after turn {done}"
        with self.progress.evaluation(what, self.evaluation.count(upto), unit="records") as bar:
            summary = self.evaluation.run(upto, partial(self._watch, stage, bar), cache)
            self._write()
        name = SCORING[stage]
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.tracker.scores(done, summary, stage)
        return summary

    def _watch(self, stage: Stage, bar: Bar, score: RecordScore) -> None:
        line = {"stage": stage, "turn": self.evaluation.stream.turn_of(score.place), **asdict(score)}
        self._lines.append(line)
        if len(self._lines) >= RECORD_LINES:
            self._write()
        if score.protocol == PROTOCOLS["edit"]:  # the first probe of every record
            bar.advance()

    def _write(self) -> None:
        self.tracker.folder.append_records(self._lines)
        self._lines.clear()


if __name__ == "__main__":
    main()
