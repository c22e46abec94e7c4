"""A user's own file, under the user's own field names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from data.dataset import Dataset, Row, question, question_or_none, subject, text
from data.records import EditRecord, Question


@dataclass(frozen=True)
class OwnFile(Dataset):
    """A data set that needs to be told its field names before it can be read."""

    def with_fields(self, names: Mapping[str, str] | None) -> Dataset:
        """The reader of `names`, {our name: the user's}; prompt and answer are needed, the rest as the file has it."""
        names = dict(names or {})
        for needed in ("prompt", "answer"):
            if needed not in names:
                raise ValueError(f"dataset.fields.{needed}=null: set it to the field of your file with the {needed}")
        if unknown := set(names) - set(OUR_NAMES):
            raise ValueError(f"dataset.fields.{min(unknown)}: no such entry; set one of {', '.join(OUR_NAMES)}")
        for prompt in ("locality", "multi_hop"):
            if (prompt in names) != (f"{prompt}_answer" in names):
                raise ValueError(f"dataset.fields.{prompt} and .{prompt}_answer go together; set both or neither")
        variant = ",".join(f"{ours}={theirs!r}" for ours, theirs in sorted(names.items()))
        fields = tuple(dict.fromkeys(names.values()))
        return Dataset(self.name, fields, partial(_to_record, names), fetchable=False, variant=variant)


def _to_record(names: Mapping[str, str], row: Row, index: int, seed: int) -> EditRecord:
    """A named probe may be null in a row and is then left out; a field that is absent is a mistake in the names."""
    return EditRecord(
        index,
        edit=question(row, names["prompt"], names["answer"]),
        rephrase=_probe(names, row, "rephrase", "answer"),
        locality=_probe(names, row, "locality", "locality_answer"),
        persona=_probe(names, row, "persona", "answer"),
        multi_hop=_probe(names, row, "multi_hop", "multi_hop_answer"),
        subject=_subject(names, row),
    )


def _subject(names: Mapping[str, str], row: Row) -> str | None:
    """The row's subject, null in rows without one. ValueError where it does not occur in the prompt."""
    if "subject" not in names:
        return None
    field, prompt = names["subject"], names["prompt"]
    if field not in row:
        text(row, field)
    found = subject(row, field)
    if found is not None and found not in text(row, prompt):
        raise ValueError(f"field {field!r}, {found!r}, does not occur in field {prompt!r}, {row[prompt]!r}")
    return found


def _probe(names: Mapping[str, str], row: Row, prompt: str, reply: str) -> Question | None:
    return question_or_none(row, names[prompt], names[reply]) if prompt in names else None


def _unnamed(row: Row, index: int, seed: int) -> EditRecord:
    raise ValueError("dataset=jsonl needs dataset.fields: set its prompt and answer to the names of your fields")


OUR_NAMES = (
    *("prompt", "answer", "rephrase", "locality", "locality_answer"),
    *("persona", "multi_hop", "multi_hop_answer", "subject"),
)
DATASET = OwnFile("jsonl", (), _unnamed, fetchable=False)
