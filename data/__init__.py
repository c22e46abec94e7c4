"""The data room: files to records, records to turns.

A new data set is a file with a `DATASET` and an entry here.
"""

from __future__ import annotations

from data import counterfact, fever, jsonl, synthetic, ultraeditbench, wikibigedit, zsre
from data.dataset import Dataset

DATASETS: dict[str, Dataset] = {
    module.DATASET.name: module.DATASET
    for module in (zsre, fever, wikibigedit, ultraeditbench, counterfact, jsonl, synthetic)
}
