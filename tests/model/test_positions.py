"""What the model has at one position of each sequence, and what an offset there does to a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from data.records import TokenSequence
from model import LanguageModel
from model.offsets import tokens_searched
from model.source import find_edit_modules
from tests.conftest import exact_llama, tiny_gpt2, tiny_llama

LLAMA = ("model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj")
GPT2 = ("transformer.h.1.mlp.c_proj", "transformer.h.2.mlp.c_proj")
FAMILIES = pytest.mark.parametrize(("make", "names"), [(exact_llama, LLAMA), (tiny_gpt2, GPT2)])
LENGTHS = [(5, 2), (9, 1), (3, 4), (9, 3), (6, 1)]  # tokens of prompt and answer
POSITIONS = [4, 2, 0, 8, 5]


def language_model(make: Callable[..., Any], names: tuple[str, ...], compute_tokens: int = 20) -> LanguageModel:
    model = make(dtype=torch.float64)
    return LanguageModel(model, None, find_edit_modules(model, list(names), 0), compute_tokens=compute_tokens)


def sequences() -> list[TokenSequence]:
    draw = torch.Generator().manual_seed(3)
    return [
        TokenSequence(tuple(torch.randint(0, 256, (prompt + answer,), generator=draw).tolist()), prompt)
        for prompt, answer in LENGTHS
    ]


def offsets(scale: float = 1.0) -> Tensor:
    return scale * torch.randn((len(LENGTHS), 24), dtype=torch.float64, generator=torch.Generator().manual_seed(4))


@FAMILIES
def test_what_is_there_is_what_a_plain_forward_has(make: Callable[..., Any], names: tuple[str, ...]) -> None:
    model = language_model(make, names)
    keys = model.keys_at(sequences(), POSITIONS)
    hidden = model.hidden_at(names[1], sequences(), POSITIONS)
    for place, (sequence, at) in enumerate(zip(sequences(), POSITIONS, strict=True)):
        plain = model.model(input_ids=torch.tensor([sequence.ids]), output_hidden_states=True)
        torch.testing.assert_close(hidden[place], plain.hidden_states[3][0, at])
    for name in names:
        values = model.values_at(name, sequences(), POSITIONS)
        torch.testing.assert_close(model.edited[name].module(keys[name]), values)
    assert list(model.keys_at(sequences(), POSITIONS, [names[1]])) == [names[1]]


@FAMILIES
def test_what_the_head_reads_where_it_predicts_the_first_token_of_an_answer(
    make: Callable[..., Any], names: tuple[str, ...]
) -> None:
    model = language_model(make, names)
    found = model.hidden_states(sequences())
    for place, sequence in enumerate(sequences()):
        plain = model.model(input_ids=torch.tensor([sequence.ids]), output_hidden_states=True)
        torch.testing.assert_close(found[place], plain.hidden_states[-1][0, sequence.answer_start - 1].float())


@pytest.mark.parametrize("massive", [1e3, 9e3, 1e5])
def test_a_stream_whose_spacing_is_wide_takes_offsets_all_the_same(massive: float) -> None:
    """In bf16 9,000 has neighbours 64 away, so that 100 more are found as 128."""
    plain = tiny_llama(dtype=torch.bfloat16)
    plain.model.embed_tokens.weight.data[:, :2] = massive
    model = LanguageModel(plain, None, find_edit_modules(plain, list(LLAMA), 0))
    assert all(model.adds_to_stream(name) for name in LLAMA)


@FAMILIES
def test_a_forward_ends_where_all_has_been_read(make: Callable[..., Any], names: tuple[str, ...]) -> None:
    """Layers above the last module that is read do not run, nor does the head; the next forward is whole again."""
    model, ran = language_model(make, names), list[str]()
    layers = model.model.get_submodule(names[0].split(".1.")[0])
    for place, module in (*enumerate(layers), ("head", model.model.get_output_embeddings())):
        module.register_forward_hook(lambda *_, name=str(place): ran.append(name))

    def layers_of(read: Callable[[], Any]) -> list[str]:
        ran.clear()
        read()
        return sorted(set(ran))

    assert layers_of(lambda: model.hidden_at(names[0], sequences(), POSITIONS)) == ["0", "1"]
    assert layers_of(lambda: model.keys_at(sequences(), POSITIONS, [names[0]])) == ["0"]
    assert layers_of(lambda: model.keys_at(sequences(), POSITIONS)) == ["0", "1"]
    assert layers_of(lambda: list(model.token_keys(sequences()))) == ["0", "1"]
    assert layers_of(lambda: model.reference_logits(sequences())) == [*map(str, range(len(layers))), "head"]


@FAMILIES
def test_an_offset_moves_the_residual_stream_by_itself(make: Callable[..., Any], names: tuple[str, ...]) -> None:
    """Added by hand to the layer's output, it gives the same losses; the loss is the mean over a sequence's tokens."""
    model, name, moved = language_model(make, names), names[1], offsets()
    losses, _ = model.offset_losses(name, sequences(), POSITIONS)(moved)
    for place, (sequence, at) in enumerate(zip(sequences(), POSITIONS, strict=True)):

        def add(_layer: Any, _inputs: Any, output: Any, place: int = place, at: int = at) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden[0, at] += moved[place]
            return output

        handle = model.model.get_submodule(name.rsplit(".mlp", 1)[0]).register_forward_hook(add)
        with torch.no_grad():
            log_probs = model.model(input_ids=torch.tensor([sequence.ids])).logits[0].log_softmax(-1)
        handle.remove()
        said = [-log_probs[i - 1, sequence.ids[i]] for i in range(sequence.answer_start, len(sequence.ids))]
        torch.testing.assert_close(losses[place], torch.stack(said).mean())


@FAMILIES
@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("kl", [False, True])
def test_gradients_are_finite_differences(
    make: Callable[..., Any], names: tuple[str, ...], replace: bool, kl: bool
) -> None:
    model, name, here = language_model(make, names), names[0], offsets()
    reference = model.reference_logits(sequences()) if kl else None

    def losses(at: Tensor) -> Tensor:
        return model.offset_losses(name, sequences(), POSITIONS, reference=reference, replace=replace)(at)[0]

    _, gradients = model.offset_losses(name, sequences(), POSITIONS, reference=reference, replace=replace)(here)
    direction, step = offsets(0.3).flip(0), 1e-5
    slopes = (losses(here + step * direction) - losses(here - step * direction)) / (2 * step)
    torch.testing.assert_close((gradients * direction).sum(1), slopes, rtol=1e-6, atol=1e-9)
    assert gradients.norm(dim=1).min() > 1e-4  # each sequence hangs on its own offset


@FAMILIES
def test_compute_batches_change_nothing(make: Callable[..., Any], names: tuple[str, ...]) -> None:
    few, many = language_model(make, names, 1), language_model(make, names, 10_000)
    for small, large in zip(
        few.offset_losses(names[0], sequences(), POSITIONS)(offsets()),
        many.offset_losses(names[0], sequences(), POSITIONS)(offsets()),
        strict=True,
    ):
        torch.testing.assert_close(small, large)
    torch.testing.assert_close(few.keys_at(sequences(), POSITIONS), many.keys_at(sequences(), POSITIONS))


def test_a_search_differentiates_fewer_tokens_the_wider_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as have `SEARCHED` hidden numbers, where a compute batch has more."""
    assert tokens_searched(8192, 576) == 8192
    assert tokens_searched(8192, 4096) == 2048
    assert tokens_searched(256, 4096) == 256
    model = language_model(exact_llama, LLAMA, 10_000)
    many = model.offset_losses(LLAMA[0], sequences(), POSITIONS)
    monkeypatch.setattr("model.offsets.SEARCHED", 3 * offsets().shape[1])
    few = model.offset_losses(LLAMA[0], sequences(), POSITIONS)
    assert len(few.before) > len(many.before)
    for one, other in zip(few(offsets()), many(offsets()), strict=True):
        torch.testing.assert_close(one, other)


def test_kl_of_the_model_with_itself_is_nothing_and_replacing_by_what_is_there_changes_nothing() -> None:
    model, name = language_model(exact_llama, LLAMA), LLAMA[1]
    reference, nothing = model.reference_logits(sequences()), offsets(0.0)
    own, gradients = model.offset_losses(name, sequences(), POSITIONS, reference=reference)(nothing)
    assert own.abs().max() < 1e-12
    assert gradients.abs().max() < 1e-12
    plain, _ = model.offset_losses(name, sequences(), POSITIONS)(nothing)
    there = model.values_at(name, sequences(), POSITIONS)
    torch.testing.assert_close(model.offset_losses(name, sequences(), POSITIONS, replace=True)(there)[0], plain)


def test_a_module_outside_of_the_layers_has_no_residual_stream_behind_it() -> None:
    model = exact_llama()
    alone = LanguageModel(model, None, {"lm_head": model.lm_head})
    with pytest.raises(ValueError, match="'lm_head' lies in no list of layers"):
        alone.hidden_at("lm_head", sequences(), POSITIONS)
