"""WikiBigEdit: changes between Wikidata snapshots, with personas and, in some rows, multi-hop questions."""

from __future__ import annotations

from data.dataset import Dataset, Row, question, question_or_none, samples
from data.records import EditRecord


def to_record(row: Row, index: int, seed: int) -> EditRecord:
    """update, rephrase, personas -> ans; loc -> loc_ans; mhop -> mhop_ans.

    A null probe is left out: most rows have no multi-hop question, and a training file need not have the field.
    """
    return EditRecord(
        index,
        edit=question(row, "update", "ans"),
        rephrase=question_or_none(row, "rephrase", "ans"),
        locality=question_or_none(row, "loc", "loc_ans"),
        persona=question_or_none(row, "personas", "ans"),
        multi_hop=question_or_none({"mhop": None, **row}, "mhop", "mhop_ans"),
    )


DATASET = Dataset(
    "wikibigedit",
    ("update", "rephrase", "ans", "personas", "loc", "loc_ans", "mhop", "mhop_ans"),
    to_record,
    # the 500K rows of wikibigedit.json are for the long run, which names them in dataset.valid_path
    raw_files={
        "train": ("wikibigedit/wikibigedit_train_17k.json",),
        "eval": ("wikibigedit/wikibigedit_eval_17k.json",),
    },
    sample_files=samples("wikibigedit"),
)
