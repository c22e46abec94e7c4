"""Facts that repeat or contradict each other, against a count by dictionaries."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from data.records import EditRecord, Question
from data.repeats import SHOWN, find_repeats

facts = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("xyz")), max_size=20)


def records(said: list[tuple[str, str]]) -> list[EditRecord]:
    return [EditRecord(i, Question(prompt, answer)) for i, (prompt, answer) in enumerate(said)]


@given(said=facts, data=st.data())
def test_counts_and_rows_are_those_of_the_facts(said: list[tuple[str, str]], data: st.DataObject) -> None:
    found = find_repeats(data.draw(st.permutations(records(said))))
    answers: defaultdict[str, set[str]] = defaultdict(set)
    for prompt, answer in said:
        answers[prompt].add(answer)
    distinct = sum(map(len, answers.values()))
    assert (found.repeats, found.contradictions) == (len(said) - distinct, distinct - len(answers))
    assert len(found.repeated) == min(SHOWN, found.repeats)
    assert len(found.contradicting) == min(SHOWN, found.contradictions)
    prompts = [prompt for prompt, _ in said]
    repeated = [(said.index(fact), row) for row, fact in enumerate(said) if said.index(fact) < row]
    contradicting = [
        (prompts.index(prompts[row]), row)
        for row, fact in enumerate(said)
        if said.index(fact) == row != prompts.index(prompts[row])
    ]
    assert found.repeated == tuple(repeated[:SHOWN])
    assert found.contradicting == tuple(contradicting[:SHOWN])


def test_case_and_spaces_make_no_other_fact() -> None:
    found = find_repeats(records([("Where is  Ö?", "Here"), ("where is ö?", " here"), ("where is o?", "here")]))
    assert (found.repeats, found.contradictions, found.repeated) == (1, 0, ((0, 1),))


def test_what_is_said_of_them() -> None:
    said = [("a", "x"), ("b", "x"), ("a", "y"), *[("b", "x")] * 4]
    words = "4 repeat another one (rows 1 and 3, 1 and 4, 1 and 5, ...)"
    more = " and 1 contradict another one, by another answer to the same prompt (rows 0 and 2)"
    assert str(find_repeats(records(said))) == words + more
    assert str(find_repeats(records(said[3:]))) == words.replace("4 repeat", "3 repeat").replace(
        "1 and 3, 1 and 4, 1 and 5, ...", "0 and 1, 0 and 2, 0 and 3"
    )


@given(said=facts, known=facts)
def test_facts_that_training_asks_too(said: list[tuple[str, str]], known: list[tuple[str, str]]) -> None:
    """By their prompts, whatever the answers; the last of the rows that ask it is named."""
    found = find_repeats(records(said), records(known))
    row_of = {prompt: row for row, (prompt, _) in enumerate(known)}
    asked = [(row_of[prompt], row) for row, (prompt, _) in enumerate(said) if prompt in row_of]
    assert (found.trained_on, found.trained) == (len(asked), tuple(asked[:SHOWN]))
    alone = find_repeats(records(said))
    assert str(found) == str(alone)
    assert alone.trained_on == 0
