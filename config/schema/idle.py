"""Settings that a run ignores, a line each, for a warning: they are mistakes of thought, not of spelling."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from enum import Enum

from config.schema.checks import Section
from config.schema.corpus import CorpusConfig
from config.schema.editor import OF_PRESETS, EditorConfig, HyperNetworkConfig, PreheatMode
from config.schema.evaluation import GlueConfig
from config.schema.model import ModelConfig
from config.schema.run import RunConfig


def settings_without_effect(run: RunConfig, typed: Collection[str] = ()) -> list[str]:
    """Those that were set, and that others leave without effect, each with the reason.

    `typed`: the keys that the user wrote down, for values that presets bring along too.
    """
    if run.evaluate is not None:
        return list(_where_nothing_is_edited(run))
    return [
        *_of_warm_up(run),
        *_of_editor(run.editor, typed),
        *_of_step(run, typed),
        *_that_only_other_editors_ask_for(run),
        *_of_text(run),
        *_of_model(run.model),
        *_of_output(run),
        *_of_evaluation(run),
    ]


def _where_nothing_is_edited(run: RunConfig) -> Iterator[str]:
    edits = {
        "evaluation.every": run.evaluation.every,
        "evaluation.retention": run.evaluation.retention,
        "downstream_eval_steps": run.downstream_eval_steps,
        "model_cache": run.model_cache,
    }
    yield from (f"{key}={value} has no effect with evaluate={run.evaluate}" for key, value in edits.items() if value)


def _of_warm_up(run: RunConfig) -> Iterator[str]:
    preheat, turns, used = run.editor.preheat_mode, run.dataset.num_warm_up, run.dataset.warm_up_key
    if preheat is PreheatMode.none and turns:
        yield f"{turns} warm-up turns have no effect with editor.preheat_mode=none"
    if preheat not in (PreheatMode.none, PreheatMode.start) and turns == 0:
        yield f"editor.preheat_mode={preheat.name} has no effect with {used}=0"
    unused = next(key for key in ("num_seq_zsre", "num_seq_wikibigedit") if key != used)
    if getattr(run, unused) not in (None, turns):
        yield f"{unused}={getattr(run, unused)} has no effect with dataset={run.dataset.name}; {used} counts there"


def _of_editor(editor: EditorConfig, typed: Collection[str]) -> Iterator[str]:
    if isinstance(editor, HyperNetworkConfig) and not editor.trains() and editor.save_checkpoint:
        why = "editor.n_epochs=0" if editor.load_checkpoint is None else "editor.load_checkpoint"
        yield f"editor.save_checkpoint=true has no effect with {why}: no network is trained"
    causes = dict.fromkeys(editor.unused(), f"editor={editor.name}") | editor.ignored()
    yield from keys_without_effect(editor, causes, typed)


def _of_step(run: RunConfig, typed: Collection[str]) -> Iterator[str]:
    editor = run.editor
    if "model.lr" in typed and ("lr" in editor.unused() or editor.lr != run.model.lr):
        yield f"model.lr={run.model.lr} has no effect with editor={editor.name}, whose step is {editor.step_key()}"


def keys_without_effect(editor: EditorConfig, causes: Mapping[str, str], typed: Collection[str] = ()) -> Iterator[str]:
    """Of these keys of an editor those that were set, each with the cause why it does nothing."""
    for key, cause in causes.items():
        value = getattr(editor, key)
        if f"editor.{key}" in typed or (_is_set(editor, key) and value not in OF_PRESETS.get(key, ())):
            yield f"editor.{key}={value.name if isinstance(value, Enum) else value} has no effect with {cause}"


def _that_only_other_editors_ask_for(run: RunConfig) -> Iterator[str]:
    for key in run.editor.unused_elsewhere():
        parent, _, name = key.rpartition(".")
        section = getattr(run, parent) if parent else run
        if _is_set(section, name):
            yield f"{key}={getattr(section, name)} has no effect with editor={run.editor.name}"


def _of_text(run: RunConfig) -> Iterator[str]:
    if run.corpus != CorpusConfig() and not run.editor.asks_for_text():
        yield f"corpus.* has no effect with editor={run.editor.name}, which asks for no text"
    elif run.editor.preserves_unrelated():
        idle = (key for key in ("path", "questions") if _is_set(run.corpus, key))
        yield from (f"corpus.{key} has no effect with editor.preserve_text=unrelated" for key in idle)


def _of_model(model: ModelConfig) -> Iterator[str]:
    made = model.name_or_path.startswith("random:")  # whose preset says how many layers it has
    if _is_set(model, "auto_layers") and model.edit_modules != "auto" and not made:
        yield f"model.auto_layers={model.auto_layers} has no effect with model.edit_modules, which names the modules"
    if model.revision is not None and model.name_or_path.startswith(("pypi:", "random:")):
        yield f"model.revision={model.revision} has no effect with {model.name_or_path}, which is not of the hub"


def _of_output(run: RunConfig) -> Iterator[str]:
    if run.model_cache_dir is not None and not run.model_cache:
        yield f"model_cache_dir={run.model_cache_dir} has no effect without model_cache=true"
    if _is_set(run, "keep") and not run.checkpoint_every:
        yield f"keep={run.keep} has no effect with checkpoint_every=0"


def _of_evaluation(run: RunConfig) -> Iterator[str]:
    if run.glue != GlueConfig() and not run.downstream_eval_steps:
        yield "glue.* has no effect with downstream_eval_steps=0"
    if run.evaluation.prompt is not None and not (run.evaluation.generation or run.evaluation.examples):
        why = "evaluation.generation=off and evaluation.examples=0"
        yield f"evaluation.prompt={run.evaluation.prompt.name} has no effect with {why}"


def _is_set(section: Section, key: str) -> bool:
    """Whether it has another value than nobody's."""
    return bool(getattr(section, key) != next(entry.default for entry in fields(section) if entry.name == key))
