"""An editor on its way through made turns, with what a run of main.py has around it: the turn's line, checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.made import SEED, TRAINING_TURNS, Facts, Shape
from data.records import Phase, Turn
from editor.capture import CaptureEditor, CaptureSettings
from editor.hypernetwork import HyperNetworkEditor
from editor.meta_train import MetaSettings, MetaStep, MetaTrainer
from editor.registry import EDITORS, build
from editor.rledit import RLEditSettings
from editor.stableedit import StableEditSettings
from editor.stopwatch import Stopwatch
from harness.run import Checkpoints
from harness.watch import TurnDiagnostics
from model import LanguageModel
from model.edited import sha256_of_tensor


@dataclass(frozen=True)
class Method:
    """An editor's settings for a model of some shape, as its preset has them but where a comment says otherwise."""

    settings: Callable[[Shape], Any]
    warms_up: bool = False
    meta: MetaSettings | None = None


METHODS = {
    # the root is followed (newton) on CPUs too, where auto would decompose, so that both compute the same
    "stableedit": Method(
        lambda shape: StableEditSettings(shape.lr, 10.0, 512, "stable", "shape", 0.01, "shift", 0.0, "newton"),
        warms_up=True,
    ),
    "ultraedit": Method(
        lambda shape: StableEditSettings(
            shape.lr, 1.0, 512, "original", "shape", 0.01, "relative", 0.0, preheat_mode="none"
        )
    ),
    "rledit": Method(
        lambda shape: RLEditSettings(
            shape.lr, 512, "shape", shape.rank, shape.blocks, SEED, 1.0, 1e-4, 0.95, 10, "trajectory", 20
        ),
        meta=MetaSettings(1e-5, 0.6, 1.0),
    ),
}


@dataclass(frozen=True)
class Course:
    """What the editors are sent through: turns of facts on one model."""

    model: LanguageModel
    shape: Shape
    facts: Facts
    turns: int  # of edits

    @property
    def warm_up(self) -> int:
        """Turns that bring rows enough to whiten with, d_v + 2, were each answer a single token."""
        ((_, d_v),) = set(self.model.shapes.values())
        return max(self.shape.warm_up, math.ceil((d_v + 2) / (self.facts.a_turn * len(self.model.shapes))))


class Run:
    """One run; the model is its own for as long as it goes on."""

    def __init__(self, course: Course, name: str) -> None:
        self.course, self.method = course, METHODS[name]
        self.model = course.model
        device = self.model.device
        settings = self.method.settings(course.shape)
        editor = build(EDITORS[name], self.model, settings, device, CaptureSettings())
        assert isinstance(editor, CaptureEditor)
        self.editor = editor
        self.diagnostics = TurnDiagnostics(device, device)
        self.first_edit = course.warm_up if self.method.warms_up else 0
        self.last = self.first_edit + course.turns
        self.done = 0
        self.lines: list[dict[str, Any]] = []  # of the turns that this object ran, as turns.jsonl has them
        self.trained: list[MetaStep] = []

    def begin(self) -> None:
        """The model as it was made, and the network trained, where there is one."""
        self.model.restore_original()
        if self.method.meta is None:
            return
        assert isinstance(self.editor.rule, HyperNetworkEditor)
        trainer = MetaTrainer(self.model, self.editor.rule, self.method.meta, self.editor.settings)
        self.trained = [trainer.turn(self.course.facts.training_turn(index)) for index in range(TRAINING_TURNS)]

    def go_on(self, upto: int, after: Callable[[Turn], None] = lambda turn: None) -> None:
        """The turns before turn `upto`, warm-up counted; seconds of a line hold those of the line itself.

        `after` is done after each of them.
        """
        for index in range(self.done, upto):
            turn = self.course.facts.turn(index, Phase.WARM_UP if index < self.first_edit else Phase.EDIT)
            watch = Stopwatch(self.model.device)
            with watch.measure("edit"), self.model.reading_once():
                edit = self.editor.edit(self.model, turn)
            with watch.measure("line"):
                line = self.diagnostics.line(turn, edit, self.editor, watch.seconds["edit"])
            line["seconds"] = {**edit.seconds, "line": watch.seconds["line"]}
            self.lines.append(line)
            after(turn)
        self.done = upto

    def save(self, folder: Path) -> None:
        """A checkpoint of what harness/job/resume.py puts into one."""
        past, memory = self.diagnostics.state()
        groups = {"model": self._masters(), "editor": self.editor.state_dict(), "diagnostics": past}
        Checkpoints(folder, "turn", keep=1).save(self.done, groups, {"diagnostics": memory})

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint of another run, whose own state is not looked at."""
        found = Checkpoints(folder, "turn", keep=1).newest()
        assert found is not None, "it was saved just before"
        groups = found.tensors()
        self.model.restore_original()
        self.model.restore(groups["model"])
        self.editor.load_state_dict(groups["editor"])
        self.diagnostics.load_state(groups.get("diagnostics", {}), found.state["diagnostics"])
        self.done = found.place

    def edit_lines(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["phase"] == Phase.EDIT.value]

    def tensors(self) -> dict[str, Tensor]:
        """Edited weights, as the model computes with them and as they are kept, and the editor's state."""
        weights = {f"weight of {name}": edited.weight for name, edited in self.model.edited.items()}
        masters = {f"master of {name}": master for name, master in self._masters().items()}
        return {**weights, **masters, **self.editor.state_dict()}

    def bits(self, first: int) -> dict[str, str]:
        """All that it came to: each tensor, and each number of the lines from turn `first` on but seconds and bytes."""
        told = {f"line of turn {line['turn']}": told_by(line) for line in self.lines if line["turn"] >= first}
        return {**{name: sha256_of_tensor(tensor) for name, tensor in self.tensors().items()}, **told}

    def _masters(self) -> dict[str, Tensor]:
        return {name: edited.master for name, edited in self.model.edited.items()}


def told_by(line: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in line.items() if key not in ("seconds", "memory")})


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of those that hold a NaN or an infinity."""
    return [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
