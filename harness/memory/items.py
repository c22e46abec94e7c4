"""What a run keeps, in bytes, from its configuration and the outline of its model; and what would make it smaller."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, reduce

import torch

from config.schema import (
    Dtype,
    EditorConfig,
    EditPrecision,
    FineTuningConfig,
    GraceConfig,
    LocateConfig,
    RunConfig,
    WiseConfig,
)
from editor.registry import EDITORS
from harness.memory.asked import BEFORE_TURNS, SINGLE, Asked, Facts, Item
from harness.memory.beside import of_grace, of_wise
from harness.memory.captured import of_captured
from harness.memory.located import of_located, of_moments
from harness.memory.passes import scored
from harness.memory.tuned import of_tuned
from model.source import Outline

Family = Callable[[Asked], Iterator[Item]]

OF_THE_MODEL: dict[type[EditorConfig], Family] = {
    # editors that work on the loaded model, by what configures them; all others capture gradients
    LocateConfig: of_located,
    FineTuningConfig: of_tuned,
    GraceConfig: of_grace,
    WiseConfig: of_wise,
}


def items(cfg: RunConfig, outline: Outline, facts: Facts, device: torch.device) -> list[Item]:
    """All that a run keeps; `device` is where the model will be."""
    asked = Asked(cfg, outline, facts, device)
    found = [*_of_weights(asked), *of_moments(asked), *_family(cfg)(asked), *_of_evaluation(asked)]
    return [one for one in found if one.bytes]


def _family(cfg: RunConfig) -> Family:
    for kind, family in OF_THE_MODEL.items():
        if isinstance(cfg.editor, kind):
            return family
    if not hasattr(EDITORS[cfg.editor.name], "update"):
        raise ValueError(f"editor={cfg.editor.name}: nobody has said what it keeps; harness/memory/items.py is where")
    return of_captured


def _of_weights(asked: Asked) -> Iterator[Item]:
    weights, half = asked.outline.weights, asked.cfg.model.half.name
    yield Item("weights", weights * asked.number, f"{weights:.3g} numbers in {half}", from_start=True)
    yield Item("originals", asked.entries * asked.number, "edited weights as they were loaded", from_start=True)
    masters = asked.entries * SINGLE * asked.is_mastered
    yield Item("masters", masters, "edited weights in float32", from_start=True)


def _of_evaluation(asked: Asked) -> Iterator[Item]:
    yield Item("set aside", asked.copy, "edited weights, while the original ones answer", while_in="evaluation")
    yield from scored(asked)


def highest(found: list[Item], model_and_editor: bool) -> int:
    """Bytes at the most crowded time, on the model's device; with the editor's, where that is the same one."""
    here = [one for one in found if model_and_editor or not one.of_editor]

    def at(part: str) -> int:
        always = (one for one in here if one.while_in is None and (one.from_start or part not in BEFORE_TURNS))
        return sum(one.bytes for one in always) + sum(one.bytes for one in here if one.while_in == part)

    return max(at(part) for part in {one.while_in for one in found if one.while_in is not None})


SWITCHES: dict[str, Callable[[RunConfig], RunConfig]] = {
    # what makes a run smaller, what changes its numbers least first
    "diagnostics.previous=0": lambda cfg: replace(cfg, diagnostics=replace(cfg.diagnostics, previous=0)),
    "model.compute_tokens=1024": lambda cfg: replace(cfg, model=replace(cfg.model, compute_tokens=1024)),
    "editor.cache_dir=FOLDER": lambda cfg: replace(cfg, editor=replace(cfg.editor, cache_dir="FOLDER")),
    "editor_device=cpu": lambda cfg: replace(cfg, editor_device="cpu"),
    "model.compute_tokens=256": lambda cfg: replace(cfg, model=replace(cfg.model, compute_tokens=256)),
    "model.half=bf16": lambda cfg: replace(cfg, model=replace(cfg.model, half=Dtype.bf16)),
    "model.edit_precision=in_place": lambda cfg: replace(
        cfg, model=replace(cfg.model, edit_precision=EditPrecision.in_place)
    ),
}


def what_fits(cfg: RunConfig, size: Callable[[RunConfig], int], limit: int) -> tuple[list[str], int]:
    """The fewest of the switches with which the run fits, and what it needs then.

    One that is enough alone is taken alone, the first; otherwise they add up in order, each that saves something, and
    those that are not needed for it go again, the last first. Where even all are too few, those that save something.
    """

    @cache
    def needs(*names: str) -> int:
        return size(reduce(lambda changed, name: SWITCHES[name](changed), names, cfg))

    taken: tuple[str, ...] = next(((name,) for name in SWITCHES if needs(name) <= limit), ())
    for name in SWITCHES:
        if needs(*taken) > limit and needs(*taken, name) < needs(*taken):
            taken = (*taken, name)
    enough = max(limit, needs(*taken))
    for name in reversed(taken):
        fewer = tuple(other for other in taken if other != name)
        taken = fewer if needs(*fewer) <= enough else taken
    return list(taken), needs(*taken)
