"""Which runs can stand in one table: where each of them was scored, after how many edits of the same facts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
    left_out = [f"{run.folder}: left out, {reason}" for run, reason in reasons if reason]
    for key, members in groups.items():
        of_seeds = {one.run.seed for one in members}
        for run in fit:
            data, model, edits, *files = _key(run)
            if (data, model, *files) == (*key[:2], *key[3:]) and edits > key[2] and run.seed in of_seeds:
                found = _on_the_way(run, key[2])
                if isinstance(found, Standing):
                    members.append(found)
                elif found:
                    left_out.append(f"{run.folder}: left out where it had {key[2]:,} edits, {found}")
    return groups, tuple(left_out)


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
    form, in_own_words = config["dataset"]["prompt_form"], form_of_run(config)
    asked = f"{form} prompts" if in_own_words == form else f"{form} prompts, {in_own_words} where it writes"
    data = f"{source_name(config, 'dataset')} ({asked})"
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


def _on_the_way(run: Run, edits: int) -> Standing | str | None:
    """The run after so many edits, or why not; None where it was not scored there.

    Its first edits must be those of a shorter run.
    """
    turns = [line["turn"] for line in run.evaluations if line["stage"] == "eval"]
    turn = next((one for one in turns if run.edits_after(one) == edits), None)
    if turn is None:
        return None
    mode = run.about["config"]["editor"].get("preheat_mode", "none")
    if mode not in WARM_UP_FIRST:
        return f"its warm-up is where a shorter run has none (editor.preheat_mode={mode})"
    pieces = _evaluations(run.lines("records.jsonl"), turns, turn)
    if pieces.keys() != set(turns):
        return "its records.jsonl does not say which evaluation a line is of"
    (scores,) = (line["scores"] for line in run.evaluations if line["stage"] == "eval" and line["turn"] == turn)
    return Standing(run, turn, scores, record_scores(pieces[turn], "eval"))


def _evaluations(
    lines: Iterable[Mapping[str, Any]], turns: Sequence[int], wanted: int
) -> dict[int | None, list[Mapping[str, Any]]]:
    """The evaluations on the way, by the turns before them; of all but the wanted one without their lines.

    A line says `after` how many turns it is; in older folders an evaluation begins where places begin again.
    """
    found: dict[int | None, list[Mapping[str, Any]]] = {}
    count, last = 0, -1
    for line in lines:
        if line.get("stage") != "eval":
            continue
        count += line["place"] < last
        last = line["place"]
        turn = line.get("after", turns[count] if count < len(turns) else None)
        own = found.setdefault(turn, [])
        if turn == wanted:
            own.append(line)
    return found
