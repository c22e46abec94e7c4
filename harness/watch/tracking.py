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

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Final, Literal, Self

from data.records import Phase
from harness.run import TRAINING_PHASES, RunFolder, Stage, exit_code, leaves, one_line

log = logging.getLogger(__name__)

WandbMode = Literal["online", "offline", "disabled"]
Scores = Mapping[str, Any]  # {"ES": {"mean", "low", "high", "n"}, ...}; a score without an interval is a plain number

TAG_LENGTH: Final = 64  # wandb refuses longer tags


@dataclass(frozen=True, slots=True)
class WandbSettings:
    """The `tracker` group of the config. `group` None = data set and model, so that editors and seeds compare."""

    mode: WandbMode = "offline"
    project: str = "stableedit"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()


class _NullSink:
    """Where the tracker sends what the run folder already holds; wandb disabled: the callers need no `if`."""

    def log(self, metrics: Mapping[str, float]) -> None: ...
    def summarize(self, metrics: Mapping[str, float]) -> None: ...
    def close(self, exit_code: int) -> None: ...


class _WandbSink(_NullSink):
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
            if phase in TRAINING_PHASES:  # by name, which outdoes every pattern
                self._run.define_metric(name, step_metric=f"{phase}/turn", hidden=name == f"{phase}/turn")
            elif name.endswith(("_low", "_high")):  # for custom charts; no chart of their own beside each score
                self._run.define_metric(name, step_metric="turn", hidden=True)
        self._defined |= {*metrics}
        self._run.log(dict(metrics), step=self._step)
        self._step += 1

    def summarize(self, metrics: Mapping[str, float]) -> None:
        self._run.summary.update(dict(metrics))

    def close(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


def check_wandb(mode: WandbMode) -> None:
    """ValueError where wandb's server is asked for and this machine has no login, without a prompt.

    Whether the server accepts the key is seen when the run starts.
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
    """What wandb's service reads as it starts, unless the user has set it: its logs go into the run folder.

    An offline run sends no telemetry either, which wandb's offline mode alone does not see to.
    """
    wanted = {"WANDB_CACHE_DIR": str(folder)} | ({"WANDB_ERROR_REPORTING": "false"} if mode == "offline" else {})
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _open_sink(folder: RunFolder, settings: WandbSettings) -> _NullSink:
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
    """Sends each number of a run to its folder and to wandb; an exception marks the run failed in both, and goes on."""

    def __init__(self, folder: RunFolder, settings: WandbSettings) -> None:
        self.folder = folder
        self._settings = settings
        self._sink = _NullSink()

    def __enter__(self) -> Self:
        try:
            self._sink = _open_sink(self.folder, self._settings)
        except BaseException as error:
            self._fail(error)
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        code = exit_code(error)
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
        self._sink.log({"turn": turn, **_numbers({"glue": means})})

    def results(self, results: Mapping[str, Any]) -> None:
        """Record the end of a run: `results.json`, and in wandb's summary base/, final/, change/ and cost/."""
        self.folder.write_results(results)
        base, final = _means(results.get("base", {})), _means(results.get("final", {}))
        change = {name: final[name] - base[name] for name in final if name in base}
        parts = {"base": base, "final": final, "change": change, "cost": results.get("cost", {})}
        self._sink.summarize(_numbers(parts))

    def _fail(self, error: BaseException) -> None:
        try:
            self.folder.fail(error)
        except OSError:  # a full disk may be the very error under way, and that one must reach the user
            log.exception("run.json could not be marked failed")


def turn_metrics(line: Mapping[str, Any]) -> dict[str, float]:
    """A line of `turns.jsonl` as wandb metrics: the prefix before the first slash becomes a section of charts.

    update/all is over the turn's modules: Frobenius norm of the whole update, the cosine to the update before it that
    is largest in size, the largest drift. Meta-training has sections of its own, over its own count of turns.
    """
    if line["phase"] in TRAINING_PHASES:
        kept = ("turn", "loss", "meta_loss", "grad_norm", "seconds")
        return _numbers({line["phase"]: {name: line.get(name) for name in kept}})
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
    return {"turn": line["turn"], **_numbers(parts)}


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
    return _numbers({"scores": metrics})


_SCORE_PARTS: Final = {"": "mean", "_low": "low", "_high": "high"}


def _means(scores: Scores) -> dict[str, float]:
    means = {name: score.get("mean") if isinstance(score, Mapping) else score for name, score in scores.items()}
    return {name: mean for name, mean in means.items() if isinstance(mean, int | float)}


def _numbers(tree: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in nested mappings, as path/to/number; null and text are for the files only."""
    return {path: value for path, value in leaves(tree, "/") if isinstance(value, int | float)}
