"""Tasks and their rows: what is read, what is shown, what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from glue_eval.rows import SHIPPED, read_task
from glue_eval.tasks import TASKS, chosen_tasks
from tests.conftest import REAL_DATA

SENTIMENT = TASKS["sst2"]


def write_rows(folder: Path, task: str, rows: list[Any]) -> Path:
    path = folder / f"{task}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reviews(count: int) -> list[dict[str, Any]]:
    return [{"sentence": f"review {i}", "label": i % 2, "idx": i} for i in range(count)]


def test_there_are_eight() -> None:
    names = ["sst2", "mmlu", "mrpc", "cola", "rte", "nli", "sentiment_analysis", "dialogue"]
    assert [task.name for task in chosen_tasks(None)] == names
    assert [task.name for task in chosen_tasks(["nli", "sst2"])] == ["nli", "sst2"]


@pytest.mark.parametrize(
    ("names", "said"),
    [(["sst3"], "sst3: no such task; choose from sst2, mmlu"), (["nli", "nli"], "nli: is named twice"), ([], "choose")],
)
def test_names_that_are_refused(names: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        chosen_tasks(names)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_prompts_end_where_the_answer_begins(task: Any) -> None:
    assert task.template.endswith(":")
    assert len(set(task.answers)) == len(task.answers)
    assert not any(" " in answer for answer in task.answers)  # one word, so that a text can begin with it


def test_a_row_of_each_form() -> None:
    example = TASKS["mmlu"].example({"question": "How?", "subject": "x", "choices": ["a", "b", "c", "d"], "answer": 2})
    assert (example.question, example.label) == ("Question: How?\nA. a\nB. b\nC. c\nD. d\nAnswer:", 2)
    example = TASKS["dialogue"].example({"article": "f : hi {x}", "options": list("wxyz"), "answers": "D"})
    assert (example.question, example.label) == ("Dialogue: f : hi {x}\nA. w\nB. x\nC. y\nD. z\nAnswer:", 3)
    assert TASKS["rte"].example({"sentence1": "a", "sentence2": "b", "label": 0}).label == 0
    assert TASKS["rte"].answers == ("Yes", "No")  # GLUE's 0 is entailment
    assert TASKS["mrpc"].answers == ("No", "Yes")


# --------------------------------------------------------------------------------------------------------------------
# Which rows


def test_the_first_hundred_rows_are_shown_and_the_next_hundred_asked(tmp_path: Path) -> None:
    write_rows(tmp_path, "sst2", reviews(350))
    read = read_task(SENTIMENT, tmp_path, 3, 100)
    assert [example.question for example in read.shots] == [f"Review: review {i}\nSentiment:" for i in range(3)]
    assert [example.question for example in read.asked] == [f"Review: review {i}\nSentiment:" for i in range(100, 200)]
    assert len(read_task(SENTIMENT, tmp_path, 100, None).asked) == 250


def test_a_short_file_keeps_a_fifth_to_show(tmp_path: Path) -> None:
    write_rows(tmp_path, "sst2", reviews(40))
    assert len(read_task(SENTIMENT, tmp_path, 8, 100).asked) == 32
    with pytest.raises(ValueError, match=r"9 examples are asked for, but the few-shot pool of sst2 has 8 of the 40"):
        read_task(SENTIMENT, tmp_path, 9, 100)
    write_rows(tmp_path, "sst2", reviews(1))
    assert len(read_task(SENTIMENT, tmp_path, 0, 100).asked) == 1


def test_the_hash_names_the_rows_that_were_used(tmp_path: Path) -> None:
    rows = reviews(300)
    write_rows(tmp_path, "sst2", rows)

    def sha256(few_shot: int = 2, limit: int = 50) -> str:
        return read_task(SENTIMENT, tmp_path, few_shot, limit).sha256

    first = sha256()
    assert {sha256(few_shot=3), sha256(limit=51)}.isdisjoint({first})
    write_rows(tmp_path, "sst2", rows[:150] + [{**row, "label": 1 - row["label"]} for row in rows[150:]])
    assert sha256() == first  # rows that are neither shown nor asked
    write_rows(tmp_path, "sst2", [{**rows[0], "sentence": "other"}, *rows[1:]])
    assert sha256() != first


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_shipped_rows(task: Any, caplog: pytest.LogCaptureFixture) -> None:
    """At least thirty are asked, balanced, as are those shown; no row stands there twice; and it is said aloud."""
    read = read_task(task, None, 8, None)
    assert len(read.asked) >= 30
    for examples in (read.asked, read.shots):
        counts = Counter(example.label for example in examples)
        assert set(counts) == set(range(len(task.answers)))
        assert len(set(counts.values())) == 1
    assert len({example.question for example in (*read.shots, *read.asked)}) == read.rows
    assert f"{task.name}: the 40 shipped rows serve" in caplog.text
    assert read.source == f"shipped/{task.name}.jsonl"


def test_no_shipped_row_is_somebody_elses() -> None:
    if not REAL_DATA.is_dir():
        pytest.skip("the real data is not here")
    fields = ("sentence", "sentence1", "sentence2", "question", "article")

    def texts(folder: Path) -> set[str]:
        rows = [json.loads(line) for name in TASKS for line in (folder / f"{name}.jsonl").open()]
        return {"".join(row[field].split()).casefold() for row in rows for field in fields if field in row}

    assert len(texts(SHIPPED)) > 300
    assert texts(SHIPPED) & texts(REAL_DATA / "glue") == set()


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_real_rows(task: Any) -> None:
    if not REAL_DATA.is_dir():
        pytest.skip("the real data is not here")
    read = read_task(task, REAL_DATA / "glue", 100, 100)
    assert (len(read.shots), len(read.asked)) == (100, 100)


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which data set is asked for, and that its rows come in a drawn order; the hub itself is not asked here."""
    asked = []

    def load(path: str, config: str, split: str) -> datasets.Dataset:
        asked.append((path, config, split))
        return datasets.Dataset.from_list(reviews(250))

    monkeypatch.setattr(datasets, "load_dataset", load)
    read = read_task(SENTIMENT, "hub", 1, 100)
    assert asked == [("nyu-mll/glue", "sst2", "validation")]
    assert [example.question for example in read.asked] != [f"Review: review {i}\nSentiment:" for i in range(100, 200)]
    assert read.asked == read_task(SENTIMENT, "hub", 1, 100).asked
    with pytest.raises(ValueError, match="nli: no place on the hub is known for it"):
        read_task(TASKS["nli"], "hub", 0, 100)


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nand a page of advice")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match=r"^sst2: nyu-mll/glue/sst2/validation cannot be fetched \(no route\); bring"):
        read_task(SENTIMENT, "hub", 0, 100)


# --------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("task", "row", "said"),
    [
        ("sst2", {"sentence": "x", "label": -1}, "label=-1 is no label of sst2, which has 0, 1"),
        ("sst2", {"sentence": "x", "label": True}, "label=True is no label"),
        ("sst2", {"sentence": "x", "label": None}, "label=None is no label"),
        ("sst2", {"sentence": "x"}, "has no 'label', the label of sst2"),
        ("sst2", {"text": "x", "label": 1}, "'sentence' is missing, empty or no text"),
        ("sst2", {"sentence": " ", "label": 1}, "'sentence' is missing, empty or no text"),
        ("sst2", ["x", 1], "is list and not an object with fields"),
        ("nli", {"sentence1": "x", "sentence2": "y", "label": "neutral"}, "label='neutral' is no label of nli"),
        ("mmlu", {"question": "x", "choices": ["a", "b"], "answer": 1}, "'choices' is missing, or is not a list of 4"),
        ("mmlu", {"question": "x", "choices": ["a", "b", "c", 4], "answer": 1}, "'choices' is missing, or is not"),
        ("mmlu", {"question": "x", "choices": list("abcd"), "answer": 4}, "answer=4 is no label of mmlu"),
        ("dialogue", {"article": "x", "options": list("abcd"), "answers": "E"}, "answers='E' is no label of dialogue"),
    ],
)
def test_rows_that_are_refused(task: str, row: Any, said: str, tmp_path: Path) -> None:
    """By file and line, wherever the row stands: also among those that would not be used."""
    good = json.loads((SHIPPED / f"{task}.jsonl").read_text().splitlines()[0])
    path = write_rows(tmp_path, task, [good] * 6 + [row])
    with pytest.raises(ValueError, match="mend the row or take it out") as caught:
        read_task(TASKS[task], tmp_path, 0, 1)
    assert str(caught.value).startswith(f"{path}, line 7: {said}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"sentence": "x", "label": 1}\n{"sentence": "x", "lab', ", line 2: broken JSON"),
        (b"", ": holds no rows"),
        (b"\n\n", ": holds no rows"),
        (b"\xff\xfe{", ": is no UTF-8 text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", ": a Git LFS pointer, not the data"),
    ],
)
def test_files_that_are_refused(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "sst2.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="sst2") as caught:
        read_task(SENTIMENT, tmp_path, 0, 100)
    assert str(caught.value).startswith(f"{path}{said}")
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sst2\.jsonl: no such file; bring the rows of sst2 there"):
        read_task(SENTIMENT, tmp_path, 0, 100)
    with pytest.raises(ValueError, match="no such folder"):
        read_task(SENTIMENT, tmp_path / "nowhere", 0, 100)
