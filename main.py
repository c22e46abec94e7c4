"""Edit a language model, turn by turn:  python main.py dataset=zsre editor=stableedit

Reads top to bottom: compose, check everything that needs no weights, load, score the base, edit, score, save. A run
that was stopped goes on with resume=auto, bit for bit.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from enum import Enum
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import hydra
import torch
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from config.compose import check_command_line, waiting_for_choices
from config.schema import RunConfig, Token, to_run_config
from data.records import Turn
from data.stream import EditStream
from data.training import TrainingStream
from editor.base import CapturedTurn, Editor
from editor.hypernetwork import HyperNetworkEditor
from editor.meta_train import MetaSettings, MetaTrainer
from editor.registry import EDITORS
from harness.evaluation import Downstream, HiddenStates, Scoring
from harness.job import (
    Held,
    LoopState,
    MetaTraining,
    Plan,
    asked_too_late,
    base_cache,
    capture_memory,
    check_export,
    earlier_run,
    evaluate_only,
    evaluated_source,
    export_folder,
    is_saved,
    load_model,
    make_evaluation,
    make_plan,
    move_into,
    network_keeper,
    plan_downstream,
    require_weights,
    wandb_settings,
)
from harness.ranks import joined, program_of
from harness.run import (
    CACHE,
    MODEL,
    Checkpoints,
    Interrupted,
    Interruption,
    RunFolder,
    check_launcher,
    end_if_asked,
    end_on,
    last_lines,
    launcher_errors,
    requeued_after_checkpoint,
    share_terminal,
)
from harness.watch import RunProgress, Stopwatch, Tracker, TurnDiagnostics, show_results
from model_source import stamp

log = logging.getLogger(__name__)

REFUSALS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
}
"""What a file system says no with."""


def main() -> None:
    """The command line. A mistake of the user's ends in one line, and exit code 1."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then leaves errors to us instead of showing a trace
    prepare_process()
    try:
        with joined() as ranks:
            if ranks.rank > 0:
                ranks.follow(Held())
                return
            check_launcher(sys.argv[1:], ranks.size)
            check_command_line(sys.argv[1:])
            sys.argv[1:] = waiting_for_choices(sys.argv[1:])
            job()
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(error_line(error))
    except launcher_errors() as error:
        sys.stderr.write(f"{last_lines(error)}\n")
        sys.exit("error: a job ended without a result (above); the same command with resume=auto goes on")
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)  # 128 + SIGINT, as shells have it


def prepare_process() -> None:
    """What holds for all of a process; a job that a launcher starts has one of its own."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to give the same bits twice
    os.environ.setdefault("MKL_CBWR", "AUTO")  # and MKL, whose sums otherwise hang on where in memory a matrix begins
    end_on(signal.SIGTERM)


@hydra.main(version_base="1.3", config_path="config", config_name="config")
def job(composed: DictConfig) -> None:
    """One run, or one of a sweep."""
    prepare_process()
    share_terminal(HydraConfig.get().launcher["_target_"])
    in_sweep = HydraConfig.get().mode is RunMode.MULTIRUN
    try:
        with requeued_after_checkpoint():
            run(to_run_config(composed), composed, Path(HydraConfig.get().runtime.output_dir))
    except (ValueError, FloatingPointError, OSError) as error:
        line = error_line(error)
        if in_sweep:  # which goes on with its other jobs and ends with this error, maybe in another process
            log.error("this job failed: %s", line.removeprefix("error: "))
            raise ValueError(line.removeprefix("error: ")) from error
        sys.exit(line)
    except Interrupted as stop:
        raise SystemExit(stop.code) from None  # which any process can read
    except Exception:
        if in_sweep:
            log.exception("this job failed")
        raise


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
    in_cache = error.filename and Path(os.fsdecode(error.filename)).is_relative_to(CACHE)
    other = "for the cache, by the environment: XDG_CACHE_HOME=FOLDER" if in_cache else "as with hydra.run.dir=FOLDER"
    return f"error: {where}{error.strerror}; free some space, or choose another folder, {other}"


def run(cfg: RunConfig, composed: DictConfig, folder: Path) -> None:
    """Look at everything that can be wrong before the model is loaded; then edit, unless it has been done already."""
    plan = make_plan(cfg, joined())
    downstream = plan_downstream(cfg, plan)
    evaluated = evaluated_source(cfg, plan)
    about: dict[str, Any] = {
        "config": plain_config(composed),
        "overrides": list(HydraConfig.get().overrides.task),
        "inputs": plan.inputs | downstream.inputs,
        "model": {"name": cfg.model.name_or_path, "revision": cfg.model.revision, "files": stamp(plan.source)},
        "device": plan.hardware,
        "hydra": hydra_files(composed),
    }
    if evaluated is not None:
        about["model"]["evaluated"] = {"name": cfg.evaluate, "files": stamp(evaluated)}
    end_if_asked()
    with earlier_run(cfg.resume, roots_of_runs(), about, folder) as earlier:
        if earlier is not None:
            move_into(earlier.path, folder, link=HydraConfig.get().mode is RunMode.MULTIRUN)
        if earlier is not None and earlier.run["status"] == "finished":
            require_weights(cfg, plan, earlier, about, evaluated)
            log.info("resume=%s: finished already, %s; these are its results", cfg.resume, earlier.run["finished"])
            for line in asked_too_late(cfg, earlier.path):
                log.warning("%s", line)
            show_results(earlier.results(), earlier.path)
            if cfg.diagnostics.report and evaluated is None and not earlier.is_drawn():
                draw(earlier.path)
        elif evaluated is not None:
            evaluate_only(cfg, plan, evaluated, about, folder, earlier)
        else:
            check_export(cfg, None if earlier is None else earlier.run.get("saved"))
            edit(cfg, plan, downstream, about, folder, earlier)


def edit(
    cfg: RunConfig, plan: Plan, downstream: Downstream, about: dict[str, Any], folder: Path, earlier: RunFolder | None
) -> None:
    """The loop, in the order of its lines. A new run is recorded in `folder`, an earlier one where it is."""
    path = earlier.path if earlier else folder
    checkpoints = {kind: Checkpoints(path / "checkpoints", kind, cfg.keep) for kind in ("turn", "training")}
    start = (checkpoints["turn"].newest() or checkpoints["training"].newest()) if earlier else None
    model = load_model(cfg, plan)
    about["model"]["fingerprint"] = fingerprint = model.fingerprint()
    editor = build_editor(cfg, model.shapes, plan.editor_device)
    if plan.network is not None:
        plan.network.require({MODEL: fingerprint})
        editor.load_state_dict(plan.network.tensors())
    devices = (*model.devices, plan.editor_device)
    diagnostics = TurnDiagnostics(*devices, previous=cfg.diagnostics.previous, seed=cfg.seed)
    run_folder = earlier or RunFolder.create(folder, **about)
    hidden = HiddenStates(
        model.hidden_states, plan.stream.edited(), plan.tokenize, path, cfg.diagnostics.hidden_states, cfg.seed
    )
    state = LoopState(checkpoints, run_folder, model, editor, diagnostics)
    done, total = state.restore(start, about) if earlier else 0, len(plan.stream)

    with (
        run_folder,
        Tracker(run_folder, wandb_settings(cfg.tracker)) as tracker,
        RunProgress() as progress,
        capture_memory(cfg, plan.stream, plan.outline.shapes) as allocate,
        Interruption() as interruption,
    ):
        score = Scoring(make_evaluation(cfg, plan, model), tracker, progress)
        score.seconds = state.seconds  # with those that a resumed run spent before
        try:
            begun = done or state.trained
            base = score.base(begun, base_cache(cfg, plan, fingerprint))
            downstream.base(model, tracker, progress, fingerprint)
            if not begun:
                hidden.keep("base")

            if plan.training is not None and done:
                network_keeper(cfg, path, model.shapes, fingerprint).keep_late(editor, len(plan.training), done)
            elif plan.training is not None:
                capture_turn = partial(model.capture, every_token=cfg.editor.token is Token.all, allocate=allocate)
                keeper = network_keeper(cfg, path, model.shapes, fingerprint)
                training = meta_training(cfg, plan.training, state, tracker, capture_turn)
                training.run(cfg.checkpoint_every, keeper, progress, interruption)
                del training  # and with it the moments of its optimiser

            with progress.turns(total, done=done) as bar:
                for turn in plan.stream.from_turn(done):
                    score.retention(done)
                    if is_due(cfg.evaluation.every, done, plan.stream):
                        score("eval", done)
                    if is_due(cfg.downstream_eval_steps, done, plan.stream):
                        downstream(model, tracker, progress, done)
                    with interruption.held():
                        watch = Stopwatch(*devices)
                        with watch.measure("capture"):
                            capture = model.capture(turn, cfg.editor.token is Token.all, allocate)
                        with watch.measure("update"), of_turn(turn):
                            updates = editor.update(capture.modules, turn.phase)
                        with watch.measure("apply"):
                            changes = model.apply(updates, turn.index)
                        line = diagnostics.line(turn, capture, updates, changes, editor, watch.seconds)
                        tracker.turn(line)
                        done = turn.index + 1
                        if cfg.checkpoint_every and (done % cfg.checkpoint_every == 0 or done == total):
                            state.save(done)
                    bar.advance(edits_total=line["edits_total"], phase=line["phase"])

            final = score("final", done)
            retained = score.retained()
            downstream(model, tracker, progress, done)
            hidden.keep("edited")
            score.examples(plan.examples)
            results = {
                "base": base,
                "final": final,
                **retained,
                "cost": {**run_folder.cost(), "seconds": state.seconds},
            }
            tracker.results(results)
            if cfg.model_cache and not is_saved(cfg, run_folder.path, run_folder.run.get("saved")):
                with interruption.held():
                    model.export(target := export_folder(cfg, run_folder.path))
                    run_folder.note(saved=cfg.model_cache_dir)
                log.info("the edited model is in %s", target)
        except Interrupted as stop:
            if cfg.checkpoint_every and done:
                state.save(done)
            command = state.how_to_go_on(program_of(plan.ranks), about["overrides"])
            log.warning("%s after turn %d of %d; %s", stop.signal, done, total, command)
            raise
    show_results(results, path)
    if cfg.diagnostics.report:
        draw(path)


def draw(path: Path) -> None:
    """The report of a finished run."""
    from harness.report import write_report  # matplotlib takes a second

    log.info("the report is %s", write_report([path]))


@contextlib.contextmanager
def of_turn(turn: Turn) -> Iterator[None]:
    """An editor does not know which turn it is in: name it where its numbers fail."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"turn {turn.index}: {error}; the weights are those of the turn before") from error


def is_due(every: int, done: int, stream: EditStream) -> bool:
    """Whether what happens every so many turns is due after `done` of them; not in warm-up, nor before the first."""
    warm_up = range(stream.warm_up_start, stream.warm_up_start + stream.num_warm_up)
    return every > 0 and done > 0 and done % every == 0 and done - 1 not in warm_up


def roots_of_runs() -> list[Path]:
    """The folders that this configuration puts runs below: the part of Hydra's folders that is no run's own."""
    raw = OmegaConf.to_container(HydraConfig.get(), resolve=False)
    assert isinstance(raw, dict)
    shared = ["/".join(takewhile(is_shared, raw[kind]["dir"].split("/"))) for kind in ("run", "sweep")]
    resolved = OmegaConf.to_container(OmegaConf.create(shared), resolve=True)
    assert isinstance(resolved, list)
    return [Path(HydraConfig.get().runtime.cwd, str(root)) for root in resolved]


def is_shared(part: str) -> bool:
    """Whether a part of a path is the same for all runs: it names no time, no choice and no number of a job."""
    return "${" not in part.replace("${oc.env:", "")


def build_editor(cfg: RunConfig, shapes: Mapping[str, tuple[int, int]], device: torch.device) -> Editor:
    """The editor that the configuration names, with its settings."""
    kind = EDITORS[cfg.editor.name]
    return kind(shapes, settings_of(kind.Settings, cfg), device)


def meta_training(
    cfg: RunConfig,
    stream: TrainingStream,
    state: LoopState,
    tracker: Tracker,
    capture: Callable[[Turn], CapturedTurn],
) -> MetaTraining:
    """The training of the editor's network, wherever the run's state has it."""
    assert isinstance(state.editor, HyperNetworkEditor)
    trainer = MetaTrainer(state.model, state.editor, settings_of(MetaSettings, cfg), capture)
    return MetaTraining(trainer, stream, state, tracker)


def settings_of(kind: Any, cfg: RunConfig) -> Any:
    """A dataclass of an editor's settings, each under the name that users type; `seed` is the run's."""
    typed = {"seed": cfg.seed, **vars(cfg.editor)}
    values = {key: value.name if isinstance(value, Enum) else value for key, value in typed.items()}
    return kind(**{entry.name: values[entry.name] for entry in fields(kind)})


def hydra_files(composed: DictConfig) -> dict[str, str]:
    """What Hydra itself would write into .hydra/, before anybody knows whether there will be a run."""
    hydra_config = HydraConfig.instance().cfg
    assert hydra_config is not None
    contents = {"config": composed, "hydra": hydra_config, "overrides": HydraConfig.get().overrides.task}
    return {f"{name}.yaml": OmegaConf.to_yaml(content) for name, content in contents.items()}


def plain_config(composed: DictConfig) -> dict[str, Any]:
    """The resolved configuration as JSON holds it, Enums by the words that users type."""
    plain = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


if __name__ == "__main__":
    main()
