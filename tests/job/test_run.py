"""Whole runs of a tiny model: what a command writes, what it repeats, and what its settings change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

import harness.report
import main
from config.compose import CONFIG_DIR
from data import DATASETS
from data.files import open_records
from data.records import TrainingTurn
from data.stream import tokenize
from editor.meta_train import MetaTrainer
from harness.evaluation.evaluate import RecordScore, score_records, summarize
from harness.run import places
from model import LanguageModel
from model.source import ModelSource, load_tokenizer
from tests.commands import MODULES, Commands, Run, command_line, save_tiny_model, zsre_row
from tests.conftest import ROOT

FILES = {
    *("main.log", "run.json", "turns.jsonl", "scores.jsonl", "results.json", "records.jsonl", "checkpoints"),
    *("hidden_states.safetensors", "examples.json"),
}
SCORES = ["ES", "GS", "LS", "ES_seq", "GS_seq", "LS_seq"]
COMPARED = ["LS_agree", "LS_kl"]  # with the base model: the edited model's only


def records_of(run: Run, stage: str) -> list[dict[str, Any]]:
    return [line for line in run.lines("records.jsonl") if line["stage"] == stage]


def without_times(run: Run) -> list[dict[str, Any]]:
    """turns.jsonl without what differs from run to run."""
    return [{k: v for k, v in line.items() if k not in ("seconds", "memory")} for line in run.lines("turns.jsonl")]


# ---------------------------------------------------------------------------------------------------------------------
# The run folder


def test_the_run_folder_holds_what_it_promises(run: Commands) -> None:
    done = run("num_seq_zsre=2", "evaluation.examples=4")
    assert {path.name for path in done.folder.iterdir()} == FILES | {".hydra"}
    assert {path.name for path in (done.folder / ".hydra").iterdir()} == {"config.yaml", "hydra.yaml", "overrides.yaml"}
    about = done.json("run.json")
    assert (about["status"], about["error"], about["device"]) == ("finished", None, "cpu")
    assert about["config"]["editor"]["RunningMeanStd_mode"] == "stable"
    assert set(about["inputs"]) == {"eval", "train"}
    assert about["model"]["fingerprint"]
    assert "num_seq_zsre=2" in about["overrides"]


def test_a_run_ends_with_its_report(run: Commands) -> None:
    done = run("num_seq=2", "diagnostics.report=true")
    assert "data:image/png;base64," in (done.folder / "report.html").read_text(encoding="utf-8")
    assert {"scores.png", "updates.png", "time.png"} <= {path.name for path in done.folder.iterdir()}
    assert f"the report is {done.folder / 'report.html'}" in (done.folder / "main.log").read_text(encoding="utf-8")


def test_records_that_all_score_alike_are_drawn(run: Commands) -> None:
    run.write("eval", [zsre_row(1) for _ in range(40)])
    done = run("num_seq=13", "diagnostics.report=true")
    scores = done.json("results.json")
    assert all(score["low"] <= score["mean"] <= score["high"] for score in scores["final"].values())
    assert (done.folder / "scores.png").is_file()


def test_a_report_that_fails_is_a_warning_of_a_finished_run(run: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> Path:
        raise ValueError("'xerr' must not contain negative values")

    monkeypatch.setattr(harness.report, "write_report", fail)
    done = run("num_seq=2", "diagnostics.report=true")
    assert done.json("run.json")["status"] == "finished"
    log = (done.folder / "main.log").read_text(encoding="utf-8")
    assert "WARNING" in log
    assert "'xerr' must not contain negative values" in log
    assert "Traceback" in log
    assert f"python -m harness.report {done.folder}" in log


def test_each_turn_has_its_line(run: Commands) -> None:
    lines = run("num_seq_zsre=2").lines("turns.jsonl")
    assert [line["turn"] for line in lines] == list(range(6))
    assert [line["edits_total"] for line in lines] == [0, 0, 3, 6, 9, 12]
    for line in lines:
        assert line["edits"] == 3
        assert line["answer_tokens"] >= 3
        assert line["loss"] > 0
        assert set(line["seconds"]) == {"capture", "update", "apply", "total"}
        assert set(line["modules"]) == set(MODULES)
        assert set(line["statistics"]) == {"40x24"}
        for module in line["modules"].values():
            assert 0 < module["update_max"] <= module["update_norm"]
            assert module["drift"] > 0
    seen = [line["statistics"]["40x24"]["n"] for line in lines]
    tokens = [line["answer_tokens"] for line in lines]
    assert seen == [2.0 * sum(tokens[: t + 1]) for t in range(6)]  # two modules share the statistics of their shape


def test_results_and_records_say_the_same(run: Commands) -> None:
    done = run("num_seq_zsre=2")
    results = done.json("results.json")
    assert results["base"] != results["final"]
    assert results["final"]["ES"]["mean"] > results["base"]["ES"]["mean"]
    assert (results["cost"]["turns"], results["cost"]["warm_up_turns"], results["cost"]["edits"]) == (6, 2, 12)
    for stage in ("base", "final"):
        assert sorted(results[stage]) == sorted(SCORES + COMPARED * (stage == "final"))
        lines = records_of(done, stage)
        # in the order of the edits, and within a record in the order of the scores; edit turns come after 2 of warm-up
        assert [(line["index"], line["protocol"]) for line in lines] == [(i, p) for i in range(12) for p in SCORES[:3]]
        assert [line["turn"] for line in lines] == [2 + i // 3 for i in range(12) for _ in range(3)]
        scores = [RecordScore(**{k: v for k, v in line.items() if k not in ("stage", "turn")}) for line in lines]
        assert summarize(scores, 1000, 42) == results[stage]
    assert len(done.lines("records.jsonl")) == 2 * 12 * 3
    assert [(line["turn"], line["stage"]) for line in done.lines("scores.jsonl")] == [(0, "base"), (6, "final")]


def test_nothing_is_written_outside_the_run_folder_and_the_cache(run: Commands, tmp_path: Path) -> None:
    """In a process of its own, whose home and working folder are empty, and the run folder that config.yaml names."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    line = [word for word in run.line("num_seq=1", "evaluation.sample=2") if not word.startswith("hydra.run.dir")]
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "HF_", "WANDB_"))}
    command = [sys.executable, str(ROOT / "main.py"), *line]
    environment = {**kept, "HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    before = set(tmp_path.rglob("*"))
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    new = {path for path in set(tmp_path.rglob("*")) - before if path.is_file()}
    (run_folder,) = (path.parent for path in new if path.name == "run.json")
    assert run_folder.relative_to(here).parts[:4] == ("outputs", "zsre", "smollm2-135m", "stableedit")
    strangers = {path for path in new if run_folder not in path.parents}
    assert strangers
    assert all(path.is_relative_to(home / ".cache" / "stableedit") for path in strangers), strangers
    assert f"run folder   {run_folder}" in done.stdout
    assert "ES  efficacy" in done.stdout


def test_answers_are_taught_with_their_end_and_scored_without_it(
    run: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the space before them, too, as they are numbers; in turns of training as in those of edits."""
    trained: list[TrainingTurn] = []
    turn = MetaTrainer.turn
    monkeypatch.setattr(MetaTrainer, "turn", lambda self, one: trained.append(one) or turn(self, one))
    network = ("editor=malmen", "editor.rank=4", "editor.n_blocks=1", "editor.max_train_turns=1")
    done = run("dataset.prompt_form=qa", "dataset.answer_end=eos", "num_seq=1", *network)
    answers = {line["index"]: len(zsre_row(line["index"])["ans"]) for line in done.lines("records.jsonl")}
    scored = [line["tokens"] for line in done.lines("records.jsonl") if line["protocol"] == "ES"]
    assert scored == 2 * [*answers.values()]
    assert "ES_end" in done.json("results.json")["final"]
    assert done.lines("turns.jsonl")[-1]["answer_tokens"] == sum(answers.values()) + 2 * len(answers)  # a byte, a token
    assert trained
    rows = json.loads((run.folder / "train.json").read_text())
    for one in trained:
        wanted = [len(rows[record.index]["ans"]) + 2 for record in one.edits.records]
        for sequences in (one.edits.sequences, one.rephrases):
            assert [sequence.answer_length for sequence in sequences] == wanted
            assert all(sequence.end_tokens == 1 for sequence in sequences)


# ---------------------------------------------------------------------------------------------------------------------
# The same again


def test_the_same_seed_gives_the_same_bytes(run: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the base model is scored anew, the data converted anew, and compute batches are cut otherwise."""
    first = run("dataset.shuffle=true", run="first")
    monkeypatch.setattr(places, "CACHE", tmp_path / "other_cache")
    second = run("dataset.shuffle=true", "editor.batch_size=2", run="second")
    assert first.scores() == second.scores()
    bytes_of = [
        [(one.folder / name).read_bytes() for name in ("records.jsonl", "scores.jsonl")] for one in (first, second)
    ]
    assert bytes_of[0] == bytes_of[1]
    text = [(one.folder / "results.json").read_text() for one in (first, second)]
    scores = [part[: part.index('"cost"')] + part[part.index('"final"') :] for part in text]
    assert scores[0] == scores[1]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The answer tokens of each batch that the model was asked to score."""
    sizes: list[int] = []
    original = LanguageModel.answer_logits

    def counting(self: LanguageModel, batch: Any) -> torch.Tensor:
        sizes.append(len(batch.targets))
        return original(self, batch)

    monkeypatch.setattr(LanguageModel, "answer_logits", counting)
    return sizes


def test_the_base_model_is_scored_once(run: Commands, asked: list[int]) -> None:
    first = run(run="first")
    both = sum(asked)
    asked.clear()
    second = run(run="second")
    assert 2 * sum(asked) == both
    assert first.scores() == second.scores()
    assert (first.folder / "records.jsonl").read_bytes() == (second.folder / "records.jsonl").read_bytes()
    asked.clear()
    run("editor=ultraedit", "num_seq_zsre=null", "editor.preheat_mode=start", run="third")
    assert 2 * sum(asked) == both, "another editor edits the same base model"


def test_another_model_in_the_same_folder_is_another_base(
    run: Commands, tmp_path: Path, asked: list[int], byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    run.model = save_tiny_model(tmp_path / "model", byte_tokenizer)
    run("num_seq=1", run="first")
    both = sum(asked)
    asked.clear()
    save_tiny_model(run.model, byte_tokenizer, seed=1)
    run("num_seq=1", run="second")
    assert sum(asked) == both


@pytest.mark.parametrize(
    "change",
    [
        "dataset.answer_tokens=separate",
        "dataset.prompt_form=qa",
        "dataset.answer_end=eos",
        "dataset.shuffle=true",
        "seed=5",
        "model.half=bf16",
        "evaluation.sample=4",
        "num_seq=3",
        "data",
    ],
)
def test_what_changes_a_score_changes_the_cached_base(run: Commands, asked: list[int], change: str) -> None:
    run(run="first")
    asked.clear()
    if change == "data":
        run.write("eval", [zsre_row(i + 1) for i in range(12)])
    settings = [change] * (change != "data")
    run(*settings, run="second")
    both = sum(asked)
    asked.clear()
    run(*settings, run="third")
    assert 2 * sum(asked) == both


def test_the_text_and_the_window_of_perplexity_change_the_cached_base(run: Commands) -> None:
    """What is kept is the number of another text, which nothing else would notice."""
    texts = [run.folder / name for name in ("one.txt", "other.txt")]
    for text, word in zip(texts, ("abc ", "xyz "), strict=True):
        text.write_text(word * 60)
    found = [
        run(f"evaluation.perplexity={text}", f"evaluation.perplexity_window={window}", "num_seq=1", run=f"run_{i}")
        .json("results.json")["base"]["perplexity"]
        for i, (text, window) in enumerate(((texts[0], 32), (texts[1], 32), (texts[1], 16), (texts[0], 32)))
    ]  # fmt: skip
    assert len(set(found)) == 3
    assert found[0] == found[3]


# ---------------------------------------------------------------------------------------------------------------------
# When, and on what


def test_evaluation_on_the_way(run: Commands) -> None:
    done = run("evaluation.every=2", "num_seq_zsre=1", "num_seq=4")
    stages = [(line["turn"], line["stage"], line["scores"]["ES"]["n"]) for line in done.lines("scores.jsonl")]
    # after stream turns 2 and 4 of 5, on what was edited by then: 1 and 3 edit turns of 3 facts
    assert stages == [(0, "base", 12), (2, "eval", 3), (4, "eval", 9), (5, "final", 12)]


def test_a_sample_is_the_same_for_base_and_final_and_follows_the_seed(run: Commands) -> None:
    def chosen(done: Run, stage: str) -> list[int]:
        return [line["index"] for line in records_of(done, stage) if line["protocol"] == "ES"]

    first, other = run("evaluation.sample=5", run="first"), run("evaluation.sample=5", "seed=1", run="other")
    assert chosen(first, "base") == chosen(first, "final")
    assert len(set(chosen(first, "base"))) == 5
    assert chosen(first, "base") != chosen(other, "base")
    assert first.json("results.json")["final"]["ES"]["n"] == 5


def test_shuffled_edits_follow_the_seed(run: Commands) -> None:
    def order(*overrides: str, name: str) -> list[int]:
        done = run("dataset.shuffle=true", "num_seq=3", *overrides, run=name)
        return [line["index"] for line in records_of(done, "final") if line["protocol"] == "ES"]

    one, other = order(name="one"), order("seed=7", name="other")
    assert sorted(one) != one
    assert len(set(one)) == 9
    assert one != other


@pytest.mark.parametrize(
    ("mode", "phases"),
    [
        ("start", "wweeee"),
        ("q1", "ewweee"),
        ("middle", "eewwee"),
        ("q3", "eeewwe"),
        ("end", "eeewwe"),
        ("none", "eeee"),
    ],
)
def test_warm_up_stands_where_it_is_asked_for(run: Commands, mode: str, phases: str) -> None:
    done = run(f"editor.preheat_mode={mode}", "num_seq_zsre=2", "evaluation.sample=1")
    assert done.phases() == phases
    assert set(done.json("run.json")["inputs"]) == ({"eval"} if mode == "none" else {"eval", "train"})


def test_facts_that_contradict_each_other_are_told_where_they_are_edited(run: Commands) -> None:
    def told(done: Run) -> list[str]:
        return [line for line in (done.folder / "main.log").read_text().splitlines() if "facts to edit" in line]

    rows = [zsre_row(i) for i in range(12)]
    rows[10] = {**rows[2], "ans": "no"}
    rows[11] = rows[1]
    assert told(run()) == []
    file = run.write("eval", rows)
    assert told(run("num_seq=3", run="without")) == []  # nine facts, which are all of them different
    (line,) = told(run(run="with"))
    assert (
        f"WARNING harness.job.plan: file {file}: of the 12 facts to edit, 1 repeat another one (rows 1 and 11)" in line
    )
    assert "1 contradict another one, by another answer to the same prompt (rows 2 and 10)" in line


def test_facts_that_warm_up_asks_too_are_told(run: Commands) -> None:
    file = run.write("eval", [zsre_row(i) for i in range(12)])
    same = (f"dataset.train_path={file}", "num_seq=3")
    log = (run(*same, "num_seq_zsre=2", run="same").folder / "main.log").read_text()
    assert f"of the 9 facts to edit, 6 are asked in {file} too, which warms up or trains" in log
    assert "(there and here, rows 0 and 0, 1 and 1, 2 and 2, ...)" in log
    assert "asked in" not in (run(*same, "editor.preheat_mode=none", run="without").folder / "main.log").read_text()


def test_facts_that_fill_no_turn_are_told(run: Commands) -> None:
    """Unless so many turns were asked for."""

    def told(done: Run) -> list[str]:
        return [line for line in (done.folder / "main.log").read_text().splitlines() if "fill no turn" in line]

    file = run.write("eval", [zsre_row(i) for i in range(11)])
    (line,) = told(run(run="all"))
    assert f"file {file}: 2 of its 11 rows fill no turn of dataset.n_edits=3 and are not edited" in line
    assert told(run("num_seq=2", run="two")) == []
    assert told(run("dataset.n_edits=11", "num_seq_zsre=0", run="one")) == []


def test_zero_warm_up_turns_are_the_run_without_warm_up(run: Commands) -> None:
    """The training file is not opened, and no score or statistic differs."""
    without = run("editor.preheat_mode=none", run="without")
    (run.folder / "train.json").unlink()
    done = run("num_seq_zsre=0")
    assert done.phases() == "eeee"
    assert list(done.json("run.json")["inputs"]) == ["eval"]
    assert done.scores() == without.scores()
    statistics = [[line["statistics"] for line in one.lines("turns.jsonl")] for one in (done, without)]
    assert statistics[0] == statistics[1]


def test_warm_up_turns_are_all_there_is_unless_said(run: Commands) -> None:
    assert run("num_seq=1").phases() == "wwwe"


# ---------------------------------------------------------------------------------------------------------------------
# Captures on disk, edited models


def test_captures_on_disk_change_no_bit_and_leave_nothing(run: Commands, tmp_path: Path) -> None:
    memory = run(run="memory")
    disk = run("editor.cache_dir=" + str(tmp_path / "spill" / "deep"), run="disk")
    assert memory.scores() == disk.scores()
    assert without_times(memory) == without_times(disk)
    assert [path for path in (tmp_path / "spill").rglob("*") if path.is_file()] == []
    assert list((tmp_path / "spill" / "deep").iterdir()) == []


def test_a_failed_run_takes_its_captures_along_and_says_so(
    run: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class BrokenError(Exception):
        pass

    def fail(self: LanguageModel, updates: object) -> None:
        assert any(path.is_file() for path in (tmp_path / "spill").rglob("*"))
        raise BrokenError("something of ours")

    monkeypatch.setattr(LanguageModel, "apply", fail)
    with command_line(run.line(f"editor.cache_dir={tmp_path / 'spill'}")), pytest.raises(BrokenError):
        main.main()
    assert list((tmp_path / "spill").iterdir()) == []
    about = Run(tmp_path / "run").json("run.json")
    assert (about["status"], about["error"]) == ("failed", "BrokenError: something of ours")
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize("where", ["", "elsewhere/edited"])
@pytest.mark.parametrize("half", ["fp32", "bf16"])
def test_the_saved_model_scores_what_the_run_says(run: Commands, tmp_path: Path, where: str, half: str) -> None:
    place = [f"model_cache_dir={tmp_path / where}"] if where else []
    done = run("model_cache=true", f"model.half={half}", "num_seq=2", "num_seq_zsre=1", *place)
    folder = tmp_path / where if where else done.folder / "model"
    transformers.AutoModelForCausalLM.from_pretrained(folder)
    source = ModelSource(str(folder))
    tokenizer = load_tokenizer(source)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[half]
    edited = LanguageModel.load(source, tokenizer, MODULES, dtype=kind, device=torch.device("cpu"))
    records = open_records(tmp_path / "eval.json", DATASETS["zsre"], cache_dir=tmp_path / "again", seed=42)[:6]
    scores = score_records(edited, enumerate(records), lambda questions: tokenize(questions, tokenizer, "joint"))
    final = done.json("results.json")["final"]
    assert summarize(scores, 1000, 42) == {name: score for name, score in final.items() if name not in COMPARED}


# ---------------------------------------------------------------------------------------------------------------------
# Settings that change the edits


def norms(done: Run) -> list[float]:
    return [module["update_norm"] for line in done.lines("turns.jsonl") for module in line["modules"].values()]


def whitened(done: Run) -> list[bool]:
    """Of each turn, whether value gradients were whitened fully."""
    return [
        any(group["floored_fraction"] is not None for group in line["statistics"].values())
        for line in done.lines("turns.jsonl")
    ]


SETTINGS = {
    "as it is": (),
    "ultraedit": ("editor=ultraedit",),
    "scope": ("editor.statistics_scope=module",),
    "all tokens": ("editor.token=all",),
    "separate": ("dataset.answer_tokens=separate",),
    "floor": ("editor.whitening_floor_mode=absolute", "editor.whitening_floor=1e3"),
    "shift": ("editor.whitening_floor_mode=shift",),
    "newton": ("editor.whitening_floor_mode=shift", "editor.whitening_solver=newton"),
    "released": ("model.half=bf16", "model.edit_precision=in_place"),
    "bf16": ("model.half=bf16",),
    "mini-batch": ("dataset.batch_size=3",),
    "auto": ("model.edit_modules=auto", "model.auto_layers=1"),
    "glob": ("model.edit_modules=*.mlp.up_proj",),
    "on a device": ("model_device=cpu", "editor_device=cpu"),
}


def test_each_setting_has_its_own_edits(run: Commands) -> None:
    """Long enough for full whitening: n > d_v + 1 = 25 rows."""
    seen = {name: run(*overrides, run=name.replace(" ", "_")) for name, overrides in SETTINGS.items()}
    edits = {name: tuple(norms(done)) for name, done in seen.items()}
    assert edits["as it is"] == edits["on a device"]
    others = {name: values for name, values in edits.items() if name != "on a device"}
    same = [(a, b) for a in others for b in others if a < b and others[a] == others[b]]
    assert same == []
    assert seen["ultraedit"].phases() == "eeee"
    assert any(whitened(seen["as it is"]))
    assert not any(whitened(seen["ultraedit"]))
    assert seen["floor"].lines("turns.jsonl")[-1]["statistics"]["40x24"]["floored_fraction"] == 1
    assert len(seen["scope"].lines("turns.jsonl")[0]["statistics"]) == 2
    answers, all_tokens = (seen[name].lines("turns.jsonl")[0] for name in ("as it is", "all tokens"))
    assert all_tokens["answer_tokens"] == answers["answer_tokens"]
    assert all_tokens["statistics"]["40x24"]["n"] > 4 * answers["statistics"]["40x24"]["n"]
    assert set(seen["auto"].lines("turns.jsonl")[0]["modules"]) == {MODULES[1]}
    assert len(seen["glob"].lines("turns.jsonl")[0]["modules"]) == 4
    for done in seen.values():
        assert done.json("run.json")["status"] == "finished"


ABLATIONS = sorted(file.stem for file in (CONFIG_DIR / "ablation").glob("*.yaml"))


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_an_ablation_runs(run: Commands, ablation: str) -> None:
    done = run(f"ablation={ablation}", "editor.lr=0.01", "evaluation.sample=2")
    assert done.json("run.json")["status"] == "finished"
    assert done.phases().count("e") == 4
    expected = {"batch_statistics": True, "diagonal_whitening": False, "without_ln": False}
    assert any(whitened(done)) == expected.get(ablation, True)
    assert ("w" in done.phases()) == (ablation != "without_warm_up")


# ---------------------------------------------------------------------------------------------------------------------
# Data sets


def fever_row(i: int) -> dict[str, Any]:
    other = {"unrel_prompt": f"Cup {i} is empty.", "unrel_ans": "yes"}
    return {
        "prompt": f"Box {i} is full.",
        "equiv_prompt": [f"Full is box {i}.", f"{i}: full."],
        "alt": f"no{i}",
        **other,
    }


def wikibigedit_row(i: int) -> dict[str, Any]:
    """Only every third row has a multi-hop question, only every second a persona."""
    return {
        "update": f"Where is box {i}?", "rephrase": f"Box {i} is where?", "ans": f"at {i}",
        "personas": f"Tell me, box {i}?" if i % 2 == 0 else None, "loc": f"Where is cup {i}?", "loc_ans": f"by {i}",
        "mhop": f"What is beside box {i}?" if i % 3 == 0 else None, "mhop_ans": f"cup {i}" if i % 3 == 0 else None,
    }  # fmt: skip


def ultraeditbench_row(i: int) -> dict[str, Any]:
    locality = {"loc": f"Cup {i}?", "loc_ans": f"c{i}"}
    return {"prompt": f"Box {i}?", "rephrase_prompt": f"What of box {i}?", "ans": f"b{i}", **locality}


def counterfact_row(i: int) -> dict[str, Any]:
    return {
        "prompt": f"Box {i} is in", "target_new": f"b{i}", "rephrase_prompt": f"In what is box {i}? In",
        "locality_prompt": f"Cup {i} is in", "locality_ground_truth": f"c{i}",
    }  # fmt: skip


def rome_row(i: int) -> dict[str, Any]:
    return {
        "requested_rewrite": {
            "prompt": "{} is in", "subject": f"Box {i}",
            "target_new": {"str": f"b{i}"}, "target_true": {"str": f"c{i}"},
        },
        "paraphrase_prompts": [f"Box {i}? It is in"], "neighborhood_prompts": [f"Cup {i} is in", f"Jug {i} is in"],
    }  # fmt: skip


def own_row(i: int) -> dict[str, Any]:
    return {"q": f"Box {i}?", "a": f"b{i}", "again": f"Again, box {i}?" if i else None, "note": i}


OWN_FIELDS = ("dataset.fields.prompt=q", "dataset.fields.answer=a", "dataset.fields.rephrase=again")
DATA: dict[str, tuple[Callable[[int], dict[str, Any]], tuple[str, ...], dict[str, int]]] = {
    # rows, overrides, records each score is of
    "zsre": (zsre_row, (), {"ES": 12, "GS": 12, "LS": 12}),
    "fever": (fever_row, (), {"ES": 12, "GS": 12, "LS": 12}),
    "wikibigedit": (wikibigedit_row, (), {"ES": 12, "GS": 12, "LS": 12, "PS": 6, "MS": 4}),
    "wikibigedit without": (wikibigedit_row, ("dataset.eval_mhop=false",), {"ES": 12, "GS": 12, "LS": 12, "PS": 6}),
    "ultraeditbench": (ultraeditbench_row, (), {"ES": 12, "GS": 12, "LS": 12}),
    "counterfact": (counterfact_row, (), {"ES": 12, "GS": 12, "LS": 12}),
    "counterfact rome": (rome_row, (), {"ES": 12, "GS": 12, "LS": 12}),
    "jsonl": (own_row, OWN_FIELDS, {"ES": 12, "GS": 11}),
}


@pytest.mark.parametrize("name", DATA)
def test_a_data_set_runs_and_a_null_question_is_left_out(run: Commands, name: str) -> None:
    row, overrides, counts = DATA[name]
    for split, rows in {"eval": range(12), "train": range(50, 53)}.items():
        run.write(split, [row(i) for i in rows])
    done = run(f"dataset={name.split()[0]}", *overrides)
    results = done.json("results.json")
    for stage in ("base", "final"):
        assert {score: results[stage][score]["n"] for score in results[stage] if "_" not in score} == counts
        assert {f"{score}_seq" for score in counts} <= set(results[stage])
    assert done.phases() == "weeee"


def test_json_lines_and_an_array_are_the_same_data(run: Commands) -> None:
    fields = ("dataset=jsonl", *OWN_FIELDS, "editor.preheat_mode=none")
    rows = [own_row(i) for i in range(12)]
    run.write("eval", rows)
    array = run(*fields, run="array")
    run.write("eval", "\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert run(*fields, run="lines").scores() == array.scores()


def test_the_shipped_sample_serves_where_no_file_is_named(run: Commands, tmp_path: Path) -> None:
    line = ("dataset.valid_path=null", "dataset.train_path=null", "num_seq=1", "num_seq_zsre=1", "dataset.n_edits=4")
    done = run(*line)
    lines = (done.folder / "main.log").read_text().splitlines()
    warnings = [text for text in lines if "WARNING data.files" in " ".join(text.split())]
    assert len(warnings) == 2
    assert all("python -m data.prepare zsre" in text for text in warnings)


# ---------------------------------------------------------------------------------------------------------------------
# Several runs


def runs_below(folder: Path) -> Iterator[Run]:
    return (Run(path.parent) for path in sorted(folder.rglob("run.json")))


def test_a_sweep_over_editors_compares_them_on_one_base(run: Commands, tmp_path: Path, asked: list[int]) -> None:
    line = ("-m", "editor=stableedit,ultraedit", "num_seq_zsre=1", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    with command_line(run.line(*line)):
        main.main()
    first, second = runs_below(tmp_path / "sweep")
    names = [done.json("run.json")["config"]["editor"]["name"] for done in (first, second)]
    assert names == ["stableedit", "ultraedit"]
    assert (first.phases(), second.phases()) == ("weeee", "eeee")
    base, other = (done.json("results.json")["base"] for done in (first, second))
    assert base == other
    assert norms(first)[2:] != norms(second)


def test_a_run_folder_is_not_used_twice(run: Commands) -> None:
    done = run("num_seq=1", "evaluation.sample=1")
    before = {path.name: path.read_bytes() for path in done.folder.iterdir() if path.suffix in (".json", ".jsonl")}
    assert "run.json is there already" in run.refused("num_seq=1")
    assert before == {name: (done.folder / name).read_bytes() for name in before}
