"""Text that second moments are taken over: what its hash knows, its windows, and how files are read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from data.corpus import Questions
from data.prompts import PromptForm
from data.records import Question
from tests.data.test_stream import byte_level

ASKED = [Question("the capital of Italy is", "Rome"), Question("2 and 2 are", "4")]
CHAT = PromptForm("<user>", "</user>", "\n", brings_special_tokens=True, end=0)


def questions(form: PromptForm = CHAT, answer_tokens: Any = "joint", asked: list[Question] = ASKED) -> Questions:
    return Questions(lambda: asked, form, answer_tokens, "corpus.questions", "bring more")


def token_ids(corpus: Questions) -> list[tuple[int, ...]]:
    return [window.ids for window in corpus.windows(byte_level(), 8, 1000)]


@pytest.mark.parametrize(
    "other",
    [
        questions(replace(CHAT, before="<User>")),  # another chat template under the same name
        questions(replace(CHAT, after="")),
        questions(replace(CHAT, gap=" ")),
        questions(replace(CHAT, brings_special_tokens=False)),
        questions(asked=ASKED[:1]),
    ],
)
def test_questions_that_make_other_tokens_have_another_hash(other: Questions) -> None:
    assert token_ids(other) != token_ids(questions())
    assert other.sha256 != questions().sha256


def test_answer_tokens_are_in_the_hash() -> None:
    joint, separate = (questions(PromptForm(gap=""), how, [Question("i", "n")]) for how in ("joint", "separate"))
    assert token_ids(joint) != token_ids(separate)
    assert joint.sha256 != separate.sha256


def test_ends_are_left_out_of_tokens_and_hash() -> None:
    other = questions(replace(CHAT, end=None))
    assert token_ids(other) == token_ids(questions())
    assert other.sha256 == questions().sha256
