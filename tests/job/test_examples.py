"""A run ends with a few questions and the words of both models."""

from __future__ import annotations

from typing import Any

import pytest

from model import LanguageModel
from tests.commands import Commands, Run, zsre_row

NAMES = {"edit": "ES", "rephrase": "GS", "locality": "LS"}


def examples(run: Run) -> list[dict[str, Any]]:
    return run.json("examples.json")


def places(run: Run) -> list[int]:
    return [one["place"] for one in examples(run) if one["probe"] == "edit"]


def test_they_are_what_both_models_write(run: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    """As `evaluation.generation` has it for the same questions."""
    done = run("evaluation.examples=4", "evaluation.generation=all", "evaluation.max_new_tokens=5", "num_seq_zsre=1")
    found = examples(done)
    assert [one["probe"] for one in found] == ["edit"] * 4 + ["rephrase"] * 4 + ["locality"] * 4
    texts = {
        (line["stage"], line["place"], line["protocol"]): line["text"]
        for line in done.lines("records.jsonl")
        if "text" in line
    }
    for one in found:
        place, name = one["place"], NAMES[one["probe"]]
        assert (one["base"], one["edited"]) == (texts["base", place, name], texts["final", place, name])
        row = zsre_row(one["index"])
        asked = {"edit": row["src"], "rephrase": row["rephrase"], "locality": row["loc"] + "?"}
        wanted = {"edit": row["ans"], "rephrase": row["ans"], "locality": row["loc_ans"]}
        assert (one["question"], one["wanted"]) == (asked[one["probe"]], wanted[one["probe"]])
    assert any(one["base"] != one["edited"] for one in found)
    out = capsys.readouterr().out
    assert "what the model says" in out
    assert "unrelated questions" in out
    assert done.json("results.json")["cost"]["seconds"]["examples"] > 0


def test_the_seed_chooses_them_and_nothing_else(run: Commands) -> None:
    settings = ("num_seq_zsre=1", "evaluation.max_new_tokens=2")
    one = places(run(*settings, "evaluation.examples=3"))
    assert len(set(one)) == 3
    assert places(run(*settings, "evaluation.examples=3", "model.lr=0.2", "editor=ultraedit", run="other")) == one
    assert places(run(*settings, "evaluation.examples=3", "seed=1", run="seed")) != one


def test_there_may_be_none(run: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    done = run("evaluation.examples=0", "num_seq=1", "num_seq_zsre=1")
    assert not (done.folder / "examples.json").exists()
    assert "what the model says" not in capsys.readouterr().out
    assert "examples" not in done.json("results.json")["cost"]["seconds"]


def test_a_question_that_is_not_there_is_left_out(run: Commands) -> None:
    """And where there are fewer records than asked for, all of them are shown."""
    run.write("eval", [{"q": f"Box {i}?", "a": f"b{i}", "again": f"Again, {i}?" if i else None} for i in range(3)])
    fields = ("dataset.fields.prompt=q", "dataset.fields.answer=a", "dataset.fields.rephrase=again")
    done = run("dataset=jsonl", *fields, "editor.preheat_mode=none", "evaluation.examples=9")
    asked = [(one["probe"], one["index"]) for one in examples(done)]
    assert asked == [("edit", 0), ("edit", 1), ("edit", 2), ("rephrase", 1), ("rephrase", 2)]


def test_a_model_that_was_edited_before_is_asked_the_same(run: Commands) -> None:
    settings = ("num_seq=2", "evaluation.examples=4", "evaluation.max_new_tokens=4")
    edited = run(*settings, "num_seq_zsre=1", "model_cache=true")
    scored = run(*settings, f"evaluate={edited.folder / 'model'}", run="scored")
    assert examples(scored) == examples(edited)


def test_what_cannot_be_asked_is_refused_first(run: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LanguageModel, "load", lambda *_, **__: pytest.fail("the model was loaded first"))
    said = run.refused("evaluation.prompt=chat", "evaluation.examples=4")
    assert "evaluation.prompt=chat: the model's tokenizer has no chat template" in said
    assert "evaluation.examples=-1: must be 0 or more; 0 keeps none" in run.refused("evaluation.examples=-1")
