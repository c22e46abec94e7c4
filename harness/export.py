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
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor

from config.schema import EditPrecision, Half
from harness.checkpoint import Checkpoint, Checkpoints
from harness.delta import Delta, Difference, Origin, added, difference, read_delta, removed, write_delta
from harness.places import CACHE
from harness.plan import DTYPES
from harness.tracking import TRAINING, read_run
from model import LanguageModel, ModelSource, load_tokenizer, locate, outline

log = logging.getLogger(__name__)

SUFFIX = ".safetensors"
GOES_WITH = {"run": {"delta", "turn", "model"}, "apply": {"model", "trust_remote_code"}, "undo": {"edited"}}
GOES_WITH["undo"] |= {"trust_remote_code"}


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def main(arguments: Sequence[str] | None = None) -> None:
    """A mistake of the user's ends in one line, and exit code 1."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.basicConfig(level=logging.INFO, format="%(levelname)-7s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    option = "--model "
    try:
        chosen = parse(arguments)
        option = "--from " if chosen.undo else option
        done = work(chosen)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split()).replace('model.name_or_path=', option)}")
    sys.stdout.write(f"{done}\n")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see python -m harness.export --help")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What the user typed; ValueError where it does not go together."""
    parser = _Parser(
        prog="python -m harness.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    path: dict[str, Any] = {"type": lambda text: Path(text).expanduser().absolute()}
    parser.add_argument("run", nargs="?", metavar="RUN", **path, help="the folder of a run")
    parser.add_argument("--apply", metavar="DELTA", **path, help="add a delta to the base model")
    parser.add_argument("--undo", metavar="DELTA", **path, help="take a delta off the edited model")
    parser.add_argument(
        "--to", required=True, metavar="PATH", **path, help="what to write: a folder; a file of a delta"
    )
    parser.add_argument("--delta", action="store_true", default=None, help=f"write the differences only, to a {SUFFIX}")
    parser.add_argument("--turn", type=int, metavar="T", help="the state after T turns; default: the newest checkpoint")
    parser.add_argument("--from", dest="edited", metavar="FOLDER", help="the edited model, for --undo")
    parser.add_argument(
        "--model", metavar="BASE", help="the base model, where it is not under the name that the run had for it"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", default=None, help="run the model's own code; a run says it itself"
    )
    chosen = parser.parse_args(arguments)
    given = {name for name, value in vars(chosen).items() if value is not None} - {"to"}
    ways = [way for way in GOES_WITH if way in given]
    if len(ways) != 1:
        parser.error(f"{' and '.join(ways) or 'no work'} given: name one of RUN, --apply DELTA, --undo DELTA")
    for name in sorted(given - {ways[0]} - GOES_WITH[ways[0]]):
        option = {"edited": "from"}.get(name, name).replace("_", "-")
        parser.error(f"--{option} says nothing to {'a RUN' if ways == ['run'] else f'--{ways[0]}'}: leave it out")
    if chosen.undo and chosen.edited is None:
        parser.error("--undo needs --from FOLDER, the edited model")
    return chosen


def work(chosen: argparse.Namespace) -> str:
    """Write what was asked for, and say what it is."""
    check_target(chosen.to, chosen.delta)
    if chosen.apply:
        return f"{chosen.to}: {apply(chosen)}"
    if chosen.undo:
        return f"{chosen.to}: {undo(chosen)}"
    return f"{chosen.to}: {export(chosen)}"


def check_target(target: Path, is_file: bool) -> None:
    """ValueError where something stands there, or nothing can be written there."""
    if is_file and target.suffix != SUFFIX:
        raise ValueError(f"--to {target}: a delta is one file; give it a name that ends in {SUFFIX}")
    if target.exists() and (is_file or not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--to {target}: is there already and is not written over; name another")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise ValueError(f"--to {target}: cannot be written ({error.strerror}); choose another place") from error


# ---------------------------------------------------------------------------------------------------------------------
# From a run


def export(chosen: argparse.Namespace) -> str:
    """The model as a checkpoint of the run has it, whole or as a delta."""
    run = read_run(chosen.run)
    checkpoint, when = find_checkpoint(chosen.run, run, chosen.turn)
    settings = run["config"]["model"]
    name, revision = settings["name_or_path"], settings["revision"]
    if chosen.model:
        name, revision = chosen.model, None
    trust = settings["trust_remote_code"]
    source = ModelSource(locate(name, CACHE, revision), settings["class_name"], revision, trust)
    shapes = outline(source, settings["edit_modules"], settings["auto_layers"]).shapes
    model = LanguageModel.load(
        source,
        load_tokenizer(source),
        shapes,
        dtype=DTYPES[Half[settings["half"]]],
        device=torch.device("cpu"),
        master=EditPrecision[settings["edit_precision"]] is EditPrecision.master,
    )
    base = model.fingerprint()
    if base != run["model"]["fingerprint"]:
        raise ValueError(
            f"--model {name}: other weights than those that the run began with (fingerprint "
            f"{run['model']['fingerprint']}, now {base}); name the base model of the run"
        )
    for module, master in checkpoint.of_group("model"):
        model.edited[module].restore(master)
    if not chosen.delta:
        model.export(chosen.to)
        return f"the edited model, {when}"
    first = next(iter(model.edited.values()))
    origin = Origin(
        base=settings["name_or_path"],
        revision=settings["revision"],
        class_name=settings["class_name"],
        base_fingerprint=base,
        edited_fingerprint=model.fingerprint(),
        run_id=run["run_id"],
        turn=checkpoint.place,
        modules=shapes,
        dtype=_name(first.weight),
        master_dtype=_name(first.master),
    )
    write_delta(chosen.to, origin, {n: difference(one.original, one.master) for n, one in model.edited.items()})
    return f"what the edits changed, {when}"


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def find_checkpoint(folder: Path, run: dict[str, Any], turn: int | None) -> tuple[Checkpoint, str]:
    """The checkpoint to export and, in words, when in the run that is.

    ValueError where there is none of that turn, or, for a finished run of which no turn is named, none of its end.
    """
    checkpoints = Checkpoints(folder / "checkpoints", "turn", keep=1)
    if not checkpoints.places():
        raise ValueError(_no_checkpoint(folder, run["config"]))
    found = checkpoints.newest() if turn is None else checkpoints.at(turn)
    if found is None:
        raise ValueError(f"{checkpoints.folder}: every checkpoint in it is damaged; begin the run anew")
    if found.state["run_id"] != run["run_id"]:
        raise ValueError(f"{found.path}: of run {found.state['run_id']}, not {run['run_id']}; take it away")
    done = turns_done(folder)
    when = f"after turn {found.place} of {done} of the run in {folder}"
    if run["status"] != "finished":
        log.warning("the run in %s is not finished (%s): this is not its end", folder, run["status"])
    elif turn is None and found.place < done:
        raise ValueError(
            f"{checkpoints.folder}: holds no whole checkpoint of the run's end, turn {done}; --turn {found.place} "
            "exports the newest there is"
        )
    return found, when


def _no_checkpoint(folder: Path, config: dict[str, Any]) -> str:
    if config["evaluate"] is not None:
        return f"{folder}: has edited nothing, it scored evaluate={config['evaluate']}; name the run that edited"
    saved = Path(config["model_cache_dir"] or folder / "model").expanduser()
    if (saved / "config.json").is_file():
        return f"{folder}: holds no checkpoint (checkpoint_every=0); its edited model is whole in {saved}"
    return (
        f"{folder}: holds no checkpoint of a turn; a run with checkpoint_every=N writes one every N turns, and one at "
        "its end"
    )


def turns_done(folder: Path) -> int:
    """Turns that the run has behind it, those of meta-training not counted."""
    with (folder / "turns.jsonl").open(encoding="utf-8") as file:
        return sum(json.loads(line)["phase"] not in TRAINING for line in file)


# ---------------------------------------------------------------------------------------------------------------------
# From a delta


def apply(chosen: argparse.Namespace) -> str:
    """Base + delta: the model that was edited, bit for bit."""
    delta = read_delta(chosen.apply)
    origin = delta.origin
    name, revision = (chosen.model, None) if chosen.model else (origin.base, origin.revision)
    source = ModelSource(locate(name, CACHE, revision), origin.class_name, revision, bool(chosen.trust_remote_code))
    model = load(source, delta, f"--model {name}", origin.base_fingerprint, "base")
    change(model, delta, added, origin.edited_fingerprint)
    model.export(chosen.to)
    return f"the edited model, after turn {origin.turn} of run {origin.run_id}"


def undo(chosen: argparse.Namespace) -> str:
    """Edited - delta: the base model, bit for bit."""
    delta = read_delta(chosen.undo)
    origin = delta.origin
    path = locate(chosen.edited, CACHE)
    source = ModelSource(path, origin.class_name, trust_remote_code=bool(chosen.trust_remote_code))
    model = load(source, delta, f"--from {chosen.edited}", origin.edited_fingerprint, "edited")
    change(model, delta, removed, origin.base_fingerprint)
    model.export(chosen.to)
    return f"the base model, as before run {origin.run_id}"


def load(source: ModelSource, delta: Delta, option: str, fingerprint: str, role: str) -> LanguageModel:
    """The model to change; ValueError where it is not the one that the delta belongs to."""
    try:
        shapes = outline(source, list(delta.origin.modules), 0).shapes
    except ValueError as error:
        raise ValueError(f"{option}: not the {role} model of {delta.path} ({error})") from error
    for name, shape in delta.origin.modules.items():
        if shapes[name] != shape:
            raise ValueError(
                f"{option}: not the {role} model of {delta.path}, in which {name} is {_by(shape)}, "
                f"not {_by(shapes[name])}"
            )
    model = LanguageModel.load(
        source,
        load_tokenizer(source),
        shapes,
        dtype=getattr(torch, delta.origin.dtype),
        device=torch.device("cpu"),
    )
    found = model.fingerprint()
    if found != fingerprint:
        raise ValueError(
            f"{option}: not the {role} model of {delta.path}: its weights have the fingerprint {found}, not "
            f"{fingerprint}"
        )
    return model


def _by(shape: tuple[int, int]) -> str:
    return " x ".join(map(str, shape))


def change(model: LanguageModel, delta: Delta, step: Callable[[Tensor, Difference], Tensor], fingerprint: str) -> None:
    """Every edited weight becomes step(weight, its difference)."""
    for name, edited in model.edited.items():
        edited.restore(step(edited.original, delta.difference(name)))
    if model.fingerprint() != fingerprint:
        raise ValueError(f"{delta.path}: this machine comes to other weights than the run did; nothing was written")


if __name__ == "__main__":
    main()
