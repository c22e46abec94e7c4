"""A language model of a known shape with random weights, and facts made of random tokens: no file is read.

Random weights cost what trained ones do. What is said here of facts follows from (`SEED`, index), on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from data.records import EditRecord, Phase, Question, TokenSequence, TrainingTurn, Turn
from data.stream import mini_batch_weights
from model import LanguageModel
from model.source import find_edit_modules

SEED = 42
EDIT_LAYERS = 3  # the MLP output projections of the last ones are edited, as model.auto_layers has it
MINI_BATCH = 10  # facts, dataset.batch_size

# Tokens, ends included: with the answer's last token, which predicts nothing, left out, a fact has 19.5 and its answer
# 4 on average, 2,000 and 400 a turn of 100, which is what DESIGN section 7 counts with. Facts of zsRE's form are
# shorter, 9 and 2 in the shipped sample with its model's tokenizer; their locality questions have 25.
PROMPT, ANSWER = (10, 23), (1, 7)
LOCALITY, LOCALITY_ANSWER = (18, 32), (1, 2)
TRAINING_TURNS, TURNS_A_PASS = 4, 2  # of meta-training: two trajectories, at whose ends the optimiser steps


@dataclass(frozen=True)
class Target:
    """What is wanted on one card in bf16: an editor's mean milliseconds a fact, the forward's share of the peak."""

    card: str  # of benchmarks.gpu.peak
    editor: str
    ms: float
    share: float


@dataclass(frozen=True)
class Shape:
    """A model's sizes, by their names in transformers.MistralConfig, and the settings that go with them."""

    sizes: Mapping[str, int]
    lr: float  # model.lr
    warm_up: int  # turns, at least
    rank: int  # of RLEdit's network
    blocks: int
    target: Target | None = None


SHAPES = {
    # mistralai/Mistral-7B-v0.3; step size, warm-up and network are those of the presets. At 2 ms an edit, two million
    # facts take 70 minutes.
    "mistral-7b": Shape(
        {
            "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8,
        },
        lr=1e-6, warm_up=20, rank=1024, blocks=4, target=Target("H200", "stableedit", ms=2.0, share=0.4),
    ),
    "small": Shape(
        {
            "vocab_size": 1024, "hidden_size": 96, "intermediate_size": 336, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2,
        },
        lr=1e-4, warm_up=2, rank=32, blocks=2,
    ),
}  # fmt: skip


def build(shape: Shape, dtype: torch.dtype, device: torch.device, layers: int | None = None) -> Any:
    """The model of that shape, or the lowest `layers` of it, made where it is to be."""
    width = shape.sizes["hidden_size"]
    sizes = {**shape.sizes, "num_hidden_layers": layers or shape.sizes["num_hidden_layers"]}
    config = transformers.MistralConfig(**sizes, sliding_window=None, initializer_range=width**-0.5)
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus), torch.device(device):
        torch.manual_seed(SEED)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def weights_of(shape: Shape) -> int:
    """How many numbers its weights are, nothing being made."""
    return sum(weight.numel() for weight in build(shape, torch.float32, torch.device("meta")).parameters())


def editable(plain: Any, layers: int = EDIT_LAYERS) -> LanguageModel:
    return LanguageModel(plain, None, find_edit_modules(plain, "auto", layers))


@dataclass(frozen=True)
class Facts:
    """Turns of made facts; turn i is a function of i."""

    a_turn: int
    vocabulary: int

    def turn(self, index: int, phase: Phase) -> Turn:
        drawn = random.Random(f"edit {SEED} {index}")
        return self._turn(index, phase, [self._drawn(drawn, PROMPT, ANSWER) for _ in range(self.a_turn)])

    def training_turn(self, index: int) -> TrainingTurn:
        drawn = random.Random(f"train {SEED} {index}")
        edits = [self._drawn(drawn, PROMPT, ANSWER) for _ in range(self.a_turn)]
        epoch, index_in_epoch = divmod(index, TURNS_A_PASS)
        return TrainingTurn(
            self._turn(index, Phase.EDIT, edits),
            tuple(self._rephrase(drawn, one) for one in edits),
            tuple(self._drawn(drawn, LOCALITY, LOCALITY_ANSWER) for _ in edits),
            epoch,
            index_in_epoch,
            TURNS_A_PASS,
        )

    def _turn(self, index: int, phase: Phase, sequences: Sequence[TokenSequence]) -> Turn:
        records = tuple(EditRecord(index * self.a_turn + place, Question("", "")) for place in range(self.a_turn))
        return Turn(index, phase, records, tuple(sequences), mini_batch_weights(sequences, MINI_BATCH))

    def _drawn(self, drawn: random.Random, prompt: tuple[int, int], answer: tuple[int, int]) -> TokenSequence:
        start = drawn.randint(*prompt)
        return TokenSequence(self._tokens(drawn, start + drawn.randint(*answer)), start)

    def _rephrase(self, drawn: random.Random, edit: TokenSequence) -> TokenSequence:
        """The same answer to another question."""
        start = drawn.randint(*PROMPT)
        return TokenSequence((*self._tokens(drawn, start), *edit.ids[edit.answer_start :]), start)

    def _tokens(self, drawn: random.Random, count: int) -> tuple[int, ...]:
        return tuple(drawn.choices(range(self.vocabulary), k=count))
