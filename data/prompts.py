"""How a fact is put to the model: the text around its question, and what ends its answer (DESIGN section 4)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

FormName = Literal["raw", "chat", "qa"]

PLACE = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for the question while a chat template is read


class Tokenizer(Protocol):
    """What is asked of a Hugging Face tokenizer."""

    @property
    def is_fast(self) -> bool: ...

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def chat_template(self) -> Any: ...

    def __call__(self, text: list[str], **options: Any) -> Mapping[str, Any]: ...

    def num_special_tokens_to_add(self, pair: bool = False) -> int: ...

    def apply_chat_template(self, conversation: Sequence[Mapping[str, str]], **options: Any) -> Any: ...


@dataclass(frozen=True)
class PromptForm:
    """`before` + question + `after`, then `gap` and the answer, then the token `end`.

    `brings_special_tokens`: the text holds the special tokens it needs, as a chat template's does; otherwise the
    tokenizer adds its own.
    """

    before: str = ""
    after: str = ""
    gap: str = " "  # left out where the text before it ends in whitespace
    brings_special_tokens: bool = False
    end: int | None = None  # None: answers have no end

    def text(self, question: str) -> str:
        """What comes before the gap."""
        return f"{self.before}{question}{self.after}"

    @property
    def most_added(self) -> int:
        """An upper bound on the tokens that the form adds to a question: a token stands for at least one byte."""
        return len((self.before + self.after).encode()) + (self.end is not None)


RAW = PromptForm()
"""The question as it stands, and no end: as published."""


def prompt_form(tokenizer: Tokenizer, name: FormName, ends: Collection[int] = (), option: str = "") -> PromptForm:
    """The form of that name: `raw`, `chat` (the tokenizer's template, a user's message), `qa` ("Q: ...", "A:").

    With `ends`, the tokens at which the model ends a text, answers end with that of the template, or with the
    tokenizer's own, or with the first. ValueError, naming the `option` that asked for it, where the tokenizer has no
    chat template or its template does not hold the question as it is.
    """
    if name == "chat":
        return _chat_form(tokenizer, ends, option)
    own = [end for end in ends if end == tokenizer.eos_token_id]
    end = next(iter([*own, *ends]), None)
    return PromptForm("Q: ", "\nA:", end=end) if name == "qa" else PromptForm(end=end)


def _chat_form(tokenizer: Tokenizer, ends: Collection[int], option: str) -> PromptForm:
    if not tokenizer.chat_template:
        raise ValueError(
            f"{option}=chat: the model's tokenizer has no chat template; set {option}=raw or qa, or choose an "
            "instruction-tuned model"
        )
    asked = [{"role": "user", "content": PLACE}]
    text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    if text.count(PLACE) != 1:
        raise ValueError(f"{option}=chat: the model's chat template does not hold a question once; set {option}=qa")
    before, _, after = text.partition(PLACE)
    answered = [*asked, {"role": "assistant", "content": PLACE}]
    whole = tokenizer.apply_chat_template(answered, add_generation_prompt=False, tokenize=False)
    between, _, behind = whole.removeprefix(text).partition(PLACE)
    if not whole.startswith(text) or between.strip():  # more than space, such as a train of thought
        between = " "
    closing = tokenizer([behind], add_special_tokens=False)["input_ids"][0] if behind else []
    end = next((token for token in [*closing, *ends] if token in ends), None)
    return PromptForm(before, after, between, brings_special_tokens=True, end=end)
