"""FEVER: claims to be judged; the edit is the verdict."""

from __future__ import annotations

from data.dataset import Dataset, Row, answer, choice, question, question_or_none, samples, texts_or_none
from data.records import EditRecord, Question


def to_record(row: Row, index: int, seed: int) -> EditRecord:
    """prompt -> alt, one of equiv_prompt, chosen by (seed, row), -> alt, unrel_prompt -> unrel_ans."""
    equivalent = texts_or_none(row, "equiv_prompt")
    return EditRecord(
        index,
        edit=question(row, "prompt", "alt"),
        rephrase=None if equivalent is None else Question(choice(seed, index).choice(equivalent), answer(row, "alt")),
        locality=question_or_none(row, "unrel_prompt", "unrel_ans"),
    )


DATASET = Dataset(
    "fever",
    ("prompt", "equiv_prompt", "alt", "unrel_prompt", "unrel_ans"),
    to_record,
    raw_files={
        "train": ("fever/fever_train.json",),
        "eval": ("fever/fever_eval_20k.json", "fever/fever_eval_100k.json"),
    },
    sample_files=samples("fever"),
)
