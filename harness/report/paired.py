"""Are two configurations different? Averages and paired statistics over the records their runs were scored on."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from data.intervals import blocks, bootstrap_interval
from data.records import RecordScore

RESAMPLES: Final = 10_000  # of the bootstrap, and sign flips of the test: what they tell of p ends at 1 / 10,001

Column = tuple[np.ndarray, np.ndarray]  # (rows of the data file, sorted, each once; a number of each)
Scores = dict[str, Column]  # of one run


@dataclass(frozen=True)
class Average:
    """The mean over records, and over the runs that asked about them."""

    mean: float
    low: float  # 95% percentile bootstrap over records, each with all that its runs scored
    high: float
    n: int  # records


@dataclass(frozen=True)
class Difference(Average):
    """What a configuration scored more than another on the records that both were asked about."""

    p: float | None  # two-sided, of a sign-flip test over records; None where no record differs: nothing to test


def average(runs: Sequence[Scores]) -> dict[str, Average]:
    """Each score of the runs together, records resampled alike in all of them."""
    names = dict.fromkeys(name for scores in runs for name in scores)
    return {name: Average(*_mean(*_by_record([one[name] for one in runs if name in one]))) for name in names}


def compare(pairs: Sequence[tuple[Scores, Scores]]) -> dict[str, Difference]:
    """Each score's difference, second minus first, over rows that both runs of a pair scored; empty without any."""
    names = dict.fromkeys(name for first, second in pairs for name in first if name in second)
    found = {
        name: _by_record([_shared(a[name], b[name]) for a, b in pairs if name in a and name in b]) for name in names
    }
    return {name: paired_difference(sums, counts) for name, (sums, counts) in found.items() if len(sums)}


def mean_difference(first: Column, second: Column) -> float | None:
    """Second minus first, the mean over the rows that both have; None without any."""
    rows, differences = _shared(first, second)
    return float(differences.mean()) if len(rows) else None


def _shared(first: Column, second: Column) -> Column:
    rows, here, there = np.intersect1d(first[0], second[0], assume_unique=True, return_indices=True)
    return rows, second[1][there] - first[1][here]


def _by_record(columns: Sequence[Column]) -> tuple[np.ndarray, np.ndarray]:
    """For each row of the data file, the sum of its numbers and how many there are."""
    rows, values = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    _, place = np.unique(rows, return_inverse=True)
    return np.bincount(place, values), np.bincount(place)


def paired_difference(
    sums: np.ndarray,  # (records,) of a record's differences, over its pairs of runs
    counts: np.ndarray,  # (records,) of those pairs
    seed: int = 0,
) -> Difference:
    """The mean difference with a 95% bootstrap interval, and the p-value of a sign-flip test, both over records.

    Null hypothesis: each record's sum could as well carry the other sign. p = (1 + flips with |total| at least the
    observed) / (1 + flips), valid at any n; or, where it is smaller, as below what so
    many flips can tell, Hoeffding's bound on the exact share (1963, theorem 2): 2 exp(-total^2 / (2 sum of squares)).
    """
    if not _rounded(sums).any():
        return Difference(0.0, 0.0, 0.0, len(sums), None)
    flipped = _sign_flip_p(sums, np.random.default_rng([seed, 1]))
    bound = 2 * math.exp(-(sums.sum() ** 2) / (2 * (sums**2).sum()))
    return Difference(*_mean(sums, counts, seed), min(flipped, bound))


def _mean(sums: np.ndarray, counts: np.ndarray, seed: int = 0) -> tuple[float, float, float, int]:
    """(mean, low, high, records). Records take few values, so the bootstrap draws their histogram, a multinomial."""
    values, n_each = np.unique(np.stack([_rounded(sums), counts]), axis=1, return_counts=True)  # (2, values)
    mean = float(sums.sum() / counts.sum())
    low, high = bootstrap_interval(mean, n_each, lambda drawn: np.divide(*(drawn @ values.T).T), RESAMPLES, seed)
    return mean, low, high, len(sums)


def _sign_flip_p(sums: np.ndarray, rng: np.random.Generator) -> float:
    """Flips, too, are drawn as a histogram: a binomial for each size."""
    sizes, n_each = np.unique(np.abs(_rounded(sums)), return_counts=True)
    observed = abs(sums.sum()) - 1e-9  # rounding must not make a tie a miss
    reached = 0
    for block in blocks(RESAMPLES, len(sizes)):
        flipped = (2 * rng.binomial(n_each, 0.5, size=(block, len(n_each))) - n_each) @ sizes
        reached += int((np.abs(flipped) >= observed).sum())
    return (1 + reached) / (1 + RESAMPLES)


def _rounded(values: np.ndarray) -> np.ndarray:
    """2/3 - 1/3 and 1/3 - 0 are the same difference."""
    return np.round(values, 12)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being several (Holm 1979): the chance of any false alarm among them stays at the level."""
    order = np.argsort(p_values)
    scaled = np.arange(len(order), 0, -1) * np.array(p_values)[order]
    return list(np.maximum.accumulate(scaled.clip(max=1.0))[order.argsort()].tolist())


def record_scores(lines: Iterable[Mapping[str, Any]], stage: str) -> Scores:
    """From records.jsonl, what the model of that stage scored on each record, under the names that scores have.

    KL, which is no share, is not tested.
    """
    found: dict[str, tuple[array[int], array[float]]] = {}
    for line in lines:
        if line.get("stage") != stage or not line.get("tokens"):
            continue
        for form, score in RecordScore.of_line(line).forms():
            if form == "_kl":
                continue
            rows, scores = found.setdefault(line["protocol"] + form, (array("q"), array("d")))
            rows.append(line["index"])
            scores.append(score)
    columns: Scores = {}
    for name, (rows, scores) in found.items():
        unique, first = np.unique(np.array(rows), return_index=True)
        columns[name] = unique, np.array(scores)[first]
    return columns
