"""Perplexity against its definition, window by window, and the texts it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from harness.evaluation.perplexity import Passage, perplexity, read_passage
from harness.job.plan import PASSAGE
from model import LanguageModel
from tests.conftest import tiny_gpt2, tiny_llama

IDS = tuple(torch.randint(0, 256, (300,), generator=torch.Generator().manual_seed(1)).tolist())


def directly(model: Any, ids: tuple[int, ...], window: int) -> float:
    """As transformers' documentation has it: windows a stride apart, of which only new tokens count."""
    total, count, seen = 0.0, 0, 0
    for begin in range(0, len(ids), window // 2):
        end = min(begin + window, len(ids))
        labels = torch.tensor([ids[begin:end]])
        labels[:, : -(end - seen)] = -100
        new = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids[begin:end]]), labels=labels).loss
        total, count, seen = total + float(loss) * new, count + new, end
        if end == len(ids):
            break
    assert count == len(ids) - 1
    return math.exp(total / count)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize(
    ("tokens", "window"), [(300, 64), (256, 64), (257, 64), (31, 64), (33, 64), (300, 256), (2, 8)]
)
def test_it_is_what_a_direct_computation_gives(make: Any, tokens: int, window: int) -> None:
    plain = make()
    found = perplexity(LanguageModel(plain, None, {}), Passage(IDS[:tokens], window, ""))
    assert found == pytest.approx(directly(plain, IDS[:tokens], window), rel=1e-5)


@pytest.mark.parametrize(("tokens", "window"), [(300, 64), (300, 7), (65, 64), (5, 2), (2, 512)])
def test_every_token_but_the_first_is_predicted_once_from_half_a_window_at_least(tokens: int, window: int) -> None:
    ids = tuple(range(tokens))
    windows = list(Passage(ids, window, "").windows())
    assert [token for w in windows for token in w.ids[w.answer_start :]] == list(range(1, tokens))
    for w in windows:
        assert len(w.ids) <= window
        first = w.ids[w.answer_start]
        assert w.answer_start >= min(first, window // 2)


def test_a_model_without_preferences_is_as_perplexed_as_its_vocabulary_is_large() -> None:
    plain = tiny_llama()
    plain.lm_head.weight.data.zero_()
    assert perplexity(LanguageModel(plain, None, {}), Passage(IDS, 64, "")) == pytest.approx(260, rel=1e-5)


def test_a_wrecked_model_is_named() -> None:
    plain = tiny_llama()
    plain.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="is nan"):
        perplexity(LanguageModel(plain, None, {}), Passage(IDS, 64, ""))


def test_the_shipped_passage(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    passage = read_passage(PASSAGE, byte_tokenizer, 64, "evaluation.perplexity=passage")
    assert byte_tokenizer.decode(passage.ids) == PASSAGE.read_text(encoding="utf-8")
    assert len(passage.ids) > 5000


def test_special_tokens_stand_before_the_text_and_not_after_it(tmp_path: Path) -> None:
    class Marked:
        def __call__(self, text: list[str], **_: Any) -> dict[str, Any]:
            return {"input_ids": [[1, 7, 8, 2]], "special_tokens_mask": [[1, 0, 0, 1]]}

    path = tmp_path / "text.txt"
    path.write_text("x")
    assert read_passage(path, Marked(), 8, "").ids == (1, 7, 8)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read (No such file"),
        (b"\xff\xfe\x00", "byte 0 is no UTF-8"),
        (b"a", "holds 1 tokens"),
        (b"", "0 tokens"),
    ],
)
def test_a_text_that_cannot_serve(
    tmp_path: Path, content: bytes | None, words: str, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^evaluation\.perplexity=") as caught:
        read_passage(path, byte_tokenizer, 64, f"evaluation.perplexity={path}")
    assert str(caught.value).startswith(f"evaluation.perplexity={path}: ")
    assert words in str(caught.value)
