"""A run that is killed, stopped or moved goes on to the same bits; and nothing else can go on in its place."""

from __future__ import annotations

import errno
import glob
import json
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import main
from harness.ranks.group import Ranks, launch_command
from harness.report import write_report
from harness.run import checkpoint
from harness.run.checkpoint import FORMAT, STATE, TENSORS
from harness.run.folder import RunFolder
from harness.run.interrupt import Interrupted, Interruption, end_on
from harness.run.lock import FolderLock
from model import LanguageModel
from tests.commands import Commands, Run, command_line, commands_in, save_tiny_model, zsre_row
from tests.conftest import ROOT, tiny_llama
from tests.forked import Forks

TIMES = ("seconds", "memory", "seconds_per_turn", "peak_memory", "training_seconds")
LOOP = (
    "num_seq=4",
    "num_seq_zsre=2",
    "checkpoint_every=2",
    "evaluation.every=4",
    "evaluation.retention=1",
    "evaluation.examples=1",
)


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run found, without what differs from run to run: times, and how long the text of times is."""
    done = Run(folder)
    last = max((folder / "checkpoints").glob("turn_*"), key=lambda path: int(path.name.removeprefix("turn_")))
    results = done.json("results.json")
    return {
        "turns": [
            {key: value for key, value in line.items() if key not in TIMES} for line in done.lines("turns.jsonl")
        ],
        "records": (folder / "records.jsonl").read_bytes(),
        "scores": (folder / "scores.jsonl").read_bytes(),
        "examples": (folder / "examples.json").read_bytes(),
        "results": {**results, "cost": {k: v for k, v in results["cost"].items() if k not in TIMES}},
        "tensors": (last / TENSORS).read_bytes(),  # weights, statistics, past updates
        "memory": json.loads((last / STATE).read_text())["state"]["diagnostics"],
        "status": done.json("run.json")["status"],
    }


def require_same(one: Path, other: Path) -> None:
    before, after = outcome(one), outcome(other)
    assert before["status"] == "finished"
    assert [name for name in before if before[name] != after[name]] == []


def content(folder: Path) -> dict[str, bytes]:
    """What must not be touched when a resume is refused."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "main.log"
    }


@contextmanager
def signal_after(kind: type, method: str, call: int, *numbers: int) -> Iterator[None]:
    """Send this process signals, a second apart, right after that call of `kind.method`.

    `method` may name a stage, as in "append_records of eval": then calls with its lines are counted.
    """
    method, _, stage = method.partition(" of ")
    original, seen = getattr(kind, method), 0

    def calling(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        counts = not stage or (bool(args[0]) and args[0][0]["stage"] == stage)
        seen += counts
        result = original(self, *args, **kwargs)
        if counts and seen == call:
            for pause, number in enumerate(numbers):
                time.sleep(pause)
                os.kill(os.getpid(), number)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, method, calling)
        yield


def stopped(run: Commands, kind: type, method: str, call: int, *overrides: str, by: int = signal.SIGTERM) -> Path:
    """The folder of a run of LOOP that got a signal there."""
    line = run.line(*LOOP, *overrides, run="stopped")
    with command_line(line), signal_after(kind, method, call, by), pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 128 + by
    return run.folder / "stopped"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """The folder of a run of LOOP that nothing stopped."""
    with pytest.MonkeyPatch.context() as patch:
        return commands_in(tmp_path_factory.mktemp("whole"), model_folder, patch)(*LOOP).folder


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """main.main() sets one for SIGTERM, which a process of its own would have taken with it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    assert signal.getsignal(signal.SIGINT) is before[signal.SIGINT]
    signal.signal(signal.SIGTERM, before[signal.SIGTERM])


# ---------------------------------------------------------------------------------------------------------------------
# Killed

TURNS = {25: 200, 100: 600}  # of a run that lasts for so many kills
TRAINING = (
    "editor=malmen", "editor.rank=4", "editor.n_blocks=1", "editor.n_epochs=1", "editor.max_train_turns=null",
    "editor.held_out_turns=1", "editor.meta_lr=1e-3", "num_seq=4",
)  # fmt: skip


def killed_run(folder: Path, model: Path, kills: int, seed: int, *more: str) -> int:
    """One run, killed so often at random instants of its process's life; its outcome is compared with an unbroken one.

    Half of the instants lie anywhere between the start and a while after the first new turn, half right after it. How
    many found turns under way is returned.
    """
    commands = Commands(folder, model)
    commands.write("eval", [zsre_row(i) for i in range(2 * TURNS[kills])])
    commands.write("train", [zsre_row(i) for i in range(7000, 7000 + (2 * TURNS[kills] if more else 6))])
    settings = (
        *more,
        "dataset.n_edits=2",
        "checkpoint_every=3",
        "evaluation.every=25",
        "evaluation.sample=6",
        "evaluation.retention=1",
        "evaluation.examples=1",
    )
    line = [word for word in commands.line(*settings) if not word.startswith("hydra.run.dir")]
    chance, killed, mid_loop = random.Random(seed), 0, 0
    with Forks(folder, folder / "cache") as forks:
        begun = time.monotonic()
        forks.start([*line, f"hydra.run.dir={folder / 'whole'}"])
        while not (folder / "whole" / "turns.jsonl").exists():
            assert time.monotonic() - begun < 100, forks.stderr()
            time.sleep(0.005)
        start = time.monotonic() - begun
        assert forks.end() == 0, forks.stderr()
        begun = time.monotonic()
        while True:
            pid = forks.start([*line, "resume=auto"])
            if killed == kills:
                break
            before = turns_written(folder)
            anywhere = chance.random() < 0.5
            if anywhere:
                time.sleep(chance.uniform(0, 1.5 * start))
            while not anywhere and turns_written(folder) == before:
                assert time.monotonic() - begun < 500, "no turn is made any more"
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.1))
            mid_loop += turns_written(folder) != before
            os.kill(pid, signal.SIGKILL)
            assert forks.end() == -signal.SIGKILL, f"ended by itself after {killed} kills: {forks.stderr()}"
            killed += 1
        assert forks.end() == 0, forks.stderr()
    (resumed,) = {path.parent for path in (folder / "outputs").rglob("run.json")}
    require_same(folder / "whole", resumed)
    assert len(Run(resumed).json("run.json")["resumed"]) >= mid_loop - 1
    return mid_loop


def turns_written(folder: Path) -> tuple[int, ...]:
    # not rglob: folders go while it looks
    return tuple(os.stat(path).st_mtime_ns for path in glob.glob(f"{folder}/outputs/**/turns.jsonl", recursive=True))


@pytest.mark.slow
def test_training_that_is_killed_25_times(tmp_path: Path, model_folder: Path) -> None:
    """Nearly all turns are those of meta-training; the edits that follow show that the network is the same."""
    assert killed_run(tmp_path, model_folder, 25, 2, *TRAINING) > 8


@pytest.mark.slow
def test_a_run_that_is_killed_25_times(tmp_path: Path, model_folder: Path) -> None:
    assert killed_run(tmp_path, model_folder, 25, seed=1) > 8


# ---------------------------------------------------------------------------------------------------------------------
# Told to end


STOPS = {
    # where a signal comes: what was called, how often by then; and the turns that are done when the run has stopped
    "in a turn of warm-up": (LanguageModel, "capture", 1, 1),
    "in a turn with an evaluation and a checkpoint to follow": (LanguageModel, "capture", 4, 4),
    "between weights and line of a turn": (LanguageModel, "apply", 5, 5),
    "among facts that are asked again": (RunFolder, "append_records of retention", 2, 4),
    "in an evaluation on the way": (RunFolder, "append_records of eval", 1, 4),
    "in the last evaluation": (RunFolder, "append_records of final", 1, 6),
    "among facts that are asked a last time": (RunFolder, "append_records of retention_final", 1, 6),
    "behind the results": (RunFolder, "write_results", 1, 6),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("stop", STOPS)
def test_the_turn_is_finished_and_the_run_goes_on_from_there(
    run: Commands, whole: Path, stop: str, number: int
) -> None:
    kind, method, call, turns = STOPS[stop]
    folder = stopped(run, kind, method, call, by=number)
    about = Run(folder).json("run.json")
    assert (about["status"], about["error"]) == ("interrupted", "interrupted")
    assert len(Run(folder).lines("turns.jsonl")) == turns
    assert f"turn_{turns}" in {path.name for path in (folder / "checkpoints").iterdir()}
    last = (folder / "main.log").read_text().splitlines()[-1]
    assert f"{signal.Signals(number).name} after turn {turns} of 6; to go on from turn {turns}: python main.py " in last
    assert last.endswith(f"resume={folder}")
    resumed = run(*LOOP, f"resume={folder}", run="fresh")
    assert not resumed.folder.exists(), "the folder that was made for this command is gone"
    require_same(whole, folder)
    assert [one["turn"] for one in Run(folder).json("run.json")["resumed"]] == [turns]
    assert f"going on after turn {turns}" in (folder / "main.log").read_text()
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}


def test_the_command_that_is_told_goes_on(run: Commands, capfd: pytest.CaptureFixture[str]) -> None:
    folder = stopped(run, LanguageModel, "capture", 3)
    told = shlex.split(capfd.readouterr().out.splitlines()[-1].split(": ", 1)[1])
    assert told[:2] == ["python", "main.py"]
    with command_line(told[2:]):
        main.main()
    assert Run(folder).json("run.json")["status"] == "finished"


def test_a_checkpoint_that_a_run_went_on_from_is_told_again(run: Commands) -> None:
    """Also where the run writes none any more."""
    folder = stopped(run, LanguageModel, "capture", 3)
    assert (folder / "checkpoints" / "turn_3").is_dir()
    line = run.line(*LOOP, "checkpoint_every=0", f"resume={folder}", run="fresh")
    with command_line(line), signal_after(LanguageModel, "capture", 1, signal.SIGTERM), pytest.raises(SystemExit):
        main.main()
    last = (folder / "main.log").read_text().splitlines()[-1]
    assert "; to go on from turn 3: python main.py" in last


def test_the_second_signal_stops_at_once(run: Commands) -> None:
    twice = (signal.SIGINT, signal.SIGINT)
    with (
        command_line(run.line(*LOOP)),
        signal_after(LanguageModel, "apply", 4, *twice),
        pytest.raises(SystemExit) as end,
    ):
        main.main()
    assert end.value.code == 130
    about = Run(run.folder / "run")
    assert about.json("run.json")["status"] == "interrupted"
    assert len(about.lines("turns.jsonl")) == 3
    assert {path.name for path in (about.folder / "checkpoints").iterdir()} == {"turn_2"}


def test_a_signal_waits_only_inside_what_is_held() -> None:
    done = []

    def turn(interruption: Interruption) -> None:
        with interruption.held():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # a terminal and a launcher pass the same one on
            done.append("the turn")
        done.append("never")

    with Interruption() as interruption, pytest.raises(Interrupted) as caught:
        turn(interruption)
    assert (done, caught.value.code, caught.value.signal) == (["the turn"], 130, "SIGINT")
    with Interruption(), pytest.raises(Interrupted) as caught:
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.code == 143


def test_without_a_checkpoint_it_begins_again_in_its_folder(run: Commands, whole: Path) -> None:
    folder = stopped(run, LanguageModel, "capture", 5, "checkpoint_every=0")
    assert not (folder / "checkpoints").exists()
    assert "after turn 5 of 6; to go on from turn 0:" in (folder / "main.log").read_text().splitlines()[-1]
    run(*LOOP, f"resume={folder}", run="fresh")
    require_same(whole, folder)


def test_a_signal_before_the_first_turn(run: Commands) -> None:
    folder = stopped(run, RunFolder, "append_records", 1)
    assert not (folder / "checkpoints").exists()
    assert "after turn 0 of 6; to go on from turn 0:" in (folder / "main.log").read_text().splitlines()[-1]
    run(*LOOP, f"resume={folder}", run="fresh")
    require_same(run(*LOOP, run="whole").folder, folder)


class _Dropping:
    """Python prints, and goes on after, whatever is raised in here."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_python_drops_ends_the_run_all_the_same(capfd: pytest.CaptureFixture[str]) -> None:
    end_on(signal.SIGTERM)
    _Dropping()
    assert "SIGTERM: ending; the same command with resume=auto goes on" in capfd.readouterr().err
    with pytest.raises(SystemExit) as caught, Interruption():
        pytest.fail("the turns began")
    assert caught.value.code == 143
    with Interruption():
        pass  # it has ended once


def test_a_folder_that_hydra_has_to_be_told_in_quotes(run: Commands, capfd: pytest.CaptureFixture[str]) -> None:
    name = "it's (é), y"
    line = [*run.line(*LOOP), f'hydra.run.dir="{run.folder / name}"']
    line = [word for word in line if not word.startswith(f"hydra.run.dir={run.folder}")]
    with command_line(line), signal_after(LanguageModel, "capture", 3, signal.SIGTERM), pytest.raises(SystemExit):
        main.main()
    told = shlex.split(capfd.readouterr().out.splitlines()[-1].split("go on from turn 3: ", 1)[1])
    with command_line(told[2:]):
        main.main()
    assert Run(run.folder / name).json("run.json")["status"] == "finished"


def test_the_command_for_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert shlex.join(launch_command(Ranks())) == "python main.py"
    assert shlex.join(launch_command(Ranks(0, 4))) == "torchrun --shutdown-timeout 600 --nproc-per-node 4 main.py"
    assert "--nnodes 2 --node-rank N --master-addr HOST --nproc-per-node 4" in shlex.join(launch_command(Ranks(0, 8)))


def test_what_was_saved_just_before_the_stop_is_the_runs_own(run: Commands) -> None:
    where = ("model_cache=true", f"model_cache_dir={run.folder / 'edited'}")
    with (
        command_line(run.line(*LOOP, *where, run="stopped")),
        signal_after(LanguageModel, "export", 1, signal.SIGTERM),
        pytest.raises(SystemExit),
    ):
        main.main()
    saved = (run.folder / "edited" / "model.safetensors").read_bytes()
    done = run(*LOOP, *where, "resume=auto", run="stopped")
    assert done.json("run.json")["status"] == "finished"
    assert (run.folder / "edited" / "model.safetensors").read_bytes() == saved
    assert "is there already" in run.refused(*LOOP, *where, run="another")


def test_what_another_run_saved_meanwhile_is_not_taken_for_its_own(run: Commands) -> None:
    where = ("model_cache=true", f"model_cache_dir={run.folder / 'edited'}")
    folder = stopped(run, LanguageModel, "capture", 5, *where)
    run(*LOOP, *where, "seed=7", run="another")
    before = content(folder)
    assert "is there already" in run.refused(*LOOP, *where, f"resume={folder}", run="fresh")
    assert content(folder) == before


def test_the_report_of_a_run_that_had_ended_without_it(run: Commands) -> None:
    folder = run(*LOOP, "diagnostics.report=false").folder
    assert not (folder / "report.html").exists()
    run(*LOOP, "diagnostics.report=true", "resume=auto")
    drawn = (folder / "report.html").stat().st_mtime_ns
    run(*LOOP, "diagnostics.report=true", "resume=auto")
    assert (folder / "report.html").stat().st_mtime_ns == drawn


def test_a_report_of_a_stopped_run_is_drawn_again_at_its_end(run: Commands) -> None:
    folder = stopped(run, LanguageModel, "capture", 5)
    write_report([folder])
    early = (folder / "report.html").read_text()
    run(*LOOP, "diagnostics.report=true", f"resume={folder}", run="fresh")
    assert (folder / "report.html").read_text() != early


# ---------------------------------------------------------------------------------------------------------------------
# Which run, and where


def test_a_run_that_was_moved_goes_on_where_it_lies_now(run: Commands, whole: Path) -> None:
    folder = stopped(run, LanguageModel, "capture", 3)
    moved = run.folder / "other place" / "ü"
    moved.parent.mkdir()
    folder.rename(moved)
    run(*LOOP, f"resume='{moved}'", "tracker.project=other", "keep=1", run="fresh")
    require_same(whole, moved)
    assert len(list((moved / "checkpoints").iterdir())) == 1
    assert not folder.exists()


def test_what_a_user_put_into_the_new_folder_stays(run: Commands) -> None:
    folder = stopped(run, LanguageModel, "capture", 3)
    (run.folder / "fresh").mkdir()
    (run.folder / "fresh" / "notes").write_text("mine")
    run(*LOOP, f"resume={folder}", run="fresh")
    assert (run.folder / "fresh" / "notes").read_text() == "mine"


def below(run: Commands, *overrides: str) -> list[str]:
    """A command line whose run folders lie below runs/."""
    line = run.line(*LOOP, *overrides)
    return [
        f"hydra.run.dir={run.folder}/runs/${{seed}}/${{now:%H-%M-%S-%f}}" if "run.dir" in word else word
        for word in line
    ]


def runs(run: Commands) -> list[Path]:
    return sorted(path.parent for path in (run.folder / "runs").rglob("run.json"))


def test_auto_goes_on_with_the_run_of_this_configuration(
    run: Commands, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for seed in ("seed=42", "seed=1"):
        with (
            command_line(below(run, seed, "resume=auto")),
            signal_after(LanguageModel, "capture", 3, signal.SIGTERM),
            pytest.raises(SystemExit),
        ):
            main.main()
    assert len(runs(run)) == 2
    with command_line(below(run, "resume=auto")):
        main.main()
    first, other = sorted(runs(run), key=lambda path: Run(path).json("run.json")["config"]["seed"] != 42)
    require_same(whole, first)
    assert len(Run(other).lines("turns.jsonl")) == 3
    assert len(list((run.folder / "runs" / "42").iterdir())) == 1, "nothing is left of the commands in between"


def test_auto_prefers_a_checkpoint_to_a_newer_run_without(run: Commands) -> None:
    for call, settings in ((3, ()), (2, ("checkpoint_every=0",))):
        with (
            command_line(below(run, *settings)),
            signal_after(LanguageModel, "capture", call, signal.SIGTERM),
            pytest.raises(SystemExit),
        ):
            main.main()
    older, newer = runs(run)
    with command_line(below(run, "resume=auto")):
        main.main()
    assert Run(older).json("run.json")["status"] == "finished"
    assert Run(newer).json("run.json")["status"] == "interrupted"


def test_auto_with_a_fixed_folder_goes_on_in_it(run: Commands, whole: Path) -> None:
    """As batch systems start a job again: the same line, the same folder."""
    folder = stopped(run, LanguageModel, "capture", 3, "resume=auto")
    run(*LOOP, "resume=auto", run="stopped")
    require_same(whole, folder)


def test_other_texts_than_those_the_scores_began_with(run: Commands) -> None:
    """The passage whose perplexity is taken, and the rows of a GLUE-style task: hashed like the facts."""
    passage, rows = run.folder / "passage.txt", run.folder / "rows"
    passage.write_text("the quick brown fox " * 20)
    rows.mkdir()
    answers = [{"sentence": f"a film of {i} minutes", "label": i % 2} for i in range(12)]
    (rows / "sst2.jsonl").write_text("\n".join(map(json.dumps, answers)))
    texts = (
        f"evaluation.perplexity={passage}", f"glue.rows={rows}", "glue.tasks=[sst2]", "glue.limit=2",
        "downstream_eval_steps=3",
    )  # fmt: skip
    folder = stopped(run, LanguageModel, "capture", 5, *texts)
    before = content(folder)
    for file, key in {passage: "evaluation.perplexity", rows / "sst2.jsonl": "glue.rows"}.items():
        kept = file.read_text()
        file.write_text("\n".join(reversed(kept.split("\n"))) + " or else")
        if file.suffix == ".jsonl":
            file.write_text("\n".join(reversed(kept.split("\n"))))
        message = run.refused(*LOOP, *texts, f"resume={folder}", run="fresh")
        assert f"the file of {key} has changed since" in message
        file.write_text(kept)
    assert content(folder) == before
    run(*LOOP, *texts, f"resume={folder}", run="fresh")


def test_a_finished_run_of_other_weights_is_not_passed_over(run: Commands) -> None:
    """They are read again only where files have another size or time."""
    folder = run(*LOOP).folder
    weights = run.model / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept)  # at another time
    run(*LOOP, "resume=auto")
    with pytest.MonkeyPatch.context() as patch:  # which has been noted
        patch.setattr(LanguageModel, "load", lambda *_, **__: pytest.fail("the model was loaded"))
        run(*LOOP, "resume=auto")
    tiny_llama(seed=3).save_pretrained(run.model)
    before = content(folder)
    message = run.refused(*LOOP, "resume=auto")
    assert "other weights than those that the run began with" in message
    assert content(folder) == before
    weights.write_bytes(kept)


def test_a_refused_command_leaves_the_record_of_the_run_there_alone(run: Commands) -> None:
    folder = run(*LOOP).folder
    before = content(folder)
    assert ".hydra/overrides.yaml" in before
    assert "run.json is there already" in run.refused(*LOOP, "seed=7")
    message = run.refused(*LOOP, "seed=7", "resume=auto")
    assert f"hydra.run.dir={folder}: another run, seed=42 there and 7 here" in message
    assert "choose a new folder for this one" in message
    assert content(folder) == before


def test_a_cache_that_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = OSError(errno.EROFS, "Read-only file system", str(main.CACHE / "base" / "9baf"))
    assert main.error_line(refused).endswith("by the environment: XDG_CACHE_HOME=FOLDER")
    refused = OSError(errno.EROFS, "Read-only file system", "/elsewhere")
    assert main.error_line(refused).endswith("as with hydra.run.dir=FOLDER")


def test_auto_without_an_earlier_run_begins_one_and_says_what_has_changed(run: Commands) -> None:
    run("num_seq=1", "num_seq_zsre=1", run="runs/one")
    run.write("eval", [zsre_row(i + 1) for i in range(12)])
    line = [word for word in run.line("num_seq=1", "num_seq_zsre=1", "resume=auto") if "run.dir" not in word]
    with command_line([*line, f"hydra.run.dir={run.folder}/runs/${{now:%f}}"]):
        main.main()
    (second,) = {path for path in runs(run) if path.name != "one"}
    text = (second / "main.log").read_text()
    assert "no run of this configuration and data below" in text
    assert "the file of dataset.valid_path has changed since" in text
    assert Run(second).json("run.json")["resumed"] == []


def scores_shown(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.partition(" percent")[2].partition("  a turn")[0]


def test_a_root_that_is_followed_goes_on_bit_for_bit(run: Commands) -> None:
    """The last root is where the next one begins: the run was stopped once it had one."""
    solver = ("editor.whitening_floor_mode=shift", "editor.whitening_solver=newton")
    newton = (*solver, "dataset.n_edits=2", "num_seq=6")  # turns enough between two renewals of the basis
    whole = run(*LOOP, *newton, run="whole")
    folder = stopped(run, LanguageModel, "apply", 5, *newton)
    run(*LOOP, *newton, f"resume={folder}", run="fresh")
    require_same(whole.folder, folder)
    statistics = [group for line in whole.lines("turns.jsonl")[5:] for group in line["statistics"].values()]
    assert any(group["whitening_residual"] is not None for group in statistics)


def test_results_of_other_code_are_told_to_be_of_then(run: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """Committed since, or not: with resume=auto an editor that was changed would else be given its old scores."""
    state = {"commit": "a" * 40, "dirty": True, "changes": "1" * 16}
    for module in ("harness.run.folder", "harness.job.resume"):
        monkeypatch.setattr(f"{module}.git_state", lambda: dict(state))

    def told(*resume: str) -> list[str]:
        done = run("num_seq=1", "num_seq_zsre=1", *resume, run="whole")
        return re.findall(r"WARNING.*?: (.*): these results are of then", (done.folder / "main.log").read_text())

    assert told() == told("resume=auto") == []
    state["changes"] = "2" * 16
    assert told("resume=auto") == ["files of the code differ from the git commit otherwise than when the run began"]
    state["commit"] = "b" * 40
    assert told("resume=auto")[1:] == [f"git commit was {'a' * 40} when the run began, and is {'b' * 40}"]


@pytest.mark.parametrize("resume", ["auto", "folder"])
def test_a_finished_run_is_not_run_again(
    run: Commands, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], resume: str
) -> None:
    whole = run(*LOOP, run="whole").folder
    table = scores_shown(capsys)
    before = content(whole)
    monkeypatch.setattr(LanguageModel, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    where = ("resume=auto", "whole") if resume == "auto" else (f"resume={whole}", "fresh")
    again = run(*LOOP, where[0], run=where[1])
    assert scores_shown(capsys) == table != ""
    assert "finished already" in (whole / "main.log").read_text()
    assert {name: text for name, text in content(whole).items() if not name.startswith(".hydra")} == {
        name: text for name, text in before.items() if not name.startswith(".hydra")
    }
    assert again.folder == whole or not again.folder.exists()
    assert not (whole / "run.lock").exists()


def test_a_repeated_sweep_skips_what_is_finished(run: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    """Of three jobs the second is stopped; the same sweep again, in a folder of its own as Hydra has it."""
    line = [word for word in run.line("-m", "seed=1,2,3", *LOOP) if "run.dir" not in word]
    sweep = f"hydra.sweep.dir={run.folder}/runs/${{now:%f}}"
    with (
        command_line([*line, sweep]),
        signal_after(LanguageModel, "capture", 9, signal.SIGTERM),
        pytest.raises(SystemExit) as end,
    ):
        main.main()
    assert end.value.code == 143
    done, half = runs(run)
    times = (done / "results.json").stat().st_mtime_ns
    with command_line([*line, sweep, "resume=auto"]):
        main.main()
    assert {Run(path).json("run.json")["config"]["seed"] for path in runs(run)} == {1, 2, 3}
    assert {Run(path).json("run.json")["status"] for path in runs(run)} == {"finished"}
    assert {done, half} < set(runs(run))
    assert (done / "results.json").stat().st_mtime_ns == times
    assert [len(Run(path).json("run.json")["resumed"]) for path in (done, half)] == [0, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Refused


def refused(run: Commands, folder: Path, *overrides: str) -> str:
    before = content(folder)
    message = run.refused(*LOOP, f"resume={folder}", *overrides, run="fresh")
    assert content(folder) == before, "nothing is written over"
    assert not (folder / "run.lock").exists()
    return message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("seed=1",), ("seed=42 there and 1 here", "leave resume out")),
        (("editor=ultraedit",), ("editor.name=stableedit there and ultraedit here", "editor.alpha=10")),
        (("editor.lr=0.5", "dataset.n_edits=2"), ("editor.lr=0.1 there and 0.5 here", "dataset.n_edits=3 there")),
        (("model.half=bf16",), ("model.half=fp32 there and bf16 here",)),
        (("dataset=ultraeditbench",), ("dataset.name=zsre there and ultraeditbench here",)),
    ],
)
def test_another_configuration(run: Commands, overrides: tuple[str, ...], words: tuple[str, ...]) -> None:
    folder = run.folder / "stopped"
    row = {"prompt": "Box?", "rephrase_prompt": "What box?", "ans": "b", "loc": "Cup?", "loc_ans": "c"}
    stopped(run, LanguageModel, "capture", 3)
    if "dataset=ultraeditbench" in overrides:
        run.write("eval", [row] * 12)
        run.write("train", [row] * 9)
    message = refused(run, folder, *overrides)
    for word in words:
        assert word in message


def test_another_data_file(run: Commands) -> None:
    folder = stopped(run, LanguageModel, "capture", 3)
    run.write("train", [zsre_row(i) for i in range(60, 69)])
    message = refused(run, folder)
    assert "the file of dataset.train_path has changed since (SHA-256 " in message
    assert "valid_path" not in message


def test_another_model_in_the_same_folder(
    run: Commands, tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    run.model = save_tiny_model(tmp_path / "model", byte_tokenizer)
    folder = stopped(run, LanguageModel, "capture", 3)
    save_tiny_model(run.model, byte_tokenizer, seed=1)
    message = refused(run, folder)
    assert "other weights than those that the run began with (fingerprint " in message
    save_tiny_model(run.model, byte_tokenizer)
    run(*LOOP, f"resume={folder}", run="fresh")
    assert Run(folder).json("run.json")["status"] == "finished"


@pytest.mark.parametrize(
    ("path", "words"),
    [("nowhere", "nowhere: holds no run"), (".", "holds no run (no run.json)"), ("eval.json", "holds no run")],
)
def test_no_run_there(run: Commands, path: str, words: str) -> None:
    assert words in run.refused(*LOOP, f"resume={path}", run="fresh")


def test_a_checkpoint_of_a_newer_format(run: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stopped(run, LanguageModel, "capture", 3)
    file = folder / "checkpoints" / "turn_3" / STATE
    about = json.loads(file.read_text()) | {"format": FORMAT + 1}
    del about["sha256"]
    checkpoint._write_state(file, about)
    monkeypatch.setattr(LanguageModel, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    assert f"format {FORMAT + 1}" in refused(run, folder)


def test_a_checkpoint_of_another_run(run: Commands) -> None:
    folder = stopped(run, LanguageModel, "capture", 3)
    other = run(*LOOP, "seed=1", run="other").folder
    shutil.rmtree(folder / "checkpoints")
    shutil.copytree(other / "checkpoints", folder / "checkpoints")
    assert "turn_6: of run " in refused(run, folder)


def test_lines_that_are_gone(run: Commands) -> None:
    folder = stopped(run, LanguageModel, "capture", 3)
    (folder / "records.jsonl").write_bytes((folder / "records.jsonl").read_bytes()[:-1])
    message = refused(run, folder)
    assert "records.jsonl: holds " in message
    assert "after turn 3" in message


def test_a_folder_that_another_process_writes(run: Commands) -> None:
    folder = stopped(run, LanguageModel, "capture", 3)
    code = "import sys, pathlib, harness.run.lock as lock\nkept = lock.FolderLock(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", f"{code}\nprint(flush=True)\ninput()", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        before = content(folder)
        for line in (f"resume={folder}", "resume=auto"):
            message = run.refused(*LOOP, line, run="fresh" if "auto" not in line else "stopped")
            assert f"process {other.pid} on {platform.node()} writes this run" in message
        assert {n: t for n, t in content(folder).items() if ".hydra" not in n} == {
            n: t for n, t in before.items() if ".hydra" not in n
        }
        other.kill()
        other.wait()
    assert (folder / "run.lock").exists()
    run(*LOOP, f"resume={folder}", run="fresh")
    assert Run(folder).json("run.json")["status"] == "finished"


def test_what_may_change_the_last_bits_is_said(run: Commands) -> None:
    """Another machine or version may go on with a run; it only says so."""
    folder = stopped(run, LanguageModel, "capture", 3)
    about = Run(folder).json("run.json")
    about["versions"]["torch"] = "1.0"
    (folder / "run.json").write_text(json.dumps(about))
    run(*LOOP, f"resume={folder}", run="fresh")
    said = [line for line in (folder / "main.log").read_text().splitlines() if "last bits" in line]
    assert ["WARNING" in line and "torch was 1.0 when the run began" in line for line in said] == [True]


# ---------------------------------------------------------------------------------------------------------------------
# Damage, and a full disk


@pytest.mark.parametrize("damaged", [1, 2])
def test_a_damaged_checkpoint_is_passed_over(run: Commands, whole: Path, damaged: int) -> None:
    folder = stopped(run, LanguageModel, "capture", 5)
    for place in (5, 4)[:damaged]:
        file = folder / "checkpoints" / f"turn_{place}" / TENSORS
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    run(*LOOP, f"resume={folder}", run="fresh")
    require_same(whole, folder)
    warnings = [line for line in (folder / "main.log").read_text().splitlines() if ": damaged, not" in line]
    assert len(warnings) == damaged
    assert all("WARNING" in line for line in warnings)
    assert Run(folder).json("run.json")["resumed"][0]["turn"] == (4 if damaged == 1 else 0)


def test_a_disk_that_is_full_at_a_checkpoint(run: Commands, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = checkpoint.write_safetensors, 0

    def full(path: Path, tensors: Any) -> str:
        nonlocal calls
        calls += 1
        if calls < 2:
            return original(path, tensors)
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_safetensors", full)
        message = run.refused(*LOOP, run="stopped")
    folder = run.folder / "stopped"
    assert message == (
        f"error: {folder}/checkpoints/turn_4: the checkpoint could not be written (No space left on device); "
        f"that of turn 2 is whole; make room, and go on with resume={folder}"
    )
    assert Run(folder).json("run.json")["status"] == "failed"
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"turn_2"}
    run(*LOOP, "resume=auto", run="stopped")
    require_same(whole, folder)


# ---------------------------------------------------------------------------------------------------------------------
# The lock


def test_a_lock_is_one_processs_and_leaves_nothing(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    with pytest.raises(ValueError, match=f"process {os.getpid()} on .* writes this run"):
        FolderLock(tmp_path)
    lock.release()
    assert list(tmp_path.iterdir()) == []
    lock.release()
    FolderLock(tmp_path).release()
