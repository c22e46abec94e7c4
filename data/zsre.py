"""zsRE: questions about relations of Wikipedia subjects, with unrelated questions for locality."""

from __future__ import annotations

from data.dataset import Dataset, Row, question, question_or_none, samples, subject
from data.records import EditRecord, Question


def to_record(row: Row, index: int, seed: int) -> EditRecord:
    """src -> ans, rephrase -> ans, loc + "?" -> loc_ans: locality questions come without their question mark."""
    locality = question_or_none(row, "loc", "loc_ans")
    return EditRecord(
        index,
        edit=question(row, "src", "ans"),
        rephrase=question_or_none(row, "rephrase", "ans"),
        locality=locality and Question(_with_mark(locality.prompt), locality.answer),
        subject=subject(row, "subject"),
    )


def _with_mark(prompt: str) -> str:
    prompt = prompt.rstrip()
    return prompt if prompt.endswith("?") else prompt + "?"


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
