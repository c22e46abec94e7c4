"""Several processes that share a run (harness/ranks): real ones, over gloo, on this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from editor.grace import GRACE
from harness.job import require_alike
from harness.ranks import Ranks, SharedModel
from harness.ranks import group as ranks_module
from harness.ranks.group import LostRankError
from harness.ranks.model import _require_alike
from model import LanguageModel, edited
from tests.commands import MODULES, Commands, Run, save_tiny_model, zsre_row
from tests.conftest import ROOT, tiny_llama
from tests.forked import Forks, Process

EVERYTHING = (
    "checkpoint_every=2", "keep=9", "evaluation.every=4", "evaluation.generation=all", "evaluation.max_new_tokens=4",
    "evaluation.retention=2", "evaluation.examples=4", "evaluation.perplexity=passage.txt",
    "diagnostics.hidden_states=5", "downstream_eval_steps=4", "glue.limit=5", "glue.tasks=[sst2,rte]",
    "model.compute_tokens=64",
)  # fmt: skip
TRAINED = (
    "editor.rank=4", "editor.n_blocks=1", "editor.n_epochs=1", "editor.held_out_turns=1", "editor.meta_lr=1e-4",
    "editor.max_train_turns=null", "checkpoint_every=1", "keep=9",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerFast) -> Commands:
    """A folder with a model, twelve facts to edit, nine to warm up with, and a text."""
    folder = tmp_path_factory.mktemp("ranks")
    commands = Commands(folder, save_tiny_model(folder / "model", byte_tokenizer))
    commands.write("eval", [zsre_row(i) for i in range(12)])
    commands.write("train", [zsre_row(i) for i in range(50, 59)])
    (folder / "passage.txt").write_text("the quick brown fox " * 20)
    return commands


@pytest.fixture(scope="module")
def forks(place: Commands) -> Iterator[Forks]:
    with Forks(place.folder, place.folder / "cache") as forks:
        yield forks


def started(size: int, line: list[str], **special: dict[str, Any]) -> list[Process]:
    """What torchrun starts; `special` has more of the process of a rank, as `rank1`."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank in range(size):
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(Process(line, environment, **special.get(f"rank{rank}", {})))
    return processes


def together(forks: Forks, size: int, line: list[str], **special: dict[str, Any]) -> list[int]:
    """How they ended."""
    forks.start_together(*started(size, line, **special))
    return forks.end_together()


def weights(run: Run, turn: int) -> dict[str, Tensor]:
    tensors = load_file(run.folder / "checkpoints" / f"turn_{turn}" / "tensors.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.startswith("model/")}


def require_close(one: Run, many: Run, turn: int, tolerance: float = 1e-6) -> None:
    ours, theirs = weights(one, turn), weights(many, turn)
    assert ours.keys() == theirs.keys() != set()
    for name, weight in ours.items():
        assert float((weight - theirs[name]).norm() / weight.norm()) < tolerance, name


def about(value: Any) -> Any:
    """Results in which each number may be a little another, as by rounding, and seconds anything."""
    if isinstance(value, dict):
        return {name: about(entry) for name, entry in value.items() if name not in ("cost", "seconds")}
    return pytest.approx(value, rel=5e-3, abs=1e-5) if isinstance(value, float) else value


# ---------------------------------------------------------------------------------------------------------------------
# The same result


def test_two_processes_do_what_one_does(place: Commands, forks: Forks) -> None:
    """Three edits a turn: a rank has one of them, the other two."""
    one, many = Run(place.folder / "one"), Run(place.folder / "many")
    assert together(forks, 1, place.line(*EVERYTHING, run="one")) == [0], forks.stderr()
    assert together(forks, 2, place.line(*EVERYTHING, run="many")) == [0, 0], forks.stderr()
    for turn in (2, 4, 6, 7):
        require_close(one, many, turn)
    assert many.scores() == about(one.scores())
    assert {"ES_gen", "LS_agree", "perplexity"} < many.scores()["final"].keys()
    assert many.scores()["retention"].keys() == {"ES", "GS"}
    for mine, theirs in zip(one.lines("records.jsonl"), many.lines("records.jsonl"), strict=True):
        assert theirs == about(mine)
    for mine, theirs in zip(one.lines("turns.jsonl"), many.lines("turns.jsonl"), strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-6)
        assert [theirs[name] for name in ("turn", "phase", "edits", "answer_tokens")] == [
            mine[name] for name in ("turn", "phase", "edits", "answer_tokens")
        ]
    for name in ("glue/turn_0.json", "glue/turn_4.json", "glue/turn_7.json"):
        assert many.json(name)["sst2"]["answers"] == one.json(name)["sst2"]["answers"]
    states, others = (load_file(run.folder / "hidden_states.safetensors") for run in (one, many))
    assert all(torch.allclose(states[name], others[name], rtol=1e-4, atol=1e-5) for name in states)
    assert many.json("examples.json") == one.json("examples.json")
    assert many.json("run.json")["device"] == "2 x cpu"
    assert [path.name for path in place.folder.glob("outputs*")] == [], "only rank 0 writes, and only there"


@pytest.mark.slow
def test_more_processes_than_there_is_work(place: Commands, forks: Forks) -> None:
    """One fact a turn, one record in each evaluation: some of three ranks have nothing to do."""
    few = (
        "dataset.n_edits=1", "num_seq=3", "num_seq_zsre=2", "evaluation.sample=1", "evaluation.retention=1",
        "evaluation.generation=all", "evaluation.max_new_tokens=2", "editor.token=all", "checkpoint_every=1", "keep=9",
        "editor.cache_dir=spilled",
    )  # fmt: skip
    one, many = Run(place.folder / "few_one"), Run(place.folder / "few_many")
    assert together(forks, 1, place.line(*few, run="few_one")) == [0], forks.stderr()
    assert together(forks, 3, place.line(*few, run="few_many")) == [0, 0, 0], forks.stderr()
    require_close(one, many, 5)
    assert many.scores() == about(one.scores())
    assert list((place.folder / "spilled").iterdir()) == []


LOCATED = {
    "alphaedit": ("editor.nullspace_threshold=0.05", "editor.L2=0.01"),
    "memit": ("editor.mom2_update_weight=0.5", "editor.moment_ridge=1e-2", "editor.keep_keys=true"),
    "rome": ("editor.moment_ridge=1e-3", "model.edit_modules=[model.layers.1.mlp.down_proj]"),
}


@pytest.mark.slow
@pytest.mark.parametrize("editor", LOCATED)
def test_facts_are_located_and_second_moments_made_as_by_one(place: Commands, forks: Forks, editor: str) -> None:
    """Each process makes all of the moments itself, to the last bit those of one alone; the first keeps them."""
    line = (
        "model.edit_modules=[model.layers.1.mlp.down_proj,model.layers.2.mlp.down_proj]",
        "editor.v_num_grad_steps=3", "editor.prefixes=2", "editor.prefix_tokens=3", "corpus.path=passage.txt",
        "checkpoint_every=2", "keep=9", f"editor={editor}", *LOCATED[editor],
    )  # fmt: skip
    kept = place.folder / "cache" / "stableedit" / "moments"
    one, many = Run(place.folder / f"{editor}_one"), Run(place.folder / f"{editor}_many")
    forget(kept)
    assert together(forks, 1, place.line(*line, run=one.folder.name)) == [0], forks.stderr()
    moments = forget(kept)
    assert together(forks, 2, place.line(*line, run=many.folder.name)) == [0, 0], forks.stderr()
    assert forget(kept) == moments
    assert len(moments) == (2 if editor == "rome" else 4)  # of each module, over text and over questions
    require_close(one, many, 4, tolerance=1e-5)


def forget(folder: Path) -> dict[str, bytes]:
    """The files that were in the folder."""
    held = {path: path.read_bytes() for path in folder.glob("*")}
    for path in held:
        path.unlink()
    return {path.name: content for path, content in held.items()}


@pytest.mark.slow
def test_a_warm_up_that_ends_by_itself_does_so_in_all(place: Commands, forks: Forks) -> None:
    line = ("editor.preheat_mode=adaptive", "editor.preheat_tolerance=1e9", "num_seq_zsre=3", "num_seq=2")
    one, many = Run(place.folder / "adaptive_one"), Run(place.folder / "adaptive_many")
    assert together(forks, 1, place.line(*line, run="adaptive_one")) == [0], forks.stderr()
    assert together(forks, 2, place.line(*line, run="adaptive_many")) == [0, 0], forks.stderr()
    assert [line.get("passed_over", False) for line in many.lines("turns.jsonl")] == [False, False, True, False, False]
    assert many.scores() == about(one.scores())


@pytest.mark.slow
@pytest.mark.parametrize("editor", ["ft_l", "ft_m", "locft_bf", "grace", "wise"])
def test_editors_of_other_families_do_what_they_do_in_one(place: Commands, forks: Forks, editor: str) -> None:
    line = (
        f"editor={editor}", f"model.edit_modules=[{MODULES[0]}]", "editor.num_steps=3", "editor.lr=0.01",
        "checkpoint_every=2", "keep=9", "evaluation.every=2",
    )  # fmt: skip
    one, many = Run(place.folder / f"{editor}_one"), Run(place.folder / f"{editor}_many")
    assert together(forks, 1, place.line(*line, run=f"{editor}_one")) == [0], forks.stderr()
    assert together(forks, 2, place.line(*line, run=f"{editor}_many")) == [0, 0], forks.stderr()
    last = max(int(path.name.removeprefix("turn_")) for path in (one.folder / "checkpoints").glob("turn_*"))
    ours, theirs = (
        load_file(run.folder / "checkpoints" / f"turn_{last}" / "tensors.safetensors") for run in (one, many)
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        # another share pads other texts, which rounds otherwise; where gradients are near 0, Adam's division makes more
        # of that (GRACE's values: 7e-7 of 0.7), while FT-L's updates end at their bound, where nothing of it is left
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-5, atol=1e-5)
    assert many.scores() == about(one.scores())


@pytest.mark.slow
def test_a_model_edited_before_is_scored_by_all(place: Commands, forks: Forks) -> None:
    line = [f"evaluate={place.model}", "evaluation.generation=2", "evaluation.max_new_tokens=2"]
    assert together(forks, 1, place.line(*line, run="scored_one")) == [0], forks.stderr()
    assert together(forks, 2, place.line(*line, run="scored_many")) == [0, 0], forks.stderr()
    scored = Run(place.folder / "scored_many")
    assert scored.scores() == about(Run(place.folder / "scored_one").scores())
    before = len(forks.stderr())
    assert together(forks, 2, place.line(*line, f"resume={scored.folder}", run="again")) == [0, 0], forks.stderr()
    assert "finished already" in forks.stderr()[before:]


@pytest.mark.slow
def test_a_stop_between_two_blocks_of_an_evaluation(place: Commands, forks: Forks) -> None:
    """All leave in step: nobody takes it for a crash. And one process goes on where two were stopped."""
    before = len(forks.stderr())
    stop = {"before": "tests.ranks.test_ranks:terminate_while_scoring"}
    assert together(forks, 2, place.line(*EVERYTHING, run="scoring"), rank0=stop) == [143, 0], forks.stderr()
    assert "another process" not in forks.stderr()[before:]
    stopped = Run(place.folder / "scoring")
    assert stopped.json("run.json")["status"] == "interrupted"
    assert together(forks, 1, place.line(*EVERYTHING, f"resume={stopped.folder}", run="fresh")) == [0]
    assert stopped.json("run.json")["status"] == "finished"


def terminate_while_scoring() -> None:
    """In the middle of a task of the second evaluation of edited facts."""
    from harness.evaluation import evaluate

    original, calls = evaluate._score_share, 0

    def answer(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    answer.__module__, answer.__qualname__ = original.__module__, original.__qualname__
    evaluate._score_share = answer


@pytest.mark.slow
@pytest.mark.parametrize("editor", ["mend", "rledit"])
def test_a_network_is_trained_by_all(place: Commands, forks: Forks, editor: str) -> None:
    line = [*TRAINED, f"editor={editor}", "model.lr=1e-3"]
    one, many = (Run(place.folder / f"{name}_{editor}") for name in ("one", "many"))
    assert together(forks, 1, place.line(*line, run=one.folder.name)) == [0], forks.stderr()
    assert together(forks, 2, place.line(*line, run=many.folder.name)) == [0, 0], forks.stderr()
    for mine, theirs in zip(one.lines("turns.jsonl"), many.lines("turns.jsonl"), strict=True):
        if "meta_loss" in mine:
            assert theirs["meta_loss"] == pytest.approx(mine["meta_loss"], rel=1e-3, abs=1e-6)
    require_close(one, many, 4, 1e-5)


@pytest.mark.slow
def test_the_same_bits_after_a_stop(place: Commands, forks: Forks) -> None:
    """A signal is the affair of rank 0: it ends its turn, keeps it, and the others leave with it."""
    assert together(forks, 2, place.line(*EVERYTHING, run="whole")) == [0, 0], forks.stderr()
    whole = Run(place.folder / "whole")
    stop = {"before": "tests.ranks.test_ranks:terminate_in_the_fourth_capture"}
    assert together(forks, 2, place.line(*EVERYTHING, run="stopped"), rank0=stop) == [143, 0], forks.stderr()
    stopped = Run(place.folder / "stopped")
    assert stopped.json("run.json")["status"] == "interrupted"
    assert together(forks, 2, place.line(*EVERYTHING, f"resume={stopped.folder}", run="fresh")) == [0, 0]
    assert stopped.json("run.json")["resumed"][0]["turn"] == 4
    assert all(torch.equal(w, weights(stopped, 7)[name]) for name, w in weights(whole, 7).items())
    assert stopped.scores() == whole.scores()


@pytest.mark.slow
def test_training_by_all_comes_to_the_same_bits_after_a_stop(place: Commands, forks: Forks) -> None:
    line = [*TRAINED, "editor=malmen", "model.lr=1e-3"]
    assert together(forks, 2, place.line(*line, run="trained")) == [0, 0], forks.stderr()
    stop = {"before": "tests.ranks.test_ranks:terminate_in_the_second_turn_of_training"}
    assert together(forks, 2, place.line(*line, run="training"), rank0=stop) == [143, 0], forks.stderr()
    whole, stopped = Run(place.folder / "trained"), Run(place.folder / "training")
    assert {path.name for path in (stopped.folder / "checkpoints").iterdir()} == {"training_1", "training_2"}
    assert together(forks, 2, place.line(*line, f"resume={stopped.folder}", run="fresh")) == [0, 0], forks.stderr()
    assert all(torch.equal(w, weights(stopped, 4)[name]) for name, w in weights(whole, 4).items())
    assert stopped.scores() == whole.scores()


def terminate_in_the_second_turn_of_training() -> None:
    in_call(2, SharedModel, "weight_gradients", lambda _: os.kill(os.getpid(), signal.SIGTERM))


def terminate_in_the_fourth_capture() -> None:
    in_call(4, SharedModel, "capture", lambda _: os.kill(os.getpid(), signal.SIGTERM))


def in_call(number: int, kind: type, method: str, act: Callable[[Any], None]) -> None:
    """Before the call of that number, act on the object that it is a method of."""
    original, calls = getattr(kind, method), 0

    def calling(self: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            act(self)
        return original(self, *arguments)

    setattr(kind, method, calling)


@pytest.mark.slow
def test_a_sweep(place: Commands, forks: Forks) -> None:
    """The second job fails, on rank 0 alone; the third finds the others at their places."""
    line = [word for word in place.line("-m", "seed=1,2,3", "num_seq=2") if not word.startswith("hydra.run.dir")]
    line = [*line, f"hydra.sweep.dir={place.folder / 'sweep'}", "hydra.sweep.subdir=${hydra:job.num}"]
    break_it = {"before": "tests.ranks.test_ranks:fail_in_the_second_job"}
    assert together(forks, 2, line, rank0=break_it) == [1, 0], forks.stderr()
    states = [Run(place.folder / "sweep" / str(job)).json("run.json")["status"] for job in (0, 1, 2)]
    assert states == ["finished", "failed", "finished"]


def fail_in_the_second_job() -> None:
    import main

    original, calls = main.job.make_editor, 0

    def make_editor(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        editor = original(*arguments)
        if calls == 2:
            editor.edit = lambda *_: (_ for _ in ()).throw(FloatingPointError("out of range"))  # type: ignore[method-assign]
        return editor

    main.job.make_editor = make_editor


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        "torch.distributed.run --shutdown-timeout 600 --nproc-per-node 2",
        "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no",
    ],
)
def test_as_users_start_it(place: Commands, launcher: str) -> None:
    name = launcher.partition(".")[0]
    command = [sys.executable, "-m", *launcher.split(), str(ROOT / "main.py")]
    environment = {**os.environ, "XDG_CACHE_HOME": str(place.folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *place.line(run=name)], cwd=place.folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Run(place.folder / name).json("run.json")["device"] == "2 x cpu"
    assert done.stdout.count("ES  efficacy") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def raise_in_the_second_capture() -> None:
    def fail(_: LanguageModel) -> None:
        raise MemoryError("no room for a thing of this size")

    in_call(2, LanguageModel, "capture", fail)


def lose_a_number_in_the_second_capture() -> None:
    def lose(model: LanguageModel) -> None:
        next(iter(model.edited.values())).weight.data.fill_(float("nan"))

    in_call(2, LanguageModel, "capture", lose)


def die_in_the_second_capture() -> None:
    in_call(2, LanguageModel, "capture", lambda _: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "what", "codes", "said"),
    [
        (1, "raise_in_the_second_capture", [1, 0], "rank 1 on {host}: MemoryError: no room for a thing of this size"),
        (0, "raise_in_the_second_capture", [1, 0], "MemoryError: no room for a thing of this size"),
        (1, "lose_a_number_in_the_second_capture", [1, 0], "turn 1: rank 1 on {host}: the loss is nan"),
        (1, "die_in_the_second_capture", [1, -signal.SIGKILL], "another process of the run has ended"),
        (0, "die_in_the_second_capture", [-signal.SIGKILL, 1], "another process of the run has ended"),
    ],
)
def test_one_error_ends_all(place: Commands, forks: Forks, rank: int, what: str, codes: list[int], said: str) -> None:
    """In time, with the error shown, and the run marked as failed, unless rank 0 died."""
    before, start = len(forks.stderr()), time.monotonic()
    name = f"{what}_{rank}"
    line = place.line(run=name)
    assert together(forks, 2, line, **{f"rank{rank}": {"before": f"tests.ranks.test_ranks:{what}"}}) == codes
    assert time.monotonic() - start < 30
    said = said.format(host=os.uname().nodename)
    assert said in forks.stderr()[before:]
    run = Run(place.folder / name).json("run.json")
    assert run["status"] == ("running" if codes[0] < 0 else "failed")
    assert codes[0] < 0 or said in run["error"]


@pytest.mark.slow
def test_a_rank_with_other_weights(place: Commands, forks: Forks, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    """A folder of the same name on another machine."""
    elsewhere = place.folder / "elsewhere"
    elsewhere.mkdir()
    save_tiny_model(elsewhere / "model", byte_tokenizer, seed=1)
    before = len(forks.stderr())
    line = place.line("model.name_or_path=model", run="weights")
    assert together(forks, 2, line, rank1={"cwd": str(elsewhere)}) == [1, 0]
    assert "rank 1 reads other weights than rank 0" in forks.stderr()[before:]
    assert not (place.folder / "weights" / "run.json").exists()


@pytest.mark.slow
def test_a_rank_with_other_versions(place: Commands, forks: Forks) -> None:
    before = len(forks.stderr())
    change = {"before": "tests.ranks.test_ranks:be_of_another_version"}
    assert together(forks, 2, place.line(run="versions"), rank1=change) == [1, 0]
    assert "rank 1 computes with torch 1.0 and rank 0 with " in forks.stderr()[before:]


def be_of_another_version() -> None:
    from harness.job import other_ranks

    original = other_ranks.versions
    other_ranks.versions = lambda: original() | {"torch": "1.0"}


@pytest.mark.slow
def test_a_rank_with_other_data(place: Commands, forks: Forks) -> None:
    elsewhere = place.folder / "other"
    elsewhere.mkdir()
    (elsewhere / "eval.json").write_text(json.dumps([zsre_row(i) for i in range(1, 13)]))
    before = len(forks.stderr())
    line = place.line("dataset.valid_path=eval.json", run="data")
    assert together(forks, 2, line, rank1={"cwd": str(elsewhere)}) == [1, 0]
    assert "rank 1 reads another file of dataset.valid_path than rank 0" in forks.stderr()[before:]
    assert not (place.folder / "data" / "run.json").exists()


def test_a_rank_with_other_settings() -> None:
    class Two(Ranks):
        def all_gather(self, work: Callable[[], Any]) -> list[Any]:
            about, versions = work()
            return [(about, versions), ({**about, "config": {"seed": 2, "editor": {"lr": 1.0}}}, versions)]

    about = {"config": {"seed": 1, "editor": {"lr": 1.0}}, "inputs": {}}
    with pytest.raises(ValueError, match="rank 1 has other settings than rank 0: seed=2 there and 1 here; start all"):
        require_alike(Two(), about)


@pytest.mark.slow
def test_weights_that_drift_apart_are_noticed_at_once(place: Commands, forks: Forks) -> None:
    """One bit of one weight, as another processor might round it."""
    before = len(forks.stderr())
    change = {"before": "tests.ranks.test_ranks:round_otherwise"}
    assert together(forks, 2, place.line(run="drift"), rank1=change) == [1, 0]
    assert "rank 1 holds other bits of model.layers.2.mlp.down_proj than rank 0" in forks.stderr()[before:]
    assert not (place.folder / "drift" / "turns.jsonl").exists()


def round_otherwise() -> None:
    original = LanguageModel.apply

    def apply(self: LanguageModel, *arguments: Any) -> Any:
        changes = original(self, *arguments)
        first = next(iter(self.edited.values())).master.view(-1)
        first[7] = first[7].nextafter(torch.tensor(2.0))
        return changes

    LanguageModel.apply = apply  # type: ignore[method-assign]


@pytest.mark.slow
def test_memories_that_drift_apart_are_noticed_at_once(place: Commands, forks: Forks) -> None:
    before = len(forks.stderr())
    line = place.line("editor=grace", f"model.edit_modules=[{MODULES[0]}]", "editor.num_steps=1", run="beside")
    change = {"before": "tests.ranks.test_ranks:remember_otherwise"}
    assert together(forks, 2, line, rank1=change) == [1, 0]
    assert "rank 1 holds other bits of values than rank 0" in forks.stderr()[before:]
    assert not (place.folder / "beside" / "turns.jsonl").exists()


def remember_otherwise() -> None:
    original = GRACE.state_dict

    def state_dict(self: GRACE) -> dict[str, torch.Tensor]:
        state = original(self)
        return {**state, "values": state["values"].nextafter(torch.tensor(9.0))}

    GRACE.state_dict = state_dict  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("model_device=cuda:0",), "model_device=cuda:0 with 2 processes"),
        (("model.device_map=auto",), "model.device_map=auto with 2 processes"),
        (("dataset.valid_path=nowhere.json",), "dataset.valid_path=nowhere.json: no such file"),
        (("num_seq=abc",), "num_seq"),
        (("hydra.run.dir=/dev/null/run",), "/dev/null"),  # which rank 0 alone wants to make
        (("resume=nowhere",), "nowhere: holds no run"),  # where rank 0 alone looks
        (("hydra/launcher=joblib", "-m"), "hydra/launcher=joblib with 2 processes of torchrun"),
    ],
)
def test_a_mistake_is_said_once(place: Commands, forks: Forks, overrides: tuple[str, ...], words: str) -> None:
    before = len(forks.stderr())
    assert together(forks, 2, place.line(*overrides, run="mistake")) == [1, 0]
    said = [line for line in forks.stderr()[before:].splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert words in said[0]


# ---------------------------------------------------------------------------------------------------------------------
# The parts


@pytest.mark.parametrize(("here", "gpus", "enough"), [("4", 2, False), ("2", 2, True), ("1", 0, False)])
def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch, here: str, gpus: int, enough: bool) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if enough:
        ranks_module.require_gpu_each()
        return
    with pytest.raises(ValueError, match=rf"--nproc-per-node={here}: .* has {gpus} GPUs; start as many processes or"):
        ranks_module.require_gpu_each()


def test_processes_that_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(ranks_module.VARIABLES, ("1", "2", "1", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks_module, "ARRIVAL", timedelta(seconds=1))
    with pytest.raises(LostRankError, match="the 2 processes of the run did not meet"):
        ranks_module.init_ranks.__wrapped__()


def test_by_itself_a_process_does_all() -> None:
    assert Ranks().all_gather(lambda: 7) == [7]
    assert Ranks().broadcast(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        Ranks().all_gather(lambda: 1 / 0)


@given(st.lists(st.integers(1, 100), max_size=30), st.integers(1, 6))
def test_work_is_dealt_out_whole_and_evenly(costs: list[int], world_size: int) -> None:
    model = LanguageModel(tiny_llama(), None, {})
    model.world_size = world_size
    shares = model.partition(costs)
    assert sorted(place for share in shares for place in share) == list(range(len(costs)))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(costs[place] for place in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0)


@pytest.mark.slow
def test_answers_are_taken_one_by_one_and_an_error_in_taking_breaks_no_step(place: Commands, forks: Forks) -> None:
    """Such as a full disk under editor.cache_dir: the others are let go, nobody speaks of a crash."""
    before = len(forks.stderr())
    fail = {"before": "tests.ranks.test_ranks:fail_in_taking"}
    assert together(forks, 2, place.line(run="taking"), rank0=fail) == [1, 0], forks.stderr()
    said = forks.stderr()[before:]
    assert "No space left on device" in said
    assert "another process" not in said


def fail_in_taking() -> None:
    original = Ranks.all_gather_tensors

    def all_gather_tensors(self: Ranks, work: Any, take: Any) -> None:
        def taking(*answer: Any) -> None:
            raise OSError(28, "No space left on device")

        original(self, work, taking)

    Ranks.all_gather_tensors = all_gather_tensors  # type: ignore[method-assign]


def test_weights_set_aside_come_back() -> None:
    plain = tiny_llama()
    model = LanguageModel(plain, None, {"down": plain.get_submodule("model.layers.1.mlp.down_proj")})
    shared = SharedModel(model, Ranks())
    with torch.no_grad():
        model.edited["down"].master.mul_(1.5)
    edited = model.checksums()
    with shared.unedited():
        assert model.is_original()
    assert model.checksums() == edited
    with pytest.raises(ZeroDivisionError), shared.unedited():
        raise ZeroDivisionError
    assert model.checksums() == edited


@pytest.mark.parametrize("together", [1 << 22, 7])
def test_checksums_tell_one_bit_apart(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edited, "TOGETHER", together)
    plain = tiny_llama()
    model = LanguageModel(plain, None, {"down": plain.get_submodule("model.layers.1.mlp.down_proj")})
    before = model.checksums()
    weight = model.edited["down"].master.view(-1)
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    weight[3] = weight[3].nextafter(up)
    seen = [before, model.checksums()]
    weight[4] = weight[4].nextafter(down)  # sums of bits would be as before
    seen.append(model.checksums())
    weight[:] = weight.flip(0)
    seen.append(model.checksums())
    assert len({sums["down"] for sums in seen}) == 4
    with pytest.raises(ValueError, match="rank 1 holds other bits of down than rank 0"):
        _require_alike([before, model.checksums()])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_checksums_are_of_tensors_of_all_kinds(dtype: torch.dtype) -> None:
    """An editor's state has flags and numbers too."""
    one, other = torch.tensor([0, 1, 1]).to(dtype), torch.tensor([1, 0, 1]).to(dtype)
    tensors = {"one": one, "same": one.clone(), "other": other, "flag": one[0]}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    sums = edited.checksums(tensors)
    assert sums["one"] == sums["same"] != sums["other"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items()), "they are read, not written"


@pytest.mark.slow
def test_a_model_laid_over_all_devices(place: Commands, forks: Forks) -> None:
    """Here there is one, and so the same result, bit for bit."""
    for name, more in {"laid": ["model.device_map=auto"], "put": []}.items():
        assert together(forks, 1, place.line(*EVERYTHING, *more, run=name)) == [0], forks.stderr()
    laid, put = Run(place.folder / "laid"), Run(place.folder / "put")
    assert all(torch.equal(w, weights(put, 7)[name]) for name, w in weights(laid, 7).items())
    assert json.dumps(laid.scores()) == json.dumps(put.scores())


def test_a_model_with_no_room_is_refused(place: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    from model.source import ModelSource

    source = ModelSource(str(place.model))
    found: dict[str, set[str]] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: (tiny_llama().to("meta"), found)
    )
    with pytest.raises(ValueError, match=r"model.device_map=auto: no device has room for model.embed_tokens.weight"):
        LanguageModel.load(source, None, (), dtype=torch.float32, device=torch.device("cpu"), device_map="auto")
