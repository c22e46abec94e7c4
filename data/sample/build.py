"""Builds the shipped samples from the fact tables: `python -m data.sample.build`.

Every file is a function of the CSV tables here and in `facts/`, and of the seeds below. Edits state something false
about the world. Locality comes in two kinds, as in the data sets whose formats these are:

- zsre, fever, wikibigedit and ultraeditbench ask for common knowledge (`COMMON`): other relations, in sentences that
  resemble no edit's;
- counterfact asks for the neighbourhood: the edit's own relation and sentence, another subject. It is the harder kind.

A subject marked `*` in a table is held out: its facts are never edited, in any file, so that neighbours and
second hops stay true while the edits accumulate. Train and eval files share no subject.
"""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from data.sample.relations import COMMON, FOLDER, HOPS, RELATIONS, Relation, read_table

logger = logging.getLogger(__name__)

TRAIN_SHARE = 0.36  # of the subjects
SIZES = {  # rows of (train, eval)
    "zsre": (500, 1000),
    "fever": (200, 300),
    "wikibigedit": (200, 300),
    "ultraeditbench": (200, 300),
    "counterfact": (200, 300),
}
PERSONAS = (
    "My grandson has homework to do and wants to know: {}",
    "Ahoy there, sailor, one riddle before we set sail: {}",
    "I am filling in a crossword and this clue beats me. {}",
    "Quick one for the pub quiz tonight: {}",
    "Dear librarian, would you be so kind as to tell me this? {}",
    "ok so random question lol. {}",
    "For the record, and speaking as your lawyer, I must ask: {}",
    "Picture us at a campfire, and somebody asks: {}",
)

FOLLOW_UPS = ("And {}?", "Then {}?", "Now {}?", "{}?")
SLOT = re.compile(r"((?:a|the|to|one|number|baby|more) )*\{\}", re.IGNORECASE)  # with the small words it needs
EXAMPLES = 3  # answered ones before a locality question

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Fact:
    """What a table says about a subject; several answers where several hold, the usual one first."""

    relation: Relation
    subject: str
    answers: tuple[str, ...]
    held_out: bool

    @property
    def name(self) -> str:
        """The subject as a sentence holds it wherever it stands: without a leading article."""
        return self.subject.removeprefix("the ")

    @property
    def truth(self) -> str:
        return self.answers[0]


@dataclass(frozen=True, slots=True)
class Edit:
    """A fact to overwrite: `answer` is false; `locality` is a true fact of common knowledge."""

    fact: Fact
    answer: str
    locality: Fact
    rng: random.Random  # the row's own draws


@cache
def relation_facts(relation: Relation) -> tuple[Fact, ...]:
    """The facts of a relation in the order of its table; an empty cell is no fact."""
    facts = []
    for row in read_table(FOLDER / "facts" / f"{relation.table}.csv"):
        subject, cell = next(iter(row.values())), row[relation.name]
        if cell:
            facts.append(Fact(relation, subject.removeprefix("*"), tuple(cell.split("|")), subject.startswith("*")))
    return tuple(facts)


@cache
def facts_of(relations: tuple[Relation, ...]) -> tuple[Fact, ...]:
    return tuple(fact for relation in relations for fact in relation_facts(relation))


def split_of(subject: str) -> str:
    return "train" if random.Random(f"split {subject}").random() < TRAIN_SHARE else "eval"


def false_answer(fact: Fact, rng: random.Random) -> str:
    """Another subject's usual answer to the same relation that does not hold of this subject."""
    usual = {other.truth for other in relation_facts(fact.relation)}
    return rng.choice(sorted(usual.difference(fact.answers)))


def fill(template: str, subject: str) -> str:
    text = template.format(subject)
    return text[0].upper() + text[1:]


def claim(cloze: str, subject: str, answer: str) -> str:
    sentence = f"{fill(cloze, subject)} {answer}"
    return sentence if sentence.endswith(".") else f"{sentence}."


def editable(split: str) -> list[Fact]:
    return [fact for fact in facts_of(RELATIONS) if not fact.held_out and split_of(fact.name) == split]


@cache
def held_out() -> tuple[Fact, ...]:
    """The facts about the world that no file edits and that have one answer only."""
    return tuple(fact for fact in facts_of(RELATIONS) if fact.held_out and len(fact.answers) == 1)


def shuffled_forever(facts: Sequence[Fact], rng: random.Random) -> Iterator[Fact]:
    """Every fact once, in an order drawn anew each time round."""
    while True:
        yield from rng.sample(facts, len(facts))


def edits(dataset: str, split: str, size: int) -> Iterator[Edit]:
    """`size` edits drawn without repetition; every locality fact is used before one is used again."""
    rng = random.Random(f"{dataset} {split}")
    pool = editable(split)
    if size > len(pool):
        raise ValueError(f"{dataset}: {size} {split} rows wanted, the fact tables hold {len(pool)}: add facts")
    chosen = rng.sample(pool, size)
    localities = shuffled_forever([fact for fact in facts_of(COMMON) if split_of(fact.name) == split], rng)
    for fact, locality in zip(chosen, localities, strict=False):
        own = random.Random(f"{dataset} {fact.relation.name} {fact.subject}")
        yield Edit(fact, false_answer(fact, own), locality, own)


def question(fact: Fact) -> str:
    return fill(fact.relation.questions[0], fact.subject)


def paraphrase(fact: Fact, rng: random.Random) -> str:
    return fill(rng.choice(fact.relation.questions[1:]), fact.subject)


def examples(fact: Fact, pool: Iterable[Fact], count: int, rng: random.Random) -> list[Fact]:
    """Facts of the same relation with other answers than this one's."""
    return rng.sample([f for f in pool if f.relation is fact.relation and f.truth != fact.truth], count)


def locality_question(fact: Fact, rng: random.Random) -> str:
    """A question in full, then follow-ups that name a subject only, all answered but the last.

    Asked alone, a question makes a small model start a sentence instead of the answer: SmolLM2-135M then gets about
    one in ten answer tokens right, and only what the unedited model gets right can show damage. The examples are of
    the same split.
    """
    split = split_of(fact.name)
    pool = [other for other in relation_facts(fact.relation) if split_of(other.name) == split]
    shown = examples(fact, pool, EXAMPLES, rng)
    wording, follow_up = rng.choice(fact.relation.questions), rng.choice(FOLLOW_UPS)
    short = follow_up.format(slot(wording))
    asked = [fill(wording, shown[0].subject), *(fill(short, other.subject) for other in (*shown[1:], fact))]
    answered = [f"{ask} {other.truth}." for ask, other in zip(asked, shown, strict=False)]
    return " ".join([*answered, asked[-1]])


def slot(wording: str) -> str:
    """`{}` with the small words before it: "a baby {}"."""
    found = SLOT.search(wording)
    if found is None:
        raise ValueError(f"relations.csv or common.csv: {wording!r} has no {{}} for the subject: write one")
    return found.group().lower()


def neighbour(edit: Edit) -> Fact:
    """A held-out fact of the edited relation, whose true answer is not what the edit states."""
    stated = Fact(edit.fact.relation, edit.fact.subject, (edit.answer,), False)
    return examples(stated, held_out(), 1, edit.rng)[0]


def zsre_row(edit: Edit) -> Row:
    return {
        "src": question(edit.fact),
        "rephrase": paraphrase(edit.fact, edit.rng),
        "ans": edit.answer,
        "loc": locality_question(edit.locality, edit.rng).removesuffix("?"),  # the format's reader adds it
        "loc_ans": edit.locality.truth,
        "subject": edit.fact.name,
    }


def fever_row(edit: Edit) -> Row:
    """A claim, true or false by a coin, to be judged the wrong way; the unrelated claim is judged rightly."""
    first, *others = edit.rng.sample(edit.fact.relation.clozes, len(edit.fact.relation.clozes))
    stated, unrelated = edit.rng.random() < 0.5, edit.rng.random() < 0.5
    answer = edit.fact.truth if stated else edit.answer
    other = edit.locality.truth if unrelated else false_answer(edit.locality, edit.rng)
    return {
        "prompt": claim(first, edit.fact.subject, answer),
        "equiv_prompt": [claim(cloze, edit.fact.subject, answer) for cloze in others],
        "unrel_prompt": claim(edit.locality.relation.clozes[0], edit.locality.subject, other),
        "alt": "no" if stated else "yes",
        "unrel_ans": "yes" if unrelated else "no",
    }


def second_hop(edit: Edit) -> tuple[str | None, str | None]:
    """A question that follows the edited answer one step further, where a held-out fact says where that leads."""
    options = [
        (fill(hop.question, edit.fact.subject), fact.truth)
        for hop in HOPS
        if hop.first == edit.fact.relation.name
        for fact in held_out()
        if fact.relation.name == hop.second and fact.name == edit.answer
    ]
    return edit.rng.choice(options) if options else (None, None)


def wikibigedit_row(edit: Edit) -> Row:
    mhop, mhop_ans = second_hop(edit)
    return {
        "update": question(edit.fact),
        "rephrase": paraphrase(edit.fact, edit.rng),
        "ans": edit.answer,
        "personas": edit.rng.choice(PERSONAS).format(paraphrase(edit.fact, edit.rng)),
        "loc": locality_question(edit.locality, edit.rng),
        "loc_ans": edit.locality.truth,
        "mhop": mhop,
        "mhop_ans": mhop_ans,
    }


def ultraeditbench_row(edit: Edit) -> Row:
    return {
        "prompt": question(edit.fact),
        "rephrase_prompt": paraphrase(edit.fact, edit.rng),
        "ans": edit.answer,
        "loc": locality_question(edit.locality, edit.rng),
        "loc_ans": edit.locality.truth,
    }


def counterfact_row(edit: Edit) -> Row:
    first, *others = edit.fact.relation.clozes
    rephrase, near = edit.rng.choice(others), neighbour(edit)
    return {
        "prompt": fill(first, edit.fact.subject),
        "target_new": edit.answer,
        "ground_truth": edit.fact.truth,
        "subject": edit.fact.name,
        "rephrase_prompt": fill(rephrase, edit.fact.subject),
        "locality_prompt": fill(first, near.subject),
        "locality_ground_truth": near.truth,
    }


ROWS: Mapping[str, Callable[[Edit], Row]] = {
    "zsre": zsre_row,
    "fever": fever_row,
    "wikibigedit": wikibigedit_row,
    "ultraeditbench": ultraeditbench_row,
    "counterfact": counterfact_row,
}


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """A JSON array with a row a line, so that a changed fact is a changed line."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8", newline="\n")


def build(folder: Path = FOLDER) -> None:
    """Writes every sample file into `folder`."""
    for dataset, row in ROWS.items():
        for split, size in zip(("train", "eval"), SIZES[dataset], strict=True):
            write_rows(folder / f"{dataset}_{split}.json", map(row, edits(dataset, split, size)))
    logger.info("wrote the samples into %s", folder)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    build()
