"""Records to turns: tokenising, mini-batches, warm-up.

Nothing here keeps a place in the data: turn i is a function of the seed and i, so a resumed run starts anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, overload

import numpy as np

from data.prompts import RAW, PromptForm, Tokenizer
from data.records import EditRecord, Phase, Question, TokenSequence, Turn

AnswerTokens = Literal["joint", "separate"]
Tokenize = Callable[[Sequence[Question]], list[TokenSequence]]

DEFAULT_WARM_UP_TURNS = 20  # the papers' number; what `num_seq_zsre: null` means where the data holds as many

# Compatibility normalisation turns the 3 bytes of U+FDFA into 33: no character grows by more.
NORMALISATION_GROWTH = 11

READ_TOGETHER = 1024  # records

# Edit turns that come before the warm-up turns, of T in all (DESIGN section 1, warm-up).
WARM_UP_POSITIONS = {
    "start": lambda turns: 0,
    "q1": lambda turns: turns // 4,
    "middle": lambda turns: turns // 2,
    "q3": lambda turns: 3 * turns // 4,
    "end": lambda turns: turns - 1,
    "adaptive": lambda turns: 0,
    "none": lambda turns: 0,
}


# --------------------------------------------------------------------------------------------------------------------
# Tokenising


def tokenize(
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    answer_tokens: AnswerTokens,
    form: PromptForm = RAW,
    as_target: bool = False,
) -> list[TokenSequence]:
    """Token ids of each question: the prompt in its form, then the answer.

    `joint` tokenises prompt + " " + answer together, with special tokens; a prompt that ends in whitespace gets no
    second space. The answer starts at the first token with a character of it, so a token across the border is the
    answer's. A token of the space alone is the prompt's, since predicting it says nothing about the fact; but
    `as_target`, of what is to be learned in a form with an end, it is the answer's: a model that does not write it
    never gets to the rest.

    `separate` tokenises the prompt with special tokens and " " + answer without, as the published code does. On
    SentencePiece tokenizers the answer then begins with a token of the space alone.

    Raises ValueError for a tokenizer without character offsets (joint), and where prompt or answer has no token.
    """
    if not questions:
        return []
    if answer_tokens == "joint":
        sequences = _tokenize_joint(questions, tokenizer, form, with_gap=as_target and form.end is not None)
    else:
        sequences = _tokenize_separate(questions, tokenizer, form)
    for question, sequence in zip(questions, sequences, strict=True):
        if not 0 < sequence.answer_start < len(sequence.ids):
            missing = "answer" if sequence.answer_start else "prompt"
            raise ValueError(
                f"the tokenizer makes no token of the {missing} in prompt {question.prompt!r}, answer "
                f"{question.answer!r}: change the row, or the model's tokenizer"
            )
    if form.end is not None:
        return [TokenSequence((*each.ids, form.end), each.answer_start, end_tokens=1) for each in sequences]
    return sequences


def subject_ends(
    questions: Sequence[Question],
    subjects: Sequence[str],
    tokenizer: Tokenizer,
    answer_tokens: AnswerTokens,
    form: PromptForm = RAW,
) -> list[int]:
    """Position of the last token of each prompt's subject in what `tokenize` makes of the question.

    The token that holds the last character of the subject, where the prompt names it last. Raises ValueError for a
    tokenizer without character offsets, and where a subject does not occur in its prompt.
    """
    if not questions:
        return []
    if not tokenizer.is_fast:
        raise ValueError(
            f"editor.fact_token=subject_last needs a fast tokenizer, {type(tokenizer).__name__} gives no character "
            "offsets: set editor.fact_token=last"
        )
    for question, subject in zip(questions, subjects, strict=True):
        if subject not in question.prompt:
            raise ValueError(f"the subject {subject!r} does not occur in the prompt {question.prompt!r}")
    texts = [form.text(question.prompt) for question in questions]
    if answer_tokens == "joint":
        texts = [_head(text, form) + question.answer for text, question in zip(texts, questions, strict=True)]
    offsets = tokenizer(texts, add_special_tokens=not form.brings_special_tokens, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    ends = [len(form.before) + q.prompt.rindex(s) + len(s) for q, s in zip(questions, subjects, strict=True)]
    return [
        next(i for i, (_, end) in enumerate(spans) if end >= border)
        for spans, border in zip(offsets, ends, strict=True)
    ]


def prompt_ids(questions: Sequence[str], tokenizer: Tokenizer, form: PromptForm) -> list[list[int]]:
    """Token ids of prompts in their form, without answers: what a model goes on from when it answers by itself."""
    if not questions:
        return []
    texts = [form.text(question) for question in questions]
    if form.brings_special_tokens:
        return list(tokenizer(texts, add_special_tokens=False)["input_ids"])
    encoded = tokenizer(texts, return_special_tokens_mask=True)
    columns = zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    return [ids[: _text_end(special)] for ids, special in columns]


def _tokenize_joint(
    questions: Sequence[Question], tokenizer: Tokenizer, form: PromptForm, with_gap: bool
) -> list[TokenSequence]:
    if not tokenizer.is_fast:
        raise ValueError(
            f"dataset.answer_tokens=joint needs a fast tokenizer, {type(tokenizer).__name__} gives no character "
            "offsets: set dataset.answer_tokens=separate"
        )
    prompts = [form.text(question.prompt) for question in questions]
    heads = [_head(prompt, form) for prompt in prompts]
    texts = [head + question.answer for head, question in zip(heads, questions, strict=True)]
    encoded = tokenizer(
        texts,
        add_special_tokens=not form.brings_special_tokens,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
    )
    found = [
        _cut_at_character(ids[: _text_end(special)], offsets, len(head))
        for ids, offsets, special, head in zip(
            encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"], heads, strict=True
        )
    ]
    if not with_gap:
        return found
    return [
        _with_gap(sequence, offsets, len(prompt)) if head != prompt else sequence
        for sequence, offsets, head, prompt in zip(found, encoded["offset_mapping"], heads, prompts, strict=True)
    ]


def _head(prompt: str, form: PromptForm) -> str:
    """What stands before the answer's text: a prompt that ends in whitespace gets no gap."""
    return prompt if prompt[-1:].isspace() else prompt + form.gap


def _cut_at_character(ids: list[int], offsets: list[tuple[int, int]], border: int) -> TokenSequence:
    """The answer starts with the first token that reaches past character `border`."""
    start = next((i for i, (_, end) in enumerate(offsets) if end > border), len(ids))
    return TokenSequence(tuple(ids), min(start, len(ids)))


def _with_gap(sequence: TokenSequence, offsets: list[tuple[int, int]], border: int) -> TokenSequence:
    """The answer starts with the first token from character `border` on, if not before; some have empty offsets."""
    start = sequence.answer_start
    while start and offsets[start - 1][0] >= border:
        start -= 1
    return replace(sequence, answer_start=start)


def _tokenize_separate(questions: Sequence[Question], tokenizer: Tokenizer, form: PromptForm) -> list[TokenSequence]:
    gap = "" if form.after[-1:].isspace() else form.gap
    prompts = prompt_ids([question.prompt for question in questions], tokenizer, form)
    answers = tokenizer([gap + question.answer for question in questions], add_special_tokens=False)["input_ids"]
    return [TokenSequence((*head, *ids), len(head)) for head, ids in zip(prompts, answers, strict=True)]


def _text_end(special: list[int]) -> int:
    """How many tokens there are up to the last one of the text: some tokenizers append EOS unasked."""
    end = len(special)
    while end and special[end - 1]:
        end -= 1
    return end


# --------------------------------------------------------------------------------------------------------------------
# Mini-batches


def mini_batch_weights(sequences: Sequence[TokenSequence], batch_size: int) -> tuple[float, ...]:
    """The factor of each record's answer tokens in the loss: 1 / (answer tokens of its mini-batch).

    Mini-batches are `batch_size` records each, longest token sequence first, ties in the data's order, the last one
    as short as it comes (DESIGN section 1, capture). The weights are in the order of `sequences`.
    """
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].ids))
    weights = [0.0] * len(sequences)
    for first in range(0, len(order), batch_size):
        members = order[first : first + batch_size]
        weight = 1.0 / sum(sequences[i].answer_length for i in members)
        for i in members:
            weights[i] = weight
    return tuple(weights)


# --------------------------------------------------------------------------------------------------------------------
# Turns


def make_turn(index: int, phase: Phase, records: Iterable[EditRecord], tokenize: Tokenize, batch_size: int) -> Turn:
    """A turn of these records, in mini-batches of `batch_size`."""
    records = tuple(records)
    sequences = tokenize([record.edit for record in records])
    return Turn(index, phase, records, tuple(sequences), mini_batch_weights(sequences, batch_size))


@dataclass(frozen=True)
class Rows(Sequence[EditRecord]):
    """The records at `rows`, each read when it is asked for."""

    records: Sequence[EditRecord]
    rows: range | np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> EditRecord: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> EditRecord | Rows:
        if isinstance(index, slice):
            return Rows(self.records, self.rows[index])
        return self.records[int(self.rows[index])]

    def __iter__(self) -> Iterator[EditRecord]:
        """Neighbours are read together, which costs less than one by one."""
        for start in range(0, len(self.rows), READ_TOGETHER):
            rows = self.rows[start : start + READ_TOGETHER]
            if isinstance(rows, range) and rows.step == 1:
                yield from self.records[rows.start : rows.stop]
            else:
                yield from (self.records[int(row)] for row in rows)


class EditStream:
    """The turns of a run: T turns of edits, and the warm-up turns inserted where `preheat_mode` says.

    `num_turns` None: every full turn of `edits`; `num_warm_up` None: the first 20 of `warm_up`, or all there are; 0:
    none. `shuffle` draws the order of the edits, not of warm-up, from the seed. Each edit turn also brings `replay`
    facts of edit turns before it (all where there are fewer), drawn from the seed and its index.
    Raises ValueError where the data is too short, the mode unknown, or warm-up asked for with preheat_mode=none.
    """

    def __init__(
        self,
        edits: Sequence[EditRecord],
        warm_up: Sequence[EditRecord],
        *,
        n_edits: int,
        batch_size: int,
        num_turns: int | None,
        num_warm_up: int | None,
        preheat_mode: str,
        tokenizer: Tokenizer,
        answer_tokens: AnswerTokens,
        seed: int,
        shuffle: bool = False,
        form: PromptForm = RAW,
        replay: int = 0,
    ) -> None:
        self.n_edits, self.batch_size, self.seed, self.replay = n_edits, batch_size, seed, replay
        self._tokenize = partial(tokenize, tokenizer=tokenizer, answer_tokens=answer_tokens, form=form, as_target=True)
        self.num_turns = _count_turns(len(edits), n_edits, num_turns)
        self.num_warm_up = _count_warm_up(len(warm_up), n_edits, num_warm_up, preheat_mode)
        self.warm_up_start = WARM_UP_POSITIONS[preheat_mode](self.num_turns)
        order = np.random.default_rng(seed).permutation(len(edits)) if shuffle else range(len(edits))
        self._edits = Rows(edits, order[: self.num_turns * n_edits])
        self._warm_up = Rows(warm_up, range(self.num_warm_up * n_edits))

    def __len__(self) -> int:
        """Turns, those of warm-up included."""
        return self.num_turns + self.num_warm_up

    def turn(self, index: int) -> Turn:
        """Turn `index` of the stream, counted from 0 with warm-up turns included; IndexError outside the stream."""
        if not 0 <= index < len(self):
            raise IndexError(f"turn {index} of a stream of {len(self)} turns")
        phase, rows = self._rows_of(index)
        turn = make_turn(index, phase, rows, self._tokenize, self.batch_size)
        earlier = self._replayed(index) if phase is Phase.EDIT else ()
        if not earlier:
            return turn
        return replace(turn, replay=make_turn(index, phase, earlier, self._tokenize, self.batch_size))

    def _replayed(self, index: int) -> Sequence[EditRecord]:
        """Drawn without replacement, in the order in which they were written."""
        earlier = self.edited(index)
        asked = min(self.replay, len(earlier))
        if not asked:
            return ()
        places = np.random.default_rng([self.seed, index]).choice(len(earlier), asked, replace=False)
        return [earlier[int(place)] for place in np.sort(places)]

    def from_turn(self, first: int) -> Iterator[Turn]:
        """The turns from `first` to the end; none where the stream is already done."""
        return (self.turn(index) for index in range(first, len(self)))

    def edited(self, upto: int | None = None) -> Rows:
        """The records that edit turns before turn `upto` of the stream write, in the order they are written.

        None stands for the whole stream. Warm-up records are never among them. Records are read on access.
        """
        return self._edits[: self._edit_turns_before(len(self) if upto is None else upto) * self.n_edits]

    def turn_of(self, place: int) -> int:
        """The turn of the stream that writes record `place` of `edited()`."""
        edit_turn = place // self.n_edits
        return edit_turn + (self.num_warm_up if edit_turn >= self.warm_up_start else 0)

    def warmed_up(self) -> Rows:
        """The records of the warm-up turns, read on access."""
        return self._warm_up

    def _rows_of(self, index: int) -> tuple[Phase, Rows]:
        in_warm_up = index - self.warm_up_start
        if 0 <= in_warm_up < self.num_warm_up:
            return Phase.WARM_UP, self._warm_up[in_warm_up * self.n_edits : (in_warm_up + 1) * self.n_edits]
        first = self._edit_turns_before(index) * self.n_edits
        return Phase.EDIT, self._edits[first : first + self.n_edits]

    def _edit_turns_before(self, index: int) -> int:
        return index - min(max(index - self.warm_up_start, 0), self.num_warm_up)


def _count_turns(rows: int, n_edits: int, num_turns: int | None) -> int:
    full = rows // n_edits
    if full == 0:
        raise ValueError(
            f"dataset.n_edits={n_edits}: the edit data holds {rows} rows, less than one turn; "
            f"set dataset.n_edits to {rows} or less, or dataset.valid_path to a larger file"
        )
    if num_turns is not None and num_turns > full:
        raise ValueError(
            f"num_seq={num_turns}: the edit data holds {rows} rows, {full} full turns of dataset.n_edits={n_edits}; "
            f"set num_seq to {full} or less, or dataset.valid_path to a larger file"
        )
    return full if num_turns is None else num_turns


def _count_warm_up(rows: int, n_edits: int, num_warm_up: int | None, preheat_mode: str) -> int:
    if preheat_mode not in WARM_UP_POSITIONS:
        raise ValueError(f"editor.preheat_mode={preheat_mode}: set one of {', '.join(WARM_UP_POSITIONS)}")
    if preheat_mode == "none":
        if num_warm_up:
            raise ValueError(
                f"dataset.num_warm_up={num_warm_up} has no effect with editor.preheat_mode=none; "
                "set num_seq_zsre (num_seq_wikibigedit) to null, or editor.preheat_mode=start"
            )
        return 0
    full = rows // n_edits
    if num_warm_up is None and full:
        return min(DEFAULT_WARM_UP_TURNS, full)
    if num_warm_up is None or num_warm_up > full:
        raise ValueError(
            f"num_seq_zsre (num_seq_wikibigedit)={'null' if num_warm_up is None else num_warm_up}: the training data "
            f"holds {rows} rows, {full} full turns of dataset.n_edits={n_edits}; "
            + (f"set it to {full} or less" if full else "set editor.preheat_mode=none, or a smaller dataset.n_edits")
            + ", or dataset.train_path to a larger file"
        )
    return num_warm_up


# --------------------------------------------------------------------------------------------------------------------
# Context length


def questions_of(record: EditRecord) -> dict[str, Question]:
    """The questions a record holds, by protocol."""
    protocols = ("edit", "rephrase", "locality", "persona", "multi_hop")
    found = ((protocol, getattr(record, protocol)) for protocol in protocols)
    return {protocol: question for protocol, question in found if question is not None}


def check_context(
    records: Sequence[EditRecord],
    tokenizer: Tokenizer,
    context_length: int,
    *,
    answer_tokens: AnswerTokens,
    file: str,
    most: int | None = None,
    form: PromptForm = RAW,
) -> None:
    """ValueError, naming file, row, tokens and limit, for the first question longer than the model's context.

    A token stands for at least one byte of the (normalised) text, so only questions with more bytes than the context
    has room for are tokenised. No record is read where `most`, a bound on the tokens of all questions, fits.
    """
    # the space between, and one that SentencePiece puts in front
    added = tokenizer.num_special_tokens_to_add() + 2 + form.most_added
    if most is not None and most + added <= context_length:
        return
    for record in records:
        for protocol, question in questions_of(record).items():
            if most_tokens(question) + added <= context_length:
                continue
            tokens = len(tokenize([question], tokenizer, answer_tokens, form)[0].ids)
            if tokens > context_length:
                raise ValueError(
                    f"file {file}, row {record.index}: {protocol} is {tokens} tokens long, the model's context is "
                    f"{context_length}; shorten or remove the row, or choose a model with a longer context"
                )


def most_tokens(question: Question) -> int:
    """An upper bound on the tokens of prompt and answer, from their UTF-8 bytes."""
    if question.prompt.isascii() and question.answer.isascii():
        return len(question.prompt) + len(question.answer)
    return NORMALISATION_GROWTH * len((question.prompt + question.answer).encode())
