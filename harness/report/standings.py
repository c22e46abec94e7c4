"""Which runs can stand in one table: where each of them was scored, after how many edits of the same facts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.report.page import source_name
from harness.report.paired import Scores, record_scores
from harness.report.runs import Run
from harness.run import form_of_run

Key = tuple[str, str, int, str, str]  # of a group: data, model, edits, file of facts, weights
WARM_UP_FIRST = ("start", "adaptive", "none")  # modes in which the first edits do not depend on how many follow


@dataclass(frozen=True)
class Standing:
    """A run after so many edits: at its end, or where it was scored on the way."""

    run: Run
    turns: int | None  # of the stream, warm-up included; None = all
    scores: Mapping[str, Any]  # by name, as in results.json
    records: Scores


def standings(runs: Sequence[Run]) -> tuple[dict[Key, list[Standing]], tuple[str, ...]]:
    """By group, the runs that came to their end, and those that went on and were scored after as many edits.

    Also a line for each run that is left out.
    """
    reasons = [(run, _unfit(run)) for run in runs]
    fit = [run for run, reason in reasons if not reason]
    groups: dict[Key, list[Standing]] = {}
    for run in fit:
        final = record_scores(run.lines("records.jsonl"), "final")
        groups.setdefault(_key(run), []).append(Standing(run, None, run.results["final"], final))
    for key, members in groups.items():
        of_seeds = {one.run.seed for one in members}
        for run in fit:
            data, model, edits, *files = _key(run)
            if (data, model, *files) == (*key[:2], *key[3:]) and edits > key[2] and run.seed in of_seeds:
                members += _on_the_way(run, key[2])
    return groups, tuple(f"{run.folder}: left out, {reason}" for run, reason in reasons if reason)


def _unfit(run: Run) -> str | None:
    """Why a run cannot be in a table."""
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


def group_names(key: Key, keys: Iterable[Key]) -> tuple[str, str, int]:
    """Data, model and edits; with the start of a hash where others of the same names differ in it."""
    data, model, edits, facts, weights = key
    alike = [one for one in keys if one[:3] == key[:3]]
    if any(one[3] != facts for one in alike):
        data = f"{data}, facts {facts[:8]}"
    if any(one[4] != weights for one in alike):
        model = f"{model} {weights[:8]}"
    return data, model, edits


def _on_the_way(run: Run, edits: int) -> Iterator[Standing]:
    """The run after so many edits, if it was scored there and its first edits are those of a shorter run."""
    if run.about["config"]["editor"].get("preheat_mode", "none") not in WARM_UP_FIRST:
        return
    evaluations = [line for line in run.evaluations if line["stage"] == "eval"]
    for place, line in enumerate(evaluations):
        if run.edits_after(line["turn"]) == edits:
            pieces = list(_evaluations(run.lines("records.jsonl"), place))
            if len(pieces) == len(evaluations):
                yield Standing(run, line["turn"], line["scores"], record_scores(pieces[place], "eval"))


def _evaluations(lines: Iterable[Mapping[str, Any]], wanted: int) -> Iterator[list[Mapping[str, Any]]]:
    """The lines of each evaluation on the way, of all but the wanted one none: each begins again at early facts."""
    count, last, kept = 0, None, []
    for line in lines:
        if line.get("stage") != "eval":
            continue
        if last is not None and line["place"] < last:
            yield kept
            count, kept = count + 1, []
        last = line["place"]
        if count == wanted:
            kept.append(line)
    if last is not None:
        yield kept
