"""The same rows and prompts as tasks of lm-evaluation-harness, which then judges a model by itself.

Its `acc` takes the answer whose tokens have the highest sum of log-probabilities, the first of several; this project
takes the highest mean. They are the same where all answers to a question have equally many tokens, and where the
tokens of the prompt alone come before every one of them: `write_tasks` looks at both, and a warning names the task
where it is not so.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.disk import write_atomically
from data.stream import Tokenizer
from glue_eval.score import PreparedTask, Prompt, prompt_text

log = logging.getLogger(__name__)

PREFIX = "stableedit_"  # lm-evaluation-harness has tasks of its own by most of the names


def write_tasks(tasks: Sequence[PreparedTask], tokenizer: Tokenizer, folder: Path) -> list[str]:
    """Write a task file and its rows for each task; the names by which `lm_eval --tasks` knows them."""
    names = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for task in tasks:
            name = f"{PREFIX}{task.rows.task.name}"
            texts = _texts(task)
            rows = (folder / f"{name}.jsonl").resolve()
            write_atomically(rows, "".join(json.dumps(row) + "\n" for row in _rows(task, texts)))
            write_atomically(folder / f"{name}.yaml", task_file(name, rows))
            names.append(name)
            _warn(task, texts, tokenizer)
    except OSError as error:
        raise ValueError(f"--lm-eval {folder}: cannot be written ({error.strerror}); choose another folder") from error
    return names


def task_file(name: str, rows: Path) -> str:
    """YAML, of which JSON is a part; the texts are fields of the rows, so no template reads them."""
    task: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "answers",
        "doc_to_target": "label",
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": 0,  # the prompts have theirs
    }
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in task.items())


def _texts(task: PreparedTask) -> list[str]:
    shots = task.rows.shots
    return [
        prompt_text(task.rows.task, shots[: prompt.shots], example)
        for example, prompt in zip(task.rows.asked, task.prompts, strict=True)
    ]


def _rows(task: PreparedTask, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    for example, text in zip(task.rows.asked, texts, strict=True):
        yield {"prompt": text, "answers": list(task.rows.task.answers), "label": example.label}


def _warn(task: PreparedTask, texts: Sequence[str], tokenizer: Tokenizer) -> None:
    cut = sum(not _cut_alike(*one, tokenizer) for one in zip(task.prompts, texts, strict=True))
    lengths = sum(len(set(map(len, prompt.answers))) > 1 for prompt in task.prompts)
    for count, what in (
        (lengths, "answers differ in their number of tokens"),
        (cut, "the prompt alone is cut into other tokens"),
    ):
        if count:
            log.warning(
                "%s: on %d of %d rows %s, so lm_eval's acc can differ from our likelihood score",
                task.rows.task.name, count, len(texts), what,
            )  # fmt: skip


def _cut_alike(prompt: Prompt, text: str, tokenizer: Tokenizer) -> bool:
    """Whether the tokens of the prompt alone come before every answer: lm_eval scores what follows them.

    That may be more than ours, by tokens that all answers share, such as a lone space: no answer gains by it.
    """
    alone = tuple(tokenizer([text])["input_ids"][0])
    return prompt.ids[: len(alone)] == alone
