"""What a user can get wrong: each mistake ends the run in one line, before the model is loaded where it can be seen."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import main
from data.records import LowRankUpdate, WeightChange
from harness.run import places
from harness.run.folder import RunFolder
from model import LanguageModel
from tests.commands import MODULES, Commands, Run, command_line, save_tiny_model, zsre_row
from tests.conftest import ROOT
from tests.forked import Forks, Process

ROWS = [zsre_row(i) for i in range(12)]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerFast) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), byte_tokenizer)


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    folder = tmp_path_factory.mktemp("forks")
    with Forks(folder, folder / "cache") as forks:
        yield forks


@pytest.fixture
def commands(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    monkeypatch.setattr(places, "CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    commands = Commands(tmp_path, model_folder)
    commands.write("eval", ROWS)
    commands.write("train", ROWS[:6])
    return commands


@pytest.fixture
def early(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Commands that must end before the weights are read."""

    def never(*_: object, **__: object) -> None:
        pytest.fail("the model was loaded before the mistake was seen")

    monkeypatch.setattr(LanguageModel, "load", never)
    return commands


def check(message: str, *words: object) -> None:
    for word in words:
        assert str(word) in message


# ---------------------------------------------------------------------------------------------------------------------
# The command line

LINES = {
    # command: what the line must name (tests/config/test_config.py has many more)
    "typo=1": ("typo=1", "--help"),
    "+typo=1": ("+typo=1", "there is no key"),
    "editor.alhpa=1": ("editor.alhpa=1", "did you mean editor.alpha?"),
    "num_seq=abc": ("num_seq=abc", "a whole number"),
    "num_seq=0": ("num_seq=0", "1 or more"),
    "editor.alpha=-1": ("editor.alpha=-1", "above 0"),
    "editor.replay=-1": ("editor.replay=-1", "0 is as published"),
    "dataset.n_edits=-5": ("dataset.n_edits=-5", "1 or more"),
    "editor.preheat_mode=strat": ("editor.preheat_mode=strat", "did you mean start?"),
    "dataset=zzz": ("dataset=zzz", "choose from", "zsre"),
    "model=zzz": ("model=zzz", "choose from", "smollm2-135m"),
    "editor=zzz": ("editor=zzz", "choose from", "stableedit"),
    "editor=stableedit.yaml": ("editor=stableedit.yaml", "did you mean stableedit?"),
    "editor=stableedit/plus": ("editor=stableedit/plus", "choose from", "stableedit_plus"),
    "model=Qwen/Qwen2.5-0.5B": (
        "choose from",
        "is model=huggingface model.name_or_path=Qwen/Qwen2.5-0.5B with a model.lr",
    ),
    "dataset.fields.prompt=src": ("dataset.fields.prompt=src", "dataset=zsre"),
    "hydra.rn.dir=x": ("hydra.rn.dir",),
    "-m num_seq=1,0": ("num_seq=0", "1 or more"),
}


@pytest.mark.parametrize("line", LINES)
def test_a_mistake_on_the_command_line(early: Commands, line: str) -> None:
    check(early.refused(*line.split()), *LINES[line])
    assert not (early.folder / "run").exists(), "a refused command leaves no run folder"


# ---------------------------------------------------------------------------------------------------------------------
# Data


def rows_with(place: int, row: object) -> list[Any]:
    return [*ROWS[:place], row, *ROWS[place + 1 :]]


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in zsre_row(7).items() if key != name}


BAD_FILES: dict[str, tuple[Any, tuple[str, ...]]] = {
    # content, and what the line must name besides the file
    "LFS pointer": (POINTER, ("Git LFS pointer", "git lfs pull")),
    "truncated": (json.dumps(ROWS)[:-120], ("row 11", "cut off")),
    "truncated lines": ("\n".join(map(json.dumps, ROWS))[:-20], ("row 11", "cut off")),
    "broken": (json.dumps(ROWS).replace('"ans": ', '"ans" ', 1), ("row 0", "broken JSON")),
    "row without a field": (rows_with(7, without("rephrase")), ("row 7", "'rephrase'")),
    "empty answer": (rows_with(7, {**zsre_row(7), "ans": "  "}), ("row 7", "'ans' is empty")),
    "null answer": (rows_with(3, {**zsre_row(3), "ans": None}), ("row 3", "'ans' is null")),
    "answer that is a number": (rows_with(3, {**zsre_row(3), "ans": 4}), ("row 3", "'ans' is a number (4)")),
    "row that is a list": (rows_with(2, ["a", "b"]), ("row 2", "a list")),
    "row that is null": (rows_with(0, None), ("row 0", "null")),
    "no rows": ([], ("no rows",)),
    "empty": ("", ("is empty",)),
    "100,000 brackets": ("[" * 100_000, ("more than 100 deep", "mend or fetch")),
    "a deep field": (rows_with(9, {**zsre_row(9), "junk": json.loads("[" * 200 + "]" * 200)}), ("more than 100 deep",)),
    "a page": ("<!DOCTYPE html><html>Not found</html>", ("neither a JSON array nor JSON Lines",)),
    "another data set": ([{"prompt": "a", "ans": "b"}] * 12, ("row 0", "prompt, ans")),
    "one object of lists": ({"src": ["a"], "ans": ["b"]}, ("row 0",)),
}


SPLITS = [("eval", what) for what in BAD_FILES] + [("train", what) for what in ("LFS pointer", "row that is null")]


@pytest.mark.parametrize(("split", "what"), SPLITS)
def test_a_data_file_that_cannot_be_read(early: Commands, split: str, what: str) -> None:
    content, words = BAD_FILES[what]
    path = early.write(split, content)
    check(early.refused(), path, *words)


def test_a_mistake_in_a_file_is_said_again_the_second_time(early: Commands) -> None:
    """No half-converted copy stays behind to be taken for the data."""
    early.write("eval", BAD_FILES["empty answer"][0])
    assert early.refused(run="first") == early.refused(run="second")


@pytest.mark.parametrize("key", ["dataset.valid_path", "dataset.train_path"])
@pytest.mark.parametrize("path", ["nowhere.json", "folder", "/no/such/file.json"])
def test_a_data_file_that_is_not_there(early: Commands, key: str, path: str) -> None:
    (early.folder / "folder").mkdir()
    check(early.refused(f"{key}={path}"), f"{key}={path}", "no such file", "set it to")


def test_text_that_is_not_unicode(early: Commands) -> None:
    (early.folder / "eval.json").write_bytes(json.dumps(ROWS).encode().replace(b"colour", b"\xff\xfe"))
    check(early.refused(), early.folder / "eval.json", "row 0")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["dataset.n_edits=13"], ("dataset.n_edits=13", "12 rows", "12 or less")),
        (["num_seq=5"], ("num_seq=5", "4 full turns", "num_seq to 4 or less")),
        (["num_seq_zsre=3"], ("num_seq_zsre", "=3", "6 rows", "2 or less")),
        (["dataset.n_edits=7"], ("num_seq_zsre", "6 rows", "editor.preheat_mode=none")),
    ],
)
def test_more_turns_than_the_data_holds(early: Commands, overrides: list[str], words: tuple[str, ...]) -> None:
    check(early.refused(*overrides), *words)


@pytest.mark.parametrize(("split", "field"), [("eval", "src"), ("eval", "loc"), ("train", "rephrase"), ("eval", "ans")])
def test_a_question_longer_than_the_context(early: Commands, split: str, field: str) -> None:
    """The tiny model has room for 256 tokens, and its tokenizer makes one of each byte."""
    rows = [zsre_row(i) for i in range(12 if split == "eval" else 6)]
    rows[4][field] = "x" * 300
    path = early.write(split, rows)
    check(early.refused(), path, "row 4", "256", "shorten or remove")


def test_a_question_that_just_fits(commands: Commands) -> None:
    """Prompt, a space and the answer: 256 tokens, of which the last is only predicted."""
    row = {**zsre_row(0), "ans": "12345"}
    row["src"] = "x" * (256 - len(" 12345"))
    commands.write("eval", [row, *ROWS[1:]])
    commands("num_seq=1", "num_seq_zsre=1")
    commands.write("eval", [{**row, "src": row["src"] + "x"}, *ROWS[1:]])
    check(commands.refused("num_seq=1", run="second"), "row 0", "257")


def test_an_own_file_under_other_names(early: Commands) -> None:
    names = ("dataset=jsonl", "dataset.fields.prompt=src", "dataset.fields.answer=reply")
    check(early.refused(*names), early.folder / "eval.json", "row 0", "'reply'", "src, rephrase, ans")


# ---------------------------------------------------------------------------------------------------------------------
# The model


def test_a_module_that_matches_nothing(early: Commands) -> None:
    message = early.refused("model.edit_modules=[model.layers.9.mlp.down_proj]")
    check(message, "model.edit_modules", "'model.layers.9.mlp.down_proj'", "model.layers.0.mlp.down_proj")


@pytest.mark.parametrize("pattern", ["model.embed_tokens", "model.layers.0.mlp", "model.layers.*", "model.norm"])
def test_a_module_that_is_no_linear_map(early: Commands, pattern: str) -> None:
    check(early.refused(f"model.edit_modules=[{pattern}]"), "model.edit_modules", repr(pattern), "no linear map")


@pytest.mark.parametrize("pattern", ["auto", "[*.mlp.experts.down_proj]"])
def test_fused_experts(early: Commands, tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, pattern: str) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.MixtralConfig(vocab_size=260, num_key_value_heads=1, num_local_experts=2, **sizes)
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(tmp_path / "experts")
    byte_tokenizer.save_pretrained(tmp_path / "experts")
    message = early.refused(f"model.name_or_path={tmp_path / 'experts'}", f"model.edit_modules={pattern}")
    check(message, "model.edit_modules", "mixture of experts", "edit a dense MLP")


@pytest.mark.parametrize("path", ["./nowhere", "/no/such/folder", "'~/no-such-model'"])
def test_a_model_folder_that_is_not_there(early: Commands, path: str) -> None:
    message = early.refused(f"model.name_or_path={path}")
    check(message, "model.name_or_path=" + path.strip("'"), "no such folder", "give a model")


def test_a_name_that_this_machine_cannot_fetch(early: Commands) -> None:
    message = early.refused("model.name_or_path=nobody/no-such-model")
    check(message, "model.name_or_path=nobody/no-such-model", "cannot be read", "give a folder")


def test_a_package_that_is_not_installed(early: Commands) -> None:
    check(early.refused("model.name_or_path=pypi:no_such_package"), "pypi:no_such_package", "run.sh installs it")


def spoilt(commands: Commands, spoil: Callable[[Path], object]) -> str:
    folder = commands.folder / "spoilt"
    shutil.copytree(commands.model, folder)
    spoil(folder)
    message = commands.refused(f"model.name_or_path={folder}")
    check(message, f"model.name_or_path={folder}")
    return message


SPOILT: dict[str, Callable[[Path], object]] = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "config cut off": lambda folder: (folder / "config.json").write_text('{"model_type": "lla'),
    "config of nothing": lambda folder: (folder / "config.json").write_text("{}"),
    "unknown kind": lambda folder: (folder / "config.json").write_text('{"model_type": "zzz"}'),
    "no tokenizer": lambda folder: list(map(Path.unlink, folder.glob("tokenizer*"))),
}


@pytest.mark.parametrize("what", sorted(SPOILT))
def test_a_folder_that_holds_no_whole_model(early: Commands, what: str) -> None:
    assert len(spoilt(early, SPOILT[what])) < 800


SPOILT_WEIGHTS: dict[str, Callable[[Path], object]] = {
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights cut off": lambda folder: os.truncate(folder / "model.safetensors", 5000),
    "LFS pointer": lambda folder: (folder / "model.safetensors").write_text(POINTER),
}


@pytest.mark.parametrize("what", sorted(SPOILT_WEIGHTS))
def test_weights_that_cannot_be_read(commands: Commands, what: str) -> None:
    spoilt(commands, SPOILT_WEIGHTS[what])


@pytest.mark.parametrize("name", ["AutoModelForCausalML", "LlamaConfig"])
def test_a_class_that_loads_no_model(early: Commands, name: str) -> None:
    check(early.refused(f"model.class_name={name}"), f"model.class_name={name}", "AutoModelForCausalLM")


@pytest.mark.parametrize("key", ["model_device", "editor_device"])
def test_a_device_that_this_machine_lacks(early: Commands, key: str) -> None:
    assert torch.cuda.device_count() <= 77
    check(early.refused(f"{key}=cuda:77"), f"{key}=cuda:77", "GPU", "auto")


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that run away


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The model of a run, and a copy of its edited weights from before the first turn and after each."""
    seen: dict[str, Any] = {"weights": []}
    load, apply = LanguageModel.load.__func__, LanguageModel.apply  # type: ignore[attr-defined]

    def loading(cls: type[LanguageModel], *args: Any, **options: Any) -> LanguageModel:
        seen["model"] = load(cls, *args, **options)
        seen["weights"].append(weights(seen["model"]))
        return seen["model"]

    def applying(self: LanguageModel, updates: Mapping[str, LowRankUpdate]) -> dict[str, WeightChange]:
        changes = apply(self, updates)
        seen["weights"].append(weights(self))
        return changes

    monkeypatch.setattr(LanguageModel, "load", classmethod(loading))
    monkeypatch.setattr(LanguageModel, "apply", applying)
    return seen


def weights(model: LanguageModel) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in model.model.state_dict().items()}


def check_ended(commands: Commands, applied: dict[str, Any], turns: int) -> None:
    """After so many turns, whose lines are kept and whose weights stay."""
    done = Run(commands.folder / "run")
    assert len(done.lines("turns.jsonl") if turns else []) == turns
    assert not (done.folder / "results.json").exists()
    assert done.json("run.json")["status"] == "failed"
    assert "FloatingPointError: turn" in done.json("run.json")["error"]
    assert len(applied["weights"]) == turns + 1
    now = weights(applied["model"])
    assert all(
        torch.equal(now[name].nan_to_num(), weight.nan_to_num()) for name, weight in applied["weights"][-1].items()
    )
    assert turns == 0 or not torch.equal(now[f"{MODULES[0]}.weight"], applied["weights"][0][f"{MODULES[0]}.weight"])


def test_a_loss_that_is_not_finite(
    commands: Commands, applied: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model with a hole in it, which the base model's scores, from the cache, say nothing of."""
    commands(run="before")
    load = LanguageModel.load

    def breaking(*args: Any, **options: Any) -> LanguageModel:
        model = load(*args, **options)
        fingerprint = model.fingerprint()
        monkeypatch.setattr(model, "fingerprint", lambda: fingerprint)
        model.model.model.norm.weight.data[3] = float("nan")
        applied["weights"] = [weights(model)]
        return model

    monkeypatch.setattr(LanguageModel, "load", breaking)
    check(commands.refused(), "turn 0", "the loss is nan", "the weights are those of the turn before")
    check_ended(commands, applied, 0)


def broken_copy(commands: Commands) -> Path:
    """The folder of a model with a hole in it."""
    broken = transformers.AutoModelForCausalLM.from_pretrained(commands.model)
    broken.model.norm.weight.data[3] = float("nan")
    broken.save_pretrained(commands.folder / "broken")
    shutil.copy(commands.model / "tokenizer.json", commands.folder / "broken")
    shutil.copy(commands.model / "tokenizer_config.json", commands.folder / "broken")
    return commands.folder / "broken"


def test_a_base_model_whose_logits_are_not_finite(commands: Commands, tmp_path: Path) -> None:
    """It is not scored, nor kept in the cache as if it were."""
    message = commands.refused(f"model.name_or_path={broken_copy(commands)}")
    check(message, "evaluating the base model: the logits are not finite", "model.half=fp32")
    assert Run(commands.folder / "run").json("run.json")["status"] == "failed"
    assert list((tmp_path / "cache" / "base").iterdir()) == []
    check(commands.refused(f"evaluate={broken_copy(commands)}", run="other"), "evaluating after turn", "not finite")


def test_an_edited_model_whose_logits_are_not_finite(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run has failed, not finished; its checkpoint stays, and going on from there says the same."""
    apply = LanguageModel.apply
    turns = itertools.count()

    def spoiling(self: LanguageModel, updates: Mapping[str, LowRankUpdate]) -> dict[str, WeightChange]:
        changes = apply(self, updates)
        if next(turns) == 5:
            self.edited[MODULES[1]].weight.data.fill_(float("nan"))
        return changes

    monkeypatch.setattr(LanguageModel, "apply", spoiling)
    for resume in ("null", "auto"):
        message = commands.refused(f"resume={resume}")
        check(message, "evaluating after turn 6: the logits are not finite", "take smaller steps")
        done = Run(commands.folder / "run")
        assert (done.folder / "checkpoints" / "turn_6").is_dir()
        assert done.json("run.json")["status"] == "failed"
        assert "FloatingPointError: evaluating after turn 6" in done.json("run.json")["error"]
        assert not (done.folder / "results.json").exists()


@pytest.mark.parametrize("passes", [1, 3])
def test_edits_that_outweigh_the_weights_are_told(commands: Commands, passes: int) -> None:
    """Also where the logits stay finite, because a normalisation swallows what overflows."""

    def told(done: Run) -> list[str]:
        return [line for line in (done.folder / "main.log").read_text().splitlines() if "times the norm" in line]

    (warning,) = told(commands("editor.lr=1e30", f"editor.passes={passes}", run="huge"))
    check(warning, "WARNING", "turn 0", "mlp.down_proj", "take smaller steps (editor.lr")
    assert told(commands("editor.lr=1e-3")) == []


def test_a_loss_that_is_not_finite_any_more(
    commands: Commands, applied: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = LanguageModel.apply
    turns = itertools.count()

    def spoiling(self: LanguageModel, updates: Mapping[str, LowRankUpdate]) -> dict[str, WeightChange]:
        changes = apply(self, updates)
        if next(turns) == 2:
            self.model.model.norm.weight.data.fill_(float("inf"))
            applied["weights"][-1] = weights(self)
        return changes

    monkeypatch.setattr(LanguageModel, "apply", spoiling)
    check(commands.refused(), "turn 3", "the loss is", "the weights are those of the turn before")
    check_ended(commands, applied, 3)


@pytest.mark.parametrize("precision", ["master", "in_place"])
def test_an_update_that_is_not_finite(commands: Commands, applied: dict[str, Any], precision: str) -> None:
    half = "fp32" if precision == "master" else "bf16"
    line = ("editor.lr=1e40", "num_seq_zsre=1", f"model.edit_precision={precision}", f"model.half={half}")
    check(commands.refused(*line), "turn 0", MODULES[0], "is not finite", "editor.lr", "the weights are those")
    check_ended(commands, applied, 0)


def test_of_two_updates_one_of_which_is_not_finite_neither_is_applied(
    commands: Commands, applied: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = main.job.make_editor

    def building(*args: Any) -> Any:
        editor = build(*args)
        update = editor.rule.update

        def spoiling(captures: Any, phase: Any) -> dict[str, LowRankUpdate]:
            updates = update(captures, phase)
            if len(applied["weights"]) == 3:  # turn 2
                updates[MODULES[1]].right[0, 0] = float("nan")
            return updates

        monkeypatch.setattr(editor.rule, "update", spoiling)
        return editor

    monkeypatch.setattr(main.job, "make_editor", building)
    check(commands.refused(), "turn 2", MODULES[1], "is not finite")
    check_ended(commands, applied, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Folders


@pytest.mark.parametrize("place", ["eval.json", "eval.json/below/it"])
def test_a_run_folder_that_cannot_be_made(early: Commands, place: str) -> None:
    path = early.folder / place
    check(early.refused(f"hydra.run.dir={path}"), path, "hydra.run.dir=FOLDER")
    assert json.loads((early.folder / "eval.json").read_text()) == ROWS


def test_a_sweep_folder_that_cannot_be_made(early: Commands) -> None:
    path = early.folder / "eval.json" / "below"
    check(early.refused("-m", "seed=1,2", f"hydra.sweep.dir={path}"), path, "choose another folder")


def test_a_run_folder_that_may_not_be_written(early: Commands) -> None:
    """Root may write anywhere, so a folder stands where the log belongs."""
    (early.folder / "run" / "main.log").mkdir(parents=True)
    check(early.refused(), early.folder / "run" / "main.log", "choose another folder")


def test_a_disk_that_is_full_in_the_middle_of_a_run(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: RunFolder, line: Mapping[str, Any]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path / "turns.jsonl"))

    monkeypatch.setattr(RunFolder, "append_turn", full)
    check(commands.refused(), "turns.jsonl", "No space left on device", "free some space")


def test_an_error_of_ours_is_not_taken_for_the_users(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that our own code should have written, say: the trace is what helps then."""

    def missing(self: RunFolder, line: Mapping[str, Any]) -> None:
        raise FileNotFoundError(errno.ENOENT, "ours", "somewhere")

    monkeypatch.setattr(RunFolder, "append_turn", missing)
    with command_line(commands.line()), pytest.raises(FileNotFoundError):
        main.main()


def test_a_spill_folder_that_cannot_be_written(early: Commands) -> None:
    path = early.folder / "eval.json" / "spill"
    check(early.refused(f"editor.cache_dir={path}"), f"editor.cache_dir={path}", "cannot be written", "or null")


def test_a_spill_folder_without_room(early: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30, 2**30, 2048))
    message = early.refused(f"editor.cache_dir={early.folder / 'spill'}")
    check(message, f"editor.cache_dir={early.folder / 'spill'}", "are free", "choose another folder, or null")
    assert list((early.folder / "spill").iterdir()) == []


def test_a_disk_that_fills_up_while_captures_spill(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    message = commands.refused(f"editor.cache_dir={commands.folder / 'spill'}")
    check(message, f"editor.cache_dir={commands.folder / 'spill'}", "No space left on device", "null")
    assert list((commands.folder / "spill").iterdir()) == []
    assert Run(commands.folder / "run").json("run.json")["status"] == "failed"


def test_a_place_for_the_edited_model_that_is_taken(early: Commands) -> None:
    (early.folder / "mine").mkdir()
    message = early.refused("model_cache=true", f"model_cache_dir={early.folder / 'mine'}")
    check(message, f"model_cache_dir={early.folder / 'mine'}", "is there already")


def test_a_place_for_the_edited_model_that_cannot_be_written(early: Commands) -> None:
    path = early.folder / "eval.json" / "edited"
    message = early.refused("model_cache=true", f"model_cache_dir={path}")
    check(message, f"model_cache_dir={path}", "cannot be written", "choose another folder")


def test_a_cache_folder_that_cannot_be_written(early: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "CACHE", early.folder / "eval.json" / "cache")
    check(early.refused(), early.folder / "eval.json" / "cache", "make the folder writable")


# ---------------------------------------------------------------------------------------------------------------------
# The tracker, sweeps, and the process as a shell sees it


def test_online_tracking_without_a_login(early: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(early.folder))
    monkeypatch.setenv("NETRC", str(early.folder / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(early.folder / "wandb"))
    message = early.refused("tracker.wandb=online")
    check(message, "tracker.wandb=online", "wandb login", "tracker.wandb=offline")


def test_a_sweep_finishes_its_other_jobs(commands: Commands, capfd: pytest.CaptureFixture[str]) -> None:
    sweep = commands.folder / "sweep"
    message = commands.refused("-m", "num_seq=1,5,2", "num_seq_zsre=1", f"hydra.sweep.dir={sweep}")
    check(message, "num_seq=5", "4 or less")
    assert "num_seq=5" in capfd.readouterr().err, "which of the jobs it was"
    assert len(list(sweep.rglob("results.json"))) == 2


def test_an_interrupted_run_says_so(
    commands: Commands, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: RunFolder, line: Mapping[str, Any]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "append_turn", interrupted)
    with command_line(commands.line()), pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 130
    assert capfd.readouterr().err == "interrupted\n"
    assert Run(commands.folder / "run").json("run.json")["error"] == "interrupted"


def test_a_run_that_is_told_to_end_leaves_no_run_that_seems_to_go_on(
    commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM, as batch systems send it before they kill."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(RunFolder, "append_turn", lambda self, line: os.kill(os.getpid(), signal.SIGTERM))
    with command_line(commands.line()), pytest.raises(SystemExit) as end:
        main.main()
    signal.signal(signal.SIGTERM, before)
    assert end.value.code == 143
    assert Run(commands.folder / "run").json("run.json")["status"] == "interrupted"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("editor.alhpa=1", ("editor.alhpa=1", "did you mean editor.alpha?")),
        ("dataset.valid_path=nowhere.json", ("dataset.valid_path=nowhere.json", "no such file")),
        ("hydra.run.dir=eval.json/below", ("eval.json/below", "Not a directory")),
        ("model.edit_modules=[model.layers.9.mlp.down_proj]", ("model.edit_modules", "matches no module")),
    ],
)
def test_a_process_ends_with_a_code_and_one_line_on_stderr(
    forks: Forks, commands: Commands, tmp_path: Path, line: str, words: tuple[str, ...]
) -> None:
    before = len(forks.stderr())
    forks.start_together(Process(commands.line(line), cwd=str(tmp_path)))
    assert forks.end() == 1
    said = forks.stderr()[before:]
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    check(said, *words)


def test_a_mistake_costs_little_more_than_the_imports(commands: Commands, tmp_path: Path) -> None:
    """In seconds of work, for others may share the machine, and machines differ."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}

    def work(*command: str) -> tuple[float, subprocess.CompletedProcess[str]]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200,
            check=False,
        )  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done

    imports, _ = work("-c", "import torch, transformers.modeling_utils")
    whole, done = work(str(ROOT / "main.py"), *commands.line("editor.alhpa=1"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: editor.alhpa=1")
    assert done.stderr.count("\n") == 1
    assert whole < 2 * imports
