"""Facts that nobody holds, as many as a stress run needs: fact i is a function of i.

Each is about a person with a name of four syllables, a consonant and a vowel each; no two have the same name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data.dataset import Dataset, Row, question, question_or_none
from data.records import EditRecord

CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"
SYLLABLES = [consonant + vowel for consonant in CONSONANTS for vowel in VOWELS]
PAIRS = [first + second for first in SYLLABLES for second in SYLLABLES]
NAMES = len(PAIRS) ** 2
STRIDE = 28_657_001  # shares no factor with NAMES, so that i * STRIDE takes every name once and neighbours differ
FIRST = {"eval": 0, "train": NAMES // 4}  # of each split's names; the second half is that of the locality questions

WHAT_THEY_DO = (
    ("sells", "trades in", ("rope", "cocoa", "lace", "tape", "wine", "honey", "dates", "wool")),
    ("paints", "draws", ("mules", "mice", "moles", "bees", "hares", "toads", "vases", "tulips")),
    ("rules", "governs", ("Doro", "Lemi", "Tavo", "Suna", "Riga Bay", "Homu", "Neco", "Wazu")),
    ("plays", "makes music on", ("lutes", "pipes", "tubas", "bells", "horns", "violas", "bugles", "kazoos")),
)


def make_rows(split: str, count: int) -> Iterator[dict[str, Any]]:
    """The first `count` rows of a split, train or eval, which share no name."""
    return (make_row(FIRST[split] + i) for i in range(count))


def make_row(i: int) -> dict[str, Any]:
    """What person i does, in two wordings, and what another does, whom no edit is about."""
    verb, other_verb, objects = WHAT_THEY_DO[i % len(WHAT_THEY_DO)]
    unrelated, _, unrelated_objects = WHAT_THEY_DO[(i + 1) % len(WHAT_THEY_DO)]
    place = i * STRIDE
    return {
        "prompt": f"{name(place)} {verb}",
        "rephrase": f"{name(place)} {other_verb}",
        "answer": objects[place // 64 % len(objects)],
        "locality": f"{name(place + NAMES // 2 * STRIDE)} {unrelated}",
        "locality_answer": unrelated_objects[place // 512 % len(unrelated_objects)],
    }


def name(place: int) -> str:
    """One of `NAMES` names; places that differ by a multiple of `NAMES` have the same."""
    place, first = divmod(place, len(PAIRS))
    return (PAIRS[first] + PAIRS[place % len(PAIRS)]).capitalize()


def to_record(row: Row, index: int, seed: int) -> EditRecord:
    """prompt -> answer, rephrase -> answer, locality -> locality_answer."""
    return EditRecord(
        index,
        edit=question(row, "prompt", "answer"),
        rephrase=question_or_none(row, "rephrase", "answer"),
        locality=question_or_none(row, "locality", "locality_answer"),
    )


DATASET = Dataset(
    "synthetic",
    ("prompt", "rephrase", "answer", "locality", "locality_answer"),
    to_record,
    fetchable=False,
    make_rows=make_rows,
)
