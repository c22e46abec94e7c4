"""Text that second moments are taken over: what its hash knows, its windows, and how files are read."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data import corpus
from data.corpus import Questions, TextFiles, open_corpus
from data.disk import sha256_of
from data.prompts import PromptForm
from data.records import Question
from tests.data.test_stream import byte_level

ASKED = [Question("the capital of Italy is", "Rome"), Question("2 and 2 are", "4")]
CHAT = PromptForm("<user>", "</user>", "\n", brings_special_tokens=True, end=0)


def questions(form: PromptForm = CHAT, answer_tokens: Any = "joint", asked: list[Question] = ASKED) -> Questions:
    return Questions(lambda: asked, form, answer_tokens, "corpus.questions", "bring more")


def token_ids(asked: Questions) -> list[tuple[int, ...]]:
    return [window.ids for window in asked.windows(byte_level(), 8, 1000)]


@pytest.mark.parametrize(
    "other",
    [
        questions(replace(CHAT, before="<User>")),  # another chat template under the same name
        questions(replace(CHAT, after="")),
        questions(replace(CHAT, gap=" ")),
        questions(replace(CHAT, brings_special_tokens=False)),
        questions(asked=ASKED[:1]),
    ],
)
def test_questions_that_make_other_tokens_have_another_hash(other: Questions) -> None:
    assert token_ids(other) != token_ids(questions())
    assert other.sha256 != questions().sha256


def test_answer_tokens_are_in_the_hash() -> None:
    joint, separate = (questions(PromptForm(gap=""), how, [Question("i", "n")]) for how in ("joint", "separate"))
    assert token_ids(joint) != token_ids(separate)
    assert joint.sha256 != separate.sha256


def test_ends_are_left_out_of_tokens_and_hash() -> None:
    other = questions(replace(CHAT, end=None))
    assert token_ids(other) == token_ids(questions())
    assert other.sha256 == questions().sha256


def opened(path: Path) -> TextFiles:
    return open_corpus(str(path), Path("nowhere"), 1000)


def words(path: Path, window: int, tokens: int) -> list[str]:
    """What the windows hold, without the token behind each that nothing is asked of."""
    found = []
    for one in opened(path).windows(byte_level("$A"), window, tokens):
        assert len(one.ids) == one.answer_start + 1 <= window + 1
        found.append(byte_level().decode(one.ids[:-1]))
    return found


def test_windows_end_where_documents_and_the_limit_do(tmp_path: Path) -> None:
    rows = [{"text": text} for text in ("abcdefg", "", "hij", "klmnop")]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert words(path, 3, 100) == ["abc", "def", "g", "hij", "klm", "nop"]
    assert words(path, 3, 8) == ["abc", "def", "g", "h"]
    assert words(path, 3, 7) == ["abc", "def", "g"]
    assert words(path, 100, 12) == ["abcdefg", "hij", "kl"]


def test_no_more_is_read_than_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "TOGETHER", 2)
    monkeypatch.setattr(corpus, "MOST_CHARACTERS", 0)
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "abcd"}\n{"text": "efgh"}\nno JSON\n')
    assert words(path, 4, 8) == ["abcd", "efgh"]
    with pytest.raises(ValueError, match="line 3: not an object"):
        words(path, 4, 9)


def test_a_text_file_is_cut_at_lines_and_a_line_that_is_too_long_by_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "BLOCK", 10)
    path = tmp_path / "text.txt"
    text = "one\ntwo\nthree\nfour\n" + "ü" * 25 + "\nlast"
    path.write_text(text, encoding="utf-8")
    blocks = list(opened(path).documents())
    assert blocks == ["one\ntwo\nthree\n", "four\n" + "ü" * 10, "ü" * 10, "ü" * 5 + "\nlast"]


def test_a_file_of_one_line_is_never_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    class Noted(io.TextIOWrapper):
        def readline(self, size: int = -1) -> str:  # type: ignore[override]
            line = super().readline(size)
            read.append(len(line))
            return line

        def readlines(self, hint: int = -1) -> list[str]:  # type: ignore[override]
            lines = super().readlines(hint)
            read.extend(map(len, lines))
            return lines

    path = tmp_path / "text.txt"
    path.write_bytes(b"ab" * corpus.BLOCK * 2)
    monkeypatch.setattr(
        Path, "open", lambda self, mode="r", **options: Noted(io.BufferedReader(io.FileIO(self)), **options)
    )
    assert "".join(corpus._blocks(path)) == "ab" * corpus.BLOCK * 2
    assert 0 < max(read) <= corpus.BLOCK


@pytest.mark.parametrize("name", ["text.jsonl", "text.JSONL", "text.ndjson", "text", "text.txt"])
def test_json_lines_are_known_by_their_name_or_by_their_first_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('\n{"text": "A first one."}\n{"text": "A second."}\n')
    corpus = open_corpus(str(tmp_path / name), tmp_path, 100)
    assert list(corpus.documents()) == ["A first one.", "A second."]
    bytes_alone = hashlib.sha256(sha256_of(tmp_path / name).encode()).hexdigest()
    assert (corpus.sha256 == bytes_alone) == name.endswith(".jsonl"), "other text, other moments"


def test_text_that_looks_like_json_is_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text('{"a": 1}\nand more\n')
    assert list(open_corpus(str(tmp_path / "text.txt"), tmp_path, 100).documents()) == ['{"a": 1}\nand more\n']


def test_a_broken_line_is_found_before_anything_is_computed(tmp_path: Path) -> None:
    """However late, among the text that will be read; what lies behind it is left alone."""
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "abc def"}\n' * 500 + "nonsense\n")
    with pytest.raises(ValueError, match="line 501"):
        open_corpus(str(path), Path("nowhere"), 1000)
    assert list(open_corpus(str(path), Path("nowhere"), 100).windows(byte_level(), 50, 100))


def test_a_line_of_json_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MOST_BYTES", 1 << 20)
    path = tmp_path / "text.json"
    path.write_text('{"text": "a"}\n' + json.dumps([{"text": "a" * (1 << 20)}]))
    with pytest.raises(ValueError, match=r"text.json, line 2: longer than 1 MiB, .* a line of its own"):
        list(opened(path).documents())


def test_half_a_character_is_refused_by_its_line(tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "whole \\ud83d\\ude00"}\n{"text": "King \\ud83d"}\n')
    with pytest.raises(ValueError, match=r"text.jsonl, line 2: a text that is no Unicode, as if cut"):
        list(opened(file).documents())


def test_every_text_of_the_shipped_samples_is_read(tmp_path: Path) -> None:
    (tmp_path / "passage.txt").write_text("passage")
    for name in corpus.SAMPLES:
        (tmp_path / name).write_text(json.dumps([{"a": name, "b": ["x", {"c": "y", "d": 1}]}, {"a": "z"}]))
    shipped = open_corpus(None, tmp_path, 1000)
    assert list(shipped.documents()) == [
        "passage",
        *(text for name in corpus.SAMPLES for text in (f"{name}\nx\ny", "z")),
    ]
    assert shipped.is_shipped
    before = shipped.sha256
    (tmp_path / "passage.txt").write_text("other")
    assert open_corpus(None, tmp_path, 1000).sha256 != before
