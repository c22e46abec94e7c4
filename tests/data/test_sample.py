"""The shipped samples: rebuilt byte for byte, false where they edit, true and elsewhere where they probe."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from data import DATASETS
from data.sample.build import (
    EXAMPLES,
    FOLDER,
    SIZES,
    Fact,
    build,
    claim,
    edits,
    facts_of,
    fill,
    held_out,
    relation_facts,
)
from data.sample.relations import COMMON, RELATIONS, Relation

PROMPT = {
    "zsre": "src",
    "fever": "prompt",
    "wikibigedit": "update",
    "ultraeditbench": "prompt",
    "counterfact": "prompt",
}
FILES = [(dataset, split) for dataset in SIZES for split in ("train", "eval")]
both_splits = pytest.mark.parametrize(("dataset", "split"), FILES)
both_splits_of_questions = pytest.mark.parametrize(("dataset", "split"), [f for f in FILES if f[0] != "fever"])
each_dataset = pytest.mark.parametrize("dataset", list(SIZES))


@cache
def rows(dataset: str, split: str) -> list[dict[str, Any]]:
    return json.loads((FOLDER / f"{dataset}_{split}.json").read_text(encoding="utf-8"))


def every_fact() -> tuple[Fact, ...]:
    return facts_of(RELATIONS + COMMON)


@cache
def asked() -> dict[str, Fact]:
    """Every question and cloze the tables can make, and the fact it asks for."""
    return {
        fill(template, fact.subject): fact
        for fact in every_fact()
        for template in fact.relation.questions + fact.relation.clozes
    }


def test_rebuild_gives_the_shipped_bytes(tmp_path: Path) -> None:
    build(tmp_path)
    shipped = {path.name: path.read_bytes() for path in FOLDER.glob("*.json")}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == shipped


def test_sizes_and_variety() -> None:
    assert len(rows("zsre", "eval")) >= 1000
    assert len(rows("zsre", "train")) >= 500
    assert all(len(rows(dataset, "eval")) >= 300 and len(rows(dataset, "train")) >= 200 for dataset in SIZES)
    for split in ("train", "eval"):
        assert len({asked()[row["src"]].relation.name for row in rows("zsre", split)}) >= 12
    assert sum(path.stat().st_size for path in FOLDER.glob("*.json")) < 1_075_000


def test_every_question_asks_for_one_fact() -> None:
    """Else two edits, or an edit and a locality prompt, could ask the same and want different answers."""
    assert len(asked()) == sum(len(fact.relation.questions + fact.relation.clozes) for fact in every_fact())
    assert len({relation.name for relation in RELATIONS + COMMON}) == len(RELATIONS + COMMON)


@each_dataset
def test_edit_prompts_are_unique_across_both_files(dataset: str) -> None:
    prompts = [row[PROMPT[dataset]] for split in ("train", "eval") for row in rows(dataset, split)]
    assert len(set(prompts)) == len(prompts)


@each_dataset
def test_train_and_eval_share_no_subject(dataset: str) -> None:
    train, held = (
        {edit.fact.name for edit in edits(dataset, s, SIZES[dataset][i])} for i, s in enumerate(("train", "eval"))
    )
    assert not train & held


@both_splits_of_questions
def test_rephrase_asks_for_the_same_fact_in_other_words(dataset: str, split: str) -> None:
    key = {"ultraeditbench": "rephrase_prompt", "counterfact": "rephrase_prompt"}.get(dataset, "rephrase")
    for row in rows(dataset, split):
        assert row[key] != row[PROMPT[dataset]]
        assert asked()[row[key]] == asked()[row[PROMPT[dataset]]]


@both_splits_of_questions
def test_edits_state_what_another_subject_of_the_relation_has(dataset: str, split: str) -> None:
    for row in rows(dataset, split):
        fact, answer = asked()[row[PROMPT[dataset]]], row.get("ans", row.get("target_new"))
        assert answer not in fact.answers
        assert any(answer == other.truth for other in every_fact() if other.relation == fact.relation)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_fever_turns_the_verdict_of_the_edit_and_keeps_the_others(split: str) -> None:
    truth = {claim(c, f.subject, f.truth): f for f in every_fact() for c in f.relation.clozes}
    for row in rows("fever", split):
        assert row["alt"] == ("no" if row["prompt"] in truth else "yes")
        assert row["unrel_ans"] == ("yes" if row["unrel_prompt"] in truth else "no")
        claims = [row["prompt"], *row["equiv_prompt"]]
        assert len(set(claims)) == len(claims) >= 3
        assert len({text in truth for text in claims}) == 1
    verdicts = [(row["alt"], row["unrel_ans"]) for row in rows("fever", split)]
    assert all(verdicts.count((a, u)) > len(verdicts) / 8 for a in ("yes", "no") for u in ("yes", "no"))


def runs_of_three(relations: Iterable[Relation]) -> set[tuple[str, ...]]:
    """Every three words that stand in a row in a question or cloze, the subject between them aside."""
    templates = (template for relation in relations for template in relation.questions + relation.clozes)
    parts = (re.findall(r"[a-z']+", part) for template in templates for part in template.lower().split("{}"))
    return {run for words in parts for run in zip(words, words[1:], words[2:], strict=False)}


def test_common_knowledge_is_asked_for_in_words_no_edit_uses() -> None:
    assert not runs_of_three(COMMON) & runs_of_three(RELATIONS)


@both_splits
def test_locality_relation_is_never_an_edited_one(dataset: str, split: str) -> None:
    for edit in edits(dataset, split, SIZES[dataset][split == "eval"]):
        assert edit.fact.relation in RELATIONS
        assert edit.locality.relation in COMMON
        assert len(edit.locality.answers) == 1


def names(ask: str, fact: Fact) -> bool:
    return re.search(rf"\b{re.escape(fact.subject)}\b", ask, re.IGNORECASE) is not None


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("dataset", ["zsre", "wikibigedit", "ultraeditbench"])
def test_locality_questions_follow_a_true_example_of_their_kind(dataset: str, split: str) -> None:
    made = edits(dataset, split, SIZES[dataset][split == "eval"])
    for row, fact in zip(rows(dataset, split), (edit.locality for edit in made), strict=True):
        *answered, last = re.findall(r"(.*?\?)(?: (.*?)\. |$)", row["loc"] + "?" * (dataset == "zsre"))
        same = relation_facts(fact.relation)
        assert asked()[answered[0][0]].relation == fact.relation
        assert len(answered) == EXAMPLES
        for ask, answer in answered:
            assert any(names(ask, o) and answer == o.truth != fact.truth for o in same)
        assert names(last[0], fact)
        assert row["loc_ans"] == fact.truth


@pytest.mark.parametrize("split", ["train", "eval"])
def test_counterfact_probes_the_neighbourhood(split: str) -> None:
    for row in rows("counterfact", split):
        edited, near = asked()[row["prompt"]], asked()[row["locality_prompt"]]
        assert near.relation == edited.relation
        assert near.held_out
        assert near.answers == (row["locality_ground_truth"],) != (row["target_new"],)


def test_no_probe_of_old_knowledge_is_ever_edited() -> None:
    made = [edit for d, s in FILES for edit in edits(d, s, SIZES[d][s == "eval"])]
    assert not {edit.fact for edit in made} & {*held_out(), *facts_of(COMMON)}


def test_locality_prompts_are_many_and_spread_evenly() -> None:
    assert len({row["loc"] for row in rows("zsre", "eval")}) >= 900
    counts = Counter(edit.locality for edit in edits("zsre", "eval", SIZES["zsre"][1]))
    assert len(counts) >= 400
    assert max(counts.values()) - min(counts.values()) <= 1


def test_common_knowledge_of_train_and_eval_is_apart() -> None:
    train, held = ({row["loc"] for row in rows("zsre", split)} for split in ("train", "eval"))
    assert not train & held


@pytest.mark.parametrize("split", ["train", "eval"])
def test_second_hops_follow_the_edited_answer(split: str) -> None:
    hops = [row for row in rows("wikibigedit", split) if row["mhop"] is not None]
    assert 15 <= len(hops) < len(rows("wikibigedit", split)) / 2
    held_out = {(fact.name, fact.truth) for fact in every_fact() if fact.held_out}
    assert all((row["ans"], row["mhop_ans"]) in held_out for row in hops)
    assert all((row["mhop"] is None) == (row["mhop_ans"] is None) for row in rows("wikibigedit", split))


@pytest.mark.parametrize("split", ["train", "eval"])
def test_files_are_row_a_line_json(split: str) -> None:
    first, *lines, last = (FOLDER / f"zsre_{split}.json").read_text(encoding="utf-8").splitlines()
    assert (first, last) == ("[", "]")
    assert [json.loads(line.removesuffix(",")) for line in lines] == rows("zsre", split)


def test_element_numbers_run_without_a_gap() -> None:
    """A slipped line in the table would shift every later answer."""
    numbers = [int(fact.truth) for fact in every_fact() if fact.relation.name == "atomic_number"]
    assert numbers[0] == 1
    assert all(after - before == 1 for before, after in pairwise(numbers))


def test_tables_hold_no_stray_blanks_or_doubled_subjects() -> None:
    for fact in every_fact():
        assert all(answer and answer == answer.strip() for answer in (*fact.answers, fact.subject))
    keys = [(fact.relation.name, fact.subject) for fact in every_fact()]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("dataset", ["zsre", "counterfact"])
@pytest.mark.parametrize("split", ["train", "eval"])
def test_the_samples_say_what_their_facts_are_about(dataset: str, split: str) -> None:
    rows = json.loads((FOLDER / f"{dataset}_{split}.json").read_text(encoding="utf-8"))
    records = [DATASETS[dataset].to_record(row, index, 0) for index, row in enumerate(rows)]
    assert all(record.subject and record.subject in record.edit.prompt for record in records)
