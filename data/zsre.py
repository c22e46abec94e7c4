"""zsRE: questions about relations of Wikipedia subjects, with unrelated questions for locality."""

from __future__ import annotations

from data.dataset import Dataset, Row, answer, question, samples, subject, text
from data.records import EditRecord, Question


def to_record(row: Row, index: int, seed: int) -> EditRecord:
    """src -> ans, rephrase -> ans, loc + "?" -> loc_ans: locality questions come without their question mark."""
    locality = text(row, "loc").rstrip()
    return EditRecord(
        index,
        edit=question(row, "src", "ans"),
        rephrase=question(row, "rephrase", "ans"),
        locality=Question(locality if locality.endswith("?") else locality + "?", answer(row, "loc_ans")),
        subject=subject(row, "subject"),
    )


DATASET = Dataset(
    "zsre",
    ("src", "rephrase", "ans", "loc", "loc_ans", "subject"),
    to_record,
    raw_files={
        "train": ("zsre/zsre_train.json",),
        "eval": ("zsre/zsre_eval_20k.json", "zsre/zsre_eval_100k.json"),
    },
    sample_files=samples("zsre"),
)
