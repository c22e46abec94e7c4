"""How a question is put to the model, and where its answer begins and ends."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from data.prompts import FormName, PromptForm, prompt_form
from data.records import EditRecord, Question
from data.stream import AnswerTokens, check_context, prompt_ids, tokenize
from tests.evaluation.test_evaluate_generation import TEMPLATE

QUESTION = Question("Who wrote Emma?", "Jane Austen")


@pytest.fixture
def tokenizer(byte_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer.backend_tokenizer, eos_token="<eos>", chat_template=TEMPLATE
    )


@pytest.mark.parametrize("cut", ["joint", "separate"])
@pytest.mark.parametrize(
    ("name", "prompt", "answer"),
    [
        ("raw", "Who wrote Emma?", " Jane Austen"),
        ("qa", "Q: Who wrote Emma?\nA:", " Jane Austen"),
        ("chat", "<user>Who wrote Emma?<a>", " Jane Austen"),  # a template that knows no answers
    ],
)
def test_the_answer_is_the_tail_in_every_form(
    tokenizer: PreTrainedTokenizerFast, name: FormName, cut: AnswerTokens, prompt: str, answer: str
) -> None:
    form = prompt_form(tokenizer, name, ends=[tokenizer.eos_token_id])
    (sequence,) = tokenize([QUESTION], tokenizer, cut, form)
    assert sequence.end_tokens == 1
    assert sequence.ids[-1] == tokenizer.eos_token_id
    said = sequence.without_end()
    assert tokenizer.decode(said.ids) == prompt + answer
    assert tokenizer.decode(said.ids[said.answer_start :]).strip() == "Jane Austen"
    assert said.end_tokens == 0
    # a model that answers by itself begins where the answer does; a space before it may be the prompt's (`joint`)
    asked = prompt_ids([QUESTION.prompt], tokenizer, form)[0]
    assert list(said.ids[: len(asked)]) == asked
    assert said.answer_start - len(asked) in (0, 1)


def test_without_an_end_a_sequence_is_what_it_was(tokenizer: PreTrainedTokenizerFast) -> None:
    (sequence,) = tokenize([QUESTION], tokenizer, "joint")
    assert tokenizer.decode(sequence.ids) == "Who wrote Emma? Jane Austen"
    assert sequence.end_tokens == 0


@pytest.mark.parametrize("cut", ["joint", "separate"])
def test_no_space_follows_a_template_that_ends_a_line(tokenizer: PreTrainedTokenizerFast, cut: AnswerTokens) -> None:
    form = PromptForm("<user>", "<a>\n", "", brings_special_tokens=True)
    (sequence,) = tokenize([QUESTION], tokenizer, cut, form)
    assert tokenizer.decode(sequence.ids) == "<user>Who wrote Emma?<a>\nJane Austen"
    assert tokenizer.decode(sequence.ids[sequence.answer_start :]) == "Jane Austen"


@pytest.mark.parametrize("template", ["nothing", "{{ messages[0].content }}{{ messages[0].content }}"])
def test_a_template_that_holds_no_question_is_refused(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=r"^dataset.prompt_form=chat: .* set dataset.prompt_form=qa"):
        prompt_form(tokenizer, "chat", option="dataset.prompt_form")


def test_the_context_holds_form_and_end_too(tokenizer: PreTrainedTokenizerFast) -> None:
    form = prompt_form(tokenizer, "qa", ends=[tokenizer.eos_token_id])
    length = len(tokenize([QUESTION], tokenizer, "joint", form)[0].ids)
    record = EditRecord(7, QUESTION)
    check_context([record], tokenizer, length, answer_tokens="joint", file="f.json", form=form)
    with pytest.raises(ValueError, match=f"row 7: edit is {length} tokens long"):
        check_context([record], tokenizer, length - 1, answer_tokens="joint", file="f.json", form=form)
    check_context([record], tokenizer, length - 7, answer_tokens="joint", file="f.json")


ANSWERED = (
    "{% for m in messages %}[{{ m.role }}]{{ GAP if m.role == 'assistant' }}{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize(("gap", "found"), [("''", ""), ("' '", " "), ("'\\n\\n'", "\n\n"), ("'<think></think>'", " ")])
def test_space_and_end_of_an_answer_are_the_templates(tokenizer: PreTrainedTokenizerFast, gap: str, found: str) -> None:
    """A train of thought is not space, and the template's own end comes before the tokenizer's."""
    tokenizer.chat_template = ANSWERED.replace("GAP", gap)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    end = tokenizer.convert_tokens_to_ids("<end>")
    form = prompt_form(tokenizer, "chat", [tokenizer.eos_token_id, end])
    assert form == PromptForm("[user]", "<end>[assistant]", found, brings_special_tokens=True, end=end)
    assert prompt_form(tokenizer, "qa", [end, tokenizer.eos_token_id]).end == tokenizer.eos_token_id
    (sequence,) = tokenize([QUESTION], tokenizer, "joint", form)
    assert tokenizer.decode(sequence.ids) == f"[user]Who wrote Emma?<end>[assistant]{found}Jane Austen<end>"
