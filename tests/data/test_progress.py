"""Progress is a bar on a terminal, which log lines do not tear, and clean, few lines elsewhere."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from itertools import pairwise

import pytest

from data import progress
from data.progress import duration, progress_bar


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> list[float]:
    """The time now; log lines are kept."""
    now = [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO)
    return now


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """What stderr is, for as long as the bars are wanted there; wide enough for whole ones."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    return Terminal()


@contextmanager
def logger_on(terminal: Terminal) -> Iterator[logging.Logger]:
    """stderr is the terminal, and a logger has a handler of its own on it, made before the bars.

    No fixture: pytest puts its own stderr into place between those and the test.
    """
    logger = logging.getLogger("tests.progress.terminal")
    logger.handlers = [logging.StreamHandler(terminal)]
    with redirect_stderr(terminal):
        yield logger
    logger.handlers = []


def lines_of(terminal: Terminal) -> list[str]:
    """All that was ever to be seen on a line, without control characters."""
    plain = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", terminal.getvalue())
    return [line.strip() for line in re.split(r"[\r\n]", plain) if line.strip()]


# --- lines ---------------------------------------------------------------------------------------------------------


def test_what_is_quick_has_its_first_and_its_last_line(
    clock: list[float], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bar("editing", 10, "turns") as bar:
        for _ in range(10):
            clock[0] += 0.1
            bar.advance()
    assert caplog.messages == ["editing: 1 of 10 turns, 0.90 s left", "editing: 10 of 10 turns, done in 1.00 s"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("seconds", [0.1, 1.0, 7.0, 20.0])
def test_there_is_no_more_than_a_line_in_ten_seconds_and_one_at_the_end(
    clock: list[float], caplog: pytest.LogCaptureFixture, seconds: float
) -> None:
    times: list[float] = []
    with progress_bar("editing", 30, "turns") as bar:
        for _ in range(30):
            clock[0] += seconds
            before = len(caplog.messages)
            bar.advance()
            times += [clock[0]] * (len(caplog.messages) - before)
    assert times[0] == seconds
    assert times[-1] == clock[0]
    assert all(later - earlier >= 10 for earlier, later in pairwise(times[:-1]))
    assert all(later - earlier <= 80 for earlier, later in pairwise(times))


def test_a_long_unit_says_how_far_it_is(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    """A line a minute, with the time that is left judged by what is done of the unit; none before it has begun."""
    with progress_bar("editing", 4, "turns") as bar:
        for share in (0.0, 0.1, 0.2, 0.3, 0.5):
            clock[0] += 40
            bar.within(share)
        clock[0] += 40
        bar.advance(1, "100 edits")
        clock[0] += 60
        bar.within(0.5)
    assert caplog.messages == [
        "editing: 0 of 4 turns, 10% of the next, 52 min 00 s left",
        "editing: 0 of 4 turns, 30% of the next, 32 min 53 s left",
        "editing: 1 of 4 turns, 100 edits, 12 min 00 s left",
        "editing: 1 of 4 turns, 100 edits, 50% of the next, 8 min 20 s left",
    ]


def test_a_long_unit_is_seen_beside_the_bar(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    with logger_on(terminal), progress_bar("editing", 4, "turns") as bar:
        for second, share in enumerate((0.1, 0.2, 0.3)):
            now[0] = 0.4 * second
            bar.within(share)
        bar.advance(1, "100 edits")
        now[0] = 9.0
        bar.within(0.5)
    seen = " ".join(lines_of(terminal))
    assert "10% of the next" in seen
    assert "20% of the next" not in seen, "too soon to look again"
    assert "30% of the next" in seen
    assert "100 edits, 50% of the next" in seen


def test_the_end_is_told_once(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    """Who counts in steps that may be empty comes to the end and then reports that nothing was left."""
    with progress_bar("writing", 4, "tokens") as bar:
        for step in (4, 0, 0):
            clock[0] += 20
            bar.advance(step)
    assert [line for line in caplog.messages if "done in" in line] == ["writing: 4 of 4 tokens, done in 20 s"]


def test_work_that_is_often_short_is_spoken_of_when_it_is_long(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    for seconds in (2.0, 4.0):
        assert caplog.messages == []
        with progress_bar("writing", 4, "tokens", quiet=True) as bar:
            for _ in range(4):
                clock[0] += seconds
                bar.advance()
    assert caplog.messages == ["writing: 3 of 4 tokens, 4.00 s left", "writing: 4 of 4 tokens, done in 16 s"]


def test_bytes_are_scaled_and_their_total_may_be_unknown(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with progress_bar("zsre.json", None, "B", scale=True) as bar:
        clock[0] += 1.0
        bar.advance(5_000_000)
        clock[0] += 60.0
        bar.restart(200_000_000, 100_000_000)
        clock[0] += 1.0
        bar.advance(20_000_000, "again")
    assert caplog.messages == ["zsre.json: 5.00MB", "zsre.json: 120M of 200MB, again, 4.00 s left"]


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


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.25 s"), (42, "42 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7805, "2 h 10 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# --- bars ----------------------------------------------------------------------------------------------------------


def test_log_records_do_not_tear_the_bar(terminal: Terminal) -> None:
    with logger_on(terminal) as logger, progress_bar("editing", 3, "turns", keep=True) as bar:
        for turn in range(3):
            bar.advance(1, f"{1000 * (turn + 1):,} edits, edit")
            logger.warning("record %d", turn)
        with progress_bar("evaluating turn 3", 10, "records") as evaluation:
            evaluation.advance(10)
            logger.warning("between")
        logger.warning("after")
    lines = lines_of(terminal)
    assert {*(f"record {turn}" for turn in range(3)), "between", "after"} <= set(lines)  # each alone on its line
    assert re.fullmatch(r"editing: 100%\|█+\| 3/3 \[\d\d:\d\d<\d\d:\d\d, .* turns.*, 3,000 edits, edit\]", lines[-1])
    assert any(line.startswith("evaluating turn 3:") for line in lines)
    assert terminal.getvalue().endswith("\n")


def test_log_handlers_are_given_back_also_after_an_error(terminal: Terminal) -> None:
    with logger_on(terminal) as logger:
        own, seen = list(logger.handlers), []

        def crash() -> None:
            with progress_bar("editing", 3, "turns"):
                seen.extend(logger.handlers)
                raise RuntimeError("boom")

        with pytest.raises(RuntimeError, match="boom"):
            crash()
        assert seen != own
        assert logger.handlers == own


def test_a_download_that_goes_on_shows_all_of_it(terminal: Terminal) -> None:
    with redirect_stderr(terminal), progress_bar("zsre.json", None, "B", scale=True, keep=True) as bar:
        bar.restart(200_000_000, 100_000_000)
        bar.advance(100_000_000)
    assert re.match(r"zsre.json: 100%\|█+\| 200M/200M \[", lines_of(terminal)[-1])


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    caplog.set_level(logging.INFO)
    with redirect_stderr(terminal), progress_bar("evaluating base model", 4, "questions") as bar:
        bar.advance(4)
    assert terminal.getvalue() == ""
    assert caplog.messages[0].startswith("evaluating base model: 4 of 4 questions")
