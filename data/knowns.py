"""Knowns: facts a small model gets right by itself, a probe of what editing preserves. Not a set to edit from."""

from __future__ import annotations

from data.dataset import Dataset, Row, question
from data.records import EditRecord


def to_record(row: Row, index: int, seed: int) -> EditRecord:
    """prompt -> attribute, the object alone; prompt -> prediction, a model's whole continuation, where that is all."""
    return EditRecord(
        index, edit=question(row, "prompt", "prediction" if row.get("attribute") is None else "attribute")
    )


DATASET = Dataset(
    "knowns",
    ("prompt", "attribute", "prediction"),
    to_record,
    raw_files={"eval": ("known_1000.json",)},
    sample_files={"eval": "knowns.json"},
)
