"""The turns that networks are trained on: each fact once a pass, none that is held out, in an order of the seed's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from data.records import EditRecord, Question, TokenSequence, TrainingTurn
from data.training import TrainingStream

RECORDS = [EditRecord(i, Question(f"q{i}", "a"), rephrase=Question(f"r{i}", "a")) for i in range(23)]  # 7 full turns


def lengths(questions: Sequence[Question]) -> list[TokenSequence]:
    """Of one token a question, its number."""
    return [TokenSequence((int(question.prompt[1:]), 0), 1) for question in questions]


def stream(**changes: Any) -> TrainingStream:
    settings: dict[str, Any] = {
        "n_edits": 3, "batch_size": 2, "epochs": 2, "max_turns": None, "held_out": 2, "needs_locality": False,
        "seed": 5,
    }  # fmt: skip
    return TrainingStream(RECORDS, tokenize=lengths, **settings | changes)


def rows(turns: Sequence[TrainingTurn]) -> list[int]:
    return [record.index for turn in turns for record in turn.edits.records]


def passes(found: TrainingStream) -> list[list[int]]:
    turns, size = list(found.from_turn(0)), found.turns_per_epoch
    return [rows(turns[start : start + size]) for start in range(0, len(turns), size)]


def test_a_pass_has_each_trained_fact_once_and_none_that_is_held_out() -> None:
    found = stream()
    assert (len(found), found.turns_per_epoch) == (10, 5)
    assert rows(found.held_out()) == list(range(15, 21))  # the file's last full turns, in its order
    for one in passes(found):
        assert sorted(one) == list(range(15))


def test_each_pass_and_each_seed_has_an_order_of_its_own() -> None:
    (first, second), (other, _) = passes(stream()), passes(stream(seed=6))
    assert len({tuple(order) for order in (first, second, other, range(15))}) == 4
    assert rows(stream(seed=6).held_out()) == rows(stream().held_out())


def test_a_turn_is_a_function_of_its_number() -> None:
    turns = list(stream().from_turn(0))
    assert [stream().turn(index) for index in reversed(range(10))] == turns[::-1]
    assert list(stream().from_turn(7)) == turns[7:]
    assert [(turn.epoch, turn.index_in_epoch, turn.epoch_turns) for turn in turns[3:7]] == [
        (0, 3, 5), (0, 4, 5), (1, 0, 5), (1, 1, 5),
    ]  # fmt: skip
    for turn in turns:
        assert [sequence.ids[0] for sequence in turn.edits.sequences] == rows([turn])
        assert [sequence.ids[0] for sequence in turn.rephrases] == rows([turn])
    for outside in (-1, 10):
        with pytest.raises(IndexError):
            stream().turn(outside)


def test_max_turns_bounds_a_pass_and_other_passes_have_other_facts() -> None:
    found = stream(max_turns=2)
    assert len(found) == 4
    first, second = passes(found)
    assert len(first) == len(set(first)) == 6
    assert set(first) != set(second)
    assert set(first) | set(second) <= set(range(15))
