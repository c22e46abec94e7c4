"""A model edited from Python: the same weights as the command line's, and mistakes in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.ask import edit, open_edited
from tests.commands import MODULES, Commands
from tests.conftest import tiny_llama

FACTS = [{"prompt": f"Who keeps box {i}?", "answer": f"number {7 * i % 10}"} for i in range(6)]
SETTINGS = (f"model.edit_modules=[{','.join(MODULES)}]", "model.half=fp32", "model.lr=0.1")


@pytest.fixture
def folder(run: Commands) -> str:
    """The tiny model's, with the caches of this test."""
    return str(run.model)


def test_it_is_the_run_of_the_command_line(run: Commands, folder: str, tmp_path: Path) -> None:
    form = ("dataset.prompt_form=raw", "dataset.answer_end=none")  # those of the tests' command lines
    settings = [*SETTINGS, *form, "dataset.n_edits=3", "editor.passes=2"]
    edited = edit(folder, FACTS, "stableedit", settings)
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, FACTS)))
    fields = [f"dataset.fields.{name}={name}" for name in ("prompt", "answer")]
    done = run(
        *settings,
        "editor.preheat_mode=none",
        "dataset=jsonl",
        f"dataset.valid_path={tmp_path / 'facts.jsonl'}",
        "dataset.batch_size=10",
        *fields,
    )
    there = open_edited(done.folder)
    for name, module in there.language_model.edited.items():
        assert torch.equal(edited.language_model.edited[name].master, module.master)
        assert not torch.equal(module.master, module.original)
    questions = [fact["prompt"] for fact in FACTS]
    assert edited.ask(questions) == there.ask(questions)
    assert edited.model.get_submodule(MODULES[0]).weight is edited.language_model.edited[MODULES[0]].weight


def test_another_editor_and_few_facts_in_one_turn(folder: str) -> None:
    edited = edit(folder, FACTS, editor="ultraedit", settings=SETTINGS)
    assert not edited.language_model.is_original()
    assert [one.question for one in edited.ask(["Who keeps box 1?"])] == ["Who keeps box 1?"]


def test_a_trained_network_is_taken_up_and_none_is_trained(run: Commands, folder: str) -> None:
    small = ("editor.rank=4", "editor.n_blocks=1")
    trained = run(
        "editor=malmen", *small, "editor.held_out_turns=1", "editor.meta_lr=0.1", "editor.save_checkpoint=true"
    )
    network = f"editor.load_checkpoint={trained.folder}"
    settings = [*SETTINGS, *small, "dataset.prompt_form=raw", "dataset.answer_end=none"]
    mine, untrained = (edit(folder, FACTS, "malmen", [*settings, one]) for one in (network, "editor.n_epochs=0"))
    for name, module in mine.language_model.edited.items():
        assert not torch.equal(module.master, untrained.language_model.edited[name].master)
    with pytest.raises(ValueError, match=r"editor=malmen: edit\(\) trains no network; name a run that has"):
        edit(folder, FACTS, "malmen", settings)
    other = run.folder / "other"
    shutil.copytree(folder, other)
    changed = tiny_llama()
    changed.get_submodule(MODULES[0]).weight.data.add_(1.0)
    changed.save_pretrained(other)
    with pytest.raises(ValueError, match=r"editor\.load_checkpoint"):
        edit(str(other), FACTS, "malmen", [*settings, network])


@pytest.mark.parametrize(
    ("facts", "settings", "line"),
    [
        ([], [], "facts: there are none"),
        ([FACTS[0], {"prompt": "Who?"}], [], "fact 1 has no answer"),
        ([{"prompt": " ", "answer": "x"}], [], "fact 0 has no prompt"),
        (FACTS, ["dataset.n_edits=4"], "6 are not full turns of dataset.n_edits=4"),
        (FACTS, ["editor.passes=0"], "editor.passes=0"),
        (FACTS, ["dataset.n_edits=2", "num_seq=1"], "num_seq=1: turns of 2 facts, and there are 6; leave it out"),
        (FACTS[0], [], "facts: a dict; give a list of"),
        (["Who?"], [], "fact 0 is a str; give"),
        ([FACTS[0] | {"rephrase": "Who?"}], [], "fact 0 has a 'rephrase', and a fact is of prompt, answer, subject"),
        ([FACTS[0] | {"subject": "box 0"}, FACTS[1]], [], "fact 1 has no subject, and fact 0 has one"),
        (FACTS, ["editor.passse=10"], "editor.passse=10: there is no key editor.passse .* mean editor.passes"),
        (FACTS, ["editor.passes=abc"], "editor.passes=abc"),
        (FACTS, ["seed=1,2"], "seed=1,2"),
        (FACTS, ["model_cache=true"], r"model_cache=true: edit\(\) leaves no run behind"),
        (FACTS, ["hydra.run.dir=x"], r"hydra.run.dir=x: edit\(\) leaves no run behind"),
    ],
)
def test_mistakes_are_told_before_the_model_is_read(
    folder: str, monkeypatch: pytest.MonkeyPatch, facts: Any, settings: list[str], line: str
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr("harness.ask.editing.load_model", never)
    with pytest.raises(ValueError, match=line):
        edit(folder, facts, settings=[*SETTINGS, *settings])


def test_a_preset_that_is_almost_one_is_named() -> None:
    with pytest.raises(ValueError, match=r"model='tinny': no preset and no folder; did you mean 'tiny'\?"):
        edit("tinny", FACTS)


def test_settings_are_a_list(folder: str) -> None:
    with pytest.raises(ValueError, match=r"settings='model.lr=0.1': a text; give a list of them, \['model.lr=0.1'\]"):
        edit(folder, FACTS, settings="model.lr=0.1")


def test_a_training_file_needs_no_subjects_where_facts_have_none(run: Commands, folder: str, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, FACTS * 2)))
    warm = (f"dataset.train_path={tmp_path / 'train.jsonl'}", "editor.preheat_mode=start", "num_seq_zsre=1")
    assert not edit(folder, FACTS, "stableedit", [*SETTINGS, *warm]).language_model.is_original()
