"""Accuracy, weighted F1, Matthews correlation: against their definitions, and do their intervals cover."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glue_eval.metrics import accuracy, confusion, matthews, summary, weighted_f1

PAIRS = st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0, 1, 2, None])), min_size=1, max_size=30)


def f1_by_definition(labels: list[int], answers: list[int | None]) -> float:
    total = 0.0
    for kind in set(labels):
        right = sum(a == b == kind for a, b in zip(labels, answers, strict=True))
        precision = right / answers.count(kind) if answers.count(kind) else 0.0
        recall = right / labels.count(kind)
        f1 = 2 * precision * recall / (precision + recall) if right else 0.0
        total += f1 * labels.count(kind) / len(labels)
    return total


def matthews_by_definition(labels: list[int], answers: list[int | None]) -> float:
    """The correlation of one-hot indicators, no answer being a fourth kind."""
    said = [3 if answer is None else answer for answer in answers]
    x, y = np.eye(4)[labels], np.eye(4)[said]

    def covariance(a: np.ndarray, b: np.ndarray) -> float:
        return float(((a - a.mean(0)) * (b - b.mean(0))).sum())

    below = math.sqrt(covariance(x, x) * covariance(y, y))
    return covariance(x, y) / below if below > 1e-12 else 0.0


@given(PAIRS)
def test_each_is_what_its_definition_says(pairs: list[tuple[int, int | None]]) -> None:
    labels, answers = [label for label, _ in pairs], [answer for _, answer in pairs]
    counts = confusion(labels, answers, 3)
    assert float(accuracy(counts)) == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    assert float(weighted_f1(counts)) == pytest.approx(f1_by_definition(labels, answers))
    assert float(matthews(counts)) == pytest.approx(matthews_by_definition(labels, answers), abs=1e-9)


def test_on_paper() -> None:
    """Six rows: 3 true positives, 1 false positive, 1 false negative, 1 true negative."""
    counts = confusion([1, 1, 1, 0, 1, 0], [1, 1, 1, 1, 0, 0], 2)
    assert counts.tolist() == [[1, 1, 0], [1, 3, 0]]
    assert float(accuracy(counts)) == pytest.approx(4 / 6)
    assert float(weighted_f1(counts)) == pytest.approx((2 * 0.5 + 4 * 0.75) / 6)
    assert float(matthews(counts)) == pytest.approx((3 * 1 - 1 * 1) / math.sqrt(4 * 4 * 2 * 2))


def test_answers_that_are_all_the_same_correlate_with_nothing() -> None:
    assert float(matthews(confusion([0, 1, 0, 1], [1, 1, 1, 1], 2))) == 0.0
    assert float(matthews(confusion([1, 1], [1, 1], 2))) == 0.0


def test_what_is_no_answer_is_wrong_and_belongs_to_no_label() -> None:
    found = summary(confusion([0, 0, 1, 1], [0, None, 1, None], 2), 100, 0)
    assert found["accuracy"]["mean"] == 0.5
    assert found["f1"]["mean"] == pytest.approx(2 / 3)  # precision 1, recall 1/2
    assert found["accuracy"]["n"] == 4


def test_intervals_cover() -> None:
    """95% intervals hold the truth in about 95% of experiments: 400 of 100 rows each."""
    rng = np.random.default_rng(0)
    truth = np.array([[0.35, 0.1, 0.05], [0.1, 0.3, 0.1]])  # of (label, answer)
    exact = {"accuracy": accuracy(truth), "f1": weighted_f1(truth), "mcc": matthews(truth)}
    held = dict.fromkeys(exact, 0)
    for seed in range(400):
        found = summary(rng.multinomial(100, truth.ravel()).reshape(truth.shape), 400, seed)
        for name, value in exact.items():
            held[name] += found[name]["low"] <= float(value) <= found[name]["high"]
    assert all(0.91 <= count / 400 <= 0.985 for count in held.values()), held
