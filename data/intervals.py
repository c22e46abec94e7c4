"""Bootstrap intervals from histograms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

CELLS = 4_000_000  # numbers drawn at once


def blocks(resamples: int, width: int) -> list[int]:
    """Into how many rows at a time to cut `resamples` rows of `width` numbers: at most `CELLS` numbers each."""
    size = max(1, min(resamples, CELLS // width))
    return [min(size, resamples - start) for start in range(0, resamples, size)]


def bootstrap_interval(
    estimate: float,
    counts: np.ndarray,  # (...) how often each value was observed
    measure: Callable[[np.ndarray], np.ndarray],  # (R, ...) counts -> (R,) estimates
    resamples: int,
    seed: int,
) -> tuple[float, float]:
    """95% percentile bootstrap interval of an estimate, which lies within it.

    Resampling observations with replacement draws their histogram from a multinomial: exact, and what it costs does
    not grow with them. An estimate may be summed in another order than those of the resamples and, where all of these
    are equal, lie a rounding error beside them.
    """
    n = int(counts.sum())
    rng = np.random.default_rng(seed)
    drawn = (rng.multinomial(n, counts.ravel() / n, size=size) for size in blocks(resamples, counts.size))
    estimates = np.concatenate([measure(one.reshape(-1, *counts.shape)) for one in drawn])
    low, high = np.percentile(estimates, [2.5, 97.5])
    return min(float(low), estimate), max(float(high), estimate)
