"""Meta-training as whole commands on the tiny model: what it leaves behind, how it goes on, what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

import main
from data.records import LossTerm
from harness.run.interrupt import Interruption
from model import LanguageModel
from tests.commands import Commands, Run, command_line, save_tiny_model, zsre_row

TRAINED = ("mend", "malmen", "rledit")
# three passes over three turns of three facts, one more turn held out
SETTINGS = (
    "editor.rank=4", "editor.n_blocks=2", "editor.meta_lr=0.01", "editor.n_epochs=3", "editor.held_out_turns=1",
    "num_seq=2",
)  # fmt: skip
# as published: the preset for the small model steps every turn
PUBLISHED = {"rledit": ("editor.update_every=trajectory", "editor.back_depth=10")}


def settings_of(name: str) -> tuple[str, ...]:
    return (f"editor={name}", *SETTINGS, *PUBLISHED.get(name, ()))


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerFast) -> Commands:
    folder = tmp_path_factory.mktemp("training")
    made = Commands(folder, save_tiny_model(folder / "model", byte_tokenizer))
    made.write("eval", [zsre_row(i) for i in range(12)])
    made.write("train", [zsre_row(i) for i in range(100, 112)])
    return made


@pytest.fixture(scope="module")
def runs(commands: Commands) -> dict[str, Run]:
    """One run of each trained editor that keeps its network."""
    keep = ("editor.save_checkpoint=true", "checkpoint_every=4", "model_cache=true")
    return {name: commands(*settings_of(name), *keep, run=name) for name in TRAINED}


def training_lines(run: Run, phase: str = "meta_train") -> list[dict[str, Any]]:
    return [line for line in run.lines("turns.jsonl") if line["phase"] == phase]


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in ("seconds", "memory")} for line in lines]


@pytest.mark.parametrize("name", TRAINED)
def test_training_comes_first_and_is_on_record(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    phases = [line["phase"] for line in run.lines("turns.jsonl")]
    one_pass = ["meta_valid"] + ["meta_train"] * 3
    assert phases == [*one_pass * 3, "meta_valid", "edit", "edit"]
    lines = training_lines(run)
    assert [line["turn"] for line in lines] == list(range(9))
    assert [line["epoch"] for line in lines] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for line in lines:
        loss = line["meta_loss"]
        assert loss["rephrase"] > 0
        assert loss["total"] > loss["rephrase"]  # the locality loss counts
    cost = run.json("results.json")["cost"]
    assert (cost["turns"], cost["training_turns"], cost["edits"]) == (2, 9, 6)


@pytest.mark.parametrize("name", TRAINED)
def test_training_lowers_the_loss_of_turns_that_it_never_saw(runs: dict[str, Run], name: str) -> None:
    totals = [line["meta_loss"]["total"] for line in training_lines(runs[name], "meta_valid")]
    assert totals[-1] < totals[0]


def test_the_optimiser_steps_once_a_trajectory_or_once_a_turn(commands: Commands, runs: dict[str, Run]) -> None:
    assert [line["grad_norm"] is not None for line in training_lines(runs["malmen"])] == [True] * 9
    assert [line["grad_norm"] is not None for line in training_lines(runs["rledit"])] == [False, False, True] * 3
    every_turn = commands("editor=rledit", *SETTINGS, "editor.update_every=turn", run="every_turn")
    assert [line["grad_norm"] is not None for line in training_lines(every_turn)] == [True] * 9


@pytest.mark.parametrize("name", TRAINED)
def test_a_kept_network_edits_like_the_run_that_trained_it(commands: Commands, runs: dict[str, Run], name: str) -> None:
    """So the language model is after training, bit for bit, what it was before: here nothing was trained on it."""
    load = f"editor.load_checkpoint={runs[name].folder}"
    again = commands(*settings_of(name), load, "model_cache=true", run=f"{name}_again")
    assert without_times(again.lines("turns.jsonl")) == without_times(runs[name].lines("turns.jsonl")[-2:])
    assert again.scores() == runs[name].scores()
    models = [load_file(run.folder / "model" / "model.safetensors") for run in (again, runs[name])]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])
    assert "network" in again.json("run.json")["inputs"]


def test_an_untrained_network_edits(commands: Commands) -> None:
    run = commands("editor=rledit", *SETTINGS, "editor.n_epochs=0", run="untrained")
    assert run.phases() == "ee"
    assert "train" not in run.json("run.json")["inputs"]


def test_the_seed_decides_the_network(commands: Commands, runs: dict[str, Run]) -> None:
    other = commands("editor=malmen", *SETTINGS, "seed=7", run="seed")
    losses = [[line["meta_loss"]["total"] for line in training_lines(run)] for run in (other, runs["malmen"])]
    assert losses[0] != losses[1]


# ---------------------------------------------------------------------------------------------------------------------
# Interrupted


@pytest.mark.parametrize("name", ["malmen", "rledit"])
@pytest.mark.parametrize("stop", [2, 4, 9, 10])
def test_training_that_was_stopped_comes_to_the_same_bits(
    commands: Commands, runs: dict[str, Run], monkeypatch: pytest.MonkeyPatch, name: str, stop: int
) -> None:
    """In the middle of a pass (for RLEdit of a trajectory, with half its gradient), later, where editing begins, and
    after its first turn, where the network that was kept at the end of training stays as it is."""
    keep = ("editor.save_checkpoint=true", "checkpoint_every=4", "model_cache=true")
    place = f"{name}_stopped_{stop}"
    stopping_after(monkeypatch, stop)
    with command_line(commands.line(*settings_of(name), *keep, run=place)), pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 143
    monkeypatch.undo()
    commands(*settings_of(name), *keep, f"resume={commands.folder / place}", run="fresh")
    resumed = Run(commands.folder / place)
    assert without_times(resumed.lines("turns.jsonl")) == without_times(runs[name].lines("turns.jsonl"))
    assert resumed.scores() == runs[name].scores()
    for file in ("model/model.safetensors", "network/turn_9/tensors.safetensors"):
        assert (resumed.folder / file).read_bytes() == (runs[name].folder / file).read_bytes()


def test_what_a_finished_run_is_asked_for_too_late(commands: Commands) -> None:
    commands(*settings_of("malmen"), run="over")
    late = commands(
        *settings_of("malmen"), "resume=auto", "model_cache=true", "editor.save_checkpoint=true", run="over"
    )
    said = (late.folder / "main.log").read_text()
    assert f"`python -m harness.export {late.folder} --to FOLDER` does" in said
    assert "editor.save_checkpoint=true: the run ended without keeping its network; without resume," in said
    assert not (late.folder / "model").exists()


def test_a_network_asked_for_after_training_has_ended(
    commands: Commands, runs: dict[str, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parameters are those that training ended with, its statistics those after the first turn of editing."""
    stopping_after(monkeypatch, 10)
    with command_line(commands.line(*settings_of("malmen"), run="late")), pytest.raises(SystemExit):
        main.main()
    monkeypatch.undo()
    resume = f"resume={commands.folder / 'late'}"
    late = Run(commands.folder / "late")
    first = load_file(late.folder / "checkpoints" / "turn_1" / "tensors.safetensors")
    commands(*settings_of("malmen"), resume, "editor.save_checkpoint=true", run="fresh")
    assert late.scores() == runs["malmen"].scores()
    files = (run.folder / "network" / "turn_9" / "tensors.safetensors" for run in (late, runs["malmen"]))
    kept, ended = (load_file(file) for file in files)
    assert kept.keys() == ended.keys()
    different = {name for name in kept if not torch.equal(kept[name], ended[name])}
    assert different == {name for name in kept if ".normalizers." in name}
    assert all(torch.equal(kept[name], first[name.replace("network/", "editor/", 1)]) for name in kept)
    said = "the network is kept as it is after turn 1, whose rows its statistics have seen, too"
    assert said in (late.folder / "main.log").read_text()

    again = commands(*settings_of("malmen"), f"editor.load_checkpoint={late.folder}", run="from_late")
    assert "kept after turn 1 of the run that trained it" in (again.folder / "main.log").read_text()


def stopping_after(monkeypatch: pytest.MonkeyPatch, turns: int) -> None:
    """A signal arrives while training turn number `turns` goes on."""
    held = Interruption.held
    count = 0

    def counted(self: Interruption) -> Any:
        nonlocal count
        count += 1
        if count == turns:
            self._first = 15
        return held(self)

    monkeypatch.setattr(Interruption, "held", counted)


# ---------------------------------------------------------------------------------------------------------------------
# Refused


def test_a_training_file_that_is_too_short(commands: Commands) -> None:
    message = commands.refused(
        "editor=malmen", "editor.rank=4", "dataset.n_edits=20", "dataset.valid_path=" + str(long_file(commands))
    )
    assert "dataset.train_path: the training data holds 12 rows, 0 full turns of dataset.n_edits=20" in message
    held = commands.refused("editor=malmen", "editor.rank=4", "editor.held_out_turns=4")
    assert "editor.held_out_turns=4 of them are not trained on" in held


def long_file(commands: Commands) -> Path:
    path = commands.folder / "long.json"
    path.write_text(json.dumps([zsre_row(i) for i in range(200, 230)]))
    return path


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["editor.rank=65"],
            "editor.rank=65: more than the 64 inputs of the network of a 40x24 module; set 64 or less",
        ),
        (["editor.back_depth=0"], "editor.back_depth=0: must be 1 or more"),
        (["editor.time_decay=0"], "editor.time_decay=0.0: must lie in (0, 1]"),
        (["editor.time_decay=1.01"], "editor.time_decay=1.01: must lie in (0, 1]"),
        (["editor.trajectory_length=0"], "editor.trajectory_length=0: must be 1 or more"),
        (["editor.load_checkpoint=nowhere"], "editor.load_checkpoint=nowhere: no such folder"),
    ],
)
def test_settings_without_sense(commands: Commands, settings: list[str], words: str) -> None:
    rank = [] if "rank" in settings[0] else ["editor.rank=4"]
    assert words in commands.refused("editor=rledit", *rank, *settings)


def test_training_data_without_the_questions_that_the_loss_needs(commands: Commands) -> None:
    fields = ("dataset=jsonl", "dataset.fields.prompt=src", "dataset.fields.answer=ans", "editor=malmen")
    bare = commands.refused(*fields, "editor.rank=4")
    assert "turns of dataset.n_edits=3 facts without any rephrase question" in bare
    message = commands.refused(*fields, "editor.rank=4", "dataset.fields.rephrase=rephrase")
    assert "without any locality question" in message
    assert "or editor.loc_coef=0" in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["editor=rledit"], "trained with editor=malmen, here it is rledit; set editor=malmen"),
        (["editor.rank=5"], "trained with editor.rank=4, here it is 5; set editor.rank=4"),
        (["editor.n_blocks=3"], "trained with editor.n_blocks=2, here it is 3"),
        (["model.edit_modules=[model.layers.2.mlp.down_proj]"], "model.layers.3.mlp.down_proj (40x24)"),
        (["editor.statistics_scope=module"], "trained with editor.statistics_scope=shape, here it is module"),
    ],
)
def test_a_network_made_for_something_else(
    commands: Commands, runs: dict[str, Run], settings: list[str], words: str
) -> None:
    load = f"editor.load_checkpoint={runs['malmen'].folder}"
    keys = {word.split("=")[0] for word in settings}
    rest = [word for word in ("editor=malmen", *SETTINGS) if word.split("=")[0] not in keys]
    message = commands.refused(*rest, *settings, load)
    assert message.startswith(f"error: editor.load_checkpoint={runs['malmen'].folder}: trained")
    assert words in message


def test_a_network_trained_on_another_model(
    commands: Commands, runs: dict[str, Run], byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    other = save_tiny_model(commands.folder / "other_model", byte_tokenizer, seed=5)
    load = f"editor.load_checkpoint={runs['malmen'].folder}"
    message = commands.refused("editor=malmen", *SETTINGS, load, f"model.name_or_path={other}")
    assert "trained on other weights (fingerprint " in message


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_network(commands: Commands, runs: dict[str, Run], file: str, damage: str) -> None:
    copy = commands.folder / f"damaged_{file}_{damage}"
    shutil.copytree(runs["malmen"].folder / "network" / "turn_9", copy)
    content = bytearray((copy / file).read_bytes())
    if damage == "cut":
        del content[-7:]
    else:
        content[len(content) // 2] ^= 4
    (copy / file).write_bytes(content)
    message = commands.refused("editor=malmen", *SETTINGS, f"editor.load_checkpoint={copy}")
    assert f"{copy / file}: damaged, not" in message


def test_a_run_that_kept_no_network(commands: Commands, runs: dict[str, Run]) -> None:
    plain = commands("editor=mend", *SETTINGS, "editor.n_epochs=0", run="kept_none")
    message = commands.refused("editor=mend", *SETTINGS, f"editor.load_checkpoint={plain.folder}")
    assert "holds no whole network; name a run that was made with editor.save_checkpoint=true" in message


def test_a_loss_that_turns_non_finite_stops_training_and_leaves_the_last_good_network(
    commands: Commands, runs: dict[str, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network kept after the first pass is the one that an undisturbed training has there, and edits."""
    gradients, calls = LanguageModel.weight_gradients, 0

    def breaking(self: LanguageModel, terms: Sequence[LossTerm]) -> tuple[dict[str, torch.Tensor], list[float]]:
        nonlocal calls
        found, losses = gradients(self, terms)
        calls += 1
        return found, [math.nan if calls == 6 and term.reference is not None else loss
                       for term, loss in zip(terms, losses, strict=True)]  # fmt: skip

    monkeypatch.setattr(LanguageModel, "weight_gradients", breaking)
    message = commands.refused(*settings_of("malmen"), "editor.save_checkpoint=true", run="diverged")
    assert message.startswith("error: meta-training, turn 5: the locality loss is nan; a smaller editor.meta_lr ")
    run = Run(commands.folder / "diverged")
    assert message.endswith(f"; the network after turn 3 is in {run.folder / 'network'}")
    assert run.json("run.json")["status"] == "failed"
    load = f"editor.load_checkpoint={run.folder}"
    edited = commands(*settings_of("malmen"), load, run="after_divergence")
    assert edited.phases() == "ee"
    assert edited.scores() != runs["malmen"].scores()  # six more turns of training would have made another network


@pytest.mark.parametrize("rate", ["80", "1e30"])
def test_steps_beyond_all_bounds_end_in_one_line(commands: Commands, rate: str) -> None:
    message = commands.refused(*settings_of("rledit"), f"editor.meta_lr={rate}", run=f"diverged_{rate}")
    assert message.startswith("error: meta-training, ")
    assert "; a smaller editor.meta_lr or editor.lr may keep it finite" in message


def test_few_steps_of_the_optimiser_are_warned_of(commands: Commands) -> None:
    """One step a trajectory and one trajectory a pass: the published schedule on a short file."""
    run = commands(*settings_of("rledit"), run="few_steps")
    log = (run.folder / "main.log").read_text()
    assert "meta-training: 9 turns make 3 steps of the optimiser, few to learn anything from" in log
