"""The runs that docs/records keeps as numbers make the tables that the pages show."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.report.leaderboard import board_of
from harness.report.leaderboard_files import markdown
from harness.report.runs import open_runs
from tests.conftest import ROOT

RECORDS = ROOT / "docs" / "records"
PAGES = {"side_by_side": "results.md", "long": "leaderboard.md"}


def test_each_folder_has_its_page() -> None:
    assert {path.name for path in RECORDS.iterdir()} == set(PAGES)


@pytest.mark.parametrize("folder", PAGES)
def test_the_tables_of_a_page_are_those_of_the_runs_beside_it(folder: str) -> None:
    board = board_of(open_runs([RECORDS / folder]))
    assert not board.left_out
    page = (ROOT / "docs" / PAGES[folder]).read_text(encoding="utf-8").splitlines()
    lines = [line for line in markdown(board, []).splitlines() if line.startswith("|")]
    assert len(lines) > 3
    assert [line for line in lines if line not in page] == []


STAGES = {"base", "eval", "final", "retention", "retention_final"}
WORDS = {*STAGES, "edit", "warm_up", "meta_train", "meta_valid", "ES", "GS", "LS", "PS", "MS"}
"""Stages, phases and protocols."""


@pytest.mark.parametrize("path", sorted(RECORDS.rglob("*.gz")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_text_is_among_the_numbers(path: Path) -> None:
    """No sentence of a data set, and none of a model."""
    found = {word for line in gzip.decompress(path.read_bytes()).splitlines() for word in texts(json.loads(line))}
    assert found <= WORDS


@pytest.mark.parametrize("path", sorted(RECORDS.rglob("*.json")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_path_of_a_machine_is_among_the_settings(path: Path) -> None:
    assert not [word for word in texts(json.loads(path.read_text())) if "/" in word]


def texts(value: Any) -> Iterator[str]:
    """The texts in it, but for its keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts(item)
