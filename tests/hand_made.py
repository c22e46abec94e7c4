"""A language model whose logits can be worked out on paper: it says what it has read most often."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from model import LanguageModel

WEIGHT, SHARPNESS = 100.0, 1.0


class StandIn:
    """What scoring asks of a model beside its answers: one that shares its work with nobody."""

    device = torch.device("cpu")
    compute_tokens = 8  # padded tokens of its batches
    world_size = LanguageModel.world_size
    partition = LanguageModel.partition
    map_ranks = LanguageModel.map_ranks
    all_ranks = LanguageModel.all_ranks


def counting_model(vocabulary: int, context_length: int = 512) -> transformers.LlamaForCausalLM:
    """One layer of attention that looks at every token alike, over one-hot embeddings; no MLP."""
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=vocabulary, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        head_dim=vocabulary, max_position_embeddings=context_length, rms_norm_eps=1e-12, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    one_hot = torch.eye(vocabulary)
    layer = model.model.layers[0]
    zero = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.mlp.down_proj]
    for module in zero:
        module.weight.data.zero_()
    model.model.embed_tokens.weight.data = one_hot.clone()
    layer.self_attn.v_proj.weight.data = one_hot.clone()
    layer.self_attn.o_proj.weight.data = WEIGHT * one_hot
    model.lm_head.weight.data = SHARPNESS * one_hot
    return model


def counted_logits(ids: Sequence[int], vocabulary: int) -> Tensor:  # (V,) float64
    """What `counting_model` gives after `ids`, from its definition."""
    counts = torch.bincount(torch.tensor(ids), minlength=vocabulary).double()
    seen = WEIGHT * vocabulary**0.5 * counts / len(ids)
    seen[ids[-1]] += 1
    return SHARPNESS * seen / (seen**2).mean().sqrt()


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A token a word or run of punctuation; the words of these texts and, for all others, <other>."""
    split = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    vocabulary = {word: place for place, word in enumerate(["<other>", "<pad>", *words])}
    if len(vocabulary) % 2:  # rotary positions come in pairs
        vocabulary["<unused>"] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<other>"))
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<other>", pad_token="<pad>")


def counting_language_model(texts: Iterable[str]) -> LanguageModel:
    tokenizer = word_tokenizer(texts)
    return LanguageModel(counting_model(len(tokenizer)), tokenizer, {}, compute_tokens=64)
