"""Facts into a model from Python, without a command line: the plan, the editor and the turns of a run."""

from __future__ import annotations

import difflib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from config.compose import check_command_line, choices_of, compose_config, typed_keys
from config.schema import quoted, to_run_config
from data.progress import progress_bar
from harness.ask.edited import MAX_NEW_TOKENS, EditedModel
from harness.job import load_model, make_editor, make_plan
from harness.ranks import init_ranks
from harness.run import prepare_libraries
from harness.watch import turn_note

FACTS_A_TURN = 100  # as published
PARTS = ("prompt", "answer", "subject")  # of a fact
OF_RUNS = ("model_cache", "model_cache_dir", "editor.cache_dir", "evaluate", "resume", "hydra")
"""Settings that say what a run leaves behind, or takes up."""


def edit(
    model: str,
    facts: Iterable[Mapping[str, str]],
    editor: str = "stableedit_plus",
    settings: Sequence[str] = (),
) -> EditedModel:
    """A model with the facts written into it, ready to be asked; on disk caches alone are written.

    `model` is a preset of config/model, or the folder or Hugging Face name of any causal language model, which needs
    a step size: settings=["model.lr=1e-3"]. Each fact has a `prompt`, an `answer` and, for editors that ask for it, a
    `subject`. `settings` are those of the command line. Up to 100 facts are one turn; more of them are turns of
    `dataset.n_edits`, which must share them out evenly. Nothing warms up, unless the settings say otherwise. Editors
    that learn to edit take a network that a run has trained (`editor.load_checkpoint`).
    ValueError, in one line, for what is wrong with any of them, before a weight is read.
    """
    prepare_libraries()
    rows = _rows(facts)
    _check_settings(settings)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "facts.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        line = [*_choices(model, editor, path, rows), *settings]
        check_command_line([*line, "--cfg", "job"])  # its keys; its values below
        composed = compose_config(line)
        if composed.editor.get("n_epochs") and composed.editor.load_checkpoint is None:
            raise ValueError(
                f"editor={editor}: edit() trains no network; name a run that has, editor.load_checkpoint=RUN, or set "
                "editor.n_epochs=0 for the untrained one"
            )
        cfg = to_run_config(composed)
        plan = make_plan(cfg, init_ranks(), typed_keys(settings))
        if len(plan.stream.edited()) < len(rows):
            size, turns = cfg.dataset.n_edits, cfg.num_seq
            if turns is not None and turns * size < len(rows):
                raise ValueError(f"num_seq={turns}: turns of {size} facts, and there are {len(rows)}; leave it out")
            raise ValueError(
                f"facts: {len(rows)} are not full turns of dataset.n_edits={size}; set dataset.n_edits to a number "
                "that divides them"
            )
        edited = load_model(cfg, plan)
        chosen = make_editor(cfg, plan, edited, edited.fingerprint())
        with progress_bar("editing", len(plan.stream), "turns", keep=True) as bar:
            for turn in plan.stream.from_turn(0):
                with edited.reading_once(), edited.telling(bar.within):
                    chosen.edit(edited, turn)
                bar.advance(1, turn_note(len(plan.stream.edited(turn.index + 1)), turn.phase))
    return EditedModel(edited, edited, f"{model} with {len(rows)} facts", cfg.asked_form().name, MAX_NEW_TOKENS)


def _rows(facts: Iterable[Mapping[str, str]]) -> list[dict[str, str]]:
    """What the data file of such a run has."""
    if isinstance(facts, Mapping | str):
        raise ValueError(f"facts: a {type(facts).__name__}; give a list of {{'prompt': ..., 'answer': ...}}")
    rows = [_row(i, fact) for i, fact in enumerate(facts)]
    if not rows:
        raise ValueError("facts: there are none; give a list of {'prompt': ..., 'answer': ...}")
    subjects = [i for i, row in enumerate(rows) if "subject" in row]
    if subjects and len(subjects) < len(rows):
        without = next(i for i, row in enumerate(rows) if "subject" not in row)
        raise ValueError(f"fact {without} has no subject, and fact {subjects[0]} has one: give it to all, or to none")
    return rows


def _row(i: int, fact: Mapping[str, str]) -> dict[str, str]:
    if not isinstance(fact, Mapping):
        raise ValueError(f"fact {i} is a {type(fact).__name__}; give {{'prompt': ..., 'answer': ...}}")
    if unknown := sorted(set(fact) - set(PARTS)):
        raise ValueError(f"fact {i} has a {unknown[0]!r}, and a fact is of {', '.join(PARTS)}: take it out")
    missing = [name for name in ("prompt", "answer") if not str(fact.get(name) or "").strip()]
    if missing:
        raise ValueError(f"fact {i} has no {missing[0]}: give it one, {{'prompt': ..., 'answer': ...}}")
    return {name: fact[name] for name in PARTS if fact.get(name) is not None}


def _check_settings(settings: Sequence[str]) -> None:
    if isinstance(settings, str):
        raise ValueError(f"settings={settings!r}: a text; give a list of them, [{settings!r}]")
    for setting in settings:
        key = setting.lstrip("+~").partition("=")[0]
        if key in OF_RUNS or key.partition(".")[0] in OF_RUNS:
            raise ValueError(f"{setting}: edit() leaves no run behind and takes none up; leave it out, or use main.py")


def _choices(model: str, editor: str, path: Path, rows: Sequence[Mapping[str, str]]) -> list[str]:
    """What the command line of such a run says."""
    presets = choices_of("model")
    preset = model in presets
    near = difflib.get_close_matches(model, presets, n=1, cutoff=0.8)
    if near and not preset and not Path(model).expanduser().is_dir():
        raise ValueError(f"model={model!r}: no preset and no folder; did you mean {near[0]!r}?")
    chosen = [f"model={model}"] if preset else ["model=huggingface", f"model.name_or_path={quoted(model)}"]
    fields = [f"dataset.fields.{name}={name}" for name in PARTS if name in rows[0]]
    size = f"dataset.n_edits={min(len(rows), FACTS_A_TURN)}"
    data = ["dataset=jsonl", f"dataset.valid_path={quoted(str(path))}", size, *fields]
    return [*chosen, f"editor={editor}", "editor.preheat_mode=none", *data]
