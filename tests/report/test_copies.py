"""Copies of runs as numbers alone: to a leaderboard what the runs are, and without a word of anybody's."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from harness.report.__main__ import main
from harness.report.copies import without_machine
from tests.report.test_leaderboard import made, right
from tests.report.test_report import make_run, write_lines

KINDS = ("turns", "scores", "records")


def two_runs(folder: Path) -> Path:
    for name, count in (("plain", 30), ("better", 39)):
        run = made(
            folder / name / "0", {"ES": right(count)}, "seed=1", "dataset.valid_path=/home/me/facts.json", editor=name
        )
        again = {"at": "2026-01-01", "turn": 3, "overrides": ["resume=old/place"]}
        (run / "run.json").write_text(json.dumps(json.loads((run / "run.json").read_text()) | {"resumed": [again]}))
        lines = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
        write_lines(run / "records.jsonl", [line | {"text": "a secret sentence"} for line in lines])
        (run / "examples.json").write_text('[{"prompt": "a secret sentence"}]')
        (run / "glue").mkdir()
        scores = {"sst2": {"likelihood": {"accuracy": {"mean": 0.5}}, "answers": ["a secret sentence"]}}
        (run / "glue" / "turn_0.json").write_text(json.dumps(scores))
    return folder


def run_ids(folder: Path, **ids: str) -> None:
    for name, run_id in ids.items():
        path = folder / name / "0" / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"run_id": run_id}))


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_leaderboard_of_copies_is_that_of_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, copies = two_runs(tmp_path / "runs"), tmp_path / "copies"
    main(["--numbers", str(runs), "--to", str(copies)])
    assert capsys.readouterr().out == f"{copies}\n"
    boards = []
    for folder in (runs, copies):
        main(["--leaderboard", str(folder), "--to", str(tmp_path / "out" / folder.name)])
        boards.append(files_below(tmp_path / "out" / folder.name))
    assert boards[0] == boards[1]
    assert b"better" in boards[0]["leaderboard.csv"]
    main([str(copies), "--to", str(tmp_path / "page")])
    assert (tmp_path / "page" / "report.html").is_file()


def test_a_copy_has_no_word_of_the_data_and_no_path(tmp_path: Path) -> None:
    runs, copies = two_runs(tmp_path / "runs"), tmp_path / "copies"
    main(["--numbers", str(runs), "--to", str(copies)])
    found = files_below(copies)
    assert set(found) == {
        f"{name}/0/{file}"
        for name in ("plain", "better")
        for file in (
            "run.json",
            "results.json",
            "turns.jsonl.gz",
            "scores.jsonl.gz",
            "records.jsonl.gz",
            "glue/turn_0.json",
        )
    }
    texts = [gzip.decompress(content) if name.endswith(".gz") else content for name, content in found.items()]
    assert not any(b"secret" in text or b"/home/me" in text or b"old/place" in text for text in texts)
    about = json.loads(found["plain/0/run.json"])
    assert about["config"]["dataset"]["valid_path"] == "facts.json"
    assert "dataset.valid_path=facts.json" in about["overrides"]
    assert about["resumed"] == [{"at": "2026-01-01", "turn": 3}]


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("/home/me/facts.json", "facts.json"),
        ("~/facts.json", "facts.json"),
        ("../../me/facts.json", "facts.json"),
        ("/home/me/lr=1/facts.json", "facts.json"),
        ("editor.lr=1e-3", "editor.lr=1e-3"),
        ("+glue.rows=/data/rows/", "+glue.rows=rows"),
        ("dataset.valid_path='/home/me/my facts.json'", "dataset.valid_path='my facts.json'"),
        ("dataset.valid_path=/home/a=b/f.json", "dataset.valid_path=f.json"),
        ("[/a/b,/c/d]", "[b,d]"),
        ("file:///home/me/f.json", "f.json"),
        ("editor.load_checkpoint=outputs/mine/0", "editor.load_checkpoint=0"),
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("model.edit_modules=[model.layers.*.mlp.down_proj]", "model.edit_modules=[model.layers.*.mlp.down_proj]"),
        ({"paths": ["/a/b", 3, None]}, {"paths": ["b", 3, None]}),
    ],
)
def test_of_paths_on_a_machine_the_last_part_is_kept(value: Any, kept: Any) -> None:
    assert without_machine(value) == kept


def test_copying_again_writes_the_same_bytes_and_nothing_of_another_run(tmp_path: Path) -> None:
    runs, copies = two_runs(tmp_path / "runs"), tmp_path / "copies"
    main(["--numbers", str(runs / "plain" / "0"), "--to", str(copies)])  # a run named itself has its own name there
    before = files_below(copies)
    assert "0/run.json" in before
    main(["--numbers", str(runs / "plain" / "0"), "--to", str(copies)])
    assert files_below(copies) == before
    run_ids(runs, better="f" * 16)
    with pytest.raises(SystemExit, match=r"0: is there, and no copy of .*better/0; choose another folder with --to"):
        main(["--numbers", str(runs / "better" / "0"), "--to", str(copies)])
    with pytest.raises(SystemExit, match="would both be copied to"):
        main(["--numbers", str(runs / "better" / "0"), str(runs / "plain" / "0"), "--to", str(tmp_path / "new")])
    with pytest.raises(SystemExit, match="is there, and no copy of"):  # the run itself
        main(["--numbers", str(runs / "plain" / "0"), "--to", str(runs / "plain")])
    for given, target in ((runs, runs / "copies"), (runs, runs), (runs / "plain" / "0", runs / "plain" / "0" / "x")):
        with pytest.raises(SystemExit, match=r"--to .* lies in .*, whose runs are copied; choose a place beside it"):
            main(["--numbers", str(given), "--to", str(target)])
    backup = tmp_path / "backup"
    shutil.copytree(runs / "plain" / "0", backup / "0")  # the same run, but no copy without words
    with pytest.raises(SystemExit, match="is there, and no copy of"):
        main(["--numbers", str(runs / "plain" / "0"), "--to", str(backup)])
    assert files_below(copies) == before
    assert not (tmp_path / "new").exists()


def test_what_is_not_finished_is_not_copied_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = two_runs(tmp_path / "runs")
    make_run(runs / "going", status="running")
    with pytest.raises(SystemExit, match=r"going: still running, or was killed; only finished runs are copied"):
        main(["--numbers", str(runs), "--to", str(tmp_path / "copies")])
    assert not (tmp_path / "copies").exists()
    with pytest.raises(SystemExit):
        main(["--numbers", str(runs)])
    assert "--numbers needs --to FOLDER" in capsys.readouterr().err


def test_a_damaged_copy_is_named(tmp_path: Path) -> None:
    main(["--numbers", str(two_runs(tmp_path / "runs")), "--to", str(tmp_path / "copies")])
    file = tmp_path / "copies" / "plain" / "0" / "records.jsonl.gz"
    for damaged in (file.read_bytes()[:-20], b"no archive"):
        file.write_bytes(damaged)
        with pytest.raises(SystemExit, match=r"error: .*plain/0/records\.jsonl\.gz: cannot be read"):
            main(["--leaderboard", str(tmp_path / "copies"), "--to", str(tmp_path / "out")])
