"""The records that flow through the house.

Letters: N rows (captured tokens) of a turn, d_k key size, d_v value size, B sequences of a compute batch,
L tokens of its longest sequence, M answer tokens of the batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any, Self

import torch
from torch import Tensor

Allocate = Callable[[str, tuple[int, int]], Tensor]
"""Gives the tensor to fill, by name and shape: in memory, or in a file."""


class Phase(Enum):
    """Why a turn edits the model: to warm the statistics up, or because its facts are wanted."""

    WARM_UP = "warm_up"
    EDIT = "edit"


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and the answer that should follow it."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class EditRecord:
    """One fact to write, with the questions that probe it.

    A probe the data does not hold is None and is left out of the scores, never scored as an empty string.
    `index` is the row of the file the record was read from. `subject` is what the fact is about, where the data says.
    """

    index: int
    edit: Question
    rephrase: Question | None = None
    locality: Question | None = None
    persona: Question | None = None
    multi_hop: Question | None = None
    subject: str | None = None


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A question as token ids: the prompt, then from `answer_start` on the answer, with what ends it."""

    ids: tuple[int, ...]
    answer_start: int
    end_tokens: int = 0  # of the answer's, those at its tail that say nothing but that it ends

    def without_end(self) -> TokenSequence:
        return TokenSequence(self.ids[: len(self.ids) - self.end_tokens], self.answer_start)

    @property
    def answer_length(self) -> int:
        return len(self.ids) - self.answer_start


@dataclass(frozen=True, slots=True)
class Turn:
    """The facts that enter the model together.

    `index` counts the turns of the stream, warm-up included. `sequences[i]` is the tokenised edit of `records[i]`;
    each of its answer tokens weighs `loss_weights[i]` = 1 / (answer tokens of its mini-batch) in the loss (DESIGN
    section 1, capture). `replay` holds facts of earlier turns that are asked again (DESIGN section 1, replay), or is
    None.
    """

    index: int
    phase: Phase
    records: tuple[EditRecord, ...]
    sequences: tuple[TokenSequence, ...]
    loss_weights: tuple[float, ...]
    replay: Turn | None = None

    def with_replay(self) -> Turn:
        """Its own facts, then those of earlier turns that are asked again."""
        if self.replay is None:
            return self
        return Turn(
            self.index,
            self.phase,
            self.records + self.replay.records,
            self.sequences + self.replay.sequences,
            self.loss_weights + self.replay.loss_weights,
        )

    def part(self, indices: Sequence[int]) -> Turn:
        """Some of its facts; each token keeps the weight in the loss that it has in the whole turn."""
        return replace(
            self,
            records=tuple(self.records[i] for i in indices) if self.records else (),
            sequences=tuple(self.sequences[i] for i in indices),
            loss_weights=tuple(self.loss_weights[i] for i in indices),
            replay=None,
        )


@dataclass(frozen=True, slots=True)
class FactContexts:
    """A fact in the contexts that its target vector is sought over: as it is put, then behind each prefix."""

    sequences: tuple[TokenSequence, ...]
    positions: tuple[int, ...]  # of the fact token in each
    kl_prompt: TokenSequence | None = None  # "{subject} is a", then a token that says nothing; None: no known subject
    kl_position: int = 0  # of the fact token there


@dataclass(frozen=True, slots=True)
class TrainingTurn:
    """Facts that a hypernetwork learns to edit from, and the questions that judge the edit (DESIGN section 1).

    `edits.index` counts the turns of all passes over the training file; an epoch is a pass, of `epoch_turns` turns.
    """

    edits: Turn
    rephrases: tuple[TokenSequence, ...]
    localities: tuple[TokenSequence, ...]
    epoch: int
    index_in_epoch: int
    epoch_turns: int


@dataclass(frozen=True, slots=True)
class LossTerm:
    """A part of a loss: `weight` times the mean over the answer tokens of `sequences`.

    Of their cross-entropy or, with `reference`, of KL(reference || model).
    """

    sequences: tuple[TokenSequence, ...]
    weight: float
    reference: Tensor | None = None  # (M, V) logits, in the order of the sequences and their tokens


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """A compute batch: sequences padded on the right, without the last token, which predicts nothing.

    Answer token m is predicted at (`rows[m]`, `positions[m]`). `members[b]` is the index of batch row b in the list
    of sequences the batch was cut from.
    """

    input_ids: Tensor  # (B, L) int64
    lengths: Tensor  # (B,) int64, tokens that are not padding
    members: Tensor  # (B,) int64
    rows: Tensor  # (M,) int64, sorted
    positions: Tensor  # (M,) int64, increasing within a row
    targets: Tensor  # (M,) int64


@dataclass(frozen=True, slots=True)
class Capture:
    """What one edit module saw in a turn, rows in the order of the turn's records and, within one, of its tokens."""

    keys: Tensor  # (N, d_k) float32 (of a float64 model float64), inputs of the module
    value_grads: Tensor  # (N, d_v) likewise, gradients of the loss at its outputs


@dataclass(frozen=True, slots=True)
class TurnCapture:
    """What a turn's facts did inside the model, by edit module, before it is edited."""

    modules: Mapping[str, Capture]
    loss: float  # nats a token, the mean over the turn's mini-batches
    all_correct: tuple[bool, ...]  # of each fact: whether every answer token is the model's first choice already
    mean_token_loss: tuple[float, ...]  # of each fact: the mean -log p of its answer tokens, nats
    max_token_loss: tuple[float, ...]  # of each fact: the largest


@dataclass(frozen=True, slots=True)
class LowRankUpdate:
    """A weight change in (d_k, d_v) orientation, DeltaW = left @ right.

    `left` None stands for the identity: the change is dense and `right` holds it, as when rows outnumber d_k.
    """

    left: Tensor | None  # (d_k, N)
    right: Tensor  # (N, d_v), or (d_k, d_v) where left is None


@dataclass(frozen=True, slots=True)
class WeightChange:
    """What an update did to a module's weight, in the precision that takes updates."""

    norm: float  # ||DeltaW||, Frobenius, as the editor gave it
    largest: float  # largest |entry| of DeltaW
    drift: float | None  # ||W_t - W_0|| / ||W_0||; None where W_0 is zero


@dataclass(frozen=True, slots=True)
class RecordScore:
    """One line of records.jsonl: what the model makes of one probe of one record. None is left out of the line."""

    place: int  # of the record among those that edit turns write
    index: int  # row of the data file
    protocol: str  # ES, GS, ...
    correct: int  # answer tokens that are the model's first choice, teacher-forced
    tokens: int  # without the end of the answer
    ended: bool | None = None  # all of them are right, and then the end; None where answers have none
    agree: int | None = None  # of locality: answer tokens at which the base model's first choice is this model's too
    kl: float | None = None  # mean over answer tokens of KL(base || edited), which lies in [kl, kl + kl_error]
    kl_error: float | None = None
    text: str | None = None  # what the model wrote
    exact: bool | None = None  # it is the answer
    contains: bool | None = None

    @classmethod
    def of_line(cls, line: Mapping[str, Any]) -> Self:
        """What else stands in the line, as its stage, is left aside."""
        return cls(**{name: line[name] for name in cls.__slots__ if name in line})

    def line(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    def forms(self) -> Iterator[tuple[str, float]]:
        """Each form of the score that this probe has, as names have it behind the protocol, and its value."""
        yield "", self.correct / self.tokens
        yield "_seq", float(self.correct == self.tokens)
        if self.ended is not None:
            yield "_end", float(self.ended)
        if self.exact is not None and self.contains is not None:
            yield "_gen", float(self.exact)
            yield "_contains", float(self.contains)
        if self.agree is not None and self.kl is not None:
            yield "_agree", self.agree / self.tokens
            yield "_kl", self.kl


def row_offsets(sequences: Sequence[TokenSequence], every_token: bool = False) -> Tensor:  # (sequences + 1,)
    """Where each sequence's answer tokens begin when all are counted in order; at the end, their number.

    With `every_token`, not only those of the answer: all that something predicts.
    """
    lengths = (len(one.ids) - 1 if every_token else one.answer_length for one in sequences)
    return torch.tensor([0, *lengths]).cumsum(0)


def row_indices(indices: Sequence[int], first_row: Sequence[int] | Tensor) -> Tensor:  # int64
    """The rows of the sequences at `indices`, in their order; `first_row` (of `row_offsets`) says where each begins."""
    own = [torch.arange(int(first_row[i]), int(first_row[i + 1])) for i in indices]
    return torch.cat(own) if own else torch.empty(0, dtype=torch.int64)


def read_together(tensors: Sequence[Tensor]) -> list[Any]:
    """The numbers in tensors of one shape and type, wherever these lie: a GPU is waited for once, not for each."""
    return torch.stack([tensor.to(tensors[0].device) for tensor in tensors]).tolist() if tensors else []
