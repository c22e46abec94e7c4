"""A table of methods from run folders alone: what each scored, and what a paired test cannot tell from the best.

A method is a configuration: its editor and all that was chosen but the seed. Methods stand in a group where they edited
the same model with equally many facts of the same file, and were asked in the same form.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from harness.report.averages import adjusted, compared, pairs
from harness.report.drawing import interval
from harness.report.names import CHANGED, code, configurations, seeds_told, shared_choices
from harness.report.page import LEVEL
from harness.report.paired import Average, Difference, Scores, average, mean_difference, record_scores
from harness.report.runs import Run
from harness.report.standings import Standing, group_names, standings
from harness.watch import SCORE_NAMES

ASKED: Final = tuple(name for name in SCORE_NAMES if name != "LS")  # protocols whose answers were edited
SCORE_COLUMNS: Final = (
    *SCORE_NAMES,
    *(f"{name}_{form}" for form in ("seq", "gen") for name in ASKED),
    *("LS_agree", "LS_kl", "perplexity"),
)
SECONDS, PEAK, GPU_PEAK = "seconds_per_edit", "peak_bytes", "gpu_peak_bytes"
COSTS: Final = (SECONDS, PEAK, GPU_PEAK)
COLUMNS: Final = (*SCORE_COLUMNS, *COSTS)
NEVER_BEST: Final = ("LS",)
"""Scores of which more is not better: LS is best where it is the base model's."""
LEAST: Final = 0.5  # of the records of the method with fewer, for a comparison
ENOUGH: Final = 0.8  # of them, for one that needs no word

Methods = Mapping[str, Sequence[Standing]]


@dataclass(frozen=True)
class Cell:
    """A number; without an interval where records have no number of their own."""

    mean: float
    low: float | None = None
    high: float | None = None
    by_seed: tuple[float, ...] = ()
    bold: bool = False


@dataclass(frozen=True)
class Row:
    """A method, or the base model, which has neither seeds nor code."""

    method: str
    seeds: int | None
    cells: Mapping[str, Cell]  # by column; of what its runs have not, there is none
    codes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """Methods that can be compared, the best in their first score first; before them the base model, of each choice of
    seeds that a method has: it was asked about their facts.
    """

    model: str
    data: str
    edits: int
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    members: tuple[Standing, ...]

    @property
    def title(self) -> str:
        return f"{self.data}, {self.model}, {self.edits:,} edits"


@dataclass(frozen=True)
class Board:
    """Groups in the order of their names, and a line for each run that is in none of them."""

    groups: tuple[Group, ...]
    left_out: tuple[str, ...]

    @property
    def columns(self) -> list[str]:
        """Those in which any run has a number."""
        return [name for name in COLUMNS if any(name in row.cells for group in self.groups for row in group.rows)]

    @property
    def tested(self) -> list[str]:
        """Columns in which something is bold."""
        cells = [row.cells for group in self.groups for row in group.rows]
        return [name for name in self.columns if any(name in one and one[name].bold for one in cells)]


def board_of(runs: Sequence[Run]) -> Board:
    """The table of all runs that came to their end; ValueError where none did."""
    groups, left_out = standings(runs)
    if not groups:
        raise ValueError(f"no run has finished its edits and final scores ({left_out[0]}); name one that has")
    return Board(tuple(_group(group_names(key, groups), groups[key]) for key in sorted(groups)), left_out)


def _group(names: tuple[str, str, int], members: Sequence[Standing]) -> Group:
    methods: dict[str, list[Standing]] = {}
    for label, one in zip(configurations([one.run for one in members], as_scored=False), members, strict=True):
        methods.setdefault(label, []).append(one)
    for own in methods.values():
        own.sort(key=lambda one: one.run.seed)
    rows = [Row(label, len(own), _cells(own), _codes(own)) for label, own in methods.items()]
    apart, unlike = _not_compared(methods)
    notes = [f"All with {', '.join(shared)}."] if (shared := shared_choices([one.run for one in members])) else []
    notes += [*_scored(members), *_ways(methods), *unlike]
    comparisons = {
        column: _against_the_best(column, rows, methods)
        for column in SCORE_COLUMNS
        if column not in (*NEVER_BEST, *apart)
    }
    notes += _said_of_comparisons([one for found in comparisons.values() for one in found], methods)
    notes += _seeds(methods)
    rows = [
        replace(row, cells={name: _judged(cell, row, comparisons.get(name, ())) for name, cell in row.cells.items()})
        for row in rows
    ]
    first = next((name for name in COLUMNS if any(name in row.cells for row in rows)), SECONDS)
    rows.sort(key=lambda row: -row.cells[first].mean if first in row.cells else float("inf"))
    data, model, edits = names
    return Group(model, data, edits, (*_bases(methods), *rows), tuple(dict.fromkeys(notes)), tuple(members))


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def _cells(members: Sequence[Standing]) -> dict[str, Cell]:
    """Averages over records and seeds, as the report has them; of what no record has, over seeds."""
    return _score_cells([one.scores for one in members], [one.records for one in members]) | _costs(members)


def _score_cells(scores: Sequence[Mapping[str, Any]], records: Sequence[Scores]) -> dict[str, Cell]:
    averages = average([{name: one[name] for name in one if name in SCORE_COLUMNS} for one in records])
    cells = {}
    for name in SCORE_COLUMNS:
        every = [one[name] for one in scores if one.get(name) is not None]
        if every:
            cells[name] = _cell(every, averages.get(name))
    return cells


def _cell(every: Sequence[Any], found: Average | None) -> Cell:
    by_seed = tuple(interval(score)[0] for score in every)
    if found is not None:
        return Cell(found.mean, found.low, found.high, by_seed)
    if len(every) == 1 and isinstance(every[0], Mapping):
        return Cell(*interval(every[0]), by_seed)
    return Cell(sum(by_seed) / len(by_seed), by_seed=by_seed)


def _bases(methods: Methods) -> Iterator[Row]:
    """The base model on the facts of each choice of seeds; a seed's are of the run that has the most scores of it."""
    runs = [one.run for own in methods.values() for one in own if one.turns is None and one.run.results.get("base")]
    asked = {run.seed: run for run in sorted(runs, key=lambda run: len(run.results["base"]))}
    records = {seed: record_scores(run.lines("records.jsonl"), "base") for seed, run in asked.items()}
    choices = {tuple(dict.fromkeys(one.run.seed for one in own)) for own in methods.values()}
    for seeds in sorted(choices, key=lambda one: (-len(one), one)):
        told = f", {seeds_told(seeds)}" if len(choices) > 1 else ""
        there = [seed for seed in seeds if seed in asked]
        scores = [asked[seed].results["base"] for seed in there]
        yield Row(f"base model{told}", None, _score_cells(scores, [records[seed] for seed in there]))


def _costs(members: Sequence[Standing]) -> dict[str, Cell]:
    """Seconds of the edit turns over the facts edited in them, all runs together; the largest peak of any run.

    The peak of a run that went on is not known.
    """
    cells = {}
    spent = [_spent(one) for one in members]
    if facts := sum(edits for _, edits in spent):
        by_seed = tuple(seconds / edits for seconds, edits in spent if edits)
        cells[SECONDS] = Cell(sum(seconds for seconds, _ in spent) / facts, by_seed=by_seed)
    peaks = [one.run.results["cost"].get("peak_memory", {}) for one in members if one.turns is None]
    if own := [peak[PEAK] for peak in peaks if PEAK in peak]:
        cells[PEAK] = Cell(max(own), by_seed=tuple(own))
    on_gpus = [sum(size for name, size in peak.items() if name.endswith(f"_{PEAK}")) for peak in peaks]
    if any(on_gpus):
        cells[GPU_PEAK] = Cell(max(on_gpus), by_seed=tuple(on_gpus))
    return cells


def _spent(one: Standing) -> tuple[float, float]:
    """(seconds, facts) of the run's edit turns so far; warm-up and meta-training are not among them."""
    turns = one.run.turns
    if "seconds/total" not in turns:
        return 0.0, 0.0
    editing = turns["warm_up"] == 0
    if one.turns is not None:
        editing &= turns["turn"] < one.turns
    return float(turns["seconds/total"][editing].sum()), float(turns["edits"][editing].sum())


def _codes(members: Sequence[Standing]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one for standing in members if (one := code(standing.run))))


# ---------------------------------------------------------------------------------------------------------------------
# The best, and what cannot be told from it


@dataclass(frozen=True)
class Comparison:
    """A method against the one with a column's highest mean; `reason`: why they cannot be compared."""

    column: str
    best: str
    method: str
    found: Difference | None
    reason: str | None
    is_below: bool  # by the test, and in every seed that both have, or each run in each where they share none


def _against_the_best(column: str, rows: Sequence[Row], methods: Methods) -> list[Comparison]:
    """Of each method with scores of single records; of the best too. None where fewer than two have such.

    The test is over records, paired, two-sided, its p-values adjusted (Holm) for all pairs of methods in the column:
    which of them is the best was not known before, so those with it alone would be too few.
    """
    having = {label: _having(column, own) for label, own in methods.items()}
    means = {row.method: row.cells[column].mean for row in rows if having[row.method] and column in row.cells}
    if len(means) < 2:
        return []
    best = max(means, key=means.__getitem__)
    others = [label for label in means if label != best]
    differences = {
        pair: _difference(column, *(having[label] for label in pair))
        for pair in itertools.combinations([best, *others], 2)
    }
    p = adjusted(differences)
    comparisons = [Comparison(column, best, best, None, None, is_below=False)]
    for label in others:
        found = differences[best, label]
        if isinstance(found, str):
            comparisons.append(Comparison(column, best, label, None, found, is_below=True))
            continue
        below = found[column].mean < 0 and p.get(((best, label), column), 1.0) < LEVEL
        below &= all(one < 0 for one in _by_pair(column, having[best], having[label]))
        comparisons.append(Comparison(column, best, label, found[column], None, is_below=below))
    return comparisons


def _having(column: str, members: Sequence[Standing]) -> list[Standing]:
    """Those with scores of single records."""
    return [one for one in members if column in one.records]


def _difference(column: str, first: Sequence[Standing], second: Sequence[Standing]) -> Mapping[str, Difference] | str:
    (runs, scores), (other_runs, other_scores) = (
        ([one.run for one in own], [{column: one.records[column]} for one in own]) for own in (first, second)
    )
    found = compared(runs, scores, other_runs, other_scores)
    if not isinstance(found, str) and found[column].n < LEAST * min(_counts(column, first, second)):
        return f"only {found[column].n} record{'s were' if found[column].n > 1 else ' was'} scored in both"
    return found


def _counts(column: str, *methods: Sequence[Standing]) -> list[int]:
    """Rows of the data file that each was asked about, with the seeds that all have; with any, where there are none."""
    seeds = [{one.run.seed for one in own} for own in methods]
    counted = set.intersection(*seeds) or set.union(*seeds)
    return [
        len(set().union(*(one.records[column][0].tolist() for one in own if one.run.seed in counted)))
        for own in methods
    ]


def _by_pair(column: str, first: Sequence[Standing], second: Sequence[Standing]) -> Iterator[float]:
    """The mean difference, second minus first, within each of the pairs that are compared."""
    for a, b in pairs([one.run for one in first], [one.run for one in second]):
        found = mean_difference(first[a].records[column], second[b].records[column])
        if found is not None:
            yield found


def _judged(cell: Cell, row: Row, comparisons: Sequence[Comparison]) -> Cell:
    return replace(cell, bold=any(one.method == row.method and not one.is_below for one in comparisons))


# ---------------------------------------------------------------------------------------------------------------------
# What to say beside the numbers


def _said_of_comparisons(comparisons: Sequence[Comparison], methods: Methods) -> Iterator[str]:
    """Of methods that cannot be compared, or on few of their records: a line each."""
    apart: dict[tuple[str, str, str], list[str]] = {}
    few: dict[tuple[str, str, int, int, int], list[str]] = {}
    for one in comparisons:
        if one.method == one.best:
            continue
        if one.reason:
            apart.setdefault((one.method, one.best, one.reason), []).append(one.column)
            continue
        assert one.found is not None
        counts = _counts(one.column, *(_having(one.column, methods[name]) for name in (one.method, one.best)))
        if one.found.n < ENOUGH * min(counts):
            few.setdefault((one.method, one.best, counts[0], counts[1], one.found.n), []).append(one.column)
    for (method, best, reason), columns in apart.items():
        yield f"{method} is not compared with {best}, the best in {' and '.join(columns)}: {reason}."
    for (method, best, own_count, its_count, shared), columns in few.items():
        yield (
            f"{' and '.join(columns)}: {method} was asked about {own_count:,} records and {best}, the best, about "
            f"{its_count:,}; only the {shared:,} that both were asked about are compared."
        )


def _seeds(methods: Methods) -> Iterator[str]:
    """A line where not all methods have the same."""
    seeds = {label: sorted({str(one.run.seed) for one in own}) for label, own in methods.items()}
    if len({tuple(one) for one in seeds.values()}) > 1:
        told = "; ".join(f"{label} {', '.join(own)}" for label, own in seeds.items())
        yield f"Seeds differ ({told}): compared within those that both have; without any, each run with each."


def _not_compared(methods: Methods) -> tuple[set[str], list[str]]:
    """Columns that do not compare, as runs were asked in different ways, and a line for each difference."""
    columns: set[str] = set()
    notes = []
    there = {name for own in methods.values() for one in own for name in one.scores}
    written = [name for name in SCORE_COLUMNS if name.endswith("_gen") and name in there]
    of_tokens = [name for name in SCORE_COLUMNS if name in there and name not in (*written, "perplexity")]
    for what, of, affected in (
        ("dataset.answer_tokens", lambda run: run.about["config"]["dataset"].get("answer_tokens"), of_tokens),
        ("evaluation.max_new_tokens", lambda run: run.about["config"]["evaluation"].get("max_new_tokens"), written),
        ("the text of perplexity", lambda run: str(run.about.get("inputs", {}).get("perplexity"))[:8], ["perplexity"]),
        (
            "evaluation.perplexity_window",
            lambda run: run.about["config"]["evaluation"].get("perplexity_window"),
            ["perplexity"],
        ),
    ):
        values: dict[Any, list[str]] = {}
        for label, own in methods.items():
            for one in own:
                if any(name in one.scores for name in affected):
                    values.setdefault(of(one.run), []).append(label)
        if len(values) > 1:
            told = "; ".join(f"{value}: {', '.join(dict.fromkeys(labels))}" for value, labels in values.items())
            notes.append(f"Runs differ in {what} ({told}), which leaves no comparison of {' and '.join(affected)}.")
            columns |= set(affected)
    return columns, notes


def _scored(members: Sequence[Standing]) -> Iterator[str]:
    """How many records a run was scored on."""
    asked, written = (
        sorted({len(one.records[name][0]) for one in members if name in one.records}) for name in ("ES", "ES_gen")
    )
    if asked:
        more = f", and wrote its own answers to {_span(written)} of them" if written else ""
        yield f"Each run was scored on {_span(asked)} records{more}."


def _span(counts: Sequence[int]) -> str:
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"


def _ways(methods: Methods) -> Iterator[str]:
    """A line for each way in which methods were not run alike: length, code, devices."""
    longer = [label for label, own in methods.items() if any(one.turns is not None for one in own)]
    if longer:
        yield f"Longer runs, as they stood after as many edits: {'; '.join(longer)}."
    codes = {label: _codes(own) for label, own in methods.items()}
    every = dict.fromkeys(one for own in codes.values() for one in own)
    if len(every) > 1:
        yield f"Runs are of {len(every)} versions of the code, which the CSV names."
    mixed = [label for label, own in codes.items() if len(own) > 1]
    if mixed:
        yield f"Averages over several versions of the code: {'; '.join(mixed)}."
    changed = [label for label, own in codes.items() if any(one.endswith(CHANGED) for one in own)]
    if changed:
        yield f"Made with uncommitted changes to the code: {'; '.join(changed)}."
    devices = dict.fromkeys(str(one.run.about.get("device")) for own in methods.values() for one in own)
    if len(devices) > 1:
        yield f"Runs were on different devices ({', '.join(devices)}): their costs do not compare."
