"""Perplexity on a fixed text: the cheap alarm (DESIGN section 5)."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.records import LossTerm, TokenSequence
from model import LanguageModel


@dataclass(frozen=True)
class Passage:
    """A text as token ids, with the tokenizer's special tokens before it, and how much of it is seen at once."""

    ids: tuple[int, ...]
    window: int  # tokens; each is predicted from at least half as many before it, where the text has them
    sha256: str  # of the file

    def windows(self) -> Iterator[TokenSequence]:
        """The text in strides of half a window; the tokens of a stride are the answer to those before them."""
        stride = max(1, self.window // 2)
        for start in range(0, len(self.ids), stride):
            end = min(start + stride, len(self.ids))
            first = max(0, start + stride - self.window)
            if end > max(start, 1):
                yield TokenSequence(self.ids[first:end], max(start, 1) - first)


def perplexity(model: LanguageModel, passage: Passage) -> float:
    """exp of the mean of -log p over the text's tokens, all but the first; FloatingPointError where not finite."""
    windows = list(passage.windows())
    # a term each, read one at a time: the logits of a window are as large as those of many answers
    losses = model.losses([LossTerm((window,), 1.0) for window in windows])
    tokens = [window.answer_length for window in windows]
    mean = sum(loss * n for loss, n in zip(losses, tokens, strict=True)) / sum(tokens)
    if not mean < math.log(sys.float_info.max):
        raise FloatingPointError(f"the mean loss on the text of evaluation.perplexity is {mean}: the model is wrecked")
    return math.exp(mean)


def read_passage(path: Path, tokenizer: Any, window: int, setting: str) -> Passage:
    """The text file as a passage. ValueError, naming `setting` and the file, where it holds no text to predict."""
    try:
        content = path.read_bytes()
        text = content.decode()
    except OSError as error:
        raise ValueError(f"{setting}: cannot be read ({error.strerror}); name a text file, or set it to off") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{setting}: byte {error.start} is no UTF-8; name a plain text file") from error
    encoded = tokenizer([text], return_special_tokens_mask=True)
    of_text = [place for place, special in enumerate(encoded["special_tokens_mask"][0]) if not special]
    ids = encoded["input_ids"][0][: max(of_text, default=-1) + 1]  # some tokenizers append an end token unasked
    if len(ids) < 2:
        raise ValueError(f"{setting}: the file holds {len(ids)} tokens, too few to predict one; name a longer text")
    return Passage(tuple(ids), window, hashlib.sha256(content).hexdigest())
