"""Answers that the model writes by itself, and whether they are what was asked for (DESIGN section 5, *_gen)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from data.progress import progress_bar
from data.records import EditRecord, Question
from data.stream import most_tokens, questions_of, tokenize
from model import LanguageModel

PromptForm = Literal["raw", "chat"]

SHORT = 3.0  # seconds of writing that need no bar
ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class Generation:
    """How the model is asked, and how much it may write.

    `form`: the prompt as it stands, with the tokenizer's special tokens, or as a user's message in the chat template of
    the tokenizer. `sample` records are asked, None = all that are scored. ValueError for a form the tokenizer lacks.
    """

    tokenizer: Any
    form: PromptForm
    max_new_tokens: int  # whatever the length of the answer
    sample: int | None

    def __post_init__(self) -> None:
        if self.form == "chat" and not self.tokenizer.chat_template:
            raise ValueError(
                "evaluation.prompt=chat: the model's tokenizer has no chat template; set evaluation.prompt=raw, "
                "or choose an instruction-tuned model"
            )

    def identity(self) -> list[Any]:
        """All that can change a text, beside model and tokenizer."""
        template = self.tokenizer.chat_template if self.form == "chat" else None
        return [self.form, template, self.max_new_tokens, self.sample]

    def texts(self, model: LanguageModel, questions: Sequence[Question]) -> list[str]:
        """What the model writes after each prompt, up to its own end or the budget."""
        tokens = len(questions) * self.max_new_tokens
        with progress_bar("writing answers", tokens, "tokens", delay=SHORT) as bar:
            written = model.generate(self.prompts(questions), self.max_new_tokens, bar.advance)
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in written]

    def prompts(self, questions: Sequence[Question]) -> list[list[int]]:
        """Token ids of the prompts alone: how an answer is cut into tokens has no part in them."""
        if self.form == "chat":
            return [self._chat(question.prompt) for question in questions]
        return [list(s.ids[: s.answer_start]) for s in tokenize(questions, self.tokenizer, "separate")]

    def _chat(self, prompt: str) -> list[int]:
        message = [{"role": "user", "content": prompt}]
        return list(
            self.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=False)
        )

    def check(self, records: Iterable[EditRecord], context_length: int, file: str) -> None:
        """ValueError, naming file and row, for the first prompt that the chat template makes longer than the context.

        Raw prompts are no longer than the questions, which `data.stream.check_context` has seen.
        """
        if self.form == "raw":
            return
        added = len(self._chat(""))
        for record in records:
            for protocol, question in questions_of(record).items():
                if most_tokens(question) + added <= context_length:
                    continue
                tokens = len(self._chat(question.prompt))
                if tokens > context_length:
                    raise ValueError(
                        f"file {file}, row {record.index}: the prompt of {protocol} is {tokens} tokens long in the "
                        f"chat template, the model's context is {context_length}; shorten or remove the row, or set "
                        "evaluation.prompt=raw"
                    )


def matches(text: str, answer: str) -> tuple[bool, bool]:
    """Whether a text is the answer, and whether it contains it as whole words.

    Both normalised as is usual for question answering (Rajpurkar et al. 2016): lower case, no punctuation, no articles,
    single spaces. An answer of nothing but these keeps them.
    """
    normalise = normal if normal(answer) else spaced
    text, answer = normalise(text), normalise(answer)
    return text == answer, f" {answer} " in f" {text} "


def normal(text: str) -> str:
    """Lower case, without punctuation and English articles, single spaces."""
    kept = "".join(c for c in spaced(text) if not unicodedata.category(c).startswith("P"))
    return " ".join(ARTICLES.sub(" ", kept).split())


def spaced(text: str) -> str:
    """Lower case, compatibility forms of characters made one, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
