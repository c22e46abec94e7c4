"""The blocks below all edits read a text once in a turn; nothing that is asked of the model changes by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from data.records import LossTerm, LowRankUpdate, Phase, TokenSequence, Turn
from model import LanguageModel, below
from model.source import find_edit_modules
from tests.conftest import exact_llama, tiny_gpt2

LLAMA = ("model.layers.2.mlp.down_proj", "model.layers.3.mlp.down_proj")
GPT2 = ("transformer.h.2.mlp.c_proj", "transformer.h.3.mlp.c_proj")
FAMILIES = pytest.mark.parametrize(("make", "names"), [(exact_llama, LLAMA), (tiny_gpt2, GPT2)])
LENGTHS = [(5, 2), (9, 1), (3, 4), (9, 3), (6, 1)]  # tokens of prompt and answer


def language_model(make: Callable[..., Any], names: tuple[str, ...]) -> LanguageModel:
    model = make(dtype=torch.float64)
    return LanguageModel(model, None, find_edit_modules(model, list(names), 0), compute_tokens=20)


def turn() -> Turn:
    draw = torch.Generator().manual_seed(3)
    sequences = tuple(
        TokenSequence(tuple(torch.randint(0, 256, (prompt + answer,), generator=draw).tolist()), prompt)
        for prompt, answer in LENGTHS
    )
    return Turn(0, Phase.EDIT, (), sequences, (0.5,) * len(sequences))


def update(model: LanguageModel) -> dict[str, LowRankUpdate]:
    draw = torch.Generator().manual_seed(4)
    return {
        name: LowRankUpdate(None, torch.randn(shape, dtype=torch.float64, generator=draw))
        for name, shape in model.shapes.items()
    }


class Counted:
    """How often the attention of a block is computed."""

    def __init__(self, model: LanguageModel, name: str) -> None:
        self.times = 0
        model.model.get_submodule(name).register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.times += 1


def everything(model: LanguageModel) -> list[Tensor]:
    """Whatever editors ask of a model about the facts of a turn."""
    facts = turn()
    some = facts.part([3, 0])  # in other batches
    term = LossTerm(facts.sequences, 1.0)
    captures = [model.capture(facts), model.capture(facts, every_token=True), model.capture(some)]
    sides = [side for each in captures for one in each.modules.values() for side in (one.keys, one.value_grads)]
    gradients, losses = model.weight_gradients([term])
    logits = model.reference_logits(facts.sequences)
    numbers = torch.tensor([*losses, *model.losses([term]), *(each.loss for each in captures)])
    return [*sides, *gradients.values(), logits, numbers]


@FAMILIES
def test_what_the_model_is_asked_has_the_same_answers(make: Callable[..., Any], names: tuple[str, ...]) -> None:
    """Before an update and after it; the lowest blocks see each text once, the others every time."""
    plain, once = language_model(make, names), language_model(make, names)
    layers, attention = ("model.layers", "self_attn") if make is exact_llama else ("transformer.h", "attn")
    with once.reading_once():
        low, high = (Counted(once, f"{layers}.{place}.{attention}") for place in (1, 2))
        for model in (plain, once):
            model.apply(update(model))
        for ours, expected in zip(everything(once) + everything(once), everything(plain) * 2, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
        batches = len(list(once.batches(turn().sequences)))
        assert low.times == batches
        assert high.times > 8 * batches
    everything(once)
    assert low.times > 4 * batches


def test_what_there_is_no_room_for_is_read_again() -> None:
    plain, once = language_model(exact_llama, LLAMA), language_model(exact_llama, LLAMA)
    with mock.patch.object(below, "KEPT_TOKENS", 20), once.reading_once():
        low = Counted(once, "model.layers.1.self_attn")
        for ours, expected in zip(everything(once) + everything(once), everything(plain) * 2, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    assert low.times > 2


def test_a_model_that_hands_more_from_layer_to_layer_reads_every_time() -> None:
    model = language_model(exact_llama, LLAMA)
    layers, kept = model.model.model.layers, {}
    layers[0].self_attn.register_forward_hook(lambda _m, _i, output: kept.update(mean=output[0].mean()))
    layers[2].register_forward_pre_hook(lambda _m, inputs: (inputs[0] + kept["mean"], *inputs[1:]))
    with model.reading_once():
        low = Counted(model, "model.layers.0.self_attn")
        model.capture(turn())
        first = low.times
        model.capture(turn())
    assert low.times == 2 * first


def take(_handed: Tensor) -> None:
    """As upper layers do with what lower ones have left them."""


def test_a_model_whose_upper_layers_fail_without_lower_ones_reads_every_time() -> None:
    """As where they take keys and values from these."""
    model = language_model(exact_llama, LLAMA)
    inner, handed = model.model.model, {}
    inner.register_forward_pre_hook(lambda *_: handed.clear())
    inner.layers[0].self_attn.register_forward_hook(lambda _m, _i, output: handed.update(keys=output[0]))
    inner.layers[2].register_forward_pre_hook(lambda *_: take(handed["keys"]))
    plain = language_model(exact_llama, LLAMA)
    with model.reading_once():
        for ours, expected in zip(everything(model), everything(plain), strict=True):
            assert torch.equal(ours, expected)


def test_a_model_whose_stream_has_more_rows_a_token_reads_every_time() -> None:
    model = exact_llama()
    blocks = model.model.layers[:2]
    blocks[1].register_forward_hook(lambda _m, _i, output: output[None].expand(4, -1, -1, -1))
    model.model.layers[2].register_forward_pre_hook(lambda _m, inputs: (inputs[0][0], *inputs[1:]))
    assert below.blocks_below(model, LLAMA) == []


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (LLAMA, 2),
        (("model.layers.0.mlp.down_proj", *LLAMA), 0),
        (("lm_head", *LLAMA), 0),
        (("model.embed_tokens",), 0),
    ],
)
def test_the_blocks_are_those_before_the_first_edit_module(names: tuple[str, ...], count: int) -> None:
    assert len(below.blocks_below(exact_llama(), names)) == count
