"""Runs of editors beyond the shipped ones: several updates a turn, and none at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from data.records import Phase, Turn
from editor.base import Edit, EditableModel
from editor.registry import EDITORS
from tests.commands import MODULES, Commands


@dataclass(frozen=True)
class MemorySettings:
    lr: float


class Memory(nn.Module):
    """Beside the weights: an edit module's output is moved by what the facts' gradients add up to."""

    Settings: ClassVar = MemorySettings

    def __init__(self, model: EditableModel, settings: MemorySettings, device: torch.device) -> None:
        super().__init__()
        self.step = settings.lr
        self.register_buffer("moved", torch.zeros(model.shapes[MODULES[0]][1]))
        model.wrap(MODULES[0], lambda _inputs, output: output + self.moved)

    def edit(self, model: EditableModel, turn: Turn) -> Edit:
        captured = model.capture(turn)
        self.moved -= self.step * captured.modules[MODULES[0]].value_grads.sum(0)
        return Edit(captured.loss, {}, {}, {"remember": 0.25})

    def statistics(self) -> dict[str, dict[str, float | None]]:
        return {"memory": {"norm": float(self.moved.norm())}}


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EDITORS, "stableedit", Memory)


EVERYTHING = ("evaluation.every=2", "evaluation.retention=1", "checkpoint_every=2", "evaluation.generation=2")


@pytest.mark.usefixtures("memory")
def test_an_editor_that_changes_no_weight(run: Commands) -> None:
    whole = run(*EVERYTHING, "model.lr=50", run="whole")
    lines = whole.lines("turns.jsonl")
    assert [line["phase"] for line in lines] == ["warm_up"] * 3 + ["edit"] * 4
    assert all(line["modules"] == {} and line["seconds"]["remember"] == 0.25 for line in lines)
    assert all(line["loss"] > 0 and line["statistics"]["memory"]["norm"] > 0 for line in lines)
    results = whole.json("results.json")
    seconds = results["cost"]["seconds_per_turn"]
    assert seconds == {"remember": 0.25, "total": pytest.approx(sum(line["seconds"]["total"] for line in lines) / 7)}
    assert seconds["total"] > 0, "that of the whole edit, whatever the editor says of its parts"
    assert results["final"]["ES"] != results["base"]["ES"]
    assert results["base"]["ES"] == run("model.lr=1e-6", run="other").json("results.json")["base"]["ES"]
    assert results["final"]["LS_agree"]["mean"] < 1  # the base model's words were taken without the memory
    assert results["retention"]["ES"]["by_age"].keys() >= {"0", "1"}


@pytest.mark.usefixtures("memory")
def test_it_goes_on_after_a_stop(run: Commands) -> None:
    whole = run(*EVERYTHING, "model.lr=50", run="whole")
    resumed = run.broken_off_and_resumed(*EVERYTHING, "model.lr=50", turn=3, at=(Memory, "edit"), resume="auto")
    assert resumed.scores() == whole.scores()


@pytest.mark.usefixtures("memory")
def test_it_cannot_be_exported_as_plain_weights(run: Commands) -> None:
    run.no_model_to_save()


# ---------------------------------------------------------------------------------------------------------------------
# Several updates a turn


def test_several_passes(run: Commands) -> None:
    """Each turn's line says what each pass pushed; one pass says nothing of passes."""
    one, three = run(*EVERYTHING, run="one"), run(*EVERYTHING, "editor.passes=3", run="three")
    assert all("passes" not in line for line in one.lines("turns.jsonl"))
    lines = three.lines("turns.jsonl")
    warm_up, edits = lines[:3], lines[3:]
    assert all("passes" not in line for line in warm_up)
    assert all(1 < len(line["passes"]["facts"]) <= 3 for line in edits)
    assert edits[0]["loss"] == one.lines("turns.jsonl")[3]["loss"] == edits[0]["passes"]["loss"][0]
    assert lines[-1]["modules"][MODULES[0]]["cosine_previous"] is not None
    assert three.json("results.json")["final"]["ES"]["mean"] > one.json("results.json")["final"]["ES"]["mean"]
    # every pass's rows are in the statistics, two modules sharing them
    once, several = (sum(line["answer_tokens"] for line in some) for some in (warm_up, edits))
    assert 2 * (once + several) < lines[-1]["statistics"]["40x24"]["n"] <= 2 * (once + 3 * several)


def test_facts_of_earlier_turns_are_asked_again(run: Commands) -> None:
    """Those that the model no longer says are pushed with the turn's own, which are three."""
    plain, replayed = (
        run("editor.passes=2", f"editor.replay={count}", run=f"replay_{count}").lines("turns.jsonl") for count in (0, 5)
    )
    edits = [[line for line in lines if line["phase"] == "edit"] for lines in (plain, replayed)]
    assert all(line["passes"]["facts"][0] == 3 for line in edits[0])
    assert edits[0][0]["passes"] == edits[1][0]["passes"]  # there is no earlier turn
    pushed = [line["passes"]["facts"][0] for line in edits[1]]
    assert pushed[0] == 3
    assert all(3 <= count <= 8 for count in pushed)
    assert max(pushed) > 3


def test_facts_are_pushed_until_they_are_as_likely_as_asked(run: Commands) -> None:
    settings = ("num_seq=1", "editor.passes=4", "model.lr=1")
    first, never = (
        run(*settings, f"editor.pass_loss={loss}", run=f"loss_{loss}").lines("turns.jsonl")[-1]["passes"]["facts"]
        for loss in ("1e6", "1e-6")
    )
    assert first == [3, 0]  # after the first pass all are
    assert never == [3, 3, 3, 3]


def test_several_passes_go_on_after_a_stop(run: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    from editor.stableedit import StableEdit

    line = (*EVERYTHING, "editor.passes=3", "diagnostics.previous=2")
    whole = run(*line, run="whole")
    update, seen = StableEdit.update, []

    def stopped(self: StableEdit, captures: Mapping[str, Any], phase: Phase) -> Any:
        seen.append(phase)
        if len(seen) == 7:
            raise FloatingPointError("stopped in the middle of a turn")
        return update(self, captures, phase)

    with monkeypatch.context() as patch:
        patch.setattr(StableEdit, "update", stopped)
        run.refused(*line, run="broken")
    resumed = run(*line, f"resume={run.folder / 'broken'}", run="broken")
    assert resumed.turns() == whole.turns()
    assert resumed.scores() == whole.scores()


def test_captures_of_several_passes_may_lie_on_disk(run: Commands, tmp_path: Path) -> None:
    memory, disk = (run("editor.passes=3", f"editor.cache_dir={where}", run=name)
                    for name, where in (("memory", "null"), ("disk", tmp_path / "spill")))  # fmt: skip
    assert memory.turns() == disk.turns()
    assert json.dumps(memory.scores()) == json.dumps(disk.scores())


def test_networks_are_trained_through_the_same_door(run: Commands) -> None:
    """With one pass, as published, whatever the passes of the edits are."""
    settings = ("editor=malmen", "editor.rank=4", "editor.n_blocks=1", "editor.held_out_turns=1", "model.lr=0.01")
    one, two = run(*settings, run="one"), run(*settings, "editor.passes=2", run="two")
    trained = [[line for line in each.turns() if line["phase"].startswith("meta")] for each in (one, two)]
    assert trained[0] == trained[1] != []
    assert one.turns() != two.turns()
