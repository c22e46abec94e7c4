"""The full data files: what they are called here, what a row holds, and who has them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

HOSTS = {
    "huggingface": "https://huggingface.co",
    "github": "https://media.githubusercontent.com",
    "rome": "https://rome.baulab.info",
}


@dataclass(frozen=True, slots=True)
class UrlSource:
    """A file at a fixed path of a host, published as it is wanted here."""

    host: str
    path: str
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class HubSource:
    """Files of a Hugging Face data set repository whose rows, one file after the other, make the wanted file.

    Their sizes and hashes are asked of the repository's listing. Without `paths` the listing must leave no doubt which
    file is meant: the wanted name, or the only JSON file, or the Parquet shards of the one split `train`.
    """

    repo: str
    paths: tuple[str, ...] = ()
    rows: int | None = None


@dataclass(frozen=True, slots=True)
class DataFile:
    """A full file, its place below data/raw, the fields of its rows (DESIGN section 4), and who has it, best first."""

    dataset: str
    path: str
    fields: tuple[str, ...]
    sources: tuple[UrlSource | HubSource, ...]
    nullable: tuple[str, ...] = ()

    @property
    def pinned(self) -> dict[str, int | None]:
        """SHA-256 -> size of every copy whose hash is public."""
        return {s.sha256: s.size for s in self.sources if isinstance(s, UrlSource) and s.sha256}


def _lfs(path: str, size: int, sha256: str) -> UrlSource:
    """Size and hash are those of the Git LFS pointers in MINE-USTC/StableEdit, commit 0b11e4c."""
    return UrlSource("github", f"media/MINE-USTC/StableEdit/main/data/raw/{path}", size, sha256)


# Release order of the eight snapshots: the stream of edits is chronological. 502,382 rows together.
WIKIBIGEDIT_SNAPSHOTS = tuple(
    f"wiki_big_edit_{first}_{last}.json"
    for first, last in itertools.pairwise(
        ("20240201", "20240220", "20240301", "20240320", "20240401", "20240501", "20240601", "20240620", "20240701")
    )
)
FIELDS = {
    "zsre": ("src", "rephrase", "ans", "loc", "loc_ans"),
    "fever": ("prompt", "equiv_prompt", "alt", "unrel_prompt", "unrel_ans"),
    "wikibigedit": ("update", "rephrase", "ans", "personas", "loc", "loc_ans"),
    "ultraeditbench": ("prompt", "rephrase_prompt", "ans", "loc", "loc_ans"),
}
NULLABLE = {"wikibigedit": ("mhop", "mhop_ans")}


def _file(path: str, size: int, sha256: str, *first: HubSource) -> DataFile:
    dataset = path.split("/")[0]
    return DataFile(dataset, path, FIELDS[dataset], (*first, _lfs(path, size, sha256)), NULLABLE.get(dataset, ()))


FILES = (
    _file("zsre/zsre_train.json", 59688351, "db0a0dd7d5b2b74cc92c1572e2d04545fc65aeff0146b4466596b050df48a562"),
    _file("zsre/zsre_eval_20k.json", 7360316, "81cd16d2f1d5f59a267f17237c1d3c2f0608fec71c5856cf8b1f6af3b63cb940"),
    _file("zsre/zsre_eval_100k.json", 36786886, "5cda0c27b0e845144110940582789269695a409b61cfb2ddb0b93fb4b6a4f5f9"),
    _file("fever/fever_train.json", 87653077, "3b5049113e8a67882ebc3977f715c5e5e3415728e46df89eb268a5070526233b"),
    _file("fever/fever_eval_20k.json", 18922817, "cf068646881ac4af2abae5ec4a87c77c31be3399aefaff3761f058d378fa077c"),
    _file("fever/fever_eval_100k.json", 92873449, "0b50fdbb91afbf905342f0621201cb5369e95224cfe261106be7f52239f37cbc"),
    _file(
        "wikibigedit/wikibigedit_train_17k.json",
        8395410,
        "a3069b6b1b4c21618025f932ba5c87f6cedbc9f618f7530bed1c2360a21c5dc1",
    ),
    _file(
        "wikibigedit/wikibigedit_eval_17k.json",
        11017427,
        "9268a9658b5e633c0c233d2102ea1f1f0d6db126a6d953c86f8e4619639367da",
    ),
    _file(
        "wikibigedit/wikibigedit.json",
        250648693,
        "546ba3aa8204b41200ad015bbfe2ffda9e46095b0796e5bc347e9c3546d03fc7",
        HubSource("lukasthede/WikiBigEdit", WIKIBIGEDIT_SNAPSHOTS, 502382),
    ),
    _file(
        "ultraeditbench/UltraEditBench_train_20k.json",
        8535320,
        "04ce2ae7fdda92dda42b054321e887e5f70352bf380ba364450e9d1e1fe31427",
    ),
    _file(
        "ultraeditbench/UltraEditBench_2M.json",
        800506139,
        "b5ebb3fda5bd59a23cc7e5aa29a2eb7371e4488cc3def5038dc8b6c211eca0f1",
        HubSource("XiaojieGu/UltraEditBench"),
    ),
    DataFile(
        "knowns",
        "known_1000.json",
        ("prompt", "prediction"),
        (
            UrlSource("github", "media/MINE-USTC/StableEdit/main/data/raw/known_1000.json"),
            UrlSource("rome", "data/dsets/known_1000.json"),
        ),
    ),
)
