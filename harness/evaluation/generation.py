"""Answers that the model writes by itself, and whether they are what was asked for (DESIGN section 5, *_gen)."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data.progress import progress_bar
from data.prompts import PromptForm
from data.records import EditRecord
from data.stream import most_tokens, prompt_ids, questions_of
from model import LanguageModel

ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class Generation:
    """How the model is asked, and how much it may write; `sample` records are asked, None = all that are scored."""

    tokenizer: Any
    form: PromptForm
    max_new_tokens: int  # whatever the length of the answer
    sample: int | None

    def identity(self) -> list[Any]:
        """All that can change a text, beside model and tokenizer."""
        return [asdict(self.form), self.max_new_tokens, self.sample]

    def texts(self, model: LanguageModel, questions: Sequence[str]) -> list[str]:
        """What the model writes after each prompt, up to its own end or the budget."""
        prompts = prompt_ids(questions, self.tokenizer, self.form)
        tokens = len(prompts) * self.max_new_tokens
        with progress_bar("writing answers", tokens, "tokens", quiet=True) as bar:
            written = model.generate(prompts, self.max_new_tokens, bar.advance)
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in written]

    def check(self, records: Iterable[EditRecord], context_length: int, file: str) -> None:
        """ValueError, naming file and row, for the first prompt that its form makes longer than the context.

        Raw prompts are no longer than the questions, which `data.stream.check_context` has seen.
        """
        added = self.form.most_added
        for record in records if added else ():
            for protocol, question in questions_of(record).items():
                if most_tokens(question) + added <= context_length:
                    continue
                tokens = len(prompt_ids([question.prompt], self.tokenizer, self.form)[0])
                if tokens > context_length:
                    raise ValueError(
                        f"file {file}, row {record.index}: the prompt of {protocol} is {tokens} tokens long in the "
                        f"form it is asked in, the model's context is {context_length}; shorten or remove the row, or "
                        "set evaluation.prompt=raw"
                    )


def matches(text: str, answer: str) -> tuple[bool, bool]:
    """Whether a text is the answer, and whether it contains it as whole words, both normalised as SQuAD does.

    (Rajpurkar et al. 2016.) An answer of nothing but punctuation and articles keeps them.
    """
    normalise = normal if normal(answer) else spaced
    text, answer = normalise(text), normalise(answer)
    return text == answer, f" {answer} " in f" {text} "


def normal(text: str) -> str:
    """Lower case, without punctuation and English articles, single spaces.

    Punctuation is what SQuAD's script takes for it, signs such as $ and + included, and that of other scripts.
    """
    kept = "".join(c for c in spaced(text) if not (c in string.punctuation or unicodedata.category(c).startswith("P")))
    return " ".join(ARTICLES.sub(" ", kept).split())


def spaced(text: str) -> str:
    """Lower case, compatibility forms of characters made one, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
