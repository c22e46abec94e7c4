"""Editors whose turns may take minutes say how far they are."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from model import LanguageModel
from tests.commands import Commands, save_tiny_model, short_run, zsre_row

MORE = {"stableedit": ("editor.passes=3", "model.lr=1e-6"), "rome": (), "memit": (), "ft_m": (), "locft_bf": ()}
"""An editor of each way to take long; with so small a step no fact leaves before the last pass."""


@pytest.fixture
def commands(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> Commands:
    made = Commands(tmp_path, save_tiny_model(tmp_path / "base", byte_tokenizer))
    made.write("eval", [zsre_row(i) for i in range(3)])
    made.write("train", [zsre_row(i) for i in range(50, 53)])
    return made


@pytest.mark.parametrize("editor", [*MORE, "grace", "wise"])
def test_a_turn_says_how_far_it_is(commands: Commands, monkeypatch: pytest.MonkeyPatch, editor: str) -> None:
    heard: list[float] = []
    tell = LanguageModel.tell

    def noted(model: LanguageModel, share: float) -> None:
        assert model._listener is not None, "within a turn the bar listens"
        heard.append(share)
        tell(model, share)

    monkeypatch.setattr(LanguageModel, "tell", noted)
    commands(*short_run(editor), *MORE.get(editor, ()))
    assert len(heard) >= 2
    edits = heard[heard.index(1.0) + 1 :] if editor == "stableedit" else heard  # behind the turn of warm-up
    assert all(0 <= share <= 1 for share in heard)
    assert all(one < other for one, other in pairwise(edits))
