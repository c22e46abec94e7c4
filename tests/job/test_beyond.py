"""Runs with what goes beyond the paper: the preserving solve, warm-up that ends by itself, shrinkage."""

from __future__ import annotations

import json
from typing import Any

import pytest

from editor.stableedit import StableEdit
from harness.watch.diagnostics import TurnDiagnostics
from tests.commands import MODULES, Commands

TEXT = ("corpus.tokens=1000", "corpus.window=64")
PRESERVING = ("editor.preserve=200", *TEXT, "num_seq_zsre=2", "checkpoint_every=2", "evaluation.every=2")
ADAPTIVE = (
    "editor.preheat_mode=adaptive", "editor.preheat_tolerance=100", "num_seq_zsre=3", "checkpoint_every=1",
)  # fmt: skip


def test_a_preserving_run_goes_on_after_a_stop(run: Commands) -> None:
    whole = run(*PRESERVING, run="whole")
    resumed = run.broken_off_and_resumed(*PRESERVING, turn=3, at=(TurnDiagnostics, "line"))
    assert resumed.turns() == whole.turns()
    assert resumed.scores() == whole.scores()
    assert "corpus" in whole.json("run.json")["inputs"]
    plain = run(*PRESERVING[3:], run="plain")
    norms = [
        [line["modules"][MODULES[0]]["update_norm"] for line in done.lines("turns.jsonl")] for done in (whole, plain)
    ]
    assert all(with_text < without for with_text, without in zip(*norms, strict=True))


def test_without_preserve_no_text_is_read(run: Commands) -> None:
    done = run("corpus.tokens=1000", "num_seq=1", "num_seq_zsre=1")
    assert "corpus.* has no effect with editor=stableedit" in (done.folder / "main.log").read_text()
    assert "corpus" not in done.json("run.json")["inputs"]
    assert "editor.preserve=-1.0: must be a finite number, 0 or above" in run.refused("editor.preserve=-1")


@pytest.mark.parametrize("form", ["raw", "qa"])
def test_unrelated_questions_of_the_warm_up_turns_as_they_are_put(run: Commands, form: str) -> None:
    """As if they had been written into a file of text; those of facts that warm nothing up are not read."""
    settings = ("editor.preserve=200", f"dataset.prompt_form={form}", "dataset.answer_end=eos", "num_seq_zsre=2")
    asked = run(*settings, "editor.preserve_text=unrelated", "corpus.path=other.txt", run="asked")
    assert "corpus.path has no effect with editor.preserve_text" in (asked.folder / "main.log").read_text()
    texts = {"raw": "{loc}? {loc_ans}", "qa": "Q: {loc}?\nA: {loc_ans}"}
    rows = json.loads((run.folder / "train.json").read_text())[:6]
    lines = [json.dumps({"text": texts[form].format(**row)}) for row in rows]
    (run.folder / "text.jsonl").write_text("\n".join(lines))
    read = run(*settings, f"corpus.path={run.folder / 'text.jsonl'}", run="read")
    assert asked.turns() == read.turns()
    assert asked.scores() == read.scores()
    plain = run(*settings[1:], run="plain")
    assert asked.scores() != plain.scores()


def test_unrelated_questions_that_are_not_there(run: Commands) -> None:
    asked = ("editor.preserve=200", "editor.preserve_text=unrelated")
    rows = json.loads((run.folder / "train.json").read_text())
    run.write("train", [{key: value for key, value in row.items() if "loc" not in key} for row in rows])
    fields = ("dataset=jsonl", "dataset.fields.prompt=src", "dataset.fields.answer=ans")
    said = run.refused(*asked, *fields, "num_seq_zsre=2")
    assert "the rows of dataset.train_path that warm up hold no unrelated questions" in said
    none = run(*asked, *fields, "editor.preheat_mode=none", "num_seq=1", "corpus.tokens=3000", run="none")
    assert "second moments of keys: 3,000 of 3,000 tokens, done" in (none.folder / "main.log").read_text()
    plain = run(*fields, "editor.preheat_mode=none", "num_seq=1", run="plain")
    assert none.turns() != plain.turns()


def test_warm_up_that_ends_by_itself(run: Commands) -> None:
    """The first turn has nothing to compare with; the second ends it, and the third is passed over."""
    whole = run(*ADAPTIVE, run="whole")
    lines = whole.lines("turns.jsonl")
    assert whole.phases() == "wwweeee"
    assert [line.get("passed_over", False) for line in lines] == [False, False, True, *[False] * 4]
    assert lines[2]["loss"] is None
    assert not lines[2]["modules"]
    shorter = run("num_seq_zsre=2", run="shorter")
    assert whole.scores() == shorter.scores()
    resumed = run.broken_off_and_resumed(*ADAPTIVE, turn=2, at=(TurnDiagnostics, "line"))
    assert resumed.turns() == whole.turns()
    assert resumed.scores() == whole.scores()


def test_warm_up_that_never_stands_still_is_all_of_it(run: Commands) -> None:
    done = run("editor.preheat_mode=adaptive", "editor.preheat_tolerance=1e-9", "num_seq_zsre=2", "num_seq=1")
    assert not any("passed_over" in line for line in done.lines("turns.jsonl"))


def test_what_cannot_stand_still_is_refused(run: Commands) -> None:
    said = run.refused("editor.preheat_mode=adaptive", "editor.RunningMeanStd_mode=original")
    assert "keeps no covariance that could come to stand still: set editor.preheat_mode=start" in said
    assert "editor.preheat_tolerance=0.0: must be" in run.refused("editor.preheat_tolerance=0")


def test_shrinkage_whitens_the_first_turn(run: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without warm-up, where the posterior mean of the covariance does not exist yet."""
    found: list[dict[str, Any]] = []
    whitenings = StableEdit._whitenings

    def seen(self: StableEdit, *arguments: Any) -> Any:
        result = whitenings(self, *arguments)
        found.append({group: whitening.details for group, whitening in result.items()})
        return result

    monkeypatch.setattr(StableEdit, "_whitenings", seen)
    settings = ("num_seq_zsre=0", "num_seq=2", "dataset.n_edits=1", "editor.whitening_floor_mode=shrinkage")
    lines = run(*settings).lines("turns.jsonl")
    assert all(len(one) == 1 for one in found)
    shares = [line["statistics"]["40x24"]["whitening_shrinkage"] for line in lines]
    assert 0 < shares[1] < shares[0] <= 1
