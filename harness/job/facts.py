"""Facts for locate-then-edit editors: where in a sequence a fact is, and the contexts that it is put in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final, cast

from config.schema import FactToken, LocateConfig, RunConfig
from data.batches import PADDING
from data.prompts import RAW, PromptForm
from data.records import EditRecord, FactContexts, Question, TokenSequence, Turn
from data.stream import AnswerTokens, prompt_ids, subject_ends, tokenize
from model import LanguageModel
from model.source import Outline

FIRST_WORDS: Final = (
    *("The", "Therefore", "Because", "I", "You", "In", "When", "We", "After", "It"),
    *("This", "There", "My", "At", "As", "If", "While", "For", "But", "Some"),
)
"""What generated prefixes begin with, the first five as in MEMIT's."""


def check_located(cfg: RunConfig, records: Sequence[EditRecord], file: str, model: Outline) -> None:
    """ValueError where facts have no place that the editor could look at, or a module puts out no hidden state."""
    if cfg.evaluate is not None or not isinstance(cfg.editor, LocateConfig):
        return
    for name, (_, d_v) in model.shapes.items():
        if d_v != model.width:
            raise ValueError(
                f"model.edit_modules: {name!r} puts out {d_v} numbers, the model's hidden states have "
                f"{model.width}, and editor={cfg.editor.name} edits what is added to these: name down_proj or "
                "its kin"
            )
    if cfg.editor.fact_token is FactToken.subject_last:
        _check_depth(list(model.shapes)[-1], model.layers)
        _check_subjects(records, file)


def _check_depth(name: str, layers: int) -> None:
    """ValueError for the last layer: no later token looks at what it puts out at the subject."""
    layer = re.search(r"\.(\d+)\.", name)
    if layer and int(layer[1]) == layers - 1:
        raise ValueError(
            f"model.edit_modules: {name!r} lies in the last of {layers} layers, behind which no token looks at the "
            "subject; name modules of earlier ones, or set editor.fact_token=last"
        )


def _check_subjects(records: Sequence[EditRecord], file: str) -> None:
    for record in records:
        if record.subject is None or record.subject not in record.edit.prompt:
            said = "has no subject" if record.subject is None else f"its prompt lacks the subject {record.subject!r}"
            raise ValueError(
                f"editor.fact_token=subject_last: file {file}, row {record.index}: {said}; set editor.fact_token=last, "
                "or bring data with subjects (dataset.fields.subject names the field of dataset=jsonl)"
            )


class Contexts:
    """The contexts of a turn's facts: as they are put, then behind each prefix, and "{subject} is a".

    A context that the model cannot read whole is left out; the fact as it is put never is.
    """

    def __init__(self, cfg: RunConfig, tokenizer: Any, form: PromptForm, prefixes: Sequence[str], most: int | None):
        """`most`: tokens that the model can look back on, None for no limit."""
        assert isinstance(cfg.editor, LocateConfig)
        self.by_subject = cfg.editor.fact_token is FactToken.subject_last
        self.answer_tokens = cast(AnswerTokens, cfg.dataset.answer_tokens.name)
        self.tokenizer, self.form, self.prefixes, self.most = tokenizer, form, ("", *prefixes), most

    def __call__(self, turn: Turn) -> list[FactContexts]:
        questions = [
            Question(prefix + record.edit.prompt, record.edit.answer)
            for record in turn.records
            for prefix in self.prefixes
        ]
        sequences = tokenize(questions, self.tokenizer, self.answer_tokens, self.form, as_target=True)
        positions = self._positions(turn.records, questions, sequences)
        kl_prompts = self._kl_prompts(turn.records)
        size = len(self.prefixes)
        return [
            self._fact(sequences[first : first + size], positions[first : first + size], *kl_prompts[i])
            for i, first in enumerate(range(0, len(sequences), size))
        ]

    def _fact(
        self, sequences: Sequence[TokenSequence], positions: Sequence[int], kl_prompt: TokenSequence | None, at: int
    ) -> FactContexts:
        read = [i for i, s in enumerate(sequences) if i == 0 or self.most is None or len(s.ids) <= self.most]
        return FactContexts(tuple(sequences[i] for i in read), tuple(positions[i] for i in read), kl_prompt, at)

    def _positions(
        self, records: Sequence[EditRecord], questions: Sequence[Question], sequences: Sequence[TokenSequence]
    ) -> list[int]:
        last = [sequence.answer_start - 1 for sequence in sequences]
        if not self.by_subject:
            return last
        subjects = [record.subject or "" for record in records for _ in self.prefixes]
        ends = subject_ends(questions, subjects, self.tokenizer, self.answer_tokens, self.form)
        # a token that holds the prompt's end and the answer's beginning is the answer's
        return [min(end, at) for end, at in zip(ends, last, strict=True)]

    def _kl_prompts(self, records: Sequence[EditRecord]) -> list[tuple[TokenSequence | None, int]]:
        """ "{subject} is a", and the position of the fact token there."""
        subjects = [record.subject for record in records if record.subject is not None]
        asked = [Question(f"{subject} is a", "") for subject in subjects]
        ids = prompt_ids([question.prompt for question in asked], self.tokenizer, RAW)
        if self.by_subject:
            ends = subject_ends(asked, subjects, self.tokenizer, "separate", RAW)
        else:
            ends = [len(own) - 1 for own in ids]
        found = iter([(TokenSequence((*own, PADDING), len(own)), end) for own, end in zip(ids, ends, strict=True)])
        return [(None, 0) if record.subject is None else next(found) for record in records]


def write_prefixes(model: LanguageModel, tokenizer: Any, count: int, tokens: int) -> list[str]:
    """What the model itself writes after as many first words, each a text to put a fact behind."""
    words = FIRST_WORDS[:count]
    written = model.generate(prompt_ids(words, tokenizer, RAW), tokens)
    texts = [word + tokenizer.decode(ids, skip_special_tokens=True) for word, ids in zip(words, written, strict=True)]
    return [f"{' '.join(text.split())}. " for text in texts]
