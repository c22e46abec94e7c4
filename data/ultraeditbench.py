"""UltraEditBench: two million question and answer pairs from Wikidata triples."""

from __future__ import annotations

from data.dataset import Dataset, Row, question, question_or_none, samples
from data.records import EditRecord


def to_record(row: Row, index: int, seed: int) -> EditRecord:
    """prompt -> ans, rephrase_prompt -> ans, loc -> loc_ans."""
    return EditRecord(
        index,
        edit=question(row, "prompt", "ans"),
        rephrase=question_or_none(row, "rephrase_prompt", "ans"),
        locality=question_or_none(row, "loc", "loc_ans"),
    )


DATASET = Dataset(
    "ultraeditbench",
    ("prompt", "rephrase_prompt", "ans", "loc", "loc_ans"),
    to_record,
    raw_files={
        "train": ("ultraeditbench/UltraEditBench_train_20k.json",),
        "eval": ("ultraeditbench/UltraEditBench_2M.json",),
    },
    sample_files=samples("ultraeditbench"),
)
