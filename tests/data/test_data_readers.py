"""Raw rows of each data set -> records."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import DATASETS, prepare
from data.dataset import Dataset
from data.records import EditRecord, Question

ZSRE = {"src": "In what city is A?", "rephrase": "A is where?", "ans": "B", "loc": "who wrote C", "loc_ans": "D"}
FEVER = {"prompt": "A is B.", "equiv_prompt": ["A equals B.", "B is A."], "alt": "yes"} | {
    "unrel_prompt": "C is D.",
    "unrel_ans": "no",
}
WIKIBIGEDIT = {"update": "Where is A?", "rephrase": "A is where?", "ans": "B", "personas": "Say, where is A?"} | {
    "loc": "Who wrote C?",
    "loc_ans": "D",
    "mhop": "Which river runs by A?",
    "mhop_ans": "E",
}
ULTRA = {"prompt": "Where is A?", "rephrase_prompt": "A is where?", "ans": "B", "loc": "Who wrote C?", "loc_ans": "D"}
EASY_EDIT = {"prompt": "A lies in", "target_new": "B", "ground_truth": "X", "rephrase_prompt": "One finds A in"} | {
    "locality_prompt": "C was written by",
    "locality_ground_truth": "D",
}
ROME = {
    "case_id": 3,
    "requested_rewrite": {
        "prompt": "{} lies in",
        "relation_id": "P17",
        "target_new": {"str": "B", "id": "Q1"},
        "target_true": {"str": "D", "id": "Q2"},
        "subject": "A",
    },
    "paraphrase_prompts": [f"Paraphrase {i}: A lies in" for i in range(5)],
    "neighborhood_prompts": [f"Neighbour {i} lies in" for i in range(9)],
}
OWN_NAMES = {
    "prompt": "q",
    "answer": "a",
    "rephrase": "q2",
    "locality": "other",
    "locality_answer": "other_a",
    "persona": "who",
    "multi_hop": "hop",
    "multi_hop_answer": "hop_a",
}
OWN = {"q": "Where is A?", "a": "B", "q2": "A is where?", "other": "Who wrote C?", "other_a": "D"} | {
    "who": "Say, where is A?",
    "hop": "Which river runs by A?",
    "hop_a": "E",
}
CASES: dict[str, tuple[Dataset, dict[str, Any]]] = {
    "zsre": (DATASETS["zsre"], ZSRE),
    "fever": (DATASETS["fever"], FEVER),
    "wikibigedit": (DATASETS["wikibigedit"], WIKIBIGEDIT),
    "ultraeditbench": (DATASETS["ultraeditbench"], ULTRA),
    "counterfact, EasyEdit": (DATASETS["counterfact"], EASY_EDIT),
    "counterfact, zsRE": (DATASETS["counterfact"], ZSRE),
    "counterfact, ROME": (DATASETS["counterfact"], ROME),
    "jsonl": (DATASETS["jsonl"].with_fields(OWN_NAMES), OWN),
}


def read(case: str, seed: int = 0, index: int = 0, **changes: Any) -> EditRecord:
    dataset, row = CASES[case]
    return dataset.to_record({**row, **changes}, index, seed)


def without(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}


class TestFields:
    def test_zsre_locality_gets_its_question_mark(self) -> None:
        expected = EditRecord(
            4,
            Question("In what city is A?", "B"),
            rephrase=Question("A is where?", "B"),
            locality=Question("who wrote C?", "D"),
        )
        assert read("zsre", index=4) == expected
        assert read("zsre", index=4, loc="who wrote C? ") == expected

    def test_fever(self) -> None:
        """The verdict to write is `alt`, `unrel_ans` that of another claim."""
        record = read("fever", index=2)
        chosen = record.rephrase
        assert chosen is not None
        assert chosen.prompt in FEVER["equiv_prompt"]
        assert record == EditRecord(
            2,
            Question(FEVER["prompt"], FEVER["alt"]),
            rephrase=Question(chosen.prompt, FEVER["alt"]),
            locality=Question(FEVER["unrel_prompt"], FEVER["unrel_ans"]),
        )
        assert FEVER["alt"] != FEVER["unrel_ans"]

    def test_wikibigedit(self) -> None:
        assert read("wikibigedit") == EditRecord(
            0,
            Question("Where is A?", "B"),
            rephrase=Question("A is where?", "B"),
            locality=Question("Who wrote C?", "D"),
            persona=Question("Say, where is A?", "B"),
            multi_hop=Question("Which river runs by A?", "E"),
        )

    @pytest.mark.parametrize(
        ("case", "field", "probe"),
        [
            ("wikibigedit", "mhop", "multi_hop"),
            ("wikibigedit", "personas", "persona"),
            ("wikibigedit", "loc", "locality"),
            ("wikibigedit", "rephrase", "rephrase"),
            ("zsre", "loc", "locality"),
            ("zsre", "rephrase", "rephrase"),
            ("fever", "unrel_prompt", "locality"),
            ("fever", "equiv_prompt", "rephrase"),
            ("counterfact, ROME", "neighborhood_prompts", "locality"),
            ("ultraeditbench", "rephrase_prompt", "rephrase"),
            ("ultraeditbench", "loc", "locality"),
            ("counterfact, EasyEdit", "rephrase_prompt", "rephrase"),
            ("counterfact, EasyEdit", "locality_prompt", "locality"),
            ("counterfact, zsRE", "rephrase", "rephrase"),
            ("counterfact, zsRE", "loc", "locality"),
        ],
    )
    def test_a_null_probe_of_published_rows_is_left_out(self, case: str, field: str, probe: str) -> None:
        record, whole = read(case, **{field: None}), read(case)
        assert getattr(whole, probe) is not None
        assert record == replace(whole, **{probe: None})

    def test_a_row_of_romes_without_paraphrases_has_its_other_probes(self) -> None:
        record = read("counterfact, ROME", paraphrase_prompts=None)
        assert record.rephrase is None
        assert record.locality is not None

    def test_a_training_row_of_wikibigedit_needs_no_multi_hop_field(self) -> None:
        row = without(without(WIKIBIGEDIT, "mhop"), "mhop_ans")
        assert DATASETS["wikibigedit"].to_record(row, 0, 0).multi_hop is None

    def test_ultraeditbench(self) -> None:
        assert read("ultraeditbench") == EditRecord(
            0, Question("Where is A?", "B"), Question("A is where?", "B"), Question("Who wrote C?", "D")
        )

    def test_counterfact_forms(self) -> None:
        assert read("counterfact, EasyEdit") == EditRecord(
            0, Question("A lies in", "B"), Question("One finds A in", "B"), Question("C was written by", "D")
        )
        assert read("counterfact, zsRE", loc="C was written by").locality == Question("C was written by", "D")
        record = read("counterfact, ROME")
        assert record.edit == Question("A lies in", "B")
        assert record.rephrase in [Question(p, "B") for p in ROME["paraphrase_prompts"]]  # type: ignore[attr-defined]
        assert record.locality in [Question(p, "D") for p in ROME["neighborhood_prompts"]]  # type: ignore[attr-defined]

    def test_whitespace_around_an_answer_goes_and_a_prompts_stays(self) -> None:
        record = read("ultraeditbench", ans=" B\n", prompt="Where is A?\n")
        assert record.edit == Question("Where is A?\n", "B")


class TestSubjects:
    @pytest.mark.parametrize("case", ["zsre", "counterfact, EasyEdit", "counterfact, zsRE"])
    def test_what_a_fact_is_about_where_the_row_says(self, case: str) -> None:
        assert read(case, subject=" A ").subject == "A"
        assert read(case, subject=None).subject is None
        assert read(case).subject is None
        with pytest.raises(ValueError, match=r"field 'subject' is a number \(3\), not text"):
            read(case, subject=3)

    def test_romes_form_always_says(self) -> None:
        record = read("counterfact, ROME")
        assert record.subject == "A"
        assert record.subject in record.edit.prompt

    def test_own_files_name_the_field(self) -> None:
        own = DATASETS["jsonl"].with_fields({"prompt": "q", "answer": "a", "subject": "s"})
        row = {"q": "Where is A?", "a": "B", "s": "A"}
        assert own.fields == ("q", "a", "s")
        assert own.to_record(row, 0, 0).subject == "A"
        assert own.to_record({**row, "s": None}, 0, 0).subject is None
        with pytest.raises(ValueError, match="field 's', 'C', does not occur in field 'q', 'Where is A"):
            own.to_record({**row, "s": "C"}, 0, 0)
        with pytest.raises(ValueError, match="no field 's'"):
            own.to_record(without(row, "s"), 0, 0)


class TestChoice:
    @pytest.mark.parametrize("case", ["fever", "counterfact, ROME"])
    def test_follows_seed_and_row_alone(self, case: str) -> None:
        chosen = [read(case, seed=1, index=i).rephrase for i in range(40)]
        random.seed(5)
        assert [read(case, seed=1, index=i).rephrase for i in reversed(range(40))] == chosen[::-1]
        assert [read(case, seed=2, index=i).rephrase for i in range(40)] != chosen
        assert len(set(chosen)) == len(CASES[case][1].get("equiv_prompt", range(5)))


class TestOwnFile:
    def test_every_role(self) -> None:
        assert read("jsonl") == DATASETS["wikibigedit"].to_record(WIKIBIGEDIT, 0, 0)

    def test_prompt_and_answer_are_enough(self) -> None:
        plain = DATASETS["jsonl"].with_fields({"prompt": "q", "answer": "a"})
        assert plain.to_record({"q": "Where is A?", "a": "B"}, 2, 0) == EditRecord(2, Question("Where is A?", "B"))
        assert plain.fields == ("q", "a")

    @pytest.mark.parametrize("role", ["rephrase", "locality", "persona", "multi_hop"])
    def test_a_null_probe_is_left_out(self, role: str) -> None:
        assert getattr(read("jsonl", **{OWN_NAMES[role]: None}), role) is None

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (None, "dataset.fields.prompt=null: set it"),
            ({"prompt": "q"}, "dataset.fields.answer=null: set it"),
            (
                {"prompt": "q", "answer": "a", "locality": "l"},
                "locality and .locality_answer go together",
            ),
            (
                {"prompt": "q", "answer": "a", "topic": "t"},
                "topic: no such entry; set one of prompt",
            ),
        ],
    )
    def test_incomplete_names(self, names: dict[str, str] | None, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            DATASETS["jsonl"].with_fields(names)

    def test_other_data_sets_have_their_own_names(self) -> None:
        assert DATASETS["zsre"].with_fields(None) is DATASETS["zsre"]
        with pytest.raises(ValueError, match=r"dataset.fields has no effect with dataset=zsre"):
            DATASETS["zsre"].with_fields({"prompt": "q"})


def field_cases() -> list[tuple[str, str]]:
    optional = {"ground_truth", "case_id", "mhop", "mhop_ans", "attribute"}
    return [(case, name) for case, (_, row) in CASES.items() for name in row if name not in optional]


class TestMistakes:
    @pytest.mark.parametrize(("case", "name"), field_cases())
    def test_a_row_without_a_field(self, case: str, name: str) -> None:
        dataset, row = CASES[case]
        with pytest.raises(ValueError, match=rf"no field '{name}'|none of the fields .*{name}") as error:
            dataset.to_record(without(row, name), 0, 0)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(("case", "name"), field_cases())
    @pytest.mark.parametrize("value", [1998, 2.5, True, {"a": 1}, "", " \n", []])
    def test_a_field_that_is_not_text(self, case: str, name: str, value: object) -> None:
        with pytest.raises(ValueError, match=rf"field '{name}(\[0\])?' is |no field") as error:
            read(case, **{name: value})
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("case", "changes", "message"),
        [
            ("zsre", {"ans": 1998}, r"field 'ans' is a number \(1998\), not text; write it in quotation marks"),
            ("zsre", {"ans": None}, "field 'ans' is null"),
            ("fever", {"equiv_prompt": "A equals B."}, r"field 'equiv_prompt' is a text .*, not a list of texts"),
            ("fever", {"equiv_prompt": ["A equals B.", ""]}, r"field 'equiv_prompt\[1\]' is empty"),
            ("wikibigedit", {"mhop_ans": None}, "field 'mhop_ans' is null"),
            ("wikibigedit", {"mhop": ""}, "field 'mhop' is empty; null in its place leaves this question out"),
            ("zsre", {"ans": ["B"]}, r"field 'ans' is a list \(\['B'\]\), not text; give one text"),
            (
                "counterfact, ROME",
                {"requested_rewrite": {"prompt": "It is in", "subject": "A"}},
                r"'It is in' has no \{\}",
            ),
        ],
    )
    def test_messages(self, case: str, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            read(case, **changes)


@pytest.mark.parametrize("case", sorted(CASES))
def test_a_reader_needs_no_field_it_does_not_name(case: str) -> None:
    dataset, row = CASES[case]
    kept = {name: row[name] for name in dataset.fields if name in row}
    assert dataset.to_record(kept, 7, 3) == dataset.to_record(row, 7, 3)


@given(
    row=st.dictionaries(
        st.sampled_from(sorted({*ZSRE, *FEVER, *WIKIBIGEDIT, *ULTRA, *EASY_EDIT, *ROME})),
        st.none() | st.text(max_size=3) | st.integers() | st.lists(st.text(max_size=3), max_size=2) | st.just({}),
    )
)
def test_any_row_is_a_record_or_a_one_line_mistake(row: dict[str, Any]) -> None:
    readers: list[Callable[..., EditRecord]] = [dataset.to_record for dataset, _ in CASES.values()]
    for to_record in readers:
        try:
            record = to_record(row, 0, 0)
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert record.edit.prompt.strip()
            assert record.edit.answer == record.edit.answer.strip() != ""


def test_data_sets_go_by_their_names_and_prepare_fetches_what_they_read() -> None:
    assert {name: dataset.name for name, dataset in DATASETS.items()} == {name: name for name in DATASETS}
    fetched = {file.path for file in prepare.FILES}
    for dataset in DATASETS.values():
        wanted = {name for names in dataset.raw_files.values() for name in names}
        assert not dataset.fetchable or wanted <= fetched
        assert dataset.fetchable == (dataset.name in {file.dataset for file in prepare.FILES})
