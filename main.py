"""Edit a language model, turn by turn:  python main.py dataset=zsre editor=stableedit

Reads top to bottom: compose, check everything that needs no weights, load, score the base, edit, score, save.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

import hydra
import torch
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from config.compose import check_command_line
from config.schema import EditorConfig, EditPrecision, Half, RunConfig, Token, to_run_config
from data.records import Phase, Turn
from editor import EDITORS
from editor.base import Editor
from harness.console import RunProgress, show_results
from harness.diagnostics import Stopwatch, TurnDiagnostics
from harness.evaluate import Evaluation, protocols_of
from harness.plan import base_cache, capture_memory, export_folder, make_plan, wandb_settings
from harness.scoring import Scoring
from harness.tracking import RunFolder, Tracker
from model import LanguageModel

log = logging.getLogger(__name__)

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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # 128 + SIGTERM; run.json and wandb are told on the way out
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
        capture_memory(cfg, plan.stream, plan.outline.shapes) as allocate,
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


def build_editor(cfg: EditorConfig, shapes: Mapping[str, tuple[int, int]], device: torch.device) -> Editor:
    """The editor with the settings it names, each under the name that users type."""
    kind = EDITORS[cfg.name]
    values: dict[str, Any] = {key: value.name if isinstance(value, Enum) else value for key, value in vars(cfg).items()}
    return kind(shapes, kind.Settings(**{entry.name: values[entry.name] for entry in fields(kind.Settings)}), device)


def plain_config(composed: DictConfig) -> dict[str, Any]:
    """The resolved configuration as JSON holds it, Enums by the words that users type."""
    plain = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


if __name__ == "__main__":
    main()
