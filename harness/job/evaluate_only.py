"""Scores of a model that was edited before, or elsewhere: a run's protocols without its turns (`evaluate=FOLDER`)."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from config.schema import RunConfig
from harness.job.evaluation import base_cache, make_evaluation
from harness.job.loading import load_model
from harness.job.other_ranks import make_scoring, new_record
from harness.job.plan import Plan, wandb_settings
from harness.job.resume import require_model
from harness.run import RunFolder, end_if_asked, places, stated_form
from harness.watch import Tracker, show_results
from model.source import ModelSource, load_tokenizer, locate

log = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def evaluate_only(
    cfg: RunConfig,
    plan: Plan,
    source: ModelSource,  # of `evaluated_source`
    about: dict[str, Any],
    folder: Path,
    earlier: RunFolder | None,
) -> None:
    """Score the base model and the one that `evaluate` names, on the facts a run of this configuration would edit.

    Leaves run.json, scores.jsonl, records.jsonl and results.json in `folder`, or in that of `earlier`, which was
    stopped and begins anew. Where `evaluate` names the base model itself, there is no second one to score.
    """
    model = load_model(cfg, plan)
    about["model"]["fingerprint"] = fingerprint = model.fingerprint()
    end_if_asked()
    cache = base_cache(cfg, plan, fingerprint)
    if earlier is not None:
        require_model("model.name_or_path", earlier.run["model"], about["model"])
        earlier.run["model"] = about["model"]
        earlier.go_on({}, 0, about["overrides"])
    run_folder = earlier or new_record(plan.ranks, folder, about)
    with run_folder, Tracker(run_folder, wandb_settings(cfg.tracker)) as tracker:
        seconds: dict[str, float] = {}
        score = make_scoring(plan.ranks, make_evaluation(cfg, plan, model), tracker, seconds)
        results: dict[str, Any] = {"base": score("base", 0, cache)}
        if source.path != plan.source.path:
            texts = None if plan.examples is None else plan.examples.texts(model)
            del model, score  # to make room for the other
            with _under_its_own_key():
                edited = load_model(cfg, plan, source)
            run_folder.run["model"]["evaluated"]["fingerprint"] = edited.fingerprint()
            end_if_asked()
            evaluation = make_evaluation(cfg, plan, edited)
            evaluation.compare_with_base(cache)
            score = make_scoring(plan.ranks, evaluation, tracker, seconds)
            results["final"] = score("final", len(plan.stream))
            score.examples(plan.examples, texts)
        results["cost"] = {"seconds": seconds}
        tracker.results(results)
    show_results(results, run_folder.path)


@contextlib.contextmanager
def _under_its_own_key() -> Iterator[None]:
    """What is wrong with the model to score is not said of the base model's key."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("model.name_or_path=", "evaluate=")) from error


def evaluated_source(cfg: RunConfig, plan: Plan) -> ModelSource | None:
    """The model that `evaluate` names; None where it names none.

    ValueError where that is no model, or has another tokenizer than the base model.
    """
    named = cfg.evaluate
    if named is None:
        return None
    folder = Path(named).expanduser()
    if folder.is_dir():
        _check_folder(named, folder)
        _warn_of_form(cfg, named, folder)
    elif named.startswith((".", "/", "~")):
        raise ValueError(f"evaluate={named}: no such folder; give a model's folder or a Hugging Face name")
    with _under_its_own_key():
        path = locate(named, places.CACHE)
        source = ModelSource(path, cfg.model.class_name, trust_remote_code=cfg.model.trust_remote_code)
        tokenizer = plan.tokenizer if path == plan.source.path else load_tokenizer(source)
    if tokenizer.get_vocab() != plan.tokenizer.get_vocab():
        raise ValueError(
            f"evaluate={named}: its tokenizer is not that of model.name_or_path={cfg.model.name_or_path}; "
            "set model=... to the model that it was edited from"
        )
    return source


def _check_folder(named: str, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        inside = folder / "model" / "config.json"
        remedy = f"evaluate={named.rstrip('/')}/model is one" if inside.is_file() else "name a model's folder"
        raise ValueError(f"evaluate={named}: no config.json in that folder; {remedy}")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(
            f"evaluate={named}: no tokenizer in that folder ({', '.join(TOKENIZER_FILES)}); "
            "save the base model's tokenizer into it"
        )


def _warn_of_form(cfg: RunConfig, named: str, folder: Path) -> None:
    """Where the run that a model was exported from asked it in another form than this one does."""
    before, now = stated_form(folder), cfg.asked_form().name
    if before not in (None, now):
        log.warning(
            "evaluate=%s: its run asked it in the form %s, and here it is asked in the form %s; dataset.prompt_form=%s "
            "asks as its run did",
            named,
            before,
            now,
            before,
        )
