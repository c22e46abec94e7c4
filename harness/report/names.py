"""Names that tell runs, configurations and modules apart."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from harness.report.runs import Run
from harness.run import NOT_IN_RUN_ID, digest_of, leave_out, leaves

# Beginnings of overrides that say nothing of what was edited, and how.
NOT_A_LABEL: Final = (
    *("hydra.", "tracker.", "evaluation.", "diagnostics.", "glue.", "downstream_eval_steps"),
    *("checkpoint_every", "keep", "resume", "model_cache", "editor.save_checkpoint"),
)
CHOICES: Final = ("ablation", "experiment", "dataset", "model")
"""Groups whose choice says enough by itself."""
SECTIONS: Final = ("dataset", "model", "editor")
"""Sections whose keys say by themselves what they are of."""

# Keys of a configuration that make no other method of it: the seed, what is said of evaluation elsewhere, the machine.
NO_CHOICE: Final = (
    *NOT_IN_RUN_ID,
    *("seed", "evaluation", "diagnostics", "glue", "downstream_eval_steps", "num_seq", "corpus.path"),
    *("model.name_or_path", "model.compute_tokens", "model.device_map", "model_device", "editor_device"),
    "editor.batch_size",
)
AS_SCORED: Final = (
    "num_seq",
    *("evaluation.prompt", "evaluation.max_new_tokens", "evaluation.perplexity", "evaluation.perplexity_window"),
)
"""Of these, keys that make other numbers of the same method."""
OF_WARM_UP: Final = ("num_seq_zsre", "num_seq_wikibigedit", "dataset.num_warm_up")
"""Keys that do nothing where nothing warms up."""
FILES: Final = ("eval", "train", "corpus", "questions", "network")  # that decide what was edited, and what with
UNKNOWN: Final = "?"  # stands for a setting that a run does not know
MOST_TOLD: Final = 3
COMMIT: Final = 7  # digits
CHANGED: Final = " with changes"


def labels(runs: Sequence[Run]) -> list[str]:
    """A short name for each run: its editor, and of its overrides those that not all runs share. No name is twice."""
    return _numbered(_names(runs, [_overrides(run) for run in runs]))


def configurations(runs: Sequence[Run], *, as_scored: bool = True) -> list[str]:
    """The name of each run's configuration: of all that was chosen, by override or by default, but the seed.

    It is told by overrides or, where these are alike and defaults have changed, by the values that differ. A key that
    a run does not know yet counts where the others differ in it. Runs that repeat a seed are apart, by the version of
    their code or else by number. With `as_scored` so are runs of other lengths, and of which a question was asked in
    another way; without, the caller tells those apart.
    """
    also = AS_SCORED if as_scored else ()
    keys = _identities(runs, also)
    first: dict[Identity, Run] = {}
    for key, run in zip(keys, runs, strict=True):
        first.setdefault(key, run)
    names = _with_defaults(list(first), _names(list(first.values()), [_choices(run, also) for run in first.values()]))
    name_of = dict(zip(first, names, strict=True))
    return _repeats_apart(keys, runs, [name_of[key] for key in keys])


def _choices(run: Run, also: Sequence[str]) -> dict[str, str]:
    """Of its overrides those that make a method, and those of `also`."""
    told = {key: value for key, value in _overrides(run).items() if not _is_no_choice(key)}
    return told | {key: value for key, value in _every_override(run).items() if key in also}


def _repeats_apart(keys: Sequence[Identity], runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """Where a configuration has a seed twice, its runs by the version of their code; what is still alike, by number."""
    seeded = [(key, run.seed) for key, run in zip(keys, runs, strict=True)]
    repeated = {key for (key, _), count in Counter(seeded).items() if count > 1}
    coded = {(key, code(run)) for key, run in zip(keys, runs, strict=True) if key in repeated}
    by_code = {key for key, count in Counter(key for key, _ in coded).items() if count > 1}
    told = [
        f"{name} at {code(run)}" if key in by_code else name for key, run, name in zip(keys, runs, names, strict=True)
    ]
    before: Counter[Any] = Counter()
    repeats = []
    for name, seed in zip(told, seeded, strict=True):
        repeats.append((name, seed[0], before[name, seed]))
        before[name, seed] += 1
    distinct = list(dict.fromkeys(repeats))
    number_of = dict(zip(distinct, _numbered([name for name, *_ in distinct]), strict=True))
    return [number_of[one] for one in repeats]


def but_for_the_step(runs: Sequence[Run]) -> list[str]:
    """What runs have in common that differ in step size and seed alone."""
    left_out = ("seed", "model.lr", "editor.lr")
    return _names(runs, [{key: value for key, value in _overrides(run).items() if key not in left_out} for run in runs])


def shared_choices(runs: Sequence[Run]) -> list[str]:
    """What was chosen alike in all of them, but the seed and the editor, and so is in no name."""
    shared = _shared(runs, [_overrides(run) for run in runs])
    return _told({key: value for key, value in sorted(shared) if key != "seed"}, set())


def code(run: Run) -> str:
    """The commit that the run was made with, marked where files differed from it; empty where it is not known."""
    state = run.about.get("git")
    return f"{state['commit'][:COMMIT]}{CHANGED * bool(state['dirty'])}" if state else ""


Identity = tuple[tuple[str, str], ...]
"""Settings and their values, in the order of their names."""


def _identities(runs: Sequence[Run], also: Sequence[str]) -> list[Identity]:
    """Of each run what makes its method, and the settings of `also`.

    Of one that knows a setting not yet, what all others with its editor have in common: nobody chose between them.
    """
    every = [_settings(run, also) for run in runs]
    values: dict[str, dict[str, set[str]]] = {}
    for settings in every:
        known = values.setdefault(settings["editor.name"], {})
        for key, value in settings.items():
            known.setdefault(key, set()).add(value)
    unlike = {name: {key for key, some in known.items() if len(some) > 1} for name, known in values.items()}
    return [
        tuple((key, one.get(key, UNKNOWN)) for key in sorted(unlike[one["editor.name"]] | {"editor.name"}))
        for one in every
    ]


def _settings(run: Run, also: Sequence[str]) -> dict[str, str]:
    """What its configuration says, key by key, the model's weights, and the hashes of the files that it learnt from."""
    no_choice = NO_CHOICE if _warms_up(run) else (*NO_CHOICE, *OF_WARM_UP)
    config = run.about["config"]
    chosen = dict(leaves(leave_out(config, no_choice), "."))
    chosen |= {key: value for key, value in leaves(config, ".") if key in also}
    typed = {key: json.dumps(value, sort_keys=True).strip('"') for key, value in chosen.items()}
    if "num_seq" in also and (edits := run.results.get("cost", {}).get("edits")):
        typed = {key: value for key, value in typed.items() if key != "num_seq"} | {"edits": str(edits)}
    inputs, weights = run.about.get("inputs", {}), run.about.get("model", {}).get("fingerprint")
    read = {f"{name} file": str(inputs[name])[:8] for name in FILES if name in inputs}
    if config["editor"].get("preserve_text") == "unrelated":  # of the warm-up turns: the seed deals them out
        read.pop("corpus file", None)
    if config["editor"].get("load_checkpoint") is None:
        read["network file"] = "none"
    return typed | read | {"weights": str(weights)}


def _warms_up(run: Run) -> bool:
    return run.about["config"]["editor"].get("preheat_mode") != "none"


def _is_no_choice(key: str) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in NO_CHOICE)


def _with_defaults(keys: Sequence[Identity], names: Sequence[str]) -> list[str]:
    """Names that several configurations have, told apart by the settings that differ."""
    told = list(names)
    for name in dict.fromkeys(names):
        members = [place for place, one in enumerate(names) if one == name]
        settings = [dict(keys[place]) for place in members]
        unlike = [key for key in settings[0] if key != "eval file" and len({one[key] for one in settings}) > 1]
        for place, own in zip(members, settings, strict=True):
            told[place] = " ".join([name, *(_setting(key, own[key]) for key in unlike[:MOST_TOLD])])
            if len(unlike) > MOST_TOLD:
                own_rest = digest_of({key: own[key] for key in unlike}, "settings")[:4]
                told[place] += f" and {len(unlike) - MOST_TOLD} more settings {own_rest}"
    return told


def _names(runs: Sequence[Run], choices: Iterable[Mapping[str, str]]) -> list[str]:
    """The editor of each, and what of its choices not all of them share."""
    chosen = list(choices)
    shared = _shared(runs, chosen)
    return [
        " ".join([str(run.about["config"]["editor"]["name"]), *_told(one, shared)])
        for run, one in zip(runs, chosen, strict=True)
    ]


def _shared(runs: Sequence[Run], chosen: Sequence[Mapping[str, str]]) -> set[tuple[str, str]]:
    """What all runs have chosen alike, but for those in which it has no effect."""
    wild = [() if _warms_up(run) else OF_WARM_UP for run in runs]
    return {
        (key, value)
        for key, value in {item for one in chosen for item in one.items()}
        if all(key in free or one.get(key) == value for free, one in zip(wild, chosen, strict=True))
    }


def _numbered(names: Sequence[str]) -> list[str]:
    return [
        name if names.count(name) == 1 else f"{name} #{names[: place + 1].count(name)}"
        for place, name in enumerate(names)
    ]


def _overrides(run: Run) -> dict[str, str]:
    """Those that say what was edited, and how."""
    left_out = NOT_A_LABEL if _warms_up(run) else (*NOT_A_LABEL, *OF_WARM_UP)
    return {key: value for key, value in _every_override(run).items() if not key.startswith(left_out)}


def _every_override(run: Run) -> dict[str, str]:
    pairs = (str(override).lstrip("+").partition("=") for override in run.about.get("overrides", ()))
    return {key: _plain(value) for key, _, value in pairs}


def _plain(value: str) -> str:
    """A number in one form, so that 1e-3 and 0.001 are one setting."""
    try:
        return value if value.lstrip("-").isdigit() else f"{float(value):g}"
    except ValueError:
        return value


def _told(overrides: Mapping[str, str], shared: set[tuple[str, str]]) -> list[str]:
    """Values alone where the value says enough (a word), else key=value. The seed is last."""
    told = [item for item in overrides.items() if item not in shared and item[0] != "editor"]
    return [_setting(key, value) for key, value in sorted(told, key=lambda item: item[0] == "seed")]


def seeds_told(seeds: Iterable[Any]) -> str:
    """As a sweep's command line has them."""
    return f"seed={','.join(map(str, seeds))}"


def _setting(key: str, value: str) -> str:
    """Of a path, its last part; of a key, that without the section where this says nothing more."""
    short = value.rsplit("/", 1)[-1]
    section, _, inside = key.partition(".")
    return short if key in CHOICES else f"{inside if section in SECTIONS and inside else key}={short}"


def short_module_names(names: Sequence[str]) -> dict[str, str]:
    """Module names without what all of them share, but for the part before the first difference: `layers.28`."""
    parts = [name.split(".") for name in names]
    if len(parts) < 2:
        return {name: ".".join(split[-3:]) for name, split in zip(names, parts, strict=True)}
    least = min(map(len, parts))
    start = next(i for i in range(least + 1) if i == least or len({split[i] for split in parts}) > 1)
    end = next(i for i in range(least - start + 1) if i == least - start or len({split[-1 - i] for split in parts}) > 1)
    return {
        name: ".".join(split[max(start - 1, 0) : len(split) - end]) for name, split in zip(names, parts, strict=True)
    }
