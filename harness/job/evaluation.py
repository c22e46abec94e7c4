"""What scores the model of a run, and where the base model's scores are kept."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from config.schema import RunConfig
from data.files import FORMAT
from glue_eval.score import SCORES_FORMAT as TASKS_FORMAT
from glue_eval.score import PreparedTask, prepare_tasks
from glue_eval.tasks import chosen_tasks
from harness.evaluation import SCORES_FORMAT, Downstream, Evaluation, HiddenStates, evaluated_counts, protocols_of
from harness.job.plan import Plan
from harness.run import digest_of, places, versions
from model import LanguageModel


def make_evaluation(cfg: RunConfig, plan: Plan, model: LanguageModel) -> Evaluation:
    return Evaluation(
        model,
        plan.stream,
        plan.tokenize,
        protocols=protocols_of(cfg.dataset.eval_mhop),
        sample=cfg.evaluation.sample,
        resamples=cfg.evaluation.resamples,
        seed=cfg.seed,
        every=cfg.evaluation.every,
        generation=plan.generation,
        passage=plan.passage,
        retention=cfg.evaluation.retention,
    )


def base_cache(cfg: RunConfig, plan: Plan, fingerprint: str) -> Path:
    """The folder that keeps the base model's scores: one for each model, data, and setting that can change a score."""
    sample = cfg.evaluation.sample
    on_the_way = None if sample is None else evaluated_counts(plan.stream, cfg.evaluation.every)
    identity = {
        "model": fingerprint,
        "tokenizer": plan.tokenizer_hash,
        "data": plan.files["eval"].sha256,
        "reading": [FORMAT, cfg.dataset.name, cfg.dataset.field_map(), cfg.seed],
        "questions": [cfg.dataset.answer_tokens.name, asdict(plan.form), cfg.dataset.eval_mhop],
        "records": [cfg.dataset.shuffle, len(plan.stream.edited()), sample, on_the_way],
        "generation": plan.generation and plan.generation.identity(),
        "passage": plan.passage and [plan.passage.sha256, plan.passage.window],
        "arithmetic": [plan.hardware, cfg.model.half.name, cfg.model.compute_tokens, cfg.model.deterministic],
        "versions": [SCORES_FORMAT, versions()],
    }
    return places.CACHE / "base" / digest_of(identity, "base scores")[:16]


def plan_downstream(cfg: RunConfig, plan: Plan) -> Downstream:
    """Read the rows and make the prompts; needs no weights. ValueError, one line, for what is wrong with them."""
    tasks: list[PreparedTask] = []
    if cfg.downstream_eval_steps and cfg.evaluate is None:
        try:
            tasks = prepare_tasks(
                chosen_tasks(cfg.glue.tasks),
                plan.tokenizer,
                plan.outline.context_length,
                origin=cfg.glue.rows,
                few_shot=cfg.glue.few_shot,
                limit=cfg.glue.limit,
            )
        except ValueError as error:
            raise ValueError(f"glue: {error}") from error
    prompts = [[task.rows.task.name, task.rows.source, task.rows.sha256, repr(task.prompts)] for task in tasks]
    identity = {
        "prompts": digest_of(prompts, "prompts"),
        "tokenizer": plan.tokenizer_hash,
        "bootstrap": [cfg.seed, cfg.evaluation.resamples],
        "arithmetic": [plan.hardware, cfg.model.half.name, cfg.model.compute_tokens],
        "versions": [TASKS_FORMAT, versions()],
    }
    return Downstream(tasks, identity, cfg.seed, cfg.evaluation.resamples)


def make_hidden_states(cfg: RunConfig, plan: Plan, model: LanguageModel, folder: Path) -> HiddenStates:
    """What keeps the hidden states of a sample of the questions in the run's folder."""
    size = cfg.diagnostics.hidden_states
    return HiddenStates(model, plan.stream.edited(), plan.tokenize, folder, size, cfg.seed)
