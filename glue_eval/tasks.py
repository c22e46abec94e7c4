"""The tasks, one row of a table each: what a question looks like, and which answers there are.

A task is nothing but data. Its prompts end where the answer begins, and an answer is a word or a letter; which words
stand for which labels is in the table too, so that one scorer serves all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

LETTERS = ("A", "B", "C", "D")


@dataclass(frozen=True)
class HubRows:
    """Where `datasets` finds the rows of a task."""

    path: str
    config: str
    split: str


@dataclass(frozen=True)
class Task:
    """A question with a closed set of answers."""

    name: str
    instruction: str  # what all prompts of the task begin with
    template: str  # of a row: {field} stands for its text, {options} for its lettered options
    label_field: str
    words: Mapping[str, str]  # a label as the rows have it: the word that stands for it
    options_field: str | None = None
    hub: HubRows | None = None

    @property
    def answers(self) -> tuple[str, ...]:
        """The words a model chooses from; a label is known by its place among them."""
        return tuple(self.words.values())

    def example(self, row: Any) -> Example:
        """The question of a row and its answer; ValueError, one line, where the row lacks a field or its label."""
        if not isinstance(row, Mapping):
            raise ValueError(f"is {type(row).__name__} and not an object with fields")
        texts = {field: _text(row, field) for field in self.fields}
        if self.options_field is not None:
            texts["options"] = _lettered(row, self.options_field)
        if self.label_field not in row:
            raise ValueError(f"has no {self.label_field!r}, the label of {self.name}")
        label = row[self.label_field]
        if isinstance(label, bool) or str(label) not in self.words:
            known = ", ".join(self.words)
            raise ValueError(f"{self.label_field}={label!r} is no label of {self.name}, which has {known}")
        return Example(self.template.format(**texts), list(self.words).index(str(label)))

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of a row that hold text."""
        return tuple(name for _, name, *_ in Formatter().parse(self.template) if name not in (None, "options"))


@dataclass(frozen=True)
class Example:
    """A row as the scorer sees it."""

    question: str
    label: int  # place among the task's answers


def _text(row: Mapping[str, Any], field: str) -> str:
    if not isinstance(text := row.get(field), str) or not text.strip():
        raise ValueError(f"{field!r} is missing, empty or no text")
    return text.strip()


def _lettered(row: Mapping[str, Any], field: str) -> str:
    options = row.get(field)
    if not (isinstance(options, list) and len(options) == len(LETTERS) and all(isinstance(o, str) for o in options)):
        raise ValueError(f"{field!r} is missing, or is not a list of {len(LETTERS)} texts")
    return "\n".join(f"{letter}. {option.strip()}" for letter, option in zip(LETTERS, options, strict=True))


GLUE, MMLU = "nyu-mll/glue", "cais/mmlu"
SENTIMENT = "Decide whether the opinion in a film review is positive or negative."
ENTAILMENT = "Decide whether the first text makes the second one true."
CHOICE = "Text: {sentence1}\nClaim: {sentence2}\nIs the claim true, yes or no?\nAnswer:"
REVIEW = "Review: {sentence}\nSentiment:"

ALL_TASKS = (
    Task(
        "sst2",
        SENTIMENT,
        REVIEW,
        "label",
        {"0": "negative", "1": "positive"},
        hub=HubRows(GLUE, "sst2", "validation"),
    ),
    Task(
        "mmlu",
        "Choose the right answer to a question.",
        "Question: {question}\n{options}\nAnswer:",
        "answer",
        {"0": "A", "1": "B", "2": "C", "3": "D"},
        options_field="choices",
        hub=HubRows(MMLU, "all", "test"),
    ),
    Task(
        "mrpc",
        "Decide whether two sentences say the same thing.",
        "Sentence 1: {sentence1}\nSentence 2: {sentence2}\nDo they say the same thing, yes or no?\nAnswer:",
        "label",
        {"0": "No", "1": "Yes"},
        hub=HubRows(GLUE, "mrpc", "validation"),
    ),
    Task(
        "cola",
        "Decide whether a sentence is grammatical English.",
        "Sentence: {sentence}\nIs it grammatical, yes or no?\nAnswer:",
        "label",
        {"0": "No", "1": "Yes"},
        hub=HubRows(GLUE, "cola", "validation"),
    ),
    Task(
        "rte",
        ENTAILMENT,
        CHOICE,
        "label",
        {"0": "Yes", "1": "No"},  # GLUE's 0 is entailment
        hub=HubRows(GLUE, "rte", "validation"),
    ),
    Task("nli", ENTAILMENT, CHOICE, "label", {"entailment": "Yes", "not_entailment": "No"}),
    Task("sentiment_analysis", SENTIMENT, REVIEW, "label", {"0": "negative", "1": "positive"}),
    Task(
        "dialogue",
        "Choose the reply that goes on with a dialogue.",
        "Dialogue: {article}\n{options}\nAnswer:",
        "answers",
        {"A": "A", "B": "B", "C": "C", "D": "D"},
        options_field="options",
    ),
)
TASKS = {task.name: task for task in ALL_TASKS}


def chosen_tasks(names: Iterable[str] | None) -> list[Task]:
    """The tasks of these names, in this order; None stands for all. ValueError for a name that is none."""
    names = list(TASKS) if names is None else list(names)
    if not names:
        raise ValueError(f"no task is named; choose from {', '.join(TASKS)}")
    for place, name in enumerate(names):
        if name not in TASKS:
            raise ValueError(f"{name}: no such task; choose from {', '.join(TASKS)}")
        if name in names[:place]:
            raise ValueError(f"{name}: is named twice; name each task once")
    return [TASKS[name] for name in names]
