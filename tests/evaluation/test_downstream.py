"""GLUE-style evaluation as a run does it, on a tiny random model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import main
from config.compose import compose_config
from config.schema import ConfigError, RunConfig, settings_without_effect, to_run_config
from harness.evaluation import downstream as under_test
from harness.job.evaluation import plan_downstream
from harness.job.plan import Plan, make_plan
from harness.ranks.group import Ranks
from harness.run import places
from harness.run.folder import RunFolder
from harness.watch.tracking import Tracker, WandbSettings
from model import LanguageModel
from tests.commands import Commands, save_tiny_model, zsre_row
from tests.glue_eval.test_glue_tasks import reviews, write_rows
from tests.run_folders import create


class Setting:
    """A configuration with its plan, its model and an open run folder."""

    def __init__(self, commands: Commands, *overrides: str) -> None:
        line = [word for word in commands.line(*overrides) if not word.startswith("hydra.")]
        self.cfg: RunConfig = to_run_config(compose_config(line))
        self.plan: Plan = make_plan(self.cfg, Ranks())
        self.model = LanguageModel.load(
            self.plan.source,
            self.plan.tokenizer,
            self.plan.outline.shapes,
            dtype=torch.float32,
            device=self.plan.device,
        )


@pytest.fixture
def commands(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Commands:
    monkeypatch.setattr(places, "CACHE", tmp_path / "cache")
    commands = Commands(tmp_path, save_tiny_model(tmp_path / "tiny", byte_tokenizer))
    commands.write("eval", [zsre_row(i) for i in range(12)])
    commands.write("train", [zsre_row(i) for i in range(50, 59)])
    (tmp_path / "rows").mkdir()
    write_rows(tmp_path / "rows", "sst2", reviews(20))
    write_rows(tmp_path / "rows", "sentiment_analysis", reviews(15))
    return commands


def on(commands: Commands, *overrides: str) -> Setting:
    rows = f"glue.rows={commands.folder / 'rows'}"
    return Setting(commands, "downstream_eval_steps=2", "glue.tasks=[sentiment_analysis,sst2]", rows, *overrides)


def score(setting: Setting, folder: RunFolder, *turns: int, fingerprint: str | None = None) -> list[dict[str, float]]:
    """The base model and these turns; what the tracker was told."""
    told: list[dict[str, float]] = []
    fingerprint = fingerprint or setting.model.fingerprint()

    class Sink:
        def log(self, metrics: Any) -> None:
            told.append(dict(metrics))

    tasks = plan_downstream(setting.cfg, setting.plan)
    tracker = Tracker(folder, WandbSettings("disabled", "x", None, None, ()))
    tracker._sink = Sink()  # type: ignore[assignment]
    tasks.base(setting.model, tracker, fingerprint)
    for turn in turns:
        tasks(setting.model, tracker, turn)
    return told


def test_a_file_a_turn(commands: Commands, tmp_path: Path) -> None:
    told = score(on(commands, "glue.few_shot=1", "glue.limit=9"), create(tmp_path / "run"), 2, 4)
    assert sorted(file.name for file in (tmp_path / "run" / "glue").iterdir()) == [f"turn_{t}.json" for t in (0, 2, 4)]
    found = json.loads((tmp_path / "run" / "glue" / "turn_2.json").read_text())
    assert set(found) == {"sentiment_analysis", "sst2"}
    for task in found.values():
        assert set(task) == {"likelihood", "generation", "rows", "answers", "seconds"}
        assert set(task["likelihood"]["accuracy"]) == {"mean", "low", "high", "n"}
        assert task["rows"]["few_shot"] == 1
        assert task["rows"]["asked"] == len(task["answers"]) == 9
        assert len(task["rows"]["sha256"]) == 64
    assert [line["turn"] for line in told] == [0, 2, 4]
    assert told[1]["glue/sst2/likelihood"] == found["sst2"]["likelihood"]["accuracy"]["mean"]


def test_an_edit_is_seen(commands: Commands, tmp_path: Path) -> None:
    """A model whose weights are other ones gets other answers; the same gets the same."""
    setting = on(commands)
    score(setting, create(tmp_path / "run"), 2)
    for edited in setting.model.edited.values():
        edited.restore(-3 * edited.master)
    score(setting, create(tmp_path / "other"), 2)

    def answers(run: str, turn: int) -> Any:
        found = json.loads((tmp_path / run / "glue" / f"turn_{turn}.json").read_text())
        return [(task, row["text"]) for task in found for row in found[task]["answers"]]

    assert answers("run", 0) == answers("run", 2)
    assert answers("run", 2) != answers("other", 2)


def test_nothing_is_done_where_it_is_off(commands: Commands, tmp_path: Path) -> None:
    """Not even rows are read."""
    setting = Setting(commands, "glue.rows=nowhere")
    assert score(setting, create(tmp_path / "run"), 2) == []
    assert not (tmp_path / "run" / "glue").exists()


def test_the_base_model_is_scored_once(commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scores are kept for the same weights, rows and settings, and for no others."""
    calls = []
    evaluate = under_test.evaluate_tasks
    monkeypatch.setattr(under_test, "evaluate_tasks", lambda *a, **b: calls.append(1) or evaluate(*a, **b))

    def scored(run: str, setting: Setting) -> int:
        calls.clear()
        score(setting, create(tmp_path / run))
        return len(calls)

    other = save_tiny_model(tmp_path / "other", on(commands).plan.tokenizer, seed=1)
    assert scored("a", on(commands)) == 1
    assert scored("b", on(commands)) == 0
    first, second = (tmp_path / run / "glue" / "turn_0.json" for run in "ab")
    assert second.read_text() == first.read_text()
    assert scored("c", on(commands, f"model.name_or_path={other}")) == 1
    assert scored("d", on(commands, "glue.few_shot=1")) == 1
    assert scored("e", on(commands, "glue.limit=3")) == 1
    write_rows(tmp_path / "rows", "sst2", [{**row, "label": 1} for row in reviews(20)])
    assert scored("f", on(commands)) == 1


def test_a_resumed_run_does_not_score_again_what_it_has(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting, folder = on(commands), create(tmp_path / "run")
    score(setting, folder, 2)
    monkeypatch.setattr(under_test, "evaluate_tasks", lambda *_, **__: pytest.fail("scored again"))
    assert score(setting, folder, 2) == []
    monkeypatch.setattr(places, "CACHE", tmp_path / "another")
    assert score(setting, folder, 2) == []
    assert folder.logged() == 2  # so that wandb goes on after what it was told


def test_an_edited_model_is_never_taken_for_the_base(
    commands: Commands, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A resumed run whose folder has lost the base model's scores."""
    setting = on(commands)
    start = setting.model.fingerprint()
    for edited in setting.model.edited.values():
        edited.restore(-3 * edited.master)
    score(setting, create(tmp_path / "run"), 2, fingerprint=start)
    assert [file.name for file in (tmp_path / "run" / "glue").iterdir()] == ["turn_2.json"]
    assert "the model is edited: no base scores of tasks" in caplog.text


def test_a_whole_command(commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two warm-up turns, four of edits: the base model, what is due in between, and the end; mistakes end in a line."""
    monkeypatch.setattr(main, "check_command_line", lambda argv: None)
    monkeypatch.chdir(tmp_path)
    settings = ("downstream_eval_steps=2", "glue.tasks=[sst2]", "glue.rows=rows", "glue.limit=4")
    run = commands(*settings, "num_seq_zsre=2", "diagnostics.report=false")
    assert {file.name for file in (run.folder / "glue").iterdir()} == {"turn_0.json", "turn_4.json", "turn_6.json"}
    refusal = commands.refused(*settings[:-1], "glue.few_shot=99", run="refused")
    assert refusal.startswith("error: glue: 99 examples are asked for, but the few-shot pool of sst2 has 4")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("glue.tasks=[sst3]", "sst3: no such task; choose from sst2, mmlu"),
        ("glue.tasks=[cola]", "cola.jsonl: no such file"),
        ("glue.rows=nowhere", "rows folder nowhere: no such folder"),
        ("glue.few_shot=5", "5 examples are asked for, but the few-shot pool of sentiment_analysis has 3"),
    ],
)
def test_mistakes_stop_a_run_before_the_weights_are_read(commands: Commands, override: str, said: str) -> None:
    setting = on(commands)
    changed = to_run_config(compose_config([override])).glue
    name = override.removeprefix("glue.").partition("=")[0]
    cfg = replace(setting.cfg, glue=replace(setting.cfg.glue, **{name: getattr(changed, name)}))
    with pytest.raises(ValueError, match=r"^glue: ") as caught:
        plan_downstream(cfg, setting.plan)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("glue.tasks=[]", "glue.tasks=[]: names no task"),
        ("glue.rows=''", "glue.rows='': must not be blank"),
        ("glue.few_shot=-1", "glue.few_shot=-1: must be 0 or more"),
        ("glue.limit=0", "glue.limit=0: must be 1 or more; null asks all rows"),
    ],
)
def test_settings_out_of_range(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        to_run_config(compose_config([override]))
    assert said in str(caught.value)


def test_settings_without_effect() -> None:
    told = settings_without_effect(to_run_config(compose_config(["glue.few_shot=2"])))
    assert told == ["glue.* has no effect with downstream_eval_steps=0"]
    assert settings_without_effect(to_run_config(compose_config(["glue.few_shot=2", "downstream_eval_steps=5"]))) == []
