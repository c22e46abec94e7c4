"""The editor of a run, from its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from functools import cache
from typing import Any

import torch
from torch import Tensor

from config.schema import LocateConfig, RunConfig, Token
from data.records import Allocate
from editor.base import EditableModel, Editor, LocateInputs, SecondMoments
from editor.capture import CaptureSettings
from editor.registry import EDITORS, build
from harness.job.facts import Contexts, write_prefixes
from harness.job.moments import KeptOfMoments, second_moments
from harness.job.plan import Plan
from harness.run import MODEL_KEY
from model import LanguageModel


def build_editor(
    cfg: RunConfig,
    model: EditableModel,
    device: torch.device,
    allocate: Allocate | None = None,
    given: LocateInputs | SecondMoments | None = None,
) -> Editor:
    kind = EDITORS[cfg.editor.name]
    capture = CaptureSettings(cfg.editor.passes, cfg.editor.pass_loss, cfg.editor.token is Token.all, allocate)
    return build(kind, model, settings_of(kind.Settings, cfg), device, capture, given)


def make_editor(
    cfg: RunConfig, plan: Plan, model: LanguageModel, fingerprint: str, allocate: Allocate | None = None
) -> Editor:
    """The editor before the first turn, with all it asks for and, where a trained network was named, with that.

    `model` is not edited yet, `fingerprint` is its own. ValueError where the network was trained for another one.
    """
    editor = build_editor(cfg, model, plan.editor_device, allocate, _inputs(cfg, plan, model, fingerprint))
    if plan.network is not None:
        plan.network.require({MODEL_KEY: fingerprint})
        editor.load_state_dict(plan.network.tensors())
    return editor


def _inputs(cfg: RunConfig, plan: Plan, model: LanguageModel, fingerprint: str) -> LocateInputs | SecondMoments | None:
    """Second moments of keys and, for locate-then-edit, facts in contexts; None for editors that ask for neither.

    Moments are made when the first is asked for: an editor may refuse the model before that.
    """
    if not cfg.editor.asks_for_text():
        return None
    made = cache(lambda: second_moments(cfg, plan, model, fingerprint))

    def moments(name: str) -> Tensor:
        return made().pop(name)

    if not isinstance(cfg.editor, LocateConfig):
        return moments
    prefixes = write_prefixes(model, plan.tokenizer, cfg.editor.prefixes, cfg.editor.prefix_tokens)
    contexts = Contexts(cfg, plan.tokenizer, plan.form, prefixes, plan.outline.context_length)
    keep = KeptOfMoments(plan.editor_device, plan.ranks.writes_cache, model.all_ranks)
    return LocateInputs(contexts, moments, keep)


def memory_of_run(
    config: Mapping[str, Any],  # of run.json
    model: EditableModel,
    device: torch.device,
) -> Editor:
    """The editor of a run whose edits lie beside the weights, at work in `model`; its state is still to be loaded."""
    editor: Editor = EDITORS[config["editor"]["name"]](model, memory_settings(config), device)
    return editor


def memory_settings(config: Mapping[str, Any]) -> Any:
    """The settings of that editor; ValueError where the run is one of a version that had other ones."""
    kind = EDITORS[config["editor"]["name"]].Settings
    typed = {"seed": config["seed"], **config["editor"]}
    missing = [entry.name for entry in fields(kind) if entry.name not in typed]
    if missing:
        raise ValueError(f"run.json: has no editor.{missing[0]}, another version wrote it; ask it with that version")
    return _chosen(kind, typed)


def settings_of(kind: Any, cfg: RunConfig) -> Any:
    """A dataclass of an editor's settings, each under the name that users type; `seed` is the run's."""
    typed = {"seed": cfg.seed, **vars(cfg.editor)}
    return _chosen(kind, {key: value.name if isinstance(value, Enum) else value for key, value in typed.items()})


def _chosen(kind: Any, typed: Mapping[str, Any]) -> Any:
    return kind(**{entry.name: typed[entry.name] for entry in fields(kind)})
