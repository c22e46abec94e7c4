"""Configurations instead of runs: averages over their seeds, paired differences, p-values adjusted for all tests."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from harness.report.drawing import Named, by_configuration
from harness.report.page import Tables
from harness.report.paired import Average, Difference, Scores, average, compare, holm, record_scores
from harness.report.runs import Run

Label = TypeVar("Label", bound=Hashable)  # of a configuration, or of two


def tables(runs: Sequence[Named]) -> Tables:
    """What is told of configurations: averages over their seeds, and paired differences from the first."""
    groups = {label: [named.run for named in own] for label, own in by_configuration(runs).items()}
    if len(runs) == 1:
        return Tables({}, {}, {}, {})
    first, *others = groups
    scores = {label: scores_of(members, "final") for label, members in groups.items()}
    differences = {label: compared(groups[first], scores[first], groups[label], scores[label]) for label in others}
    averages = {label: average(own) for label, own in scores.items()}
    return Tables(_bases(groups), averages, differences, adjusted(differences))


def _bases(groups: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, Average]]:
    """Of each configuration, the base model's averages; taken once where the base model was asked the same."""
    found: dict[str, dict[str, Average]] = {}
    asked: dict[str, str] = {}
    for label, members in groups.items():
        same = asked.setdefault(repr([run.results.get("base") for run in members]), label)
        found[label] = found[same] if same in found else average(scores_of(members, "base"))
    return found


def scores_of(runs: Sequence[Run], stage: str) -> list[Scores]:
    return [record_scores(run.lines("records.jsonl"), stage) for run in runs]


def compared(
    first: Sequence[Run], reference: Sequence[Scores], second: Sequence[Run], own: Sequence[Scores]
) -> Mapping[str, Difference] | str:
    """Paired differences within each seed that both have; every run with every run where they have none in common."""
    data = [runs[0].about.get("inputs", {}).get("eval") for runs in (first, second)]
    if data[0] != data[1]:
        return "its facts come from another file"
    if not any(reference) or not any(own):
        return f"{'it' if any(reference) else 'the first'} has no final scores of single records"
    return compare([(reference[a], own[b]) for a, b in pairs(first, second)]) or "no record was scored in both"


def pairs(first: Sequence[Run], second: Sequence[Run]) -> list[tuple[int, int]]:
    """Places of the runs that are compared: those of a seed that both have, or else each with each."""
    every = [(a, b) for a in range(len(first)) for b in range(len(second))]
    return [(a, b) for a, b in every if first[a].seed == second[b].seed] or every


def adjusted(differences: Mapping[Label, Mapping[str, Difference] | str]) -> dict[tuple[Label, str], float]:
    """(label, score) -> p-value, adjusted for all tests of that score."""
    tests: dict[str, dict[Label, float]] = {}
    for label, found in differences.items():
        for score, difference in found.items() if not isinstance(found, str) else ():
            if difference.p is not None:
                tests.setdefault(score, {})[label] = difference.p
    return {
        (label, score): p
        for score, one in tests.items()
        for label, p in zip(one, holm(list(one.values())), strict=True)
    }
