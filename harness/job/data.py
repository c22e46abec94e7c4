"""The files of a run, and what it wants of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from config.schema import HyperNetworkConfig, RunConfig
from data import DATASETS
from data.dataset import Dataset
from data.files import RecordFile, open_records, resolve_file
from data.made import made_file
from data.records import Question
from data.stream import EditStream, questions_of
from harness.run import places

SAMPLES = places.ROOT / "data" / "sample"


def open_data(cfg: RunConfig) -> dict[str, RecordFile]:
    """The files of a run by split: those to edit and, where something is done with them first, those to train on."""
    dataset = DATASETS[cfg.dataset.name].with_fields(cfg.dataset.field_map())
    has_training_file = cfg.dataset.train_path or cfg.dataset.made_facts("train") or "train" in dataset.sample_files
    paths = {"eval": cfg.dataset.valid_path}
    if cfg.warms_up() or trains(cfg) or (cfg.moments_of_questions() and has_training_file):
        paths["train"] = cfg.dataset.train_path
    files = {split: data_file(cfg, dataset, split, path) for split, path in paths.items()}
    cache = places.CACHE / "arrow"
    return {split: open_records(file, dataset, cache_dir=cache, seed=cfg.seed) for split, file in files.items()}


def unrelated_questions(cfg: RunConfig, stream: EditStream) -> list[Question]:
    """The unrelated ones of the warm-up turns; where nothing warms up, all that the shipped training file of zsRE asks.

    ValueError where the warm-up turns have none.
    """
    if not stream.num_warm_up:
        return list(training_questions(cfg, {}))
    found = [record.locality for record in stream.warmed_up() if record.locality is not None]
    if not found:
        raise ValueError(
            "editor.preserve_text=unrelated: the rows of dataset.train_path that warm up hold no unrelated questions; "
            "name their field, bring text and set editor.preserve_text=corpus, or set editor.preserve=0"
        )
    return found


def training_questions(cfg: RunConfig, files: Mapping[str, RecordFile]) -> Iterator[Question]:
    """All that the training file asks or, where the run has none, the shipped one of zsRE."""
    records = files.get("train") or open_records(
        SAMPLES / "zsre_train.json", DATASETS["zsre"], cache_dir=places.CACHE / "arrow", seed=cfg.seed
    )
    return (question for record in records for question in questions_of(record).values())


def data_file(cfg: RunConfig, dataset: Dataset, split: str, path: str | None) -> Path:
    """The file of a split: the user's, else one of made facts, the full one, or the shipped sample."""
    facts = cfg.dataset.made_facts(split)
    if path is None and facts is not None:
        return made_file(dataset, split, facts, places.CACHE / "made")
    return resolve_file(dataset, split, path, places.ROOT / "data" / "raw", SAMPLES)


def trains(cfg: RunConfig) -> bool:
    """Whether an editor learns from the training file before it edits."""
    return cfg.evaluate is None and isinstance(cfg.editor, HyperNetworkConfig) and cfg.editor.trains()
