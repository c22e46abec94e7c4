"""Builds the shipped samples from the fact tables: `python -m data.sample.build`.

Every file is a function of `facts/`, `relations.py` and the seeds below. A subject marked `*` in a table is held out:
its facts are never edited, in any file, so that locality prompts, second hops and known facts stay true while the
edits, which all state something false, accumulate. Train and eval files share no subject.
"""

from __future__ import annotations

import csv
import json
import logging
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from data.sample.relations import HOPS, RELATIONS, Relation

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
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
    """A fact to overwrite: `answer` is false; `locality` is a true fact about something else."""

    fact: Fact
    answer: str
    locality: Fact
    rng: random.Random  # the row's own draws


def read_table(table: str, folder: Path = FOLDER / "facts") -> list[dict[str, str]]:
    with (folder / f"{table}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def relation_facts(relation: Relation) -> list[Fact]:
    """The facts of a relation in the order of its table; an empty cell is no fact."""
    facts = []
    for row in read_table(relation.table):
        subject, cell = next(iter(row.values())), row[relation.name]
        if cell:
            facts.append(Fact(relation, subject.removeprefix("*"), tuple(cell.split("|")), subject.startswith("*")))
    return facts


@cache
def all_facts() -> tuple[Fact, ...]:
    return tuple(fact for relation in RELATIONS for fact in relation_facts(relation))


def split_of(subject: str) -> str:
    return "train" if random.Random(f"split {subject}").random() < TRAIN_SHARE else "eval"


@cache
def usual_answers(relation: str) -> frozenset[str]:
    return frozenset(fact.truth for fact in all_facts() if fact.relation.name == relation)


def false_answer(fact: Fact, rng: random.Random) -> str:
    """Another subject's usual answer to the same relation that does not hold of this subject."""
    return rng.choice(sorted(usual_answers(fact.relation.name).difference(fact.answers)))


def fill(template: str, subject: str) -> str:
    text = template.format(subject)
    return text[0].upper() + text[1:]


def claim(cloze: str, subject: str, answer: str) -> str:
    sentence = f"{fill(cloze, subject)} {answer}"
    return sentence if sentence.endswith(".") else f"{sentence}."


def editable(split: str) -> list[Fact]:
    return [fact for fact in all_facts() if not fact.held_out and split_of(fact.name) == split]


@cache
def held_out() -> tuple[Fact, ...]:
    """The facts that no file edits, that a small model may know, and that have one answer only."""
    return tuple(fact for fact in all_facts() if fact.held_out and fact.relation.easy and len(fact.answers) == 1)


@cache
def locality_facts(split: str) -> tuple[Fact, ...]:
    return tuple(fact for fact in held_out() if split_of(fact.name) == split)


def take_other(queue: list[Fact], fact: Fact) -> Fact:
    """Removes and returns the first fact of the queue about another relation and another subject than `fact`."""
    fits = (i for i, f in enumerate(queue) if f.relation is not fact.relation and f.subject != fact.subject)
    return queue.pop(next(fits))


def edits(dataset: str, split: str, size: int) -> Iterable[Edit]:
    """`size` edits drawn without repetition; every locality fact is used before one is used again."""
    rng = random.Random(f"{dataset} {split}")
    pool = editable(split)
    if size > len(pool):
        raise ValueError(f"{dataset}: {size} {split} rows wanted, the fact tables hold {len(pool)}: add facts")
    localities, queue = locality_facts(split), list[Fact]()
    for fact in rng.sample(pool, size):
        if len(queue) < len(localities) // 4:  # enough left to find another relation
            queue += rng.sample(localities, len(localities))
        own = random.Random(f"{dataset} {fact.relation.name} {fact.subject}")
        yield Edit(fact, false_answer(fact, own), take_other(queue, fact), own)


def question(fact: Fact) -> str:
    return fill(fact.relation.questions[0], fact.subject)


def paraphrase(fact: Fact, rng: random.Random) -> str:
    return fill(rng.choice(fact.relation.questions[1:]), fact.subject)


def example(fact: Fact) -> Fact:
    """Another held-out fact of the same relation, with another answer."""
    others = [o for o in held_out() if o.relation is fact.relation and o.truth != fact.truth]
    return random.Random(f"example {fact.relation.name} {fact.subject}").choice(others)


def locality_question(fact: Fact) -> str:
    """The question after an answered one of its kind.

    Asked alone, a question makes a small model start a sentence instead of the answer: SmolLM2-135M then gets 10% of
    the answer tokens right, with the example 48%, and only what the unedited model gets right can show damage.
    """
    shown = example(fact)
    return f"{question(shown)} {shown.truth}. {question(fact)}"


def zsre_row(edit: Edit) -> Row:
    return {
        "src": question(edit.fact),
        "rephrase": paraphrase(edit.fact, edit.rng),
        "ans": edit.answer,
        "loc": locality_question(edit.locality).removesuffix("?"),  # the format's reader adds it
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
        "loc": locality_question(edit.locality),
        "loc_ans": edit.locality.truth,
        "mhop": mhop,
        "mhop_ans": mhop_ans,
    }


def ultraeditbench_row(edit: Edit) -> Row:
    return {
        "prompt": question(edit.fact),
        "rephrase_prompt": paraphrase(edit.fact, edit.rng),
        "ans": edit.answer,
        "loc": locality_question(edit.locality),
        "loc_ans": edit.locality.truth,
    }


def counterfact_row(edit: Edit) -> Row:
    first, *others = edit.fact.relation.clozes
    return {
        "prompt": fill(first, edit.fact.subject),
        "target_new": edit.answer,
        "ground_truth": edit.fact.truth,
        "subject": edit.fact.name,
        "rephrase_prompt": fill(edit.rng.choice(others), edit.fact.subject),
        "locality_prompt": fill(edit.locality.relation.clozes[0], edit.locality.subject),
        "locality_ground_truth": edit.locality.truth,
    }


def knowns_rows() -> list[Row]:
    """The held-out facts as sentences to complete, each after a complete one of its kind: what editing should keep."""
    return [
        {
            "subject": fact.name,
            "attribute": fact.truth,
            "prediction": f" {fact.truth}.",
            "prompt": f"{claim(cloze, shown.subject, shown.truth)} {fill(cloze, fact.subject)}",
        }
        for fact in held_out()
        for cloze, shown in [(fact.relation.clozes[0], example(fact))]
    ]


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
    write_rows(folder / "knowns.json", knowns_rows())
    logger.info("wrote the samples into %s", folder)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    build()
