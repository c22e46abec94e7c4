"""A table of methods from run folders alone: what each scored, and what a paired test cannot tell from the best.

A method is a configuration: its editor and all that was chosen but the seed. Methods stand in a group where they edited
the same model with equally many facts of the same file, and were asked in the same form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from harness.report.averages import adjusted, compared, scores_of
from harness.report.drawing import interval
from harness.report.page import LEVEL, source_name
from harness.report.paired import Average, Scores, average
from harness.report.runs import Run, configurations, shared_choices
from harness.run import form_of_run
from harness.watch import SCORE_NAMES

ASKED: Final = tuple(name for name in SCORE_NAMES if name != "LS")  # protocols whose answers were edited
SCORE_COLUMNS: Final = (
    *SCORE_NAMES,
    *(f"{name}_{form}" for form in ("seq", "gen") for name in ASKED),
    *("LS_agree", "LS_kl", "perplexity"),
)
SECONDS, PEAK, GPU_PEAK = "seconds_per_edit", "peak_bytes", "gpu_peak_bytes"
Key = tuple[str, str, int, str, str]  # of a group: data, model, edits, file of facts, weights

COLUMNS: Final = (*SCORE_COLUMNS, SECONDS, PEAK, GPU_PEAK)


@dataclass(frozen=True)
class Cell:
    """A number; without an interval where records have no number of their own, or several seeds were averaged."""

    mean: float
    low: float | None = None
    high: float | None = None
    bold: bool = False


@dataclass(frozen=True)
class Row:
    """A method, or the base model, for which `seeds` is None."""

    method: str
    seeds: int | None
    cells: Mapping[str, Cell]  # by column; of what its runs have not, there is none


@dataclass(frozen=True)
class Group:
    """Methods that can be compared: the base model first, then by their first score, the best first."""

    model: str
    data: str
    edits: int
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    runs: tuple[Run, ...]

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
    reasons = [(run, _unfit(run)) for run in runs]
    left_out = tuple(f"{run.folder}: left out, {reason}" for run, reason in reasons if reason)
    fit = [run for run, reason in reasons if not reason]
    if not fit:
        raise ValueError(f"no run has finished its edits and final scores ({left_out[0]}); name one that has")
    groups: dict[Key, list[Run]] = {}
    for run in fit:
        groups.setdefault(_key(run), []).append(run)
    return Board(tuple(_group(_names(key, groups), groups[key]) for key in sorted(groups)), left_out)


def _unfit(run: Run) -> str | None:
    """Why a run cannot be in the table."""
    if not run.finished:
        return run.state
    if not run.results.get("final") or not run.results.get("cost", {}).get("edits"):
        return "it has edited nothing" if run.results.get("final") else "it has no final scores"
    for section, key in (("evaluation", "prompt"), ("dataset", "prompt_form")):
        if key not in run.about["config"].get(section, {}):
            return f"its run.json has no {section}.{key}: it does not say how its questions were put"
    return None


def _key(run: Run) -> Key:
    """Data and form, model, edits; file of facts and weights, which tell apart what has the same name."""
    config = run.about["config"]
    data = f"{source_name(config, 'dataset')} ({form_of_run(config)} prompts)"
    facts, weights = run.about.get("inputs", {}).get("eval"), run.about.get("model", {}).get("fingerprint")
    return data, source_name(config, "model"), int(run.results["cost"]["edits"]), str(facts), str(weights)


def _names(key: Key, keys: Iterable[Key]) -> tuple[str, str, int]:
    """Data, model and edits; with the start of a hash where others of the same names differ in it."""
    data, model, edits, facts, weights = key
    alike = [one for one in keys if one[:3] == key[:3]]
    if any(one[3] != facts for one in alike):
        data = f"{data}, facts {facts[:8]}"
    if any(one[4] != weights for one in alike):
        model = f"{model} {weights[:8]}"
    return data, model, edits


def _group(names: tuple[str, str, int], runs: Sequence[Run]) -> Group:
    methods: dict[str, list[Run]] = {}
    for label, run in zip(configurations(runs), runs, strict=True):
        methods.setdefault(label, []).append(run)
    scores = {label: _shown(scores_of(members, "final")) for label, members in methods.items()}
    rows = [Row(label, len(members), _cells(members, scores[label])) for label, members in methods.items()]
    notes = [f"All with {', '.join(shared)}."] if (shared := shared_choices(runs)) else []
    notes += _unlike(methods, scores)
    for column in SCORE_COLUMNS:
        bold, more = _not_below_the_best(column, rows, methods, scores)
        notes += more
        rows = [_with_bold(row, column) if row.method in bold else row for row in rows]
    first = next((name for name in COLUMNS if any(name in row.cells for row in rows)), SECONDS)
    rows.sort(key=lambda row: -row.cells[first].mean if first in row.cells else float("inf"))
    data, model, edits = names
    return Group(model, data, edits, (_base(runs), *rows), tuple(dict.fromkeys(notes)), tuple(runs))


def _shown(runs: Sequence[Scores]) -> list[Scores]:
    return [{name: column for name, column in scores.items() if name in SCORE_COLUMNS} for scores in runs]


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def _cells(runs: Sequence[Run], scores: Sequence[Scores], stage: str = "final") -> dict[str, Cell]:
    """Averages over records and seeds, as the report has them; of what no record has, over seeds."""
    averages = average(scores)
    cells = {}
    for name in SCORE_COLUMNS:
        every = [run.results[stage][name] for run in runs if run.results.get(stage, {}).get(name) is not None]
        if every:
            cells[name] = _cell(every, averages.get(name))
    return cells | (_costs(runs) if stage == "final" else {})


def _cell(every: Sequence[Any], found: Average | None) -> Cell:
    if found is not None:
        return Cell(found.mean, found.low, found.high)
    if len(every) == 1 and isinstance(every[0], Mapping):
        return Cell(*interval(every[0]))
    return Cell(sum(interval(score)[0] for score in every) / len(every))


def _base(runs: Sequence[Run]) -> Row:
    """The base model on the facts of each seed, once a seed."""
    asked = list({run.seed: run for run in reversed(runs) if run.results.get("base")}.values())
    return Row("base model", None, _cells(asked, _shown(scores_of(asked, "base")), "base"))


def _costs(runs: Sequence[Run]) -> dict[str, Cell]:
    """Seconds of the edit turns over the facts edited in them, all runs together; the largest peak of any run."""
    cells = {}
    spent = [_spent(run) for run in runs]
    if facts := sum(edits for _, edits in spent):
        cells[SECONDS] = Cell(sum(seconds for seconds, _ in spent) / facts)
    peaks = [run.results["cost"].get("peak_memory", {}) for run in runs]
    if own := [peak[PEAK] for peak in peaks if PEAK in peak]:
        cells[PEAK] = Cell(max(own))
    on_gpus = [[size for name, size in peak.items() if name.endswith(f"_{PEAK}")] for peak in peaks]
    if any(on_gpus):
        cells[GPU_PEAK] = Cell(max(map(sum, on_gpus)))
    return cells


def _spent(run: Run) -> tuple[float, float]:
    """(seconds, facts) of the run's edit turns; warm-up and meta-training are not among them."""
    turns = run.turns
    if "seconds/total" not in turns:
        return 0.0, 0.0
    editing = turns["warm_up"] == 0
    return float(turns["seconds/total"][editing].sum()), float(turns["edits"][editing].sum())


# ---------------------------------------------------------------------------------------------------------------------
# The best, and what cannot be told from it


def _not_below_the_best(
    column: str, rows: Sequence[Row], methods: Mapping[str, Sequence[Run]], scores: Mapping[str, Sequence[Scores]]
) -> tuple[set[str], list[str]]:
    """Methods with the highest mean or not shown to be below it, and what to say of those that cannot be tested.

    The test is over records, paired, two-sided, its p-values adjusted (Holm) for all comparisons in the column. None
    where fewer than two methods have scores of single records.
    """
    only = {label: [{column: one[column]} for one in every if column in one] for label, every in scores.items()}
    means = {row.method: row.cells[column].mean for row in rows if only[row.method] and column in row.cells}
    if len(means) < 2:
        return set(), []
    best = max(means, key=means.__getitem__)
    having = {
        label: [run for run, one in zip(methods[label], scores[label], strict=True) if column in one] for label in means
    }
    differences = {
        label: compared(having[best], only[best], having[label], only[label]) for label in means if label != best
    }
    p = adjusted(differences)
    bold, notes = {best}, []
    for label, found in differences.items():
        if isinstance(found, str):
            notes.append(f"{label} is not compared with {best}, {column}'s best: {found}.")
        elif found[column].mean >= 0 or p.get((label, column), 1.0) >= LEVEL:
            bold.add(label)
    return bold, notes


def _with_bold(row: Row, column: str) -> Row:
    return replace(row, cells={**row.cells, column: replace(row.cells[column], bold=True)})


def _unlike(methods: Mapping[str, Sequence[Run]], scores: Mapping[str, Sequence[Scores]]) -> Iterable[str]:
    """A line for each way in which methods of a group were not run or scored alike."""
    first, *others = methods
    rows = {
        label: {
            run.seed: set(next(iter(one.values()))[0].tolist())
            for run, one in zip(methods[label], every, strict=True)
            if one
        }
        for label, every in scores.items()
    }
    for label in others:
        shared = rows[first].keys() & rows[label].keys()
        if rows[first] and rows[label] and not shared:
            yield f"{label} and {first} have no seed in common: each run is compared with each."
        elif any(rows[first][seed] != rows[label][seed] for seed in shared):
            both = sum(len(rows[first][seed] & rows[label][seed]) for seed in shared)
            own, theirs = (sum(len(rows[one][seed]) for seed in shared) for one in (label, first))
            yield (
                f"{label} was scored on {own:,} records and {first} on {theirs:,}, of which {both:,} are the same: "
                "only those are compared."
            )
    devices = dict.fromkeys(str(run.about.get("device")) for runs in methods.values() for run in runs)
    if len(devices) > 1:
        yield f"Runs were on different devices ({', '.join(devices)}): their costs do not compare."
