"""Are two runs different? Paired statistics over the records both were scored on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

RESAMPLES: Final = 10_000  # of the bootstrap, and sign flips of the test: the smallest p is 1 / 10,001
CELLS: Final = 4_000_000  # numbers drawn at once

Scores = dict[str, tuple[np.ndarray, np.ndarray]]  # protocol -> (rows of the data file, sorted; their scores)


@dataclass(frozen=True)
class Difference:
    """Second run minus first, over the records that both scored."""

    mean: float
    low: float  # 95% percentile bootstrap over records
    high: float
    p: float  # two-sided sign-flip permutation test
    n: int


def paired_difference(first: np.ndarray, second: np.ndarray, seed: int = 0) -> Difference:
    """The mean of second - first with a 95% paired bootstrap interval, and the p-value of a sign-flip test.

    Null hypothesis of the test: a record's two scores could as well be exchanged, so that its difference could carry
    either sign. p = (1 + flips with |mean| at least the observed) / (1 + flips), which is valid at any n. Differences
    take few values, so both draw from their histogram: the bootstrap a multinomial, the flips a binomial a value.
    """
    difference = np.round(second - first, 12)  # 2/3 - 1/3 and 1/3 - 0 are the same difference
    rng = np.random.default_rng(seed)
    values, counts = np.unique(difference, return_counts=True)
    n = int(counts.sum())
    mean = float(values @ counts / n)
    resampled = np.concatenate([rng.multinomial(n, counts / n, size=size) @ values / n for size in _blocks(values)])
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Difference(mean, float(low), float(high), _sign_flip_p(difference, mean, rng), n)


def _sign_flip_p(difference: np.ndarray, mean: float, rng: np.random.Generator) -> float:
    sizes, counts = np.unique(np.abs(difference), return_counts=True)
    observed = abs(mean) * len(difference) - 1e-9  # rounding must not make a tie a miss
    reached = 0
    for block in _blocks(sizes):
        flipped = (2 * rng.binomial(counts, 0.5, size=(block, len(counts))) - counts) @ sizes
        reached += int((np.abs(flipped) >= observed).sum())
    return (1 + reached) / (1 + RESAMPLES)


def _blocks(values: np.ndarray) -> Iterable[int]:
    """`RESAMPLES` in blocks of at most `CELLS` numbers."""
    size = max(1, min(RESAMPLES, CELLS // len(values)))
    return [min(size, RESAMPLES - start) for start in range(0, RESAMPLES, size)]


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being several (Holm 1979): the chance of any false alarm among them stays at the level."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def final_scores(lines: Iterable[Mapping[str, Any]]) -> Scores:
    """From records.jsonl, what the final model scored on each record, under the names that scores have everywhere."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for line in lines:
        if line.get("stage") != "final" or not line.get("tokens"):
            continue
        for form, score in forms(line):
            rows, scores = found.setdefault(line["protocol"] + form, ([], []))
            rows.append(line["index"])
            scores.append(score)
    return {name: _sorted(np.array(rows), np.array(scores)) for name, (rows, scores) in found.items()}


def forms(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The scores of a line of records.jsonl, in percent of 1; KL, which is no share, is not tested."""
    yield "", line["correct"] / line["tokens"]
    yield "_seq", float(line["correct"] == line["tokens"])
    if "agree" in line:
        yield "_agree", line["agree"] / line["tokens"]
    for field, form in (("exact", "_gen"), ("contains", "_contains")):
        if field in line:
            yield form, float(line[field])


def _sorted(rows: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    unique, first = np.unique(rows, return_index=True)
    return unique, scores[first]


def compare(first: Scores, second: Scores) -> dict[str, Difference]:
    """Each score's difference over the rows of the data file that both runs scored; none where they share no row."""
    differences = {}
    for name in first:
        if name not in second:
            continue
        _, here, there = np.intersect1d(first[name][0], second[name][0], assume_unique=True, return_indices=True)
        if len(here):
            differences[name] = paired_difference(first[name][1][here], second[name][1][there])
    return differences
