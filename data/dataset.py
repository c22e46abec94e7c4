"""What a data set is to the project, and the checks that its reader makes of a row."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from data.records import EditRecord, Question

JSON_KINDS: dict[type, str] = {
    str: "a text",
    bool: "a truth value",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    type(None): "null",
}

Row = Mapping[str, Any]
ToRecord = Callable[[Row, int, int], EditRecord]
MakeRows = Callable[[str, int], Iterator[dict[str, Any]]]


@dataclass(frozen=True)
class Dataset:
    """How a raw row becomes a record, and which files hold such rows.

    `to_record(row, index, seed)` raises ValueError saying what is wrong with the row, not where it stands: that is
    the file reader's to add. It reads no field that is not in `fields`.
    """

    name: str
    fields: tuple[str, ...]
    to_record: ToRecord
    raw_files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """For each split, train or eval, the full files it may lie in below data/raw, the preferred one first."""
    sample_files: Mapping[str, str] = field(default_factory=dict)
    """For each split, the shipped file below data/sample."""
    fetchable: bool = True
    """Whether `python -m data.prepare` knows where the full files are."""
    make_rows: MakeRows | None = None
    """(split, how many) -> rows, for facts that are made and not collected; the first of many are those of a few."""
    variant: str = ""
    """What a record depends on beside the fields: a copy converted under another variant is not used."""

    def with_fields(self, names: Mapping[str, str] | None) -> Dataset:
        """This data set, read under the user's field names; ValueError where its names are fixed."""
        if names:
            raise ValueError(f"dataset.fields has no effect with dataset={self.name}; remove it, or set dataset=jsonl")
        return self


def samples(name: str) -> dict[str, str]:
    """The shipped files of a data set that has both splits."""
    return {split: f"{name}_{split}.json" for split in ("train", "eval")}


def text(row: Row, name: str) -> str:
    """The text in field `name`, as it is; ValueError where there is none, or it is blank or no text."""
    if name not in row:
        raise ValueError(f"no field {name!r}; it has {', '.join(map(str, row)) or 'none'}")
    return checked_text(row[name], name)


def checked_text(value: object, name: str) -> str:
    if value is None:
        raise ValueError(f"field {name!r} is null, not text")
    if not isinstance(value, str):
        remedy = "give one text" if isinstance(value, list | dict) else "write it in quotation marks"
        raise ValueError(f"field {name!r} is {_described(value)}, not text; {remedy}")
    if not value.strip():
        raise ValueError(f"field {name!r} is empty")
    return value


def answer(row: Row, name: str) -> str:
    """The text in field `name` without the whitespace around it: what joins prompt and answer is the tokeniser's."""
    return text(row, name).strip()


def texts(row: Row, name: str) -> list[str]:
    """The texts listed in field `name`; ValueError where it is no list, is empty, or holds anything but text."""
    if not isinstance(row.get(name, []), list):
        raise ValueError(f"field {name!r} is {_described(row[name])}, not a list of texts")
    if not row.get(name):
        raise ValueError(f"field {name!r} is an empty list" if name in row else f"no field {name!r}")
    return [checked_text(value, f"{name}[{place}]") for place, value in enumerate(row[name])]


def texts_or_none(row: Row, name: str) -> list[str] | None:
    """The texts, or None where the field is null."""
    return None if name in row and row[name] is None else texts(row, name)


def question(row: Row, prompt: str, reply: str) -> Question:
    return Question(text(row, prompt), answer(row, reply))


def question_or_none(row: Row, prompt: str, reply: str) -> Question | None:
    """The question, or None where its prompt is null; an absent field is an error, as a null reply to a prompt is."""
    asked = row.get(prompt)
    if isinstance(asked, str) and not asked.strip():
        raise ValueError(f"field {prompt!r} is empty; null in its place leaves this question out")
    return None if prompt in row and asked is None else question(row, prompt, reply)


def subject(row: Row, name: str) -> str | None:
    """What the fact is about, without the whitespace around it; None where the row does not say."""
    return None if row.get(name) is None else answer(row, name)


def choice(seed: int, index: int) -> random.Random:
    """The generator for what is chosen in row `index`: no other row, and no order of reading, changes the choice."""
    return random.Random(f"{seed},{index}")


def _described(value: object) -> str:
    return f"{JSON_KINDS.get(type(value), type(value).__name__)} ({repr(value)[:40]})"
