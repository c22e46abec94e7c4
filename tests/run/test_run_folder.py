"""The run folder is complete, valid and atomic whatever happens to the run."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from harness.run.folder import RunFolder, git_state, run_id
from tests.run_folders import CONFIG, SCORES, create, read, turn_line

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
    for name in ("file", "code.py"):
        (tmp_path / name).write_text("a")
        git("add", name)
    git("commit", "-m", "x")
    clean = git_state(tmp_path)
    assert clean is not None
    assert clean["dirty"] is False
    assert len(clean["commit"]) == 40
    (tmp_path / "file").write_text("b")
    assert git_state(tmp_path) == clean | {"dirty": True, "changes": None}, "no code"
    states = []
    for name, text in (("code.py", "a = 2"), ("new.py", "a = 1"), ("new.py", "a = 2"), ("notes.txt", "no code")):
        (tmp_path / name).write_text(text)
        states.append(git_state(tmp_path) or {})
    changes = [state["changes"] for state in states]
    assert len(set(changes)) == 3
    assert changes[2] == changes[3]
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
        assert len(list(folder.lines("turns.jsonl"))) == turn + 1
    folder.append_records({"turn": 2, "index": i, "text": "zwei\nZeilen ü"} for i in range(5))
    lines = (tmp_path / "records.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["index"] for line in lines[:-1]] == list(range(5))
    assert next(folder.lines("turns.jsonl")) == turn_line(0)
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
    folder.append_turn(turn_line(0) | {"seconds": {}, "passed_over": True})
    cost = folder.cost()
    assert (cost["turns"], cost["warm_up_turns"], cost["edits"]) == (4, 1, 300)
    assert cost["seconds_per_turn"] == pytest.approx(turn_line(0)["seconds"])
    assert cost["peak_memory"] == {"resident_bytes": 1003}
