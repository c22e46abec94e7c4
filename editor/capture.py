"""Gradient-capture editors: capture what the facts do inside the model, work out updates, apply them; maybe again.

Letters: N rows of a turn, d_k key size, d_v value size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.records import Allocate, Capture, LowRankUpdate, Phase, Turn, TurnCapture, WeightChange, first_rows, rows_of
from editor.base import AdaptiveWarmUp, Edit, EditableModel, UpdateRule
from editor.stopwatch import Stopwatch
from editor.updates import added_up, changed_by


@dataclass(frozen=True)
class CaptureSettings:
    """How often a turn is captured and updated, and at which positions.

    The published methods have one pass. In later ones only those facts are captured and pushed further that the model,
    as the pass before left it, does not say: an answer is left alone whose tokens are all its first choice or, with
    `pass_loss`, all have a -log p below it. Warm-up turns have one: their facts are there for the statistics, and
    pushing them further only harms the model.

    A turn's replay is captured in its first pass. Of these facts too only those are pushed that the model does not say.
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
        if isinstance(self.rule, AdaptiveWarmUp) and self.rule.passes_over(turn.phase):
            return Edit(None, {}, {}, {}, {"passed_over": True})
        watch = Stopwatch(*model.devices, self.device)
        todo, done = turn.with_replay(), _Passes(len(turn.sequences))
        passes = self.settings.passes if turn.phase is Phase.EDIT else 1
        while len(done.losses) < passes and todo.sequences:
            try:
                todo = self._pass(model, todo, done, watch)
            except FloatingPointError as error:
                raise FloatingPointError(f"{_place(turn, done)}: {error}; {_weights(done)}") from error
        return Edit(done.losses[0], done.updates(), done.changes(), watch.seconds, done.details())

    def _pass(self, model: EditableModel, todo: Turn, done: _Passes, watch: Stopwatch) -> Turn:
        """One capture, update and application; the facts that are left for the next one."""
        limit, new = self.settings.pass_loss, 0 if done.losses else done.new
        with watch.measure("capture"):
            captured = model.capture(todo, self.settings.every_token, self.settings.allocate)
            said = captured.right if limit is None else [worst < limit for worst in captured.worst]
            unsaid = [place for place, is_said in enumerate(said) if place < new or not is_said]
            captured = _some_rows(captured, first_rows(todo.sequences, self.settings.every_token), unsaid)
            todo = todo.part(unsaid)
        updates: Mapping[str, LowRankUpdate] = {}
        changes: Mapping[str, WeightChange] = {}
        if todo.sequences:
            with watch.measure("update"):
                updates = self.rule.update(captured.modules, todo.phase)
            with watch.measure("apply"):
                changes = model.apply(updates)
        done.add(captured.loss, len(todo.sequences), updates, changes)
        return todo


class _Passes:
    """What the passes of a turn did so far."""

    def __init__(self, new: int) -> None:
        self.new = new  # facts of the turn's own, which its first pass pushes whether they are said or not
        self.losses: list[float] = []
        self.facts: list[int] = []  # that each pass pushed
        self._updates: list[Mapping[str, LowRankUpdate]] = []
        self._changes: list[Mapping[str, WeightChange]] = []

    def add(
        self,
        loss: float,
        facts: int,
        updates: Mapping[str, LowRankUpdate],
        changes: Mapping[str, WeightChange],
    ) -> None:
        self.losses.append(loss)
        self.facts.append(facts)
        if updates:
            self._updates.append(updates)
            self._changes.append(changes)

    def updates(self) -> dict[str, LowRankUpdate]:
        """Of all passes together."""
        return added_up(self._updates)

    def changes(self) -> dict[str, WeightChange]:
        """Of all passes together; `largest` is that of a single pass."""
        return changed_by(self.updates(), self._changes)

    def details(self) -> dict[str, Any]:
        """Facts pushed, and the loss of those captured, by pass; nothing of a turn with one pass and no replay."""
        if len(self.losses) == 1 and self.facts[0] == self.new:
            return {}
        return {"passes": {"facts": self.facts, "loss": self.losses}}


def _some_rows(
    captured: TurnCapture,
    first_row: Tensor,  # of each fact
    places: Sequence[int],
) -> TurnCapture:
    """The rows of some of the facts."""
    if len(places) == len(captured.right):
        return captured
    rows = rows_of(places, first_row)
    modules = {name: Capture(each.keys[rows], each.value_grads[rows]) for name, each in captured.modules.items()}
    right = tuple(captured.right[place] for place in places)
    return TurnCapture(modules, captured.loss, right, tuple(captured.worst[place] for place in places))


def _place(turn: Turn, done: _Passes) -> str:
    return f"turn {turn.index}, pass {len(done.losses) + 1}" if done.losses else f"turn {turn.index}"


def _weights(done: _Passes) -> str:
    return "the weights are those of the pass before" if done.losses else "the weights are those of the turn before"
