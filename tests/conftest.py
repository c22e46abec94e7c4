"""Tiny models and tokenizers, made from their configurations."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, and tiny models gain nothing by more
os.environ.setdefault("MKL_CBWR", "AUTO")  # as main.py has it

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from tests.commands import Commands

# Properties are about values; how long an example takes on a busy machine says nothing of them.
settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no process waits for another at the end."""
    items.sort(key=lambda item: "slow" not in item.keywords)


def pytest_collection_finish() -> None:
    """The collector passes over what has been imported by now, which it would walk through for nothing: an eighth of
    the tests' time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: one token a byte."""
    vocabulary = {symbol: place for place, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> transformers.LlamaForCausalLM:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=256, eos_token_id=256, pad_token_id=256,
        initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def exact_llama(seed: int = 0, dtype: torch.dtype = torch.float64) -> transformers.LlamaForCausalLM:
    """The same in float64 throughout: transformers' norms compute in float32 whatever they are given."""
    model = tiny_llama(seed, dtype)
    norms = {name: module for name, module in model.named_modules() if name.endswith("norm")}
    for name, norm in norms.items():
        exact = torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, dtype=dtype)
        exact.weight.data.copy_(norm.weight.data)
        model.set_submodule(name, exact)
    return model.eval()


def tiny_gpt2(seed: int = 0, dtype: torch.dtype = torch.float32) -> transformers.GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=260, n_embd=24, n_layer=4, n_head=4, n_positions=256, bos_token_id=256, eos_token_id=256,
        initializer_range=0.2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).to(dtype).eval()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerFast) -> Path:
    """The tiny Llama as `from_pretrained` reads it."""
    from tests.commands import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("model"), byte_tokenizer)


@pytest.fixture
def run(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Commands in a folder of their own, with twelve facts to edit and nine to warm up with.

    Without the check of the command line, half of such a run's time: test_bad_input.py has it.
    """
    from tests.commands import commands_in

    return commands_in(tmp_path, model_folder, monkeypatch)
