"""Generated answers: which prompts the model reads, what it writes, and when that counts as the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from data.prompts import RAW, FormName, PromptForm, prompt_form
from data.records import EditRecord, Question, TokenSequence
from data.stream import prompt_ids, tokenize
from harness.evaluation.evaluate import RecordScore, score_records, summarize
from harness.evaluation.generation import Generation, matches
from model import LanguageModel
from tests.conftest import tiny_llama
from tests.hand_made import StandIn

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
QUESTIONS = [Question("What is the colour of snow?", "white"), Question("Où?", "ici"), Question("a", "b")]


@pytest.mark.parametrize(
    ("text", "answer", "exact", "contains"),
    [
        (" Paris", "Paris", True, True),
        (" paris.\n", "Paris", True, True),
        (" The United  States", "United States", True, True),
        (" Paris, the capital of France", "Paris", False, True),
        (" It is in Paris.", "Paris", False, True),
        (" Parisian", "Paris", False, False),
        (" north", "no", False, False),
        ("", "Paris", False, False),
        (" U.S.", "US", True, True),
        (" 1,000 men", "1000", False, True),
        (" “Ärger”", "ärger", True, True),
        (" $5 million", "5 million", True, True),
        (" 12", "1", False, False),
        (" a", "A", True, True),  # an answer of nothing but an article is one all the same
        (" b", "A", False, False),
        (" ?", "?", True, True),
        (" +", "+", True, True),
        (" Paris", "?", False, False),
        (" new york city", "New York", False, True),
        (" york new", "New York", False, False),
    ],
)
def test_what_counts(text: str, answer: str, exact: bool, contains: bool) -> None:
    assert matches(text, answer) == (exact, contains)


def test_a_raw_prompt_is_the_prompt_and_nothing_of_the_answer(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = prompt_ids([question.prompt for question in QUESTIONS], byte_tokenizer, RAW)
    assert prompts == [byte_tokenizer(question.prompt)["input_ids"] for question in QUESTIONS]


def test_a_chat_prompt_is_what_the_template_makes_of_it(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"^evaluation.prompt=chat: .*no chat template; set evaluation.prompt=raw"):
        prompt_form(byte_tokenizer, "chat", option="evaluation.prompt")
    tokenizer = with_template(byte_tokenizer)
    form = prompt_form(tokenizer, "chat")
    for question in QUESTIONS:
        message = [{"role": "user", "content": question.prompt}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        assert prompt_ids([question.prompt], tokenizer, form) == [ids]
        assert tokenizer.decode(ids) == f"<user>{question.prompt}<a>"
    asked = Generation(tokenizer, form, 5, None)
    records = [EditRecord(3, QUESTIONS[2]), EditRecord(4, QUESTIONS[2], locality=QUESTIONS[0])]
    asked.check(records, 36, "facts.json")
    with pytest.raises(ValueError, match=r"file facts.json, row 4: the prompt of locality is 36 tokens .* is 35;"):
        asked.check(records, 35, "facts.json")


def with_template(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template=TEMPLATE)


@pytest.mark.parametrize("name", ["raw", "chat", "qa"])
def test_texts_are_what_transformers_generates_one_at_a_time(
    name: FormName, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Special tokens among the ids are left out of the text, as decoding does."""
    tokenizer, plain = with_template(byte_tokenizer), tiny_llama(3)
    asked = Generation(tokenizer, prompt_form(tokenizer, name), 9, None)
    questions = [question.prompt for question in QUESTIONS]
    expected = []
    for prompt in prompt_ids(questions, tokenizer, asked.form):
        ids = torch.tensor([prompt])
        out = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
        expected.append(tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True))
    assert asked.texts(LanguageModel(plain, tokenizer, {}), questions) == expected
    assert len(set(expected)) == 3


class Parrot(StandIn):
    """A model that is never right under teacher forcing, and writes what it was told to write after each prompt."""

    def __init__(self, said: dict[str, str], tokenizer: Any) -> None:
        self.said, self.tokenizer = said, tokenizer
        self.asked: list[str] = []

    def answer_logits(self, batch: Any) -> torch.Tensor:
        return torch.nn.functional.one_hot((batch.targets + 1) % 260, 260).float()

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, _watch: Any) -> list[list[int]]:
        texts = [self.tokenizer.decode(prompt) for prompt in prompts]
        self.asked += texts
        return [self.tokenizer(self.said[text])["input_ids"][:max_new_tokens] for text in texts]


def test_every_probe_of_the_chosen_records_is_generated_and_kept(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    said = {"E?": " yes", "R?": "Yes, it is", "L?": "blue and green", "P?": "no", "M?": "nothing"}
    model: Any = Parrot(said, byte_tokenizer)
    whole = EditRecord(
        7,
        Question("E?", "yes"),
        Question("R?", "yes"),
        Question("L?", "green"),
        Question("P?", "yes"),
        Question("M?", "2"),
    )
    records = [(0, whole), (1, EditRecord(8, Question("E?", "yes")))]
    asked = Generation(byte_tokenizer, RAW, 20, None)
    scores = list(
        score_records(
            model, records, lambda q: tokenize(q, byte_tokenizer, "joint"), generation=asked, generated=frozenset({0})
        )
    )
    assert [(s.protocol, s.text, s.exact, s.contains) for s in scores] == [
        ("ES", " yes", True, True),
        ("GS", "Yes, it is", False, True),
        ("LS", "blue and green", False, True),
        ("PS", "no", False, False),
        ("MS", "nothing", False, False),
        ("ES", None, None, None),
    ]
    assert all(score.correct == 0 for score in scores)
    summary: Any = summarize(scores, 10, 0)
    assert {name: score["mean"] for name, score in summary.items() if "_gen" in name or "_contains" in name} == {
        "ES_gen": 1, "GS_gen": 0, "LS_gen": 0, "PS_gen": 0, "MS_gen": 0,
        "ES_contains": 1, "GS_contains": 1, "LS_contains": 1, "PS_contains": 0, "MS_contains": 0,
    }  # fmt: skip
    assert summary["ES_gen"]["n"] == 1
    assert summary["ES"]["n"] == 2
    assert scores[0].line()["text"] == " yes"
    assert set(scores[-1].line()) == {"place", "index", "protocol", "correct", "tokens"}
    assert RecordScore(**scores[1].line()) == scores[1]


def test_the_budget_does_not_follow_the_answer(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    model: Any = Parrot({"E?": " a long answer"}, byte_tokenizer)
    records = [(0, EditRecord(0, Question("E?", "a")))]
    cut = lambda questions: tokenize(questions, byte_tokenizer, "joint")  # noqa: E731
    for budget, text in ((4, " a l"), (40, " a long answer")):
        asked = Generation(byte_tokenizer, RAW, budget, None)
        (score,) = score_records(model, records, cut, generation=asked, generated=range(1))
        assert score.text == text


def test_an_end_is_scored_by_itself(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    """Teacher-forced scores are those without the end; `_end` asks for it too, and localities were taught none."""
    plain = LanguageModel(tiny_llama(3), byte_tokenizer, {})
    questions = [Question(f"q{i}", chr(97 + i)) for i in range(26)]
    records = [(i, EditRecord(i, question, locality=question)) for i, question in enumerate(questions)]

    def scores(end: int | None) -> list[RecordScore]:
        form = PromptForm(end=end)
        return list(score_records(plain, records, lambda q: tokenize(q, byte_tokenizer, "joint", form)))

    without, ended = scores(None), scores(260 - 1)
    assert [(s.protocol, s.correct, s.tokens) for s in ended] == [(s.protocol, s.correct, s.tokens) for s in without]
    assert all(score.ended is None for score in without)
    assert {score.protocol for score in ended if score.ended is not None} == {"ES"}
    assert "ES_end" in summarize(ended, 10, 0)
    assert not {"LS_end", "GS_end"} & summarize(ended, 10, 0).keys()
    for score, question in zip((s for s in ended if s.protocol == "ES"), questions, strict=True):
        (sequence,) = tokenize([question], byte_tokenizer, "joint")
        follows = int(plain.reference_logits([TokenSequence((*sequence.ids, 0), sequence.answer_start)])[-1].argmax())
        mine = scores_of_one(plain, byte_tokenizer, question, follows)
        assert mine.ended == (mine.correct == mine.tokens)
        assert score.ended == (score.correct == score.tokens and follows == 259)


def scores_of_one(
    model: LanguageModel, tokenizer: PreTrainedTokenizerFast, question: Question, end: int
) -> RecordScore:
    records = [(0, EditRecord(0, question))]
    (score,) = score_records(model, records, lambda q: tokenize(q, tokenizer, "joint", PromptForm(end=end)))
    return score
