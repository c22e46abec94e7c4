"""Edit a language model, turn by turn:  python main.py dataset=zsre editor=stableedit

Reads top to bottom: compose, check everything that needs no weights, load, score the base, edit, score, save. A run
that was stopped goes on with resume=auto, bit for bit.
"""

from __future__ import annotations

import startup  # noqa: F401  first

# isort: split
import errno
import logging
import os
import shlex
import signal
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

import hydra
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from config.compose import as_typed, check_command_line, typed_keys, waiting_for_choices
from config.schema import RunConfig, to_run_config
from data.progress import progress_bar
from data.records import Allocate
from data.stream import EditStream
from editor.capture import CaptureEditor
from editor.hypernetwork import HyperNetworkEditor
from editor.meta_train import MetaSettings, MetaTrainer
from editor.stopwatch import Stopwatch
from harness import job
from harness.evaluation import Downstream
from harness.job import LoopState, Plan
from harness.ranks import init_ranks, launch_command
from harness.run import (
    Interrupted,
    Interruption,
    RunFolder,
    check_launcher,
    end_if_asked,
    end_on,
    form_note,
    last_lines,
    launcher_errors,
    prepare_libraries,
    requeued_after_checkpoint,
    share_terminal,
    show_any_text,
)
from harness.run.places import CACHE
from harness.watch import Tracker, TurnDiagnostics, forget_peaks, show_results, turn_note
from model import BESIDE_WEIGHTS
from model.source import stamp

log = logging.getLogger(__name__)

REPORTED_ERRNOS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
}
"""Errors of the file system that end in one line instead of a trace."""


def main() -> None:
    """The command line. A mistake of the user's ends in one line, and exit code 1."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then leaves errors to us instead of showing a trace
    prepare_process()
    try:
        with init_ranks() as ranks, job.silence_other_ranks(ranks, sys.argv[1:]) as arguments, ranks.in_step():
            check_launcher(arguments, ranks.size)
            check_command_line(arguments)
            sys.argv[1:] = waiting_for_choices(arguments)
            run_job()
    except (ValueError, FloatingPointError, OSError) as error:
        if not (line := error_line(error)):
            raise
        sys.exit(line)
    except launcher_errors() as error:
        sys.stderr.write(f"{last_lines(error)}\n")
        sys.exit(
            "error: a job ended without a result (above), and others may still run; once they have ended, the same "
            "command with resume=auto goes on"
        )
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)  # 128 + SIGINT, as shells have it


def prepare_process() -> None:
    """What holds for all of a process; a job that a launcher starts has one of its own."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    show_any_text()
    prepare_libraries()
    end_on(signal.SIGTERM)


@hydra.main(version_base="1.3", config_path="config", config_name="config")
def run_job(composed: DictConfig) -> None:
    """One run, or one of a sweep."""
    prepare_process()
    share_terminal(HydraConfig.get().launcher["_target_"])
    in_sweep = HydraConfig.get().mode is RunMode.MULTIRUN
    try:
        with requeued_after_checkpoint(), init_ranks().in_step():
            cfg = job.rank_settings(to_run_config(composed), init_ranks())
            run(cfg, composed, Path(HydraConfig.get().runtime.output_dir))
    except Interrupted as stop:
        raise SystemExit(stop.code) from None  # which any process can read
    except Exception as error:
        line = error_line(error)
        if line and not in_sweep:
            sys.exit(line)
        if line:  # the sweep goes on with its other jobs and ends with this error, maybe in another process
            log.error("this job failed: %s", line.removeprefix("error: "))
            raise ValueError(line.removeprefix("error: ")) from error
        if in_sweep:
            log.exception("this job failed")
        raise


def error_line(error: Exception) -> str:
    """What the user did, or the file system refuses, in one line; empty for any other error, a fault of ours."""
    if not isinstance(error, ValueError | FloatingPointError | OSError):
        return ""
    cause = error.__cause__
    if isinstance(cause, OSError) and str(error).startswith("Unable to configure handler"):
        error = cause  # logging, about the run's main.log
    if not isinstance(error, OSError):
        return f"error: {' '.join(str(error).split())}"
    if error.errno not in REPORTED_ERRNOS:
        return ""
    where = f"{error.filename}: " if error.filename else ""
    in_cache = error.filename and Path(os.fsdecode(error.filename)).is_relative_to(CACHE)
    other = "for the cache, by the environment: XDG_CACHE_HOME=FOLDER" if in_cache else "as with hydra.run.dir=FOLDER"
    return f"error: {where}{error.strerror}; free some space, or choose another folder, {other}"


def run(cfg: RunConfig, composed: DictConfig, folder: Path) -> None:
    """Look at everything that can be wrong before the model is loaded; then edit, unless it has been done already."""
    forget_peaks()
    typed = as_typed(HydraConfig.get().overrides.task)
    plan = job.make_plan(cfg, init_ranks(), typed_keys(typed))
    downstream = job.plan_downstream(cfg, plan)
    evaluated = job.evaluated_source(cfg, plan)
    about: dict[str, Any] = {
        "config": plain_config(composed),
        "overrides": typed,
        "inputs": plan.inputs | downstream.inputs,
        "model": {"name": cfg.model.name_or_path, "revision": cfg.model.revision, "files": stamp(plan.source)},
        "device": plan.hardware,
        "hydra": hydra_files(composed),
    }
    if evaluated is not None:
        about["model"]["evaluated"] = {"name": cfg.evaluate, "files": stamp(evaluated)}
    about = job.require_alike(plan.ranks, about)
    end_if_asked()
    with job.earlier_run(cfg.resume, roots_of_runs(), about, folder, plan.ranks) as earlier:
        if earlier is not None:
            job.move_into(earlier.path, folder, link=HydraConfig.get().mode is RunMode.MULTIRUN)
        if earlier is not None and earlier.run["status"] == "finished":
            job.require_weights(cfg, plan, earlier, about, evaluated)
            log.info("resume=%s: finished already, %s; these are its results", cfg.resume, earlier.run["finished"])
            for line in job.changed_circumstances(earlier.run, about["device"]):
                log.warning("%s: these results are of then; leave resume out for new ones", line)
            for line in job.missing_outputs(cfg, earlier.path):
                log.warning("%s", line)
            show_results(earlier.results(), earlier.path)
            if cfg.diagnostics.report and evaluated is None and not earlier.is_drawn():
                draw(earlier.path)
        elif evaluated is not None:
            job.evaluate_only(cfg, plan, evaluated, about, folder, earlier)
        else:
            job.check_export(cfg, None if earlier is None else earlier.run.get("saved"))
            edit(cfg, plan, downstream, about, folder, earlier)


def edit(
    cfg: RunConfig, plan: Plan, downstream: Downstream, about: dict[str, Any], folder: Path, earlier: RunFolder | None
) -> None:
    """Edit from the first turn, or from where `earlier` stands. A new run is recorded in `folder`."""
    with job.capture_memory(cfg, plan.stream, plan.outline.shapes) as allocate:
        state = begin(cfg, plan, about, folder, earlier, allocate)
        results = loop(cfg, plan, downstream, state)
    show_results(results, state.folder.path)
    if cfg.diagnostics.report:
        draw(state.folder.path)


def begin(
    cfg: RunConfig,
    plan: Plan,
    about: dict[str, Any],
    folder: Path,
    earlier: RunFolder | None,
    allocate: Allocate | None,
) -> LoopState:
    """Model, editor and run folder as they are before the next turn."""
    start = None if earlier is None else job.newest_checkpoint(earlier)
    model = job.load_model(cfg, plan)
    about["model"]["fingerprint"] = model.fingerprint()
    editor = job.make_editor(cfg, plan, model, about["model"]["fingerprint"], allocate)
    if cfg.model_cache and model.is_wrapped:
        raise ValueError(f"model_cache=true: {BESIDE_WEIGHTS}; leave it out")
    diagnostics = TurnDiagnostics(*model.devices, plan.editor_device, previous=cfg.diagnostics.previous, seed=cfg.seed)
    state = LoopState(earlier or job.new_record(plan.ranks, folder, about), model, editor, diagnostics, cfg.keep)
    if earlier is not None:
        state.restore(start, about, plan.ranks)
    return state


def loop(cfg: RunConfig, plan: Plan, downstream: Downstream, state: LoopState) -> dict[str, Any]:
    """Score the base, train the editor's network, edit turn by turn, score: the results. This order is the run."""
    model, editor, stream = state.model, state.editor, plan.stream
    with (
        state.folder,
        Tracker(state.folder, job.wandb_settings(cfg.tracker)) as tracker,
        Interruption() as interruption,
    ):
        score = job.make_scoring(plan.ranks, job.make_evaluation(cfg, plan, model), tracker, state.seconds)
        hidden = job.make_hidden_states(cfg, plan, model, state.folder.path)
        try:
            base = score.base(state.begun, job.base_cache(cfg, plan, state.fingerprint))
            downstream.base(model, tracker, state.fingerprint)
            if not state.begun:
                hidden.keep("base")
            train(cfg, plan, state, tracker, interruption)

            with progress_bar("editing", len(stream), "turns", done=state.done, keep=True) as bar:
                for turn in stream.from_turn(state.done):
                    score.retention(state.done)
                    if is_due(cfg.evaluation.every, state.done, stream):
                        score("eval", state.done)
                    if is_due(cfg.downstream_eval_steps, state.done, stream):
                        downstream(model, tracker, state.done)
                    with interruption.held():
                        watch = Stopwatch(*model.devices, plan.editor_device)
                        with watch.measure("total"), model.reading_once(), model.telling(bar.within):
                            outcome = editor.edit(model, turn)
                        if not outcome.updates:  # what the turn changed is in the editor
                            model.require_same(editor.state_dict)
                        line = state.diagnostics.line(turn, outcome, editor, watch.seconds["total"])
                        tracker.turn(line)
                        state.done = turn.index + 1
                        state.save_if_due(cfg.checkpoint_every, len(stream))
                    bar.advance(1, turn_note(line["edits_total"], turn.phase))

            final = score("final", state.done)
            retained = score.retained()
            downstream(model, tracker, state.done)
            hidden.keep("edited")
            score.examples(plan.examples)
            results = {"base": base, "final": final, **retained, "cost": state.cost()}
            tracker.results(results)
            save_model(cfg, state, interruption)
            return results
        except Interrupted as stop:
            if cfg.checkpoint_every and state.done:
                state.save()
            in_sweep = HydraConfig.get().mode is RunMode.MULTIRUN
            command = state.how_to_go_on(launch_command(plan.ranks), as_typed(HydraConfig.get().overrides.task))
            command += "; or repeat the sweep with resume=auto, for its other jobs too" * in_sweep
            log.warning("%s after turn %d of %d; %s", stop.signal, state.done, len(stream), command)
            raise


def train(
    cfg: RunConfig,
    plan: Plan,
    state: LoopState,
    tracker: Tracker,
    interruption: Interruption,
) -> None:
    """The meta-training of the editor's network, from wherever the run's state has it; nothing where there is none."""
    if plan.training is None:
        return
    keeper = job.network_keeper(cfg, state.folder.path, state.model.shapes, state.fingerprint)
    if state.done:
        keeper.keep_late(state.editor, len(plan.training), state.done)
        return
    assert isinstance(state.editor, CaptureEditor)
    assert isinstance(state.editor.rule, HyperNetworkEditor)
    settings = job.settings_of(MetaSettings, cfg)
    trainer = MetaTrainer(state.model, state.editor.rule, settings, state.editor.settings)
    job.MetaTraining(trainer, plan.training, state, tracker).run(cfg.checkpoint_every, keeper, interruption)


def save_model(cfg: RunConfig, state: LoopState, interruption: Interruption) -> None:
    """The edited model, where it is wanted and not there yet."""
    if not cfg.model_cache or job.is_saved(cfg, state.folder.path, state.folder.run.get("saved")):
        return
    with interruption.held():
        state.model.export(target := job.export_folder(cfg, state.folder.path), form_note(cfg.asked_form().name))
        state.folder.note(saved=cfg.model_cache_dir)
    log.info("the edited model is in %s", target)


def draw(path: Path) -> None:
    """The report of a finished run, which stays finished where its report fails."""
    try:
        from harness.report import write_report  # matplotlib takes a second

        log.info("the report is %s", write_report([path]))
    except Exception as error:
        again = f"python -m harness.report {shlex.quote(str(path))}"
        log.warning("no report: %s; the run is whole, and %s draws it again", error, again, exc_info=True)


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


def hydra_files(composed: DictConfig) -> dict[str, str]:
    """What Hydra itself would write into .hydra/, before anybody knows whether there will be a run."""
    hydra_config = HydraConfig.instance().cfg
    assert hydra_config is not None
    contents = {"config": composed, "hydra": hydra_config, "overrides": as_typed(HydraConfig.get().overrides.task)}
    return {f"{name}.yaml": OmegaConf.to_yaml(content) for name, content in contents.items()}


def plain_config(composed: DictConfig) -> dict[str, Any]:
    """The resolved configuration as JSON holds it, Enums by the words that users type."""
    plain = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


if __name__ == "__main__":
    main()
