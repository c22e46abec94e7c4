"""Accuracy, weighted F1 and Matthews correlation, from counts of (label, answer), with bootstrap intervals.

Letters: K labels, R resamples. An answer is one of the K labels, or, in column K, none of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.intervals import bootstrap_interval

Metrics = dict[str, dict[str, float | int]]


def confusion(labels: Sequence[int], answers: Sequence[int | None], kinds: int) -> np.ndarray:  # (K, K + 1)
    """How often each label met each answer; None counts as none of them."""
    counts = np.zeros((kinds, kinds + 1), dtype=np.int64)
    for label, answer in zip(labels, answers, strict=True):
        counts[label, kinds if answer is None else answer] += 1
    return counts


def accuracy(
    counts: np.ndarray,  # (..., K, K + 1)
) -> np.ndarray:  # (...)
    """Right answers over rows."""
    return _right(counts).sum(-1) / counts.sum((-2, -1))


def weighted_f1(
    counts: np.ndarray,  # (..., K, K + 1)
) -> np.ndarray:  # (...)
    """Mean over labels of F1 = 2 right / (rows of the label + answers with it), weighted by the label's rows.

    A label that is neither asked for nor answered has no weight.
    """
    support = counts.sum(-1)
    either = support + counts[..., :-1].sum(-2)
    f1 = np.divide(2 * _right(counts), either, out=np.zeros(either.shape), where=either > 0)
    return (f1 * support).sum(-1) / support.sum(-1)


def matthews(
    counts: np.ndarray,  # (..., K, K + 1)
) -> np.ndarray:  # (...)
    """Correlation of labels and answers, for any number of them (R_K of Gorodkin 2004).

    (c s - sum_k t_k p_k) / sqrt((s^2 - sum p_k^2) (s^2 - sum t_k^2)) for s rows, c right, t_k rows of label k, p_k
    answers k. No answer is an answer of its own. 0 where all labels, or all answers, are the same.
    """
    asked, answered = counts.sum(-1).astype(float), counts.sum(-2).astype(float)
    rows = asked.sum(-1)
    above = _right(counts).sum(-1) * rows - (asked * answered[..., :-1]).sum(-1)
    below = np.sqrt((rows**2 - (answered**2).sum(-1)) * (rows**2 - (asked**2).sum(-1)))
    return np.divide(above, below, out=np.zeros(below.shape), where=below > 0)


def _right(counts: np.ndarray) -> np.ndarray:  # (..., K)
    return np.diagonal(counts, axis1=-2, axis2=-1)


METRICS = {"accuracy": accuracy, "f1": weighted_f1, "mcc": matthews}


def summary(
    counts: np.ndarray,  # (K, K + 1)
    resamples: int,
    seed: int,
) -> Metrics:
    """Each metric with its 95% percentile bootstrap interval over rows."""
    found: Metrics = {}
    for name, metric in METRICS.items():
        mean = float(metric(counts))
        low, high = bootstrap_interval(mean, counts, metric, resamples, seed)
        found[name] = {"mean": mean, "low": low, "high": high, "n": int(counts.sum())}
    return found
