"""Families that users edit at 7B, tiny: capture, edit, score, write and export, in float32 and in bf16."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

from data.records import EditRecord, Phase, Question, Turn
from data.stream import mini_batch_weights, tokenize
from editor.base import LocateInputs
from editor.capture import CaptureEditor
from editor.located import LayerByLayer, NullSpace
from editor.stableedit import StableEdit, StableEditSettings
from editor.target_vectors import TargetSettings
from harness.evaluation.evaluate import score_records
from model import LanguageModel
from model.source import find_edit_modules

WIDTHS = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip


def whole_gemma3(**sizes: Any) -> transformers.Gemma3Config:
    """The whole of Gemma 3, as AutoModelForCausalLM makes it of the published configuration."""
    ends = {name: sizes[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vision = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    return transformers.Gemma3Config(text_config=sizes, vision_config=vision, mm_tokens_per_image=1, **ends)


LAYOUTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt-j": (transformers.GPTJConfig, {"n_embd": 24, "n_layer": 3, "n_head": 2, "rotary_dim": 4}),
    "gemma": (transformers.GemmaConfig, {**WIDTHS, "head_dim": 12}),
    "gemma2": (transformers.Gemma2Config, {**WIDTHS, "head_dim": 12}),
    "gemma3": (transformers.Gemma3TextConfig, {**WIDTHS, "head_dim": 12, "sliding_window": 8}),
    "gemma3 with images": (whole_gemma3, {**WIDTHS, "head_dim": 12, "sliding_window": 8}),
    "phi": (transformers.PhiConfig, {**WIDTHS, "partial_rotary_factor": 0.5, "num_key_value_heads": 2}),
    "phi3": (transformers.Phi3Config, WIDTHS),  # of Phi-4
    "qwen2": (transformers.Qwen2Config, WIDTHS),
    "qwen3": (transformers.Qwen3Config, {**WIDTHS, "head_dim": 12}),
    "mistral": (transformers.MistralConfig, {**WIDTHS, "sliding_window": 8}),
    "llama": (transformers.LlamaConfig, WIDTHS),
    "lfm2": (transformers.Lfm2Config, {**WIDTHS, "layer_types": ["conv", "full_attention", "conv"]}),
}
MODULES = {"lfm2": [f"model.layers.{layer}.feed_forward.w2" for layer in (1, 2)]}  # which auto does not know
RECORDS = [EditRecord(i, Question(f"Box {i} has?", str(7919 * i % 997))) for i in range(12)]
CPU = torch.device("cpu")


def model_of(layout: str, dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast) -> LanguageModel:
    kind, sizes = LAYOUTS[layout]
    torch.manual_seed(0)
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": 256, "pad_token_id": 256}
    config = kind(**tokens, **sizes, max_position_embeddings=64, initializer_range=0.2)
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    chosen = find_edit_modules(plain, MODULES.get(layout, "auto"), 2)
    return LanguageModel(plain, tokenizer, chosen, compute_tokens=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_goes_through_everything(
    layout: str, dtype: torch.dtype, tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Two turns of StableEdit make the facts likelier; the scores and texts are those of the exported model too."""
    model = model_of(layout, dtype, byte_tokenizer)
    settings = StableEditSettings(1e-2, 10.0, 512, "stable", "shape", 0.1, "shift", 0.0)
    editor = CaptureEditor(StableEdit(model.shapes, settings, CPU), CPU)
    sequences = tuple(tokenize([record.edit for record in RECORDS], byte_tokenizer, "joint"))
    turn = Turn(0, Phase.EDIT, tuple(RECORDS), sequences, mini_batch_weights(sequences, 4))

    with model.reading_once():
        losses = [editor.edit(model, turn).loss for _ in range(2)] + [model.capture(turn).loss]
    assert losses[2] < losses[1] < losses[0]
    assert {name for name in model.shapes if model.edited[name].master.dtype is torch.float32} == set(model.shapes)
    assert all(capture.keys.dtype is torch.float32 for capture in model.capture(turn).modules.values())

    model.export(tmp_path / "edited")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "edited", dtype=dtype)
    reloaded = LanguageModel(again, byte_tokenizer, {}, compute_tokens=64)
    as_tokens = partial(tokenize, tokenizer=byte_tokenizer, answer_tokens="joint")
    found = [list(score_records(one, enumerate(RECORDS), as_tokens)) for one in (model, reloaded)]
    assert found[0] == found[1]
    prompts = [byte_tokenizer(record.edit.prompt).input_ids for record in RECORDS[:3]]
    assert model.generate(prompts, 4) == reloaded.generate(prompts, 4)
    model.restore_original()
    assert model.is_original()
    assert model.capture(turn).loss == pytest.approx(losses[0], rel=1e-6)


def test_modules_of_the_whole_gemma3_have_the_names_that_its_presets_give(
    byte_tokenizer: PreTrainedTokenizerFast,
) -> None:
    names = model_of("gemma3 with images", torch.float32, byte_tokenizer).shapes
    assert list(names) == [f"model.language_model.layers.{layer}.mlp.down_proj" for layer in (1, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_a_norm_stands_before_the_hidden_state(
    layout: str, dtype: torch.dtype, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Editors that move the hidden state by what a module puts out are refused there, and nowhere else."""
    model = model_of(layout, dtype, byte_tokenizer)
    normed = layout.startswith(("gemma2", "gemma3"))
    assert [model.adds_to_stream(name) for name in model.shapes] == [not normed] * 2
    targets = TargetSettings(1, 0.5, 0.5, 0.0625, 0.75, 0.05)
    given = LocateInputs(lambda _: (), lambda _: torch.eye(40))
    with pytest.raises(ValueError, match="norms what") if normed else nullcontext():
        LayerByLayer(
            model,
            lambda _: NullSpace(torch.eye(40, 20)),
            targets,
            given,
            ridge=1.0,
            ridge_setting="editor.L2",
            keep_keys=False,
            device=CPU,
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompts_that_begin_alike_are_read_as_alone(layout: str, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    """What they share is read once and copied for each, and again for each label; also where states are no keys."""
    model = model_of(layout, torch.float32, byte_tokenizer)
    prompts = [byte_tokenizer("The boxes hold this: " + end).input_ids for end in ("a", "box 12", "4")]
    labels = [[[7], [8, 9, 10], [8, 11]]] * 3
    together = model.label_log_probs(prompts, labels)
    alone = [model.label_log_probs([prompt], [own])[0] for prompt, own in zip(prompts, labels, strict=True)]
    for some, same in zip(together, alone, strict=True):
        assert some == [(pytest.approx(total, abs=1e-4), count) for total, count in same]
    assert model.generate(prompts, 6) == [model.generate([prompt], 6)[0] for prompt in prompts]
