"""wandb gets a copy of what the run folder holds, without a network too, and hears how the run ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.run.folder import PROJECT, RunFolder
from harness.run.interrupt import Interrupted
from harness.watch import tracking
from harness.watch.tracking import Tracker, WandbSettings, turn_metrics
from tests.run_folders import SCORES, create, read, turn_line

# --- the tracker ---------------------------------------------------------------------------------------------------


def test_tracker_marks_how_the_run_ended(tmp_path: Path) -> None:
    with Tracker(create(tmp_path / "good"), WandbSettings(mode="disabled")) as tracker:
        tracker.turn(turn_line(0))
        tracker.scores(0, SCORES, "final")
        tracker.results({"base": SCORES, "final": SCORES, "cost": {}})
    assert read(tmp_path / "good" / "run.json")["status"] == "finished"
    assert read(tmp_path / "good" / "scores.jsonl") == {"turn": 0, "stage": "final", "scores": SCORES}

    for error, status, line in (
        (RuntimeError("boom"), "failed", "RuntimeError: boom"),
        (KeyboardInterrupt(), "interrupted", "interrupted"),
        (Interrupted(signal.SIGTERM), "interrupted", "interrupted"),
        (SystemExit("no"), "failed", "SystemExit: no"),
    ):
        path = tmp_path / f"{type(error).__name__}_{status}"
        with pytest.raises(type(error)), Tracker(create(path), WandbSettings(mode="disabled")):
            raise error
        assert (read(path / "run.json")["status"], read(path / "run.json")["error"]) == (status, line)


def test_a_disk_that_is_full_does_not_hide_the_error_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = create(tmp_path)

    def full(error: BaseException) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(folder, "fail", full)
    with pytest.raises(RuntimeError, match="the first error"), Tracker(folder, WandbSettings(mode="disabled")):
        raise RuntimeError("the first error")


def test_disabled_does_not_import_wandb(tmp_path: Path) -> None:
    code = (
        "import sys; from harness.watch.tracking import *; check_wandb('disabled'); check_wandb('offline')\n"
        "f = RunFolder.create(sys.argv[1], config={}, overrides=[], inputs={}, model={}, device='cpu')\n"
        "with Tracker(f, WandbSettings(mode='disabled')): pass\n"
        "assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=True, cwd=PROJECT)


def test_turn_metrics_are_grouped_finite_numbers() -> None:
    metrics = turn_metrics(turn_line(3))
    assert metrics["turn"] == 3
    assert metrics["update/layers.0.down_proj/norm"] == 3.0
    assert metrics["update/all/norm"] == pytest.approx(5.0)  # 3-4-5: norms of disjoint modules add in squares
    assert metrics["update/all/cosine_previous"] == -0.3
    assert metrics["update/all/drift"] == 0.02
    assert "update/layers.0.down_proj/cosine_previous" not in metrics  # null on the first turn
    assert metrics["statistics/64x32/floored_fraction"] == 0.25
    assert metrics["time/capture"] == 3.0
    assert metrics["progress/edits"] == 400
    assert {name.split("/")[0] for name in metrics} == {
        *("turn", "edit", "progress", "time", "memory", "statistics", "update")
    }


def test_turns_of_meta_training_have_charts_of_their_own() -> None:
    """Over their own count of turns: those of the stream begin at 0 again."""
    loss = {"rephrase": 2.0, "locality": 0.5, "regulariser": 0.0, "total": 2.3}
    line = {"turn": 4, "phase": "meta_train", "epoch": 1, "loss": 7.0, "meta_loss": loss, "grad_norm": None}
    assert turn_metrics({**line, "seconds": {"total": 8.0}}) == {
        "meta_train/turn": 4,
        "meta_train/loss": 7.0,
        "meta_train/seconds/total": 8.0,
        **{f"meta_train/meta_loss/{name}": value for name, value in loss.items()},
    }
    assert set(turn_metrics({"turn": 9, "phase": "meta_valid", "meta_loss": {"total": 1.0}})) == {
        "meta_valid/turn",
        "meta_valid/meta_loss/total",
    }


def test_meta_training_is_drawn_over_its_own_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over: dict[str, Any] = {}

    class Run:
        dir, summary = "wandb/run/files", dict[str, float]()

        def define_metric(self, name: str, step_metric: str | None = None, **_: object) -> None:
            assert name not in over
            over[name] = step_metric

        def finish(self, exit_code: int) -> None: ...
        def log(self, metrics: dict[str, float], step: int) -> None: ...

    monkeypatch.setattr(tracking, "_start_wandb", lambda folder, settings: Run())
    with create(tmp_path) as folder, Tracker(folder, WandbSettings()) as tracker:
        for turn in range(2):
            tracker.turn({"turn": turn, "phase": "meta_train", "loss": 7.0, "seconds": {"total": 1.0}})
        tracker.turn(turn_line(0))
    assert over["meta_train/loss"] == over["meta_train/turn"] == "meta_train/turn"
    assert over["*"] == "turn"
    assert "edit/loss" not in over


# --- wandb ---------------------------------------------------------------------------------------------------------

WANDB_RUN = """
import sys, logging, json
from pathlib import Path
from tests.run_folders import create, turn_line, SCORES
from harness.watch.tracking import Tracker, WandbSettings
logging.basicConfig(level=logging.INFO)
with Tracker(create(Path(sys.argv[1])), WandbSettings(mode="offline", project="trial", tags=("mine",))) as tracker:
    for turn in range(3):
        tracker.turn(turn_line(turn))
    tracker.scores(2, SCORES, "final")
    if sys.argv[2] == "crash":
        raise RuntimeError("boom")
    tracker.results({"base": SCORES, "final": SCORES, "cost": {"turns": 3}})
"""


def wandb_environment(home: Path, server: str = "http://127.0.0.1:9") -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "XDG_"))}
    home.mkdir(parents=True)
    places = {"HOME": str(home), "PYTHONPATH": str(PROJECT), "PYTHONDONTWRITEBYTECODE": "1"}
    return kept | places | {"WANDB_BASE_URL": server}


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """What wandb takes for its server: anyone who connects waits in the backlog, where `accept` finds them."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        yield listening


@pytest.mark.parametrize("ending", ["end", "crash"])
def test_an_offline_run_leaves_its_file_and_nothing_elsewhere(
    tmp_path: Path, server: socket.socket, ending: str
) -> None:
    environment = wandb_environment(tmp_path / "home", f"http://127.0.0.1:{server.getsockname()[1]}")
    work = tmp_path / "work"
    work.mkdir()
    command = [sys.executable, "-c", WANDB_RUN, str(tmp_path / "run"), ending]
    done = subprocess.run(
        command,
        env=environment,
        cwd=work,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == (0 if ending == "end" else 1), done.stderr
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    content = file.read_bytes()
    for expected in (b"update/all/norm", b"scores/ES", b"trial", b"mine", b"stableedit", b"zsre-tiny-model", b"edit"):
        assert expected in content, expected
    assert (b"final/ES" in content) == (ending == "end")
    assert read(tmp_path / "run" / "run.json")["status"] == ("finished" if ending == "end" else "failed")
    assert list(work.iterdir()) == []
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []
    with pytest.raises(BlockingIOError):  # nobody asked the server for anything
        server.accept()
    assert done.stdout == ""
    first, *rest = done.stderr.splitlines()
    assert first.startswith("INFO:harness.watch.tracking:wandb: offline; `wandb sync ")
    assert rest == [] if ending == "end" else rest[0].startswith("Traceback")


AGAIN = """
import sys
from pathlib import Path
from tests.run_folders import turn_line
from harness.run.folder import RunFolder
from harness.watch.tracking import Tracker, WandbSettings
with RunFolder.open(Path(sys.argv[1])) as folder:
    folder.go_on({}, 0, [])
    with Tracker(folder, WandbSettings(mode="offline", project="trial")) as tracker:
        tracker.turn(turn_line(0))
"""


def test_an_offline_run_that_goes_on_is_the_same_run(tmp_path: Path) -> None:
    environment = wandb_environment(tmp_path / "home")
    for code, *arguments in ((WANDB_RUN, "crash"), (AGAIN,)):
        command = [sys.executable, "-c", code, str(tmp_path / "run"), *arguments]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    name = read(tmp_path / "run" / "run.json")["wandb_id"]
    segments = [path.name for path in (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")]
    assert segments == [f"run-{name}.wandb"] * 2


def test_a_run_that_goes_on_logs_under_the_steps_that_it_would_have_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that wandb, which takes no step twice, keeps one line of each turn."""
    logged: list[tuple[int, int]] = []

    class Run:
        dir, summary = "wandb/run/files", dict[str, float]()

        def define_metric(self, *_: object, **__: object) -> None: ...
        def finish(self, exit_code: int) -> None: ...
        def log(self, metrics: dict[str, float], step: int) -> None:
            logged.append((step, int(metrics["turn"])))

    monkeypatch.setattr(tracking, "_start_wandb", lambda folder, settings: Run())
    with create(tmp_path) as folder, Tracker(folder, WandbSettings()) as tracker:
        tracker.scores(0, SCORES, "base")
        tracker.turn(turn_line(1))
        mark = dict(folder.mark)
        tracker.scores(1, SCORES, "eval")
        tracker.turn(turn_line(2))
    first = list(logged)
    assert [step for step, _ in first] == [0, 1, 2, 3]
    with RunFolder.open(tmp_path) as folder:
        folder.go_on(mark, 1, [])
        with Tracker(folder, WandbSettings()) as tracker:
            tracker.scores(1, SCORES, "eval")
            tracker.turn(turn_line(2))
    assert logged == [*first, *first[2:]]


@pytest.mark.parametrize(("mode", "resumed", "expected"), [("online", 1, "allow"), ("online", 0, None)])
def test_online_goes_on_with_what_the_server_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: tracking.WandbMode, resumed: int, expected: str | None
) -> None:
    import wandb

    asked: dict[str, Any] = {}
    monkeypatch.setattr(wandb, "init", lambda **arguments: asked.update(arguments))
    monkeypatch.setattr(tracking, "check_wandb", lambda mode: None)
    with create(tmp_path) as folder:
        for _ in range(resumed):
            folder.go_on({}, 0, [])
        tracking._start_wandb(folder, WandbSettings(mode))
        assert (asked["id"], asked["resume"]) == (folder.run["wandb_id"], expected)


def test_the_exit_code_reaches_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []

    class Sink(tracking._NullSink):
        def close(self, exit_code: int) -> None:
            codes.append(exit_code)

    monkeypatch.setattr(tracking, "_open_sink", lambda folder, settings: Sink())
    for number, error in enumerate([RuntimeError(), KeyboardInterrupt(), SystemExit(0), SystemExit("no")]):
        with pytest.raises(type(error)), Tracker(create(tmp_path / str(number)), WandbSettings()):
            raise error
    with Tracker(create(tmp_path / "good"), WandbSettings()):
        pass
    assert codes == [1, 130, 0, 1, 0]


ONLINE = "import sys; from harness.watch.tracking import check_wandb\ncheck_wandb('online')"


@pytest.mark.parametrize(("key", "problem"), [(None, "no login found"), ("short", "API key must have")])
def test_online_without_a_login_is_refused_in_one_line(tmp_path: Path, key: str | None, problem: str) -> None:
    environment = wandb_environment(tmp_path / "home") | ({"WANDB_API_KEY": key} if key else {})
    done = subprocess.run(
        [sys.executable, "-c", ONLINE],
        env=environment,
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: tracker.wandb=online:")
    assert problem in last
    assert "tracker.wandb=offline" in last
    assert done.returncode == 1
