"""What a terminal cannot show is no reason to fail."""

from __future__ import annotations

import io

import pytest

from harness.run import show_any_text


def test_a_character_that_the_encoding_lacks_is_a_question_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="latin-1"))
    with pytest.raises(UnicodeEncodeError):
        print("Köln …", flush=True)
    show_any_text()
    print("Köln …", flush=True)
    assert written.getvalue().decode("latin-1") == "Köln ?\n"
