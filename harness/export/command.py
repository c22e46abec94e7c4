"""Edited models that leave the house: whole, or as what was changed, which can be added to the base and taken off.

    python -m harness.export RUN --to FOLDER
    python -m harness.export RUN --delta --to FILE.safetensors
    python -m harness.export --apply FILE.safetensors --to FOLDER
    python -m harness.export --undo FILE.safetensors --from FOLDER --to FOLDER

A run is exported as its checkpoints have it: the newest one, which is the end of a finished run, or that of `--turn`.
Folders are what `from_pretrained` reads. What is written is complete or absent, and nothing is written over.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.export.delta import Origin, difference, read_delta, removed, write_delta
from harness.export.load import (
    change,
    edited_by_delta,
    edited_by_run,
    find_checkpoint,
    load,
    require_in_weights,
    when_of,
)
from harness.job import require_writable
from harness.run import form_note, form_of_run, read_run
from harness.run.command import Parser, log_to_terminal
from harness.run.places import CACHE
from model import LanguageModel
from model.source import ModelSource, locate

SUFFIX = ".safetensors"
GOES_WITH = {  # which options each way of working takes, beside --to
    "run": {"delta", "turn", "model"},
    "apply": {"model", "trust_remote_code"},
    "undo": {"edited", "trust_remote_code"},
}
AS_TYPED = {"run": "RUN", "edited": "--from", "trust_remote_code": "--trust-remote-code"}  # others: --<name>


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def main(arguments: Sequence[str] | None = None) -> None:
    """A mistake of the user's ends in one line, and exit code 1."""
    log_to_terminal()
    option = "--model "
    try:
        chosen = parse(arguments)
        option = "--from " if chosen.undo else option
        done = work(chosen)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split()).replace('model.name_or_path=', option)}")
    sys.stdout.write(f"{done}\n")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What the user typed; ValueError where it does not go together."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    typed = {name: AS_TYPED.get(name, f"--{name}") for name, value in vars(chosen).items() if value is not None}
    ways = [way for way in GOES_WITH if way in typed]
    if len(ways) != 1:
        given = " and ".join(typed[way] for way in ways) or "nothing to do"
        parser.error(f"{given} given: name one of RUN, --apply DELTA, --undo DELTA")
    for name in sorted(typed.keys() - {"to", *ways} - GOES_WITH[ways[0]]):
        parser.error(f"{typed[name]} has no effect with {typed[ways[0]]}: leave it out")
    if chosen.undo and chosen.edited is None:
        parser.error("--undo needs --from FOLDER, the edited model")
    return chosen


def _parser() -> argparse.ArgumentParser:
    parser = Parser("harness.export", __doc__)
    path: dict[str, Any] = {"type": lambda text: Path(text).expanduser().absolute()}
    flag: dict[str, Any] = {"action": "store_true", "default": None}
    parser.add_argument("run", nargs="?", metavar="RUN", **path, help="the folder of a run")
    parser.add_argument("--apply", metavar="DELTA", **path, help="add a delta to the base model")
    parser.add_argument("--undo", metavar="DELTA", **path, help="take a delta off the edited model")
    parser.add_argument("--to", required=True, metavar="PATH", **path, help="a new folder; for --delta a new file")
    parser.add_argument("--delta", **flag, help=f"write only what was changed, as one {SUFFIX} file")
    parser.add_argument("--turn", type=int, metavar="T", help="the state after T turns; default: the newest checkpoint")
    parser.add_argument("--from", dest="edited", metavar="FOLDER", help="the edited model, for --undo")
    parser.add_argument("--model", metavar="BASE", help="the base model, where its name has changed since the run")
    parser.add_argument("--trust-remote-code", **flag, help="for models that bring code; a RUN says it itself")
    return parser


def work(chosen: argparse.Namespace) -> str:
    """Write what was asked for, and say what it is."""
    check_target(chosen.to, chosen.delta)
    way = apply if chosen.apply else undo if chosen.undo else export
    return f"{chosen.to}: {way(chosen)}"


def check_target(target: Path, is_file: bool) -> None:
    """ValueError where something stands there, or nothing can be written there."""
    if is_file and target.suffix != SUFFIX:
        raise ValueError(f"--to {target}: a delta is one file; give it a name that ends in {SUFFIX}")
    if target.exists() and (is_file or not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--to {target}: is there already and is not written over; name another")
    if not is_file and target.suffix == SUFFIX:
        raise ValueError(f"--to {target}: a whole model is a folder; add --delta for one file, or give another name")
    require_writable(target, f"--to {target}", "choose another place")


# ---------------------------------------------------------------------------------------------------------------------
# From a run


def export(chosen: argparse.Namespace) -> str:
    """The model as a checkpoint of the run has it, whole or as a delta."""
    run = read_run(chosen.run)
    checkpoint, when = find_checkpoint(chosen.run, run, chosen.turn)
    require_in_weights(checkpoint)
    model = edited_by_run(run, checkpoint, chosen.model)
    if not chosen.delta:
        model.export(chosen.to, form_note(form_of_run(run["config"])))
        return f"the edited model, {when}"
    differences = {name: difference(edited.original, edited.master) for name, edited in model.edited.items()}
    write_delta(chosen.to, origin_of(run, checkpoint.place, model), differences)
    return f"what the edits changed, {when}"


def origin_of(run: dict[str, Any], turn: int, edited: LanguageModel) -> Origin:
    settings = run["config"]["model"]
    one = next(iter(edited.edited.values()))
    return Origin(
        base=settings["name_or_path"],
        revision=settings["revision"],
        class_name=settings["class_name"],
        base_fingerprint=run["model"]["fingerprint"],
        edited_fingerprint=edited.fingerprint(),
        run_id=run["run_id"],
        turn=turn,
        modules=edited.shapes,
        dtype=str(one.weight.dtype).removeprefix("torch."),
        master_dtype=str(one.master.dtype).removeprefix("torch."),
        prompt_form=form_of_run(run["config"]),
    )


# ---------------------------------------------------------------------------------------------------------------------
# From a delta


def apply(chosen: argparse.Namespace) -> str:
    """Base + delta: the model that was edited, bit for bit."""
    delta = read_delta(chosen.apply)
    model = edited_by_delta(delta, chosen.model, bool(chosen.trust_remote_code))
    model.export(chosen.to, form_note(delta.origin.prompt_form))
    return f"the edited model, {when_of(delta)}"


def undo(chosen: argparse.Namespace) -> str:
    """Edited - delta: the base model, bit for bit."""
    delta = read_delta(chosen.undo)
    origin = delta.origin
    path = locate(chosen.edited, CACHE)
    source = ModelSource(path, origin.class_name, trust_remote_code=bool(chosen.trust_remote_code))
    otherwise = f"--from {chosen.edited}: not the edited model of {delta.path}"
    model = load(source, delta, origin.edited_fingerprint, otherwise)
    change(model, delta, removed, origin.base_fingerprint)
    model.export(chosen.to)
    return f"the base model, as it was before run {origin.run_id}"
