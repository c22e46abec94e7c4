"""Tasks for lm-evaluation-harness: their content, and that its `acc`, worked out from its own rules, is our score.

Where lm_eval is installed (requirements-lm-eval.txt), it judges an edited model itself.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from glue_eval.__main__ import main
from glue_eval.lm_harness import write_tasks
from glue_eval.score import evaluate_tasks, prepare_tasks
from glue_eval.tasks import TASKS, Task
from harness.export.command import main as export
from model import LanguageModel
from tests.commands import Commands, save_tiny_model
from tests.conftest import tiny_llama
from tests.glue_eval.test_glue_score import NAMING, leaking_rows
from tests.glue_eval.test_glue_tasks import reviews, write_rows
from tests.hand_made import counting_language_model


def written(folder: Path, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    task = yaml.safe_load((folder / f"stableedit_{name}.yaml").read_text())
    rows = Path(task["dataset_kwargs"]["data_files"]["test"])
    assert rows.parent == folder.resolve(), "found from wherever lm_eval is started"
    return task, [json.loads(line) for line in rows.read_text().splitlines()]


def accuracy_of_their_rules(
    model: LanguageModel, task: dict[str, Any], rows: Sequence[dict[str, Any]]
) -> tuple[float, list[int]]:
    """Their causal models tokenise context + continuation, take off as many tokens as the context has, and add up
    log-probabilities; `acc` is the share of rows whose gold answer has the highest sum, the first of several."""
    chosen = []
    for row in rows:
        context = row[task["doc_to_text"]]
        sums = []
        for answer in row[task["doc_to_choice"]]:
            whole = model.tokenizer(context + task["target_delimiter"] + answer)["input_ids"]
            start = len(model.tokenizer(context)["input_ids"])
            with torch.no_grad():
                logits = model.model(torch.tensor([whole])).logits[0].double()
            sums.append(sum(logits[i - 1].log_softmax(-1)[whole[i]].item() for i in range(start, len(whole))))
        chosen.append(sums.index(max(sums)))
    gold = [row[task["doc_to_target"]] for row in rows]
    return sum(map(int.__eq__, chosen, gold)) / len(gold), chosen


@pytest.mark.parametrize("few_shot", [0, 2])
def test_acc_is_the_likelihood_score(few_shot: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """On rows whose labels say nothing of them, so that some are right and some are not."""
    write_rows(tmp_path, "naming", leaking_rows(40, shuffled=True))
    model = counting_language_model([NAMING.instruction, NAMING.template, "A B C"])
    prepared = prepare_tasks([NAMING], model.tokenizer, 256, origin=tmp_path, few_shot=few_shot)
    assert write_tasks(prepared, model.tokenizer, tmp_path / "tasks") == ["stableedit_naming"]
    assert caplog.text == ""
    ours = evaluate_tasks(model, prepared)["naming"]
    accuracy, answers = accuracy_of_their_rules(model, *written(tmp_path / "tasks", "naming"))
    assert answers == [answer["likelihood"] for answer in ours["answers"]]
    assert 0 < accuracy == ours["likelihood"]["accuracy"]["mean"] < 1


def test_a_token_that_all_answers_begin_with_changes_nothing(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """The lone space of a byte tokenizer: the prompt's for us, the answer's for them. Answers have many tokens."""
    write_rows(tmp_path, "sst2", reviews(20))
    model = LanguageModel(tiny_llama(), byte_tokenizer, {})
    prepared = prepare_tasks([TASKS["sst2"]], byte_tokenizer, 256, origin=tmp_path)
    write_tasks(prepared, byte_tokenizer, tmp_path / "tasks")
    assert caplog.text == ""
    ours = [answer["likelihood"] for answer in evaluate_tasks(model, prepared)["sst2"]["answers"]]
    assert accuracy_of_their_rules(model, *written(tmp_path / "tasks", "sst2"))[1] == ours


def test_answers_of_unequal_length_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Four tokens that are likelier each, and less likely together, than the one of the other answer."""
    words = {"0": "A A A A", "1": "B"}
    task = Task("naming", NAMING.instruction, NAMING.template, "label", words)
    write_rows(tmp_path, "naming", [{"sentence": "A A A B B", "label": place % 2} for place in range(40)])
    model = counting_language_model([NAMING.instruction, NAMING.template, "A B"])
    prepared = prepare_tasks([task], model.tokenizer, 256, origin=tmp_path)
    write_tasks(prepared, model.tokenizer, tmp_path / "tasks")
    (line,) = caplog.messages
    assert line.startswith("naming: on 32 of 32 rows answers differ in their number of tokens, so lm_eval's acc can")
    assert [answer["likelihood"] for answer in evaluate_tasks(model, prepared)["naming"]["answers"]] == [0] * 32
    assert accuracy_of_their_rules(model, *written(tmp_path / "tasks", "naming"))[1] == [1] * 32


def test_another_cut_of_the_text_is_told(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """A token of the colon that ends the prompt and the space that follows it: alone, the prompt ends otherwise."""
    write_rows(tmp_path, "naming", leaking_rows(40))
    parts = json.loads(byte_tokenizer.backend_tokenizer.to_str())
    parts["pre_tokenizer"]["use_regex"] = False
    parts["model"]["vocab"][":Ġ"] = len(parts["model"]["vocab"]) + 1
    parts["model"]["merges"] = [[":", "Ġ"]]
    merging = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)))
    assert len(merging(": A")["input_ids"]) == 2
    write_tasks(prepare_tasks([NAMING], merging, 256, origin=tmp_path), merging, tmp_path / "tasks")
    (line,) = caplog.messages
    assert line.startswith("naming: on 32 of 32 rows the prompt alone is cut into other tokens, so lm_eval's acc can")


def test_what_is_written(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    """Texts are fields, whatever is in them; examples are in the prompts; names are not lm_eval's own."""
    rows = reviews(30)
    rows[6]["sentence"] = 'a {{film}} of "quotes" \\ and naïve\u2028lines'
    write_rows(tmp_path, "sst2", rows)
    prepared = prepare_tasks([TASKS["sst2"]], byte_tokenizer, None, origin=tmp_path, few_shot=1)
    write_tasks(prepared, byte_tokenizer, tmp_path / "new" / "tasks")
    task, found = written(tmp_path / "new" / "tasks", "sst2")
    assert (task["task"], task["output_type"], task["num_fewshot"]) == ("stableedit_sst2", "multiple_choice", 0)
    assert task["metric_list"] == [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    assert len(found) == 24
    assert found[0]["prompt"].endswith(f"\n\nReview: {rows[6]['sentence']}\nSentiment:")
    assert found[0]["prompt"].startswith(TASKS["sst2"].instruction)
    assert found[0]["prompt"].count("Review:") == 2
    assert (found[0]["answers"], found[0]["label"]) == (["negative", "positive"], rows[6]["label"])


def test_the_command(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, capsys: Any) -> None:
    """It prints the command that lm_eval is started with, and reads no weights."""
    model, tasks = tmp_path / "a model", tmp_path / "tasks"
    tiny_llama().save_pretrained(model)
    byte_tokenizer.save_pretrained(model)
    (model / "model.safetensors").write_bytes(b"")
    line = ["--model", str(model), "--tasks", "sst2", "cola", "--limit", "5", "--lm-eval", str(tasks)]
    main(line)
    said = shlex.split(capsys.readouterr().out)
    assert said == [
        *(
            "lm_eval",
            "--model",
            "hf",
            "--model_args",
            f"pretrained={model},dtype=float32",
            "--include_path",
            str(tasks),
        ),
        *("--tasks", "stableedit_sst2,stableedit_cola", "--device", said[-1]),
    ]
    assert len(written(tasks, "cola")[1]) == 5
    with pytest.raises(SystemExit, match="nothing is scored with --lm-eval"):
        main([*line, "--output", str(tmp_path / "x.json")])
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"^error: --lm-eval .*file: cannot be written \(File exists\)"):
        main([*line[:-1], str(tmp_path / "file")])
    logging.getLogger().handlers.clear()


@pytest.mark.slow
def test_lm_eval_answers_as_we_do_row_by_row(
    run: Commands, tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    """As docs/models.md has it: an edited model is exported, tasks are written, and the line that is printed is run.

    The answers to a question of both tasks have equally many tokens; this tiny model gives several of them.
    """
    pytest.importorskip("lm_eval", reason="needs requirements-lm-eval.txt")
    base, edited, tasks, found = (tmp_path / name for name in ("base", "edited", "tasks", "found"))
    save_tiny_model(base, byte_tokenizer, seed=2)
    export([str(run(f"model.name_or_path={base}", "num_seq=1", "num_seq_zsre=1").folder), "--to", str(edited)])
    of_tasks = ["--model", str(edited), "--tasks", "sst2", "mmlu", "--few-shot", "2"]
    main([*of_tasks, "--output", str(tmp_path / "ours.json")])
    capsys.readouterr()
    main([*of_tasks, "--lm-eval", str(tasks)])
    _, *words = shlex.split(capsys.readouterr().out)
    logging.getLogger().handlers.clear()

    command = [sys.executable, "-m", "lm_eval", *words, "--log_samples", "--output_path", str(found)]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    (results,) = found.rglob("results_*.json")
    for task, ours in json.loads((tmp_path / "ours.json").read_text())["tasks"].items():
        (samples,) = found.rglob(f"samples_stableedit_{task}_*.jsonl")
        rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
        sums = [[float(log_prob) for log_prob, _ in row["filtered_resps"]] for row in rows]
        answers = [answer["likelihood"] for answer in ours["answers"]]
        assert [one.index(max(one)) for one in sums] == answers
        assert len(set(answers)) > 1
        acc = json.loads(results.read_text())["results"][f"stableedit_{task}"]["acc,none"]
        assert acc == ours["likelihood"]["accuracy"]["mean"]
