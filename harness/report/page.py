"""The report as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any, Final

from data.progress import duration
from harness.report.drawing import Named, Picture, by_configuration, interval
from harness.report.names import seeds_told
from harness.report.paired import RESAMPLES, Average, Difference
from harness.report.score_figures import order
from harness.watch import EXAMPLE_TEXTS, PROBE_NAMES, as_number, printable, score_words

CSS: Final = """
:root { color: #1d2733; background: #f5f6f8; font: 16px/1.55 system-ui, "Segoe UI", Roboto, Arial, sans-serif; }
body { max-width: 78rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; background: #fff; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.8rem 0 .6rem; }
p.sub, figcaption, p.note { color: #55606e; }
p.sub { margin-top: 0; overflow-wrap: anywhere; }
.warning { border-left: 4px solid #D55E00; background: #fdf3ec; padding: .6rem .9rem; margin: .8rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .8rem .32rem 0; text-align: right; border-bottom: 1px solid #e4e7eb; white-space: nowrap; }
th { color: #55606e; font-weight: 600; border-bottom-color: #b8c0ca; }
th:first-child, td:first-child { text-align: left; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; }
td small { color: #55606e; }
.stacked td { vertical-align: top; } .stacked small { display: block; }
.texts th, .texts td { text-align: left; vertical-align: top; }
.texts td { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 7rem; }
td.far { font-weight: 650; }
.swatch { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .5em; }
p, figure { max-width: 62rem; }
figure { margin: 0; }
img { max-width: 100%; height: auto; display: block; }
figcaption { font-size: .92rem; margin-top: .4rem; }
summary { cursor: pointer; margin-top: 1rem; color: #55606e; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .92rem; }
dt { color: #55606e; } dd { margin: 0; overflow-wrap: anywhere; }
"""
PARTS: Final = ("immediate", "final", "forgetting")  # of a score's retention
LEVEL: Final = 0.05  # adjusted p-values below it are set bold


@dataclass(frozen=True)
class Tables:
    """What is told of configurations, by their names; empty of a single run."""

    base: dict[str, dict[str, Average]]  # of each score, the base model's, on the facts of the configuration's runs
    averages: dict[str, dict[str, Average]]
    differences: dict[str, Mapping[str, Difference] | str]  # from the first, or why there are none
    adjusted: dict[tuple[str, str], float]  # (name, score) -> p-value adjusted for all tests of that score


def page(
    runs: Sequence[Named],
    pictures: Iterable[tuple[Picture, bytes]],  # with the PNG of each
    tables: Tables,
) -> str:
    """The whole page; every picture is inside it."""
    body = [*_head(runs), *_averages(runs, tables), *_results(runs), *_comparison(runs, tables), *_retention(runs)]
    body += _examples(runs)
    body += [figure(picture, png) for picture, png in pictures]
    body += [_about(named) for named in runs]
    return document(_title(runs), body)


def figure(picture: Picture, png: bytes) -> str:
    image = base64.b64encode(png).decode()
    return (
        f'<h2>{escape(picture.title)}</h2>\n<figure><img alt="{escape(picture.title)}" '
        f'src="data:image/png;base64,{image}"><figcaption>{escape(picture.caption)}</figcaption></figure>'
    )


def document(title: str, body: Iterable[str]) -> str:
    """A page in the look that all have; `body` is HTML."""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{CSS}</style></head>\n'
        f"<body>\n{chr(10).join(body)}\n</body></html>\n"
    )


def _title(runs: Sequence[Named]) -> str:
    configs = [named.run.about["config"] for named in runs]
    datasets, models = (
        list(dict.fromkeys(source_name(config, key) for config in configs)) for key in ("dataset", "model")
    )
    what = runs[0].label if len(runs) == 1 else f"{len(runs)} runs"
    return f"{what} on {', '.join(datasets)}, {', '.join(models)}"


def source_name(config: Mapping[str, Any], section: str) -> str:
    part = config.get(section, {})
    return Path(str(part.get("name_or_path") or part.get("name") or "?")).name.removeprefix("pypi:")


def _head(runs: Sequence[Named]) -> Iterator[str]:
    yield f"<h1>{escape(_title(runs))}</h1>"
    if len(runs) == 1:
        yield f'<p class="sub">{escape(str(runs[0].run.folder))}</p>'
    for named in runs:
        if named.run.unfinished:
            yield f'<p class="warning"><b>{escape(named.label)}</b>: {escape(named.run.unfinished)}.</p>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "numbers") -> str:
    """Cells are HTML already. `kind`: numbers; stacked, with what is small below the rest; or texts, in lines."""
    lines = [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows]
    titles = "".join(f"<th>{cell}</th>" for cell in head)
    return f'<div class="scroll"><table class="{kind}"><tr>{titles}</tr>{"".join(lines)}</table></div>'


def _results(runs: Sequence[Named]) -> Iterator[str]:
    """Base, final and change of one run; of several, the final scores side by side."""
    yield "<h2>Scores of each run</h2>" if len(runs) > 1 else "<h2>Scores</h2>"
    if not any(named.run.results.get(stage) for named in runs for stage in ("base", "final")):
        yield '<p class="note">No evaluation is complete yet.</p>'
        return
    yield _one_runs_results(runs[0]) if len(runs) == 1 else _all_runs_results(runs)
    note = "Percent where the score is a share; means over records with 95% bootstrap intervals."
    yield f'<p class="note">{note} {"".join(_cost(named) for named in runs if len(runs) == 1)}</p>'


def _one_runs_results(named: Named) -> str:
    base, final = (named.run.results.get(stage, {}) for stage in ("base", "final"))
    names = sorted(dict.fromkeys([*base, *final]), key=order)
    rows = [
        [
            f"{escape(name)} <small>{escape(score_words(name))}</small>",
            *(_score(name, found.get(name)) for found in (base, final)),
            _change(name, base, final),
            _count(final.get(name) or base.get(name)),
        ]
        for name in names
    ]
    return table(["score", "base model", "edited model", "change", "records"], rows)


def _all_runs_results(runs: Sequence[Named]) -> str:
    names = sorted(dict.fromkeys(n for named in runs for n in named.run.results.get("final", {})), key=order)
    asked = [
        (named.label, [named], [_score(name, named.run.results.get("base", {}).get(name)) for name in names])
        for named in runs
    ]
    rows = _base_rows(asked) + [
        [_swatch(named), *(_score(name, named.run.results.get("final", {}).get(name)) for name in names)]
        for named in runs
    ]
    return table(["run", *names], rows)


def _base_rows(asked: Iterable[tuple[str, Sequence[Named], Sequence[str]]]) -> list[list[str]]:
    """One row, unless runs asked the base model about other facts: then each says of which seeds it is, or of whom.

    `asked`: the name of runs that stand together, these, and the base model's cells on their facts.
    """
    bases: dict[tuple[str, ...], dict[str, tuple[Any, ...]]] = {}  # cells -> name -> seeds
    for label, members, cells in asked:
        bases.setdefault(tuple(cells), {})[label] = tuple(dict.fromkeys(named.run.seed for named in members))
    choices = [set(own.values()) for own in bases.values()]
    by_seed = sum(map(len, choices)) == len(set.union(*choices))
    rows = []
    for cells, own in bases.items():
        of = map(seeds_told, own.values()) if by_seed else own
        told = f", {escape('; '.join(dict.fromkeys(of)))}" if len(bases) > 1 else ""
        rows.append([f"base model{told}", *cells])
    return rows


def _averages(runs: Sequence[Named], tables: Tables) -> Iterator[str]:
    """Means over records and seeds, where runs differ in the seed alone."""
    groups = by_configuration(runs)
    names = sorted({name for named in runs for name in named.run.results.get("final", {})}, key=order)
    if len(groups) == len(runs) or not names:
        return
    yield "<h2>Scores, averaged over seeds</h2>"
    asked = [
        (label, members, [_averaged(name, members, "base", tables.base[label]) for name in names])
        for label, members in groups.items()
    ]
    rows = _base_rows(asked) + [
        [_swatch(members[0], label), *(_averaged(name, members, "final", tables.averages[label]) for name in names)]
        for label, members in groups.items()
    ]
    yield table(["configuration", *names], rows, kind="stacked")
    seeds = [str(seed) for seed in sorted({named.run.seed for named in runs})]
    yield (
        '<p class="note">Means over records and seeds; in brackets a 95% bootstrap interval over records, each '
        "resampled with all that the seeds scored of it; below it each seed's own mean (seeds "
        f"{escape(', '.join(seeds))}, where a configuration has them, in this order). The interval says what other "
        "facts would change; what another seed would change, only the seeds' own means tell. Percent where the score "
        "is a share.</p>"
    )


def _averaged(name: str, members: Sequence[Named], stage: str, averages: Mapping[str, Average]) -> str:
    every = [named.run.results.get(stage, {}).get(name) for named in members]
    means = [interval(score)[0] for score in every if score is not None]
    if not means:
        return "-"
    found = averages.get(name)
    whole = asdict(found) if found else sum(means) / len(means)
    return f"{_score(name, whole)} <small>{' · '.join(_score(name, one) for one in means)}</small>"


def _retention(runs: Sequence[Named]) -> Iterator[str]:
    """What was known right after its turn, at the end, and the difference, where runs asked for it."""
    rows = [
        [_swatch(named), escape(protocol), *(_score(protocol, score.get(part)) for part in PARTS)]
        for named in runs
        for protocol, score in named.run.results.get("retention", {}).items()
    ]
    if rows:
        yield "<h2>Retention</h2>"
        yield table(["run", "score", "right after its turn", "at the end", "forgotten"], rows)


def _examples(runs: Sequence[Named]) -> Iterator[str]:
    """Wanted, before and after on a few questions; of several runs each one's are folded away."""
    shown = [named for named in runs if named.run.examples]
    if shown:
        yield "<h2>What the model says</h2>"
    for named in shown:
        rows = [
            [PROBE_NAMES[one["probe"]], *(escape(printable(one[key]).strip()) for key in EXAMPLE_TEXTS)]
            for one in named.run.examples
        ]
        texts = table(["", "question", "wanted", "base model", "edited model"], rows, kind="texts")
        yield texts if len(runs) == 1 else f"<details><summary>{_swatch(named)}</summary>{texts}</details>"
    if shown:
        yield (
            '<p class="note">Greedy generation up to the model\'s own end or evaluation.max_new_tokens; the questions '
            "are drawn from the seed.</p>"
        )


def _comparison(runs: Sequence[Named], tables: Tables) -> Iterator[str]:
    if not tables.differences:
        return
    yield f"<h2>Each against {escape(runs[0].configuration)}</h2>"
    found = {label: one for label, one in tables.differences.items() if not isinstance(one, str)}
    every = sorted({name for one in found.values() for name in one}, key=order)
    names = [name for name in every if any(name in one and one[name].p is not None for one in found.values())]
    if names:
        swatches = {named.configuration: _swatch(named, named.configuration) for named in reversed(runs)}
        rows = [
            [swatches[label], *(_difference(one.get(name), tables.adjusted.get((label, name))) for name in names)]
            for label, one in found.items()
        ]
        yield table(["configuration", *names], rows, kind="stacked")
        yield f'<p class="note">{_how_compared(runs)}</p>'
    if same := [name for name in every if name not in names]:
        yield f'<p class="note">No record differs in {", ".join(same)}: nothing to test.</p>'
    for label, why in tables.differences.items():
        if isinstance(why, str):
            yield f'<p class="note">{escape(label)} is not compared: {escape(why)}.</p>'


def _how_compared(runs: Sequence[Named]) -> str:
    several = len({named.run.seed for named in runs}) > 1
    seeds = (
        "Runs are compared within each seed that both configurations have (where they have none in common, each with "
        "each), and a record's differences are taken together. "
    )
    return (
        f"{seeds * several}Difference in percentage points over the records that both runs scored at their end, paired "
        "by row of the data file, wherever the order of edits put it: mean with a 95% bootstrap interval over records, "
        f"and p of a two-sided sign-flip test over records ({RESAMPLES:,} flips; below 1 in {RESAMPLES:,}, Hoeffding's "
        "bound), adjusted for all comparisons in its column (Holm). Columns are not adjusted for each other: decide "
        f"before looking which score counts. Where no record differs there is nothing to test. Bold where p &lt; "
        f"{LEVEL}."
    )


def _difference(difference: Difference | None, p: float | None) -> str:
    if difference is None:
        return "-"
    if p is None:
        return "0.0 <small>no record differs</small>"
    mean, low, high = (100 * value for value in (difference.mean, difference.low, difference.high))
    text = f"{mean:+.1f} <small>[{low:+.1f}, {high:+.1f}]</small> <small>p {_p(p)}</small>"
    return f"<b>{text}</b>" if p < LEVEL else text


def _p(p: float) -> str:
    return "&lt; 0.001" if p < 0.001 else f"= {p:.3f}"


def _score(name: str, score: Any) -> str:
    if score is None or interval(score)[0] is None:
        return "-"
    mean, low, high = (as_number(name, value) for value in interval(score))
    return f"{mean} <small>[{low}, {high}]</small>" if isinstance(score, Mapping) else mean


def _change(name: str, base: Mapping[str, Any], final: Mapping[str, Any]) -> str:
    if name not in base or name not in final:
        return ""
    return as_number(name, interval(final[name])[0] - interval(base[name])[0], "+")


def _count(score: Any) -> str:
    return f"{score['n']:,}" if isinstance(score, Mapping) and "n" in score else ""


def _cost(named: Named) -> str:
    cost = named.run.results.get("cost", {})
    if not cost:
        return ""
    seconds = cost.get("seconds_per_turn", {}).get("total")
    each = f", {duration(seconds)} each" if seconds else ""
    return f"{cost['turns']:,} turns{each}; {cost['edits']:,} facts edited." if "turns" in cost else ""


def _swatch(named: Named, label: str | None = None) -> str:
    """The run's colour and name, or that of its configuration."""
    return f'<span class="swatch" style="background:{named.look["color"]}"></span>{escape(label or named.label)}'


def _about(named: Named) -> str:
    """What was run, to find and to repeat it."""
    about = named.run.about
    git = about.get("git") or {}
    facts = {
        "folder": named.run.folder,
        "run id": about["run_id"],
        "status": about["status"],
        "started": _time(about.get("started")),
        "ended": _time(about.get("finished")),
        "overrides": " ".join(map(str, about.get("overrides", ()))) or "none",
        "data": ", ".join(f"{split} {digest[:12]}" for split, digest in about.get("inputs", {}).items()),
        "model": ", ".join(f"{key} {value}" for key, value in (about.get("model") or {}).items() if value),
        "device": about.get("device"),
        "commit": f"{git['commit'][:12]}{', with changes' * bool(git.get('dirty'))}" if git else None,
        "versions": ", ".join(f"{name} {value}" for name, value in (about.get("versions") or {}).items() if value),
    }
    entries = "".join(f"<dt>{key}</dt><dd>{escape(str(value))}</dd>" for key, value in facts.items() if value)
    return f"<details><summary>About {escape(named.label)}</summary><dl>{entries}</dl></details>"


def _time(text: str | None) -> str | None:
    return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M} UTC" if text else None


def png(picture: Picture) -> bytes:
    """The picture as the bytes of a PNG file; the same picture gives the same bytes."""
    buffer = io.BytesIO()
    picture.figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
