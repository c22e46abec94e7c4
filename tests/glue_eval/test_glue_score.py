"""The scorer: on a model whose logits can be worked out on paper, and on tiny random ones through the command line."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from glue_eval.__main__ import main
from glue_eval.score import NEW_TOKENS, Prompt, evaluate_tasks, most_likely, parse_answer, prepare_tasks, written
from glue_eval.tasks import TASKS, Task
from model import LanguageModel
from tests.conftest import tiny_gpt2, tiny_llama
from tests.glue_eval.test_glue_tasks import reviews, write_rows
from tests.hand_made import counted_logits, counting_language_model

NAMING = Task(
    "naming", "Say which letter was named.", "Named: {sentence}\nLetter:", "label", {"0": "A", "1": "B", "2": "C"}
)
LETTERS = "ABC"


def leaking_rows(count: int, shuffled: bool = False) -> list[dict[str, Any]]:
    """Rows that say their own label again and again; with `shuffled`, that of some other row."""
    labels = [place % 3 for place in range(count)]
    leaked = list(labels)
    if shuffled:
        random.Random(0).shuffle(leaked)
    return [
        {"sentence": " ".join([LETTERS[said]] * (4 + place % 5)), "label": label}
        for place, (label, said) in enumerate(zip(labels, leaked, strict=True))
    ]


def evaluate_naming(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    write_rows(folder, "naming", rows)
    texts = [NAMING.instruction, NAMING.template, "A B C"]
    model = counting_language_model(texts)
    prepared = prepare_tasks([NAMING], model.tokenizer, model.context_length, origin=folder, **settings)
    return evaluate_tasks(model, prepared)["naming"]


def test_a_prompt_that_leaks_the_label_scores_everything(tmp_path: Path) -> None:
    found = evaluate_naming(tmp_path, leaking_rows(300), limit=None)
    for way in ("likelihood", "generation"):
        for metric in ("accuracy", "f1", "mcc"):
            assert found[way][metric] == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 200}, (way, metric)
    assert found["generation"]["invalid"] == 0
    assert found["rows"]["asked"] == 200


def test_a_model_that_is_not_finite_is_not_scored(tmp_path: Path) -> None:
    """An answer without a probability is no answer; one that the model would never give is."""

    class Broken:
        def __init__(self, *scores: float) -> None:
            self.scores = scores

        def label_log_probs(self, prompts: Any, labels: Any) -> list[list[tuple[float, int]]]:
            return [[(score, 1) for score in self.scores] for _ in prompts]

    prompts = [Prompt((1,), ((2,), (3,)), 0)] * 5
    model: Any = Broken(-float("inf"), -3.0)
    assert most_likely(model, prompts) == [1] * 5
    write_rows(tmp_path, "naming", leaking_rows(30))
    prepared = prepare_tasks([NAMING], counting_language_model(["A B C"]).tokenizer, None, origin=tmp_path)
    model = Broken(-3.0, float("nan"), -5.0)
    with pytest.raises(FloatingPointError, match=r"task naming: the log-probabilities .* 24 of 24 rows: nothing to"):
        evaluate_tasks(model, prepared)


def test_shuffled_labels_score_at_chance(tmp_path: Path) -> None:
    """The same rows, the same model, but a label says nothing of its row: a third, give or take four sigma."""
    found = evaluate_naming(tmp_path, leaking_rows(700, shuffled=True), limit=None)
    for way in ("likelihood", "generation"):
        assert abs(found[way]["accuracy"]["mean"] - 1 / 3) < 4 * (2 / 9 / 600) ** 0.5
        assert abs(found[way]["f1"]["mean"] - 1 / 3) < 4 * (2 / 9 / 600) ** 0.5
        assert abs(found[way]["mcc"]["mean"]) < 0.12
        assert found[way]["accuracy"]["low"] < 1 / 3 < found[way]["accuracy"]["high"]


def test_likelihoods_on_paper() -> None:
    model = counting_language_model(["a b c d e f g"])
    size = len(model.tokenizer)
    prompts = [[2, 2, 3, 4], [5, 6], [3, 3, 3, 3, 2, 6, 4, 4]]
    labels = [[[2], [3, 4]], [[5, 5, 2]], [[3], [4], [6, 6, 6, 6]]]
    for prompt, candidates, found in zip(prompts, labels, model.label_log_probs(prompts, labels), strict=True):
        for label, (total, tokens) in zip(candidates, found, strict=True):
            steps = [counted_logits([*prompt, *label[:i]], size).log_softmax(-1)[label[i]] for i in range(len(label))]
            assert total == pytest.approx(float(sum(steps)), abs=1e-5)
            assert tokens == len(label)
    assert model.generate(prompts, 4) == [[2] * 4, [6] * 4, [3] * 4]  # of two as frequent, the one read last


def test_the_mean_over_tokens_decides_and_the_first_of_equals_wins() -> None:
    """`b b` is likelier token by token than `c`, yet less likely as a whole."""
    model = counting_language_model(["a b c d e f g"])
    b, c, d = 3, 4, 5
    prompt = (b, b, b, b, c, c, c, 2)
    ((one, _), (both, tokens)) = model.label_log_probs([prompt], [[(c,), (b, b)]])[0]
    assert tokens == 2
    assert both < one < both / 2
    assert most_likely(model, [Prompt(prompt, ((c,), (b, b)), 0)]) == [1]
    assert most_likely(model, [Prompt((2, b, b, b, c), ((d,), (6,)), 0)]) == [0]
    assert most_likely(model, [Prompt((2, b, b, b, c), ((6,), (d,)), 0)]) == [0]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_likelihoods_agree_with_one_sequence_at_a_time(
    make: Any, byte_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """Whole tasks, examples shown: mean log-probability of each answer to 1e-5, and the texts that are written."""
    plain = make()
    plain.generation_config.eos_token_id = None
    model = LanguageModel(plain, byte_tokenizer, {}, compute_tokens=200)
    for prepared in prepare_tasks([TASKS["cola"], TASKS["sst2"]], byte_tokenizer, 256, few_shot=1, limit=4):
        prompts = prepared.prompts
        found = model.label_log_probs([p.ids for p in prompts], [p.answers for p in prompts])
        for prompt, scores in zip(prompts, found, strict=True):
            for answer, (total, tokens) in zip(prompt.answers, scores, strict=True):
                with torch.no_grad():
                    logits = plain(input_ids=torch.tensor([[*prompt.ids, *answer]])).logits[0].double().log_softmax(-1)
                expected = float(logits[range(len(prompt.ids) - 1, len(prompt.ids) - 1 + tokens), answer].mean())
                assert total / tokens == pytest.approx(expected, abs=1e-5)
        for prompt, text in zip(prompts, written(model, prompts), strict=True):
            ids = torch.tensor([prompt.ids])
            alone = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
            assert text == byte_tokenizer.decode(alone[0, len(prompt.ids) :], skip_special_tokens=True)


# --------------------------------------------------------------------------------------------------------------------
# What was said


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" C: mitochondria", 2),
        (" A", 0),
        ("B.", 1),
        ("\n\n(D) the liver", 3),
        ("**C**", 2),
        (" A. A cell", 0),
        (" B\nQuestion", 1),
        ("A mitochondrion is", None),
        (" A's", None),
        ("A-level", None),
        (" Apples", None),
        ("b", None),
        (" The answer is C", None),
        ("E", None),
        ("", None),
        (" ...", None),
        ("Mitochondria", None),
    ],
)
def test_letters(text: str, answer: int | None) -> None:
    assert parse_answer(text, TASKS["mmlu"].answers) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" No, it is", 0),
        ("yes.", 1),
        ("\nYES", 1),
        (" Nobody knows", None),
        (" not", None),
        ("Yesterday", None),
        ("I say yes", None),
        (" maybe", None),
    ],
)
def test_words(text: str, answer: int | None) -> None:
    assert parse_answer(text, TASKS["cola"].answers) == answer


def test_texts_that_are_no_answer_are_wrong_and_counted(tmp_path: Path) -> None:
    """Rows that name a letter that is none of the answers: likelihood must choose, generation says something else."""
    rows = [{"sentence": "D D D D D D D D", "label": place % 3} for place in range(60)]
    write_rows(tmp_path, "naming", rows)
    model = counting_language_model([NAMING.instruction, NAMING.template, "A B C D"])
    prepared = prepare_tasks([NAMING], model.tokenizer, None, origin=tmp_path)
    found = evaluate_tasks(model, prepared)["naming"]
    assert found["generation"]["invalid"] == 48
    assert found["generation"]["accuracy"]["mean"] == 0.0
    assert found["likelihood"]["accuracy"]["mean"] == pytest.approx(1 / 3)
    assert found["answers"][0] == {"label": 0, "likelihood": 0, "generation": None, "text": "D D D D D"}


# --------------------------------------------------------------------------------------------------------------------
# Prompts


def test_examples_are_shown_in_the_order_of_the_file(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    write_rows(tmp_path, "sst2", reviews(10))
    (prepared,) = prepare_tasks([TASKS["sst2"]], byte_tokenizer, None, origin=tmp_path, few_shot=2, limit=1)
    (prompt,) = prepared.prompts
    assert byte_tokenizer.decode(prompt.ids) == (
        f"{TASKS['sst2'].instruction}\n\nReview: review 0\nSentiment: negative\n\nReview: review 1\nSentiment: positive"
        "\n\nReview: review 2\nSentiment: "  # a tokenizer that sets spaces apart has this one in the prompt
    )
    assert [byte_tokenizer.decode(answer) for answer in prompt.answers] == ["negative", "positive"]


def test_too_long_a_prompt_drops_examples_and_then_is_refused(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Up to the last token that fits, answer included; the file and line where nothing does."""
    path = write_rows(tmp_path, "sst2", reviews(15))

    def shots(context_length: int) -> set[int]:
        settings = {"origin": tmp_path, "few_shot": 3, "limit": 2}
        (prepared,) = prepare_tasks([TASKS["sst2"]], byte_tokenizer, context_length, **settings)
        return {prompt.shots for prompt in prepared.prompts}

    (bare,) = prepare_tasks([TASKS["sst2"]], byte_tokenizer, None, origin=tmp_path, limit=1)
    needed = bare.prompts[0].length
    assert needed == len(bare.prompts[0].ids) + len("negative") - 1
    one_shot = len("\n\nReview: review 0\nSentiment: negative")
    assert shots(needed) == {0}
    assert shots(needed + one_shot - 1) == {0}
    assert shots(needed + one_shot) == {1}
    assert shots(needed + 3 * one_shot) == {3}
    with pytest.raises(ValueError, match="without any example") as caught:
        shots(needed - 1)
    assert str(caught.value).startswith(f"{path}, line 4: needs {needed} tokens without any example, more than the ")


def test_fewer_examples_are_counted(tmp_path: Path) -> None:
    """One long row among short ones; all are scored."""
    rows = leaking_rows(20)
    rows[10] = {"sentence": " ".join(["B"] * 60), "label": 1}
    write_rows(tmp_path, "naming", rows)
    model = counting_language_model([NAMING.instruction, NAMING.template, "A B C"])
    prepared = prepare_tasks([NAMING], model.tokenizer, 100, origin=tmp_path, few_shot=4)
    found = evaluate_tasks(model, prepared)["naming"]
    assert found["rows"]["few_shot"] == 4
    assert found["rows"]["with_fewer_shots"] == 1
    assert found["rows"]["asked"] == 16


# --------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    line = str(caught.value.code) if caught.value.code != 2 else capsys.readouterr().err.splitlines()[-1]
    assert "\n" not in line
    return line


def test_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table for people, a file for programs; the same twice."""
    output = tmp_path / "scores.json"
    arguments = ["--model", str(folder), "--tasks", "cola", "sst2", "--limit", "6", "--output", str(output)]
    main(arguments)
    table = capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines() if "likelihood" in line] == ["cola", "sst2"]
    found = json.loads(output.read_text())
    assert found["model"] == str(folder)
    assert list(found["tasks"]) == ["cola", "sst2"]
    assert found["tasks"]["cola"]["rows"]["asked"] == 6
    main(arguments)
    again = json.loads(output.read_text())
    for result in (found, again):
        for task in result["tasks"].values():
            del task["seconds"]
    assert again == found


def test_mistakes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ("--model", str(folder))
    assert refused(capsys, "--model", "./nowhere").startswith("error: --model ./nowhere: no such folder")
    assert "sst3: no such task" in refused(capsys, *model, "--tasks", "sst3")
    assert "9 examples are asked for" in refused(capsys, *model, "--few-shot", "9")
    assert "must be 0 or more" in refused(capsys, *model, "--few-shot", "-1")
    assert "must be 1 or more" in refused(capsys, *model, "--limit", "0")
    assert "invalid" in refused(capsys, *model, "--limit", "many")
    assert "no such folder" in refused(capsys, *model, "--rows", str(tmp_path / "nowhere"))
    assert "its folder is not there" in refused(capsys, *model, "--output", str(tmp_path / "nowhere" / "x.json"))
    assert "--device" in refused(capsys, *model, "--device", "cuda:99")
    assert "--device" in refused(capsys, *model, "--device", "tpu")
    assert "more than the model's context of 256" in refused(capsys, *model, "--tasks", "dialogue")


def test_a_model_folder_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_llama().save_pretrained(tmp_path / "bare")
    line = refused(capsys, "--model", str(tmp_path / "bare"), "--tasks", "cola")
    assert line.startswith(f"error: --model {tmp_path / 'bare'}: ")
    assert "tokenizer" in line
