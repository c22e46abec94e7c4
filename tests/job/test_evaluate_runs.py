"""Whole commands: generated answers, retention, perplexity; a model that was edited before; what is refused."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import PreTrainedTokenizerFast

from config.compose import compose_config
from config.schema import settings_without_effect, to_run_config
from harness.run.folder import RunFolder
from harness.watch.console import result_table
from model import LanguageModel
from tests.commands import Commands, Run
from tests.conftest import tiny_llama

EVERYTHING = (
    "evaluation.generation=all",
    "evaluation.max_new_tokens=4",
    "evaluation.retention=2",
    "num_seq_zsre=1",
    "evaluation.perplexity=text.txt",
    "evaluation.examples=4",
)


@pytest.fixture
def run(run: Commands, tmp_path: Path) -> Commands:
    (tmp_path / "text.txt").write_text("A short text, " * 20, encoding="utf-8")
    return run


# ---------------------------------------------------------------------------------------------------------------------
# A run


def test_a_run_scores_all_of_it_and_the_files_agree(run: Commands, tmp_path: Path) -> None:
    done = run(*EVERYTHING, "evaluation.every=2")
    results = done.json("results.json")
    base, final = results["base"], results["final"]
    forms = {name + form for name in ("ES", "GS", "LS") for form in ("", "_seq", "_gen", "_contains")} | {"perplexity"}
    assert set(base) == forms
    assert set(final) == forms | {"LS_agree", "LS_kl"}
    assert final["LS_kl"]["mean"] > 0
    assert final["perplexity"] != base["perplexity"] > 1
    lines = done.lines("records.jsonl")
    for stage, scores in (("base", base), ("final", final)):
        own = [line for line in lines if line["stage"] == stage and line["protocol"] == "GS"]
        assert scores["GS_gen"]["mean"] == pytest.approx(sum(line["exact"] for line in own) / 12)
        assert scores["GS_contains"]["mean"] == pytest.approx(sum(line["contains"] for line in own) / 12)
        assert all(isinstance(line["text"], str) for line in own)
    local = [line for line in lines if line["stage"] == "final" and line["protocol"] == "LS"]
    assert final["LS_kl"]["mean"] == pytest.approx(sum(line["kl"] for line in local) / 12)
    stages = [(line["turn"], line["stage"]) for line in done.lines("scores.jsonl")]
    asked = [(turn, "retention") for turn in range(2, 6)]  # turn 0 is warm-up
    assert sorted(stages) == sorted([(0, "base"), (2, "eval"), (4, "eval"), (5, "final"), *asked])
    assert set(results["retention"]) == {"ES", "GS"}
    assert results["retention"]["ES"]["immediate"]["n"] == 2 * 4
    assert set(results["retention"]["ES"]["by_age"]) == {"0", "1", "2"}
    assert set(results["cost"]["seconds"]) >= {
        "scoring_base",
        "scoring_on_the_way",
        "scoring_retention",
        "scoring_final",
    }
    # what was scored at the end for retention is what the last evaluation scored
    last = {(line["place"], line["protocol"]): line["correct"] for line in lines if line["stage"] == "final"}
    kept = [line for line in lines if line["stage"] == "retention_final"]
    assert len(kept) == 2 * 2 * 4
    assert all(last[line["place"], line["protocol"]] == line["correct"] for line in kept)


def test_a_number_of_records_is_generated_from(run: Commands) -> None:
    done = run("evaluation.generation=3", "evaluation.max_new_tokens=2", "evaluation.sample=8")
    results = done.json("results.json")["final"]
    assert (results["ES"]["n"], results["ES_gen"]["n"]) == (8, 3)
    assert "perplexity" not in results
    written = [
        {line["place"] for line in done.lines("records.jsonl") if line["stage"] == stage and "text" in line}
        for stage in ("base", "final")
    ]
    assert len(written[0]) == 3
    assert written[0] == written[1]


def test_a_second_run_reads_texts_and_perplexity_of_the_base_from_the_cache(
    run: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    generate = LanguageModel.generate

    def counting(self: LanguageModel, prompts: Any, *how: Any) -> list[list[int]]:
        asked.append(len(prompts))
        return generate(self, prompts, *how)

    monkeypatch.setattr(LanguageModel, "generate", counting)
    line = (*EVERYTHING, "evaluation.examples=0")  # those are no scores, and always written anew
    first = run(*line, run="first")
    both = sum(asked)
    second = run(*line, run="second")
    assert sum(asked) == both * 3 // 2
    assert first.scores() == second.scores()
    assert (first.folder / "records.jsonl").read_bytes() == (second.folder / "records.jsonl").read_bytes()
    run(*line, "evaluation.max_new_tokens=5", run="third")
    assert sum(asked) == both * 5 // 2


def test_a_resumed_run_says_what_an_unbroken_one_says(
    run: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = (*EVERYTHING, "evaluation.every=2", "evaluation.sample=5", "checkpoint_every=1")
    whole = run(*line, run="whole")
    apply = LanguageModel.apply
    turns = itertools.count()

    def broken(self: LanguageModel, updates: Any) -> Any:
        if next(turns) == 3:
            raise FloatingPointError("stopped")
        return apply(self, updates)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "apply", broken)
        assert "stopped" in run.refused(*line, run="broken")
    shutil.rmtree(tmp_path / "cache" / "base")  # and the base model is gone from the cache
    resumed = run(*line, f"resume={tmp_path / 'broken'}", run="broken")
    assert resumed.scores() == whole.scores()
    for name in ("records.jsonl", "scores.jsonl"):
        assert (whole.folder / name).read_bytes() == (resumed.folder / name).read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# A model that was edited before


def test_a_saved_model_scores_what_its_run_said(run: Commands, tmp_path: Path) -> None:
    settings = ("evaluation.generation=5", "evaluation.max_new_tokens=3", "evaluation.examples=1")
    edited = run(*settings, "model_cache=true", "num_seq=3", "evaluation.perplexity=passage", run="edited")
    alone = run(
        *settings, f"evaluate={edited.folder / 'model'}", "num_seq=3", "evaluation.perplexity=passage", run="alone"
    )
    assert alone.json("results.json").keys() == {"base", "final", "cost"}
    assert alone.scores() == edited.scores()
    about = alone.json("run.json")
    assert (about["status"], set(about["inputs"])) == ("finished", {"eval", "perplexity"})
    assert about["model"]["evaluated"]["name"] == str(edited.folder / "model")
    assert about["model"]["evaluated"]["fingerprint"] != about["model"]["fingerprint"]
    assert {path.name for path in alone.folder.iterdir()} == {
        ".hydra", "main.log", "run.json", "scores.jsonl", "records.jsonl", "results.json", "examples.json",
    }  # fmt: skip
    assert [line["stage"] for line in alone.lines("scores.jsonl")] == ["base", "final"]


def test_a_saved_model_that_is_asked_in_another_form_is_told(run: Commands) -> None:
    edited = run("model_cache=true", "num_seq=2", "num_seq_zsre=1", "dataset.prompt_form=raw", run="edited")

    def told(*settings: str) -> str:
        name = str(len(list(edited.folder.parent.iterdir())))
        return (run(f"evaluate={edited.folder / 'model'}", *settings, run=name).folder / "main.log").read_text()

    words = "its run asked it in the form raw, and here it is asked in the form qa; dataset.prompt_form=raw asks as"
    assert words in told("num_seq=2", "dataset.prompt_form=qa")
    as_taught = told("dataset.prompt_form=raw", "dataset.n_edits=5")
    assert "its run asked it" not in as_taught
    assert "its run asked it" not in told("num_seq=2", "dataset.prompt_form=qa", "evaluation.prompt=raw")
    assert "2 of its 12 rows fill no turn of dataset.n_edits=5 and are not asked about" in as_taught


def test_a_saved_model_is_scored_once(run: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With resume=auto, unless its weights are others by now."""
    edited = run("model_cache=true", "num_seq=2", "num_seq_zsre=1", run="edited").folder / "model"
    line = (f"evaluate={edited}", "num_seq=2", "resume=auto")
    alone = run(*line, run="alone").folder
    before = (alone / "results.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "load", lambda *_, **__: pytest.fail("a model was loaded"))
        run(*line, run="alone")
    assert "finished already" in (alone / "main.log").read_text()
    tiny_llama(seed=7).save_pretrained(edited)
    assert f"evaluate={edited}: other weights than those that the run began with" in run.refused(*line, run="alone")
    assert (alone / "results.json").read_bytes() == before


def test_scoring_that_was_stopped_begins_anew_in_its_folder(run: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    line = (f"evaluate={run.model}", "num_seq=2")
    whole = run(*line, run="whole")
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_results", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit) as end:
            run(*line, run="alone")
    assert end.value.code == 130
    alone = run(*line, "resume=auto", run="alone")
    assert alone.scores() == whole.scores()
    assert (alone.folder / "records.jsonl").read_bytes() == (whole.folder / "records.jsonl").read_bytes()


def test_the_base_itself_is_scored_once(run: Commands) -> None:
    done = run(f"evaluate={run.model}", "evaluation.retention=3", "dataset.train_path=/nowhere")
    assert done.json("results.json").keys() == {"base", "cost"}
    assert run("num_seq_zsre=1", run="other").json("results.json")["base"] == done.json("results.json")["base"]
    assert "evaluation.retention=3 has no effect with evaluate=" in (done.folder / "main.log").read_text()
    assert result_table(done.json("results.json"))


def test_nothing_is_needed_that_only_editing_needs(run: Commands) -> None:
    run("editor.preheat_mode=start", "dataset=jsonl", "dataset.train_path=null", f"evaluate={run.model}",
        "dataset.fields.prompt=src", "dataset.fields.answer=ans")  # fmt: skip


def copy_without(model: Path, target: Path, *names: str) -> Path:
    shutil.copytree(model, target, ignore=shutil.ignore_patterns(*names))
    return target


def test_a_folder_that_is_no_model_is_refused_before_a_model_is_loaded(
    run: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    def never(*_: object, **__: object) -> None:
        pytest.fail("the model was loaded before the mistake was seen")

    monkeypatch.setattr(LanguageModel, "load", never)
    bare = copy_without(run.model, tmp_path / "bare", "tokenizer*")
    (tmp_path / "run_of_old").mkdir()
    copy_without(run.model, tmp_path / "run_of_old" / "model")
    other = copy_without(run.model, tmp_path / "other")
    strange = json.loads((other / "tokenizer.json").read_text())
    strange["model"]["vocab"] = {f"<{word}>": place for word, place in strange["model"]["vocab"].items()}
    (other / "tokenizer.json").write_text(json.dumps(strange))
    broken = copy_without(run.model, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    for folder, words in {
        tmp_path / "nowhere": ("no such folder",),
        tmp_path: ("no config.json in that folder; name a model's folder",),
        tmp_path / "run_of_old": ("no config.json", f"evaluate={tmp_path / 'run_of_old' / 'model'} is one"),
        bare: ("no tokenizer in that folder", "tokenizer.json", "save the base model's tokenizer into it"),
        other: ("its tokenizer is not that of model.name_or_path", "set model=..."),
    }.items():
        message = run.refused(f"evaluate={folder}")
        assert message.startswith(f"error: evaluate={folder}: ")
        for word in words:
            assert word in message
    assert f"{broken}: cannot be read" in run.refused(f"evaluate={broken}")
    assert not (tmp_path / "run" / "run.json").exists()
    assert "evaluate='': must not be blank" in run.refused("evaluate=''")


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def test_a_model_to_score_that_nobody_has_is_named_by_its_own_key(run: Commands) -> None:
    message = run.refused("evaluate=no-such-model-anywhere")
    assert "evaluate=no-such-model-anywhere: " in message
    assert "model.name_or_path" not in message


def test_settings_that_cannot_be(run: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LanguageModel, "load", lambda *_, **__: pytest.fail("the model was loaded first"))
    for line, words in {
        "evaluation.max_new_tokens=0": "1 or more",
        "evaluation.retention=-1": "0 turns it off",
        "evaluation.perplexity=''": "must not be blank",
        "evaluation.perplexity_window=1": "2 or more",
        "evaluation.perplexity=nowhere.txt": "No such file",
        f"evaluation.perplexity={tmp_path}": "Is a directory",
    }.items():
        message = run.refused(line)
        assert line.split("=")[0] in message
        assert words in message
    message = run.refused("evaluation.generation=2", "evaluation.prompt=chat")
    assert "evaluation.prompt=chat: the model's tokenizer has no chat template; set evaluation.prompt=raw" in message


def test_a_chat_prompt_too_long_for_the_context_is_refused(
    run: Commands, tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    run.model = tmp_path / "chat"
    tiny_llama().save_pretrained(run.model)
    template = "{% for m in messages %}" + "<" * 230 + "{{ m['content'] }}{% endfor %}"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer.backend_tokenizer, eos_token="<eos>", chat_template=template
    ).save_pretrained(run.model)
    message = run.refused("evaluation.generation=2", "evaluation.prompt=chat")
    assert "eval.json, row 0: the prompt of edit is 258 tokens long in the form it is asked in" in message
    assert "context is 256" in message
    done = run("evaluation.generation=2", "num_seq=1", "evaluation.sample=2")
    assert done.json("results.json")["final"]["ES_gen"]["n"] == 2


def test_settings_without_effect_are_told() -> None:
    told = settings_without_effect(
        to_run_config(compose_config(["evaluation.prompt=chat", "evaluation.examples=0", "evaluation.generation=off"]))
    )
    why = "evaluation.generation=off and evaluation.examples=0"
    assert told == [f"evaluation.prompt=chat has no effect with {why}"]
    told = settings_without_effect(
        to_run_config(compose_config(["evaluate=x", "evaluation.every=3", "num_seq_zsre=5"]))
    )
    assert told == ["evaluation.every=3 has no effect with evaluate=x"]


def test_records_hold_the_text_as_it_was_written(run: Commands) -> None:
    done = Run(run("evaluation.generation=all", "num_seq=1", "evaluation.max_new_tokens=30").folder)
    texts = [line["text"] for line in done.lines("records.jsonl") if line["stage"] == "final"]
    assert len(texts) == 9
    assert max(map(len, texts)) > 4
