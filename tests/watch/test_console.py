"""The result table fits 80 columns and hides nothing."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from harness.watch.console import as_number, show_results

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")  # everything below space but the line feed


def score(mean: float, width: float = 0.02, n: int = 1000) -> dict[str, Any]:
    return {"mean": mean, "low": mean - width, "high": mean + width, "n": n}


RESULTS: dict[str, Any] = {
    "base": {"ES": score(0.206), "LS": score(0.244), "ES_seq": score(0.02), "perplexity": 18.25},
    "final": {
        "LS": score(1.0, 0.0),
        "ES": score(0.633),
        "ES_seq": score(0.41),
        "MS": score(0.3),
        "perplexity": 19.5,
        "LS_kl": score(0.0123, 0.001),
    },
    "cost": {
        "turns": 55,
        "warm_up_turns": 5,
        "edits": 5000,
        "seconds_per_turn": {"capture": 3.1, "update": 0.28, "apply": 0.03, "total": 3.42},
        "seconds": {"evaluation": 62.4},
        "peak_memory": {"resident_bytes": 2 * 2**30},
    },
}


def shown(results: dict[str, Any], folder: str = "outputs/run") -> str:
    stream = io.StringIO()
    show_results(results, Path(folder), stream)
    return stream.getvalue()


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


# --- the table -----------------------------------------------------------------------------------------------------


def test_every_number_is_shown_whole_in_80_columns_without_colour() -> None:
    text = shown(RESULTS)
    assert not CONTROL.search(text)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    rows = {line.split()[0]: " ".join(line.split()) for line in text.splitlines() if line.strip()}
    assert rows["ES"] == "ES efficacy 20.6 [18.6, 22.6] 63.3 [61.3, 65.3] +42.7 1,000"
    assert rows["LS"] == "LS specificity 24.4 [22.4, 26.4] 100.0 [100.0, 100.0] +75.6 1,000"
    assert rows["MS"] == "MS multi-hop - 30.0 [28.0, 32.0] 1,000"
    assert rows["perplexity"] == "perplexity 18.250 19.500 +1.250"  # no share of something: not in percent
    assert rows["LS_kl"] == "LS_kl - 0.012 [0.011, 0.013] 1,000"
    assert rows["turns"] == "turns 55, 5 of them warm-up"
    assert rows["a"] == "a turn 3.42 s (capture 3.10 s, update 0.28 s, apply 0.03 s)"
    assert rows["peak"] == "peak memory resident 2.00 GiB"
    trained = shown({**RESULTS, "cost": {**RESULTS["cost"], "training_turns": 24, "training_seconds": 125.4}})
    assert "2 min 05 s" in next(line for line in trained.splitlines() if line.strip().startswith("training "))


def test_what_the_model_says_comes_first_then_scores_in_the_papers_order() -> None:
    first_words = [line.split()[0] for line in shown(RESULTS).splitlines() if line.strip()]
    ours = [word for word in first_words if word in RESULTS["final"]]
    assert ours == ["ES", "LS", "MS", "ES_seq", "LS_kl", "perplexity"]


def test_generated_answers_locality_and_forgetting_have_their_lines() -> None:
    """At their widest: every share 100%."""
    whole = score(1.0, 0.0)
    forms = ("", "_seq", "_gen", "_contains")
    final = {name + form: whole for name in ("ES", "GS", "LS", "PS", "MS") for form in forms}
    retention = {name: {"immediate": whole, "final": whole, "forgetting": whole, "by_age": {}} for name in ("ES", "GS")}
    text = shown({"base": final, "final": final | {"LS_agree": whole, "perplexity": 9.5}, "retention": retention})
    assert max(map(len, text.splitlines())) <= 80
    rows = {line.split()[0]: " ".join(line.split()) for line in text.splitlines() if line.strip()}
    assert rows["ES_gen"].startswith("ES_gen says it 100.0 [100.0, 100.0] 100.0 [100.0, 100.0] +0.0")
    assert rows["LS_contains"].startswith("LS_contains 100.0")
    assert rows["LS_agree"] == "LS_agree as base - 100.0 [100.0, 100.0] 1,000"
    assert rows["GS_forgetting"] == "GS_forgetting - 100.0 [100.0, 100.0] 1,000"
    order = [name for name in rows if name in ("MS", "ES_seq", "ES_gen", "ES_contains", "LS_agree", "ES_forgetting")]
    assert order == ["ES_gen", "MS", "ES_seq", "ES_contains", "LS_agree", "ES_forgetting"]


def test_a_number_keeps_its_interval_on_its_line_where_names_must_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "66")
    text = shown(RESULTS)
    assert "generalization" in shown({"final": {"GS": score(1.0, 0.0)}})
    assert "24.4 [22.4, 26.4] 100.0 [100.0, 100.0]" in " ".join(text.split())
    assert [line for line in text.splitlines() if line.count("[") != line.count("]")] == []


def test_a_cost_nobody_described_is_shown_under_its_own_name() -> None:
    assert re.search(r"tokens read +123", shown(RESULTS | {"cost": {"tokens_read": 123}}))


def test_the_run_folder_is_never_cut_or_broken() -> None:
    folder = "outputs/" + "/".join(["a-rather-long-name"] * 8)
    assert folder in shown(RESULTS, folder)


def test_what_is_missing_is_left_out() -> None:
    text = shown({"final": {"ES": score(0.5)}})
    assert "turns" not in text
    assert "GS" not in text


# --- examples ------------------------------------------------------------------------------------------------------

EXAMPLES = [
    {"probe": "edit", "question": "Who wrote\nFaust?", "wanted": "Kafka", "base": " Goethe", "edited": " Kafka, " * 40},
    {"probe": "rephrase", "question": "Of " + "what " * 40, "wanted": "Kafka", "base": "", "edited": "\x1b[2J[b]K[/b]"},
]


def test_examples_follow_the_scores_each_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "examples.json").write_text(json.dumps(EXAMPLES))
    text = shown(RESULTS, str(tmp_path))
    assert text.index("perplexity") < text.index("what the model says") < text.index("run folder")
    assert not CONTROL.search(text)
    lines = text[text.index("what the model says") : text.index("run folder")].splitlines()
    assert max(map(len, lines)) <= 80
    edit = next(line for line in lines if "Faust" in line)
    assert edit.split()[:5] == ["Who", "wrote", "Faust?", "Kafka", "Goethe"]
    assert edit.rstrip().endswith("…"), "a long text is cut"
    rephrase = next(line for line in lines if "Of what" in line)
    assert "(nothing)" in rephrase
    assert "[2J[b]K" in rephrase, "as it was written, without what a terminal obeys"
    order = [line.strip() for line in lines if line.strip() in ("edited questions", "rephrases of them")]
    assert order == ["edited questions", "rephrases of them"]


def test_a_run_without_examples_shows_none(tmp_path: Path) -> None:
    assert "what the model says" not in shown(RESULTS, str(tmp_path))


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [("ES_gen", 0.8404, "84.0"), ("perplexity", 38.9127, "38.913"), ("perplexity", 2.3931e10, "2.39e+10")],
)
def test_a_score_has_few_digits_however_large(name: str, value: float, text: str) -> None:
    assert as_number(name, value) == text
