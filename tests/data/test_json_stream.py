"""JSON that nests too deep: seen wherever the reader cuts the file, and no text is taken for brackets."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.download import FetchError
from data.json_stream import DEEPEST, HalfCharacterError, NestingError, ShallowJSON
from data.prepare import read_rows
from glue_eval.rows import read_task
from glue_eval.tasks import TASKS
from harness.report.runs import read_json, read_lines
from harness.run.folder import read_run

texts = st.text(st.sampled_from('[]{}"\\/ néü\n'), max_size=12)
values = st.recursive(texts | st.integers(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner))


def read_through(content: str, size: int) -> bytes:
    reader = ShallowJSON(io.BytesIO(content.encode()))
    return b"".join(iter(lambda: reader.read(size), b""))


def nested(depth: int, inside: Any) -> Any:
    for _ in range(depth):
        inside = [inside]
    return inside


@given(value=values, size=st.integers(1, 40), escaped=st.booleans())
def test_only_brackets_outside_of_texts_count(value: Any, size: int, escaped: bool) -> None:
    """The value alone is shallow; within so many brackets that its text brackets would tip it over, it still is."""
    shallow = json.dumps(nested(DEEPEST - depth_of(value), value), ensure_ascii=escaped)
    assert read_through(shallow, size) == shallow.encode()
    with pytest.raises(NestingError, match=f"more than {DEEPEST} deep before byte"):
        read_through(json.dumps(nested(DEEPEST - depth_of(value) + 1, value), ensure_ascii=escaped), size)


def depth_of(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth_of, inner), default=0)


def test_depth_is_that_of_a_place_and_not_the_number_of_brackets() -> None:
    assert read_through("[[]]{}" * 1000, 100) == b"[[]]{}" * 1000


@pytest.mark.parametrize("size", [1, 2, 5, 7, 12, 13, 100])
def test_half_a_character_is_refused_and_a_whole_one_is_not(size: int) -> None:
    """Also where a chunk ends within it; and a backslash of the text before it makes no escape."""
    for whole in (r'"\ud83d\ude00"', r'"\\ud83d"', r'"\\\ud83d\ude00\\ud83d.\uD83D\uDE00"', r'"\ud7ff \ue000"'):
        padded = f'["{"." * 20}", {whole}]'
        assert read_through(padded, size) == padded.encode()
    for half, place in {
        r'"\ud83d"': 1, r'"\uDBFF."': 1, r'"\\\ud83d"': 3, r'"\ud83d\ud83d\ude00"': 1,
        r'"\ud83d\\ude00"': 1, r'"\ud83d\n"': 1,
    }.items():  # fmt: skip
        with pytest.raises(HalfCharacterError, match=rf"^\\u[dD]\w{{3}} at byte {place + 1} is half a character$"):
            read_through(f"[{half}]", size)
        with pytest.raises(HalfCharacterError, match=f" at byte {place + 25} "):
            read_through(f'["{"." * 20}", {half}, "{"." * 20}"]', size)


@pytest.mark.parametrize("start", ["[", '[{"a":', '{"a":'])
def test_deep_files_are_refused_at_once_wherever_they_are_read(tmp_path: Path, start: str) -> None:
    deep = start + "[" * 100_000
    path = tmp_path / "sst2.jsonl"
    path.write_text(deep)
    with pytest.raises(FetchError, match=r"sst2.jsonl, after row 0: broken or cut off \(brackets nest"):
        list(read_rows(path))
    with pytest.raises(ValueError, match=r"sst2.jsonl, line 1: brackets nest too deep; mend the row"):
        read_task(TASKS["sst2"], tmp_path, 0, None)
    with pytest.raises(ValueError, match=r"sst2.jsonl: cannot be read as JSON"):
        read_json(path)
    with pytest.raises(ValueError, match=r"sst2.jsonl, line 1: is no JSON"):
        list(read_lines(path, may_be_cut=False))
    (tmp_path / "run.json").write_text(deep)
    with pytest.raises(ValueError, match=r"run.json: cannot be read"):
        read_run(tmp_path)
