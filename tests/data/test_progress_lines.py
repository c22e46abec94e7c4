"""The bars of a run, as lines: what they are called, how often they speak, and what they make of time."""

from __future__ import annotations

import logging

import pytest

from data import progress as bars
from data.progress import progress_bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> list[float]:
    """The time now; log lines are kept."""
    now = [0.0]
    monkeypatch.setattr(bars, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO)
    return now


def test_without_a_terminal_progress_is_a_few_clean_log_lines(
    clock: list[float], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bar("editing", 200, "turns", keep=True) as bar:
        for turn in range(200):
            clock[0] += 2.0
            bar.advance(1, f"{100 * (turn + 1):,} edits")
    lines = caplog.messages
    assert capsys.readouterr() == ("", "")
    assert lines[0] == "editing: 1 of 200 turns, 100 edits, 6 min 38 s left"  # 199 turns of 2 s
    assert lines[-1] == "editing: 200 of 200 turns, 20,000 edits, done in 6 min 40 s"
    assert 10 <= len(lines) <= 13


def test_slow_turns_are_reported_by_time(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with progress_bar("editing", 20_000, "turns", keep=True) as bar:
        for _ in range(100):
            clock[0] += 30.0
            bar.advance()
    assert 45 <= len(caplog.messages) <= 55


def test_a_resumed_run_judges_its_speed_by_its_own_turns(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with progress_bar("editing", 100, "turns", done=90, keep=True) as bar:
        clock[0] += 3.0
        bar.advance()
    assert caplog.messages == ["editing: 91 of 100 turns, 27 s left"]


def test_an_evaluation_and_a_training_are_called_what_they_are(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    with progress_bar("evaluating base model", 4, "questions") as bar:
        bar.advance(4)
    with progress_bar("training the editor", 1, "turns", keep=True) as bar:
        bar.advance(1, "loss 1.000")
    assert [line.split(", done")[0] for line in caplog.messages] == [
        "evaluating base model: 4 of 4 questions",
        "training the editor: 1 of 1 turns, loss 1.000",
    ]
