"""The run folder is complete, valid and atomic whatever happens to the run; wandb gets a copy without a network."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import tracking
from harness.interrupt import Interrupted
from harness.tracking import RunFolder, Tracker, WandbSettings, git_state, run_id, turn_metrics

CONFIG: dict[str, Any] = {
    "seed": 42,
    "dataset": {"name": "zsre", "train_path": None, "n_edits": 100},
    "editor": {"name": "stableedit", "cache_dir": None, "lr": 1e-3},
    "model": {"name_or_path": "somewhere/tiny-model", "edit_modules": ["layers.0.down_proj"]},
    "tracker": {"wandb": "disabled"},
}
SCORES = {"ES": {"mean": 0.6, "low": 0.5, "high": 0.7, "n": 10}, "perplexity": 18.5}


def create(path: Path, **changes: Any) -> RunFolder:
    arguments: dict[str, Any] = {
        "config": CONFIG,
        "overrides": ["seed=42"],
        "inputs": {"edits": "ab" * 32},
        "model": {"name": "tiny-model", "revision": "main", "fingerprint": "cd" * 32},
        "device": "cpu",
    }
    return RunFolder.create(path, **(arguments | changes))


def turn_line(turn: int, **changes: Any) -> dict[str, Any]:
    line = {
        "turn": turn,
        "phase": "warm_up" if turn == 0 else "edit",
        "edits": 100,
        "edits_total": 100 * (turn + 1),
        "answer_tokens": 300,
        "loss": 2.5,
        "seconds": {"capture": 3.0, "update": 0.5, "apply": 0.1, "total": 3.7},
        "modules": {
            "layers.0.down_proj": {"update_norm": 3.0, "update_max": 0.1, "cosine_previous": None, "drift": 0.01},
            "layers.1.down_proj": {"update_norm": 4.0, "update_max": 0.2, "cosine_previous": -0.3, "drift": 0.02},
        },
        "statistics": {"64x32": {"n": 300, "mean_abs": 0.1, "std_mean": 1.0, "floored_fraction": 0.25}},
        "memory": {"resident_bytes": 1000 + turn},
    }
    return line | changes


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# --- identity of a run ---------------------------------------------------------------------------------------------


def changed(key: str, value: Any) -> dict[str, Any]:
    copy = json.loads(json.dumps(CONFIG))
    *groups, name = key.split(".")
    group = copy
    for part in groups:
        group = group[part]
    group[name] = value
    return copy


@pytest.mark.parametrize("key", ["tracker.wandb", "editor.cache_dir", "dataset.train_path"])
def test_run_id_ignores_where_things_lie(key: str) -> None:
    assert run_id(changed(key, "elsewhere"), {}, None) == run_id(CONFIG, {}, None)


@pytest.mark.parametrize("key", ["seed", "editor.lr", "dataset.n_edits", "model.name_or_path"])
def test_run_id_follows_what_makes_the_numbers(key: str) -> None:
    assert run_id(changed(key, 7), {}, None) != run_id(CONFIG, {}, None)


def test_run_id_follows_data_and_revision_and_not_key_order() -> None:
    plain = run_id(CONFIG, {"edits": "a"}, "main")
    assert len({plain, run_id(CONFIG, {"edits": "b"}, "main"), run_id(CONFIG, {"edits": "a"}, "v2")}) == 3
    assert plain == run_id(dict(reversed(CONFIG.items())), {"edits": "a"}, "main")
    assert len(plain) == 16
    assert int(plain, 16) >= 0


def test_git_state_is_none_outside_a_checkout_and_knows_dirt(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", *who, "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-m", "x")
    clean = git_state(tmp_path)
    assert clean is not None
    assert clean["dirty"] is False
    assert len(clean["commit"]) == 40
    (tmp_path / "file").write_text("b")
    assert git_state(tmp_path) == clean | {"dirty": True}
    (tmp_path / "inner").mkdir()
    assert git_state(tmp_path / "inner") is None


# --- the run folder ------------------------------------------------------------------------------------------------


def test_run_json_from_start_to_finish(tmp_path: Path) -> None:
    folder = create(tmp_path / "new" / "run")
    run = read(folder.path / "run.json")
    assert (run["status"], run["error"], run["finished"]) == ("running", None, None)
    assert run["config"] == CONFIG
    assert run["versions"]["python"].startswith("3.")
    assert {"torch", "transformers", "hydra-core", "datasets", "numpy"} <= run["versions"].keys()
    folder.finish()
    ended = read(folder.path / "run.json")
    assert ended["status"] == "finished"
    assert ended["finished"] >= ended["started"]
    assert ended["started"].endswith("+00:00")


def test_failure_is_one_line(tmp_path: Path) -> None:
    folder = create(tmp_path)
    folder.fail(ValueError("first\nsecond\nthird"))
    run = read(tmp_path / "run.json")
    assert (run["status"], run["error"]) == ("failed", "ValueError: first")


def test_a_folder_holds_one_run(tmp_path: Path) -> None:
    create(tmp_path)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(ValueError, match=r"hydra\.run\.dir=.*run\.json is there already; choose a new folder"):
        create(tmp_path)
    assert (tmp_path / "run.json").read_bytes() == before


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"hydra\.run\.dir=.*not writable") as caught:
        create(tmp_path / "file" / "run")
    assert "\n" not in str(caught.value)


def test_lines_are_on_disk_at_once_and_nothing_else_is_left(tmp_path: Path) -> None:
    folder = create(tmp_path)
    for turn in range(3):
        folder.append_turn(turn_line(turn))
        assert len(list(folder.turns())) == turn + 1
    folder.append_records({"turn": 2, "index": i, "text": "zwei\nZeilen ü"} for i in range(5))
    lines = (tmp_path / "records.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["index"] for line in lines[:-1]] == list(range(5))
    assert next(folder.turns()) == turn_line(0)
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "run.lock", "turns.jsonl", "records.jsonl"}


def test_results_have_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    folder = create(tmp_path)
    folder.write_results({"final": SCORES, "base": {"ES": 0.2}})
    first = (tmp_path / "results.json").read_bytes()
    folder.write_results({"base": {"ES": 0.2}, "final": dict(reversed(SCORES.items()))})
    assert (tmp_path / "results.json").read_bytes() == first
    assert read(tmp_path / "results.json")["final"] == SCORES


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_are_refused_by_name_and_write_nothing(tmp_path: Path, value: float) -> None:
    folder = create(tmp_path)
    folder.append_turn(turn_line(0))
    folder.write_results({"final": SCORES})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    bad = {"layers.0.down_proj": {"update_norm": value}}
    with pytest.raises(ValueError, match=r"turns\.jsonl\.modules\.layers\.0\.down_proj\.update_norm is -?(nan|inf)"):
        folder.append_turn(turn_line(1, modules=bad))
    with pytest.raises(ValueError, match=r"results\.json\.final\.ES\.low"):
        folder.write_results({"final": {"ES": {"mean": 0.1, "low": value}}})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = create(tmp_path)
    folder.write_results({"final": SCORES})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        folder.write_results({"final": {}})
    assert read(tmp_path / "results.json") == {"final": SCORES}
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "run.lock", "results.json"}


def test_a_run_goes_on_from_where_its_lines_were_cut(tmp_path: Path) -> None:
    with create(tmp_path) as folder:
        folder.append_scores({"turn": 0, "stage": "base", "scores": SCORES})
        for turn in range(2):
            folder.append_turn(turn_line(turn))
        mark = dict(folder.mark)
        before = {name: (tmp_path / name).read_bytes() for name in ("turns.jsonl", "scores.jsonl")}
        folder.append_scores({"turn": 2, "stage": "eval", "scores": SCORES})
        folder.append_records([{"turn": 2}])
        folder.append_turn(turn_line(2))
        folder.fail(RuntimeError("boom"))
    with RunFolder.open(tmp_path) as folder:
        assert folder.run["status"] == "failed"
        folder.go_on(mark, 2, ["keep=1"])
        assert {name: (tmp_path / name).read_bytes() for name in before} == before
        assert (tmp_path / "records.jsonl").read_bytes() == b""
        assert (folder.mark, folder.logged()) == (mark, 3)
        assert folder.scores("base") == SCORES
    run = read(tmp_path / "run.json")
    assert (run["status"], run["error"], run["finished"]) == ("running", None, None)
    assert [(one["turn"], one["overrides"]) for one in run["resumed"]] == [(2, ["keep=1"])]
    assert not (tmp_path / "run.lock").exists()


def test_lines_that_are_too_short_are_refused_before_any_is_cut(tmp_path: Path) -> None:
    with create(tmp_path) as folder:
        for turn in range(3):
            folder.append_turn(turn_line(turn))
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(ValueError, match=r"records\.jsonl: holds 0 bytes, but held 7 after turn 1; put the whole"):
            folder.go_on({"turns.jsonl": 10, "records.jsonl": 7}, 1, [])
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_two_do_not_write_one_folder(tmp_path: Path) -> None:
    with create(tmp_path):
        for open_it in (create, RunFolder.open):
            with pytest.raises(ValueError, match=f"process {os.getpid()} on .* writes this run; wait, or stop it"):
                open_it(tmp_path)
    with RunFolder.open(tmp_path):
        pass


def test_cost_sums_the_turns_up(tmp_path: Path) -> None:
    folder = create(tmp_path)
    for turn in range(4):
        folder.append_turn(turn_line(turn))
    cost = folder.cost()
    assert (cost["turns"], cost["warm_up_turns"], cost["edits"]) == (4, 1, 300)
    assert cost["seconds_per_turn"] == pytest.approx(turn_line(0)["seconds"])
    assert cost["peak_memory"] == {"resident_bytes": 1003}


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
        "import sys; from harness.tracking import *; check_wandb('disabled'); check_wandb('offline')\n"
        "f = RunFolder.create(sys.argv[1], config={}, overrides=[], inputs={}, model={}, device='cpu')\n"
        "with Tracker(f, WandbSettings(mode='disabled')): pass\n"
        "assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=True, cwd=tracking.PROJECT)


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
from tests.test_tracking import create, turn_line, SCORES
from harness.tracking import Tracker, WandbSettings
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
    places = {"HOME": str(home), "PYTHONPATH": str(tracking.PROJECT), "PYTHONDONTWRITEBYTECODE": "1"}
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
    assert first.startswith("INFO:harness.tracking:wandb: offline; `wandb sync ")
    assert rest == [] if ending == "end" else rest[0].startswith("Traceback")


AGAIN = """
import sys
from pathlib import Path
from tests.test_tracking import turn_line
from harness.tracking import RunFolder, Tracker, WandbSettings
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


ONLINE = "import sys; from harness.tracking import check_wandb\ncheck_wandb('online')"


@pytest.mark.parametrize(("key", "problem"), [(None, "no login found"), ("short", "API key must have")])
def test_online_without_a_login_is_refused_in_one_line(tmp_path: Path, key: str | None, problem: str) -> None:
    environment = wandb_environment(tmp_path / "home") | ({"WANDB_API_KEY": key} if key else {})
    done = subprocess.run(
        [sys.executable, "-c", ONLINE],
        env=environment,
        cwd=tracking.PROJECT,
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
