"""What a run says: beside its bar over turns, and when it is done, the result table and examples."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Final, TextIO
from unicodedata import category

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from data.progress import duration
from data.records import Phase
from harness.run import read_examples

SCORE_NAMES: Final = {
    "ES": "efficacy",
    "GS": "generalization",
    "LS": "specificity",
    "PS": "personas",
    "MS": "multi-hop",
}
FORM_NAMES: Final = {  # in the order of the table: what the model says comes first
    "gen": "says it",
    "": "",
    "seq": "all tokens",
    "end": "and stops",
    "contains": "",  # says it itself
    "agree": "as base",
    "forgetting": "",
}
PROBE_NAMES: Final = {"edit": "edited questions", "rephrase": "rephrases of them", "locality": "unrelated questions"}
EXAMPLE_TEXTS: Final = ("question", "wanted", "base", "edited")
NOT_SHARES: Final = {"kl"}  # forms that are no share of something, so no percent
WRECKED: Final = 1e6  # as large as no perplexity of a model that still writes


def turn_note(edits: int, phase: Phase) -> str:
    """Beside the bar, after a turn of that phase: the edits so far."""
    return f"{edits:,} edits, {phase.value.replace('_', '-')}"


def is_share(name: str) -> bool:
    """Whether a score is a share of something, and so a percentage."""
    score, _, form = name.partition("_")
    return score in SCORE_NAMES and form not in NOT_SHARES


def as_number(name: str, value: float, sign: str = "") -> str:
    """A score, in percent where it is a share; `sign` "+" is for changes. Where it is huge it has few digits."""
    if is_share(name):
        return f"{100 * value:{sign}.1f}"
    return f"{value:{sign}.3f}" if abs(value) < WRECKED else f"{value:{sign}.3g}"


def score_words(name: str) -> str:
    """What the letters and the form of a score stand for."""
    score, _, form = name.partition("_")
    return ", ".join(word for word in (SCORE_NAMES.get(score), FORM_NAMES.get(form)) if word)


def show_results(results: Mapping[str, Any], run_folder: Path, stream: TextIO | None = None) -> None:
    """Print the result table, the run's examples and where it lies; in 80 columns, plain, where there's no terminal."""
    stream = stream or sys.stdout
    console = Console(file=stream, force_terminal=stream.isatty())
    console.print(result_table(results))
    if examples := read_examples(run_folder):
        console.print(example_table(examples))
    console.print(Text(f"  run folder   {run_folder}"), soft_wrap=True)  # never cut or broken: it will be copied


def example_table(examples: Sequence[Mapping[str, Any]]) -> Table:
    """What was wanted, and what the model wrote before and after its edits; each text is cut to its column."""
    table = Table(box=SIMPLE, padding=0, expand=True, title=" what the model says", title_justify="left")
    table.title_style = "italic"
    for heading, share in {"question": 5, "wanted": 2, "base model": 3, "edited model": 3}.items():
        table.add_column(heading, ratio=share, no_wrap=True, overflow="ellipsis")
    for probe, group in groupby(examples, key=itemgetter("probe")):
        table.add_section()
        table.add_row(Text(PROBE_NAMES[probe], style="italic"))
        for one in group:
            table.add_row(*(as_said(" ".join(one[key].split())) for key in EXAMPLE_TEXTS))
    return table


def printable(text: str) -> str:
    """A model's words, without what a terminal would take for commands."""
    return "".join("\N{REPLACEMENT CHARACTER}" if category(c) == "Cc" and c not in "\n\t" else c for c in text)


def as_said(text: str) -> Text:
    """A model's words as a cell of a table, without blanks around them; where there are none, that."""
    return Text(printable(text).strip()) if text.strip() else Text("(nothing)", style="italic")


def result_table(results: Mapping[str, Any]) -> Group:
    """Scores of base and edited model with 95% intervals, and costs: of `results.json`, whatever is there."""
    forgotten = {f"{name}_forgetting": kept["forgetting"] for name, kept in results.get("retention", {}).items()}
    costs = Table.grid(padding=(0, 2))
    for label, value in _cost_lines(results.get("cost", {})):
        costs.add_row(Text(f"  {label}"), Text(value, overflow="fold"))
    scores = _score_table(results.get("base", {}), {**results.get("final", {}), **forgotten})
    return Group(scores, costs) if costs.row_count else Group(scores)


def _score_table(base: Mapping[str, Any], final: Mapping[str, Any]) -> Table:
    # no padding: with its one column of space between cells the table just fits 80 columns at 100.0 [100.0, 100.0]
    table = Table(
        box=SIMPLE, padding=0, title=" percent, with 95% intervals", title_justify="left", title_style="italic"
    )
    table.add_column("score", overflow="fold")
    for heading in ("base model", "edited model", "change", "records"):
        table.add_column(heading, justify="right", no_wrap=True)  # where it is narrow, the names of scores break
    for _, names in groupby(sorted({*base, *final}, key=_kind), key=lambda name: _kind(name)[0]):
        table.add_section()
        for name in names:
            table.add_row(*_score_row(name, base.get(name), final.get(name)))
    return table


def _kind(name: str) -> tuple[int, str, int, str]:
    """Place of a score in the table: percent scores in the order of their forms, then everything else."""
    score, _, form = name.partition("_")
    if not is_share(name):
        return len(FORM_NAMES) + 1, "", 0, name
    place = list(FORM_NAMES).index(form) if form in FORM_NAMES else len(FORM_NAMES)
    return place, form, list(SCORE_NAMES).index(score), name


def _score_row(name: str, base: Any, final: Any) -> list[Text]:
    before, after = _mean(base), _mean(final)
    change = "" if before is None or after is None else as_number(name, after - before, "+")
    counts = [f"{score['n']:,}" for score in (final, base) if isinstance(score, Mapping) and "n" in score]
    return [
        Text(_label(name)),
        Text(_score_cell(name, base)),
        Text(_score_cell(name, final), style="bold"),
        Text(change),
        Text(counts[0] if counts else ""),
    ]


def _label(name: str) -> str:
    score, _, form = name.partition("_")
    words = FORM_NAMES.get(form) if form else SCORE_NAMES.get(score)
    return f"{name}  {words}" if words else name


def _mean(score: Any) -> float | None:
    return score.get("mean") if isinstance(score, Mapping) else score


def _score_cell(name: str, score: Any) -> str:
    mean = _mean(score)
    if mean is None:
        return "-"
    text = as_number(name, mean)
    if isinstance(score, Mapping) and score.get("low") is not None and score.get("high") is not None:
        text += f" [{as_number(name, score['low'])}, {as_number(name, score['high'])}]"
    return text


def _cost_lines(cost: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Known costs in words; others under their own names, so that nothing that was measured is hidden."""
    rest = dict(cost)
    turns, warm_up = rest.pop("turns", None), rest.pop("warm_up_turns", 0)
    if turns is not None:
        yield "turns", f"{turns:,}" + (f", {warm_up:,} of them warm-up" if warm_up else "")
    if (edits := rest.pop("edits", None)) is not None:
        yield "edits", f"{edits:,}"
    if seconds := dict(rest.pop("seconds_per_turn", {})):
        total = seconds.pop("total", sum(seconds.values()))
        shares = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())
        yield "a turn", f"{duration(total)} ({shares})" if shares else duration(total)
    if (training := rest.pop("training_seconds", None)) is not None:
        yield "training", duration(training)
    for name, value in dict(rest.pop("seconds", {})).items():
        yield name.replace("_", " "), duration(value)
    if peak := rest.pop("peak_memory", {}):
        yield "peak memory", ", ".join(_memory(name, value) for name, value in peak.items() if value)
    for name, value in rest.items():
        yield name.replace("_", " "), str(value)


def _memory(name: str, value: float) -> str:
    words = name.removesuffix("_bytes").replace("_", " ")
    return f"{words} {value / 2**30:.2f} GiB" if name.endswith("_bytes") else f"{words} {value:,}"
