"""One scorer for all tasks, two ways: the likelihood of the answers, and what the model writes.

By likelihood, an answer counts with the mean log-probability of its tokens, so that long ones are at no disadvantage;
this is the number to trust. By generation, five tokens are written greedily and read as an answer, as the papers do
it; what is none of the answers is wrong, and counted.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.records import Question
from data.stream import Tokenizer, tokenize
from glue_eval.metrics import confusion, summary
from glue_eval.rows import TaskRows, read_task
from glue_eval.tasks import Example, Task
from model import LanguageModel

NEW_TOKENS = 5
# To be raised when the same model and rows would score differently: cached scores are then left alone.
SCORES_FORMAT = 2
RESAMPLES = 1000
SEED = 42  # of the bootstrap

# -------------------------------------------------------------------------------------------------------------------
# Prompts


@dataclass(frozen=True)
class Prompt:
    """A question as token ids, and each answer as it goes on from there."""

    ids: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    shots: int  # examples shown

    @property
    def length(self) -> int:
        """Tokens the model reads to score it, either way: the last one written is not read."""
        return len(self.ids) + max(NEW_TOKENS, *map(len, self.answers)) - 1


@dataclass(frozen=True)
class PreparedTask:
    """A task that can be scored: rows checked, prompts within the context."""

    rows: TaskRows
    prompts: tuple[Prompt, ...]


def prepare_tasks(
    tasks: Iterable[Task],
    tokenizer: Tokenizer,
    context_length: int | None,
    *,
    origin: str | Path | None = None,
    few_shot: int = 0,
    limit: int | None = 100,
) -> list[PreparedTask]:
    """Read and check all rows and make all prompts; needs no weights.

    `origin` is a folder of `<task>.jsonl`, `hub`, or None = the shipped rows. A prompt longer than the context loses
    its examples from the last on; one that is too long without any is refused. ValueError, one line, for each mistake.
    """
    read = [read_task(task, origin, few_shot, limit) for task in tasks]
    return [PreparedTask(rows, tuple(_prompts(rows, tokenizer, context_length))) for rows in read]


def _prompts(rows: TaskRows, tokenizer: Tokenizer, context_length: int | None) -> Iterable[Prompt]:
    for example, place in zip(rows.asked, rows.places, strict=True):
        made = (_prompt(rows.task, rows.shots[:n], example, tokenizer) for n in range(len(rows.shots), -1, -1))
        fits = next((one for one in made if context_length is None or one.length <= context_length), None)
        if fits is None:
            bare = _prompt(rows.task, (), example, tokenizer)
            raise ValueError(
                f"{place}: needs {bare.length} tokens without any example, more than the model's context of "
                f"{context_length}; shorten the row or take it out"
            )
        yield fits


def prompt_text(task: Task, shots: Sequence[Example], example: Example) -> str:
    """What the model reads; an answer goes on after a space."""
    shown = [f"{shot.question} {task.answers[shot.label]}" for shot in shots]
    return "\n\n".join([task.instruction, *shown, example.question])


def _prompt(task: Task, shots: Sequence[Example], example: Example, tokenizer: Tokenizer) -> Prompt:
    text = prompt_text(task, shots, example)
    sequences = tokenize([Question(text, answer) for answer in task.answers], tokenizer, "joint")
    ids = [sequence.ids for sequence in sequences]
    start = min(sequence.answer_start for sequence in sequences)
    # a tokenizer may cut the prompt differently before different answers: what they share is the prompt
    while any(one[:start] != ids[0][:start] for one in ids):
        start -= 1
    return Prompt(ids[0][:start], tuple(one[start:] for one in ids), len(shots))


# -------------------------------------------------------------------------------------------------------------------
# Scores


def evaluate_tasks(
    model: LanguageModel,
    tasks: Sequence[PreparedTask],
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    watch: Callable[[str, int], None] = lambda _task, _rows: None,
) -> dict[str, Any]:
    """Score the model on each task, both ways; `watch(task, rows)` is told when a task is done.

    {task: {"likelihood": {"accuracy", "f1", "mcc"}, "generation": {the same, "invalid"}, "rows": {...}, "answers":
    [...], "seconds"}}; a metric is {"mean", "low", "high", "n"} with its 95% bootstrap interval over rows.
    """
    results = {}
    for prepared in tasks:
        results[prepared.rows.task.name] = _evaluate(model, prepared, resamples, seed)
        watch(prepared.rows.task.name, len(prepared.prompts))
    return results


def _evaluate(model: LanguageModel, prepared: PreparedTask, resamples: int, seed: int) -> dict[str, Any]:
    start = time.perf_counter()
    rows, task = prepared.rows, prepared.rows.task
    labels = [example.label for example in rows.asked]
    try:
        likeliest = most_likely(model, prepared.prompts)
    except FloatingPointError as error:
        remedy = "look at the model's weights, or edit with a smaller editor.lr"
        raise FloatingPointError(f"task {task.name}: {error}: nothing to score; {remedy}") from error
    texts = written(model, prepared.prompts)
    said = [parse_answer(text, task.answers) for text in texts]
    kinds = len(task.answers)
    return {
        "likelihood": summary(confusion(labels, likeliest, kinds), resamples, seed),
        "generation": {**summary(confusion(labels, said, kinds), resamples, seed), "invalid": said.count(None)},
        "rows": {
            "source": rows.source,
            "sha256": rows.sha256,
            "asked": len(rows.asked),
            "few_shot": len(rows.shots),
            "with_fewer_shots": sum(prompt.shots < len(rows.shots) for prompt in prepared.prompts),
        },
        "answers": [
            {"label": label, "likelihood": likely, "generation": answer, "text": text}
            for label, likely, answer, text in zip(labels, likeliest, said, texts, strict=True)
        ],
        "seconds": time.perf_counter() - start,
    }


def most_likely(model: LanguageModel, prompts: Sequence[Prompt]) -> list[int]:
    """The answer whose tokens have the highest mean log-probability, the first of several; a place in the task's.

    FloatingPointError where one has none.
    """
    scores = model.label_log_probs([prompt.ids for prompt in prompts], [prompt.answers for prompt in prompts])
    means = [[total / tokens for total, tokens in answers] for answers in scores]
    if broken := sum(any(map(math.isnan, answers)) for answers in means):
        raise FloatingPointError(f"the log-probabilities are not numbers on {broken} of {len(means)} rows")
    return [answers.index(max(answers)) for answers in means]


def written(model: LanguageModel, prompts: Sequence[Prompt]) -> list[str]:
    """What the model writes after each prompt, as text."""
    tokens = model.generate([prompt.ids for prompt in prompts], NEW_TOKENS)
    return [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]


def parse_answer(text: str, answers: Sequence[str]) -> int | None:
    """The answer that a text begins with, as a whole word; None where it begins with none of them.

    Spaces and punctuation may stand before it, and case is nobody's concern. A single letter is an option's only as a
    capital, and not where a word in small letters follows: "A cell is..." and "C: mitochondria" name no A.
    """
    begin = re.match(r"[\W_]*([^\W_]+)", text)
    if begin is None:
        return None
    word, rest = begin[1], text[begin.end() :]
    if len(word) == 1 and re.match(r"[ \t]+[a-z]|['\u2019-][a-z]", rest):
        return None
    same = str.__eq__ if len(word) == 1 else lambda a, b: a.casefold() == b.casefold()
    return next((place for place, answer in enumerate(answers) if same(word, answer)), None)
