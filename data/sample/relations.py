"""What the shipped samples ask: the relations of the fact tables and the sentences that ask for them.

`RELATIONS` (relations.csv) are about the world, and edits overwrite them. `COMMON` (common.csv) is what every speaker
of English knows: it serves locality questions and is never edited. No sentence of it shares three words in a row with
one of relations.csv, since a locality question is to resemble no edit. `HOPS` (hops.csv) are two-step questions.

`{}` stands for the subject, `|` between the entries of a cell. Questions and clozes of a relation all ask for the same
thing, so any two of them are paraphrases; a cloze completed with an answer and a full stop is a claim.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Relation:
    """A column of a fact table and how to ask for it."""

    name: str  # the column
    table: str  # the file in facts/, without .csv
    questions: tuple[str, ...]  # at least three; two where nothing is edited
    clozes: tuple[str, ...]  # at least three, each ending where the answer begins; one where nothing is edited


@dataclass(frozen=True, slots=True)
class Hop:
    """A two-step question: the answer to `first` about `{}` is the subject of `second`, whose answer is asked for."""

    first: str
    second: str
    question: str


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _relations(table: str) -> tuple[Relation, ...]:
    return tuple(
        Relation(row["name"], row["table"], tuple(row["questions"].split("|")), tuple(row["clozes"].split("|")))
        for row in read_table(FOLDER / f"{table}.csv")
    )


RELATIONS, COMMON = _relations("relations"), _relations("common")
HOPS = tuple(Hop(**row) for row in read_table(FOLDER / "hops.csv"))
