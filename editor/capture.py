"""Gradient-capture editors: capture what the facts do inside the model, work out updates, apply them; maybe again.

Letters: N rows of a turn, d_k key size, d_v value size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from data.records import (
    Allocate,
    Capture,
    LowRankUpdate,
    Phase,
    Turn,
    TurnCapture,
    WeightChange,
    row_indices,
    row_offsets,
)
from editor.base import Edit, EditableModel, TurnRule, UpdateRule
from editor.stopwatch import Stopwatch
from editor.updates import summed


@dataclass(frozen=True)
class CaptureSettings:
    """How often a turn is captured and updated, and at which positions.

    The published methods have one pass. Later ones capture and push only the facts that the model does not say yet: it
    says one when all answer tokens are its first choice or, with `pass_loss`, when all have a -log p below that.
    Replayed facts enter in the first pass, and are pushed only where the model does not say them. Warm-up turns have
    one pass: their facts are there for the statistics, and pushing them further only harms the model.
    """

    passes: int = 1
    pass_loss: float | None = None  # nats
    every_token: bool = False  # captures at all positions that predict something, not only at those of the answer
    allocate: Allocate | None = None  # where captures lie; None = in memory


class CaptureEditor:
    """An Editor from a rule that turns captures into updates: capture -> update -> apply, `passes` times a turn."""

    def __init__(self, rule: UpdateRule, device: torch.device, settings: CaptureSettings = CaptureSettings()) -> None:
        """`device` is where the rule computes."""
        self.rule, self.device, self.settings = rule, device, settings
        self.statistics, self.state_dict, self.load_state_dict = rule.statistics, rule.state_dict, rule.load_state_dict

    def edit(self, model: EditableModel, turn: Turn) -> Edit:
        """Raises FloatingPointError, saying which weights the model has then, where a number is not finite."""
        if isinstance(self.rule, TurnRule) and not self.rule.begin(turn.phase):
            return Edit(None, {}, {}, {}, {"passed_over": True})
        watch = Stopwatch(*model.devices, self.device)
        todo, done = turn.with_replay(), _Passes(len(turn.sequences))
        passes = self.settings.passes if turn.phase is Phase.EDIT else 1
        while len(done.losses) < passes and todo.sequences:
            try:
                todo = self._pass(model, todo, done, watch)
                model.tell(len(done.losses) / passes)
            except FloatingPointError as error:
                number, before = (f", pass {len(done.losses) + 1}", "pass") if done.losses else ("", "turn")
                message = f"turn {turn.index}{number}: {error}; the weights are those of the {before} before"
                raise FloatingPointError(message) from error
        updates, changes = summed(done.updates, done.changes)
        return Edit(done.loss, updates, changes, watch.seconds, done.details())

    def _pass(self, model: EditableModel, todo: Turn, done: _Passes, watch: Stopwatch) -> Turn:
        """One capture, update and application; the facts that are left for the next one."""
        limit, every_token = self.settings.pass_loss, self.settings.every_token
        pushed_anyway = 0 if done.losses else done.new
        with watch.measure("capture"):
            captured = model.capture(todo, every_token, self.settings.allocate)
            if not done.losses:
                done.loss = _own_loss(captured, todo, done.new)
            said = captured.all_correct if limit is None else [loss < limit for loss in captured.max_token_loss]
            unsaid = [i for i, is_said in enumerate(said) if i < pushed_anyway or not is_said]
            modules = captured.modules
            if len(unsaid) < len(said):
                rows = row_indices(unsaid, row_offsets(todo.sequences, every_token))
                modules = {name: Capture(each.keys[rows], each.value_grads[rows]) for name, each in modules.items()}
            todo = todo.part(unsaid)
        if todo.sequences:
            with watch.measure("update"):
                updates = self.rule.update(modules, todo.phase)
            with watch.measure("apply"):
                changes = model.apply(updates)
            done.updates.append(updates)
            done.changes.append(changes)
        done.losses.append(captured.loss)
        done.facts.append(len(todo.sequences))
        return todo


@dataclass
class _Passes:
    """What the passes of a turn did so far."""

    new: int  # facts of the turn's own, which its first pass pushes whether they are said or not
    loss: float = math.nan  # of these, before the turn
    losses: list[float] = field(default_factory=list)
    facts: list[int] = field(default_factory=list)  # that each pass pushed
    updates: list[Mapping[str, LowRankUpdate]] = field(default_factory=list)
    changes: list[Mapping[str, WeightChange]] = field(default_factory=list)

    def details(self) -> dict[str, Any]:
        """Facts pushed, and the loss of those captured, by pass; nothing of a turn with one pass and no replay."""
        if len(self.losses) == 1 and self.facts[0] == self.new:
            return {}
        return {"passes": {"facts": self.facts, "loss": self.losses}}


def _own_loss(captured: TurnCapture, turn: Turn, own: int) -> float:
    """The mean over mini-batches, as `captured.loss`, of the turn's first `own` facts; replayed ones follow them."""
    if own == len(turn.sequences):
        return captured.loss
    weights = [w * s.answer_length for w, s in zip(turn.loss_weights[:own], turn.sequences, strict=False)]
    return math.fsum(w * loss for w, loss in zip(weights, captured.mean_token_loss, strict=False)) / math.fsum(weights)
