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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor

from config.schema import EditPrecision, Half
from harness.export.delta import Delta, Difference, Origin, added, difference, read_delta, removed, write_delta
from harness.job.devices import DTYPES
from harness.job.outputs import require_writable
from harness.run.checkpoint import Checkpoint, Checkpoints
from harness.run.folder import TRAINING, read_run
from harness.run.places import CACHE
from model import BESIDE_WEIGHTS, LanguageModel
from model_source import ModelSource, load_tokenizer, locate, outline

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
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
    parser = _Parser(
        prog="python -m harness.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    require_writable(target, f"--to {target}", "choose another place")


# ---------------------------------------------------------------------------------------------------------------------
# From a run


def export(chosen: argparse.Namespace) -> str:
    """The model as a checkpoint of the run has it, whole or as a delta."""
    run = read_run(chosen.run)
    checkpoint, when = find_checkpoint(chosen.run, run, chosen.turn)
    if not checkpoint.state["in_weights"]:
        raise ValueError(f"{chosen.run}: {BESIDE_WEIGHTS}")
    model = base_of(run, chosen.model)
    for name, master in checkpoint.of_group("model"):
        model.edited[name].restore(master)
    if not chosen.delta:
        model.export(chosen.to)
        return f"the edited model, {when}"
    differences = {name: difference(edited.original, edited.master) for name, edited in model.edited.items()}
    write_delta(chosen.to, origin_of(run, checkpoint.place, model), differences)
    return f"what the edits changed, {when}"


def base_of(run: dict[str, Any], moved_to: str | None) -> LanguageModel:
    """The model that the run began with; ValueError where what has its name now is another one."""
    settings = run["config"]["model"]
    revision = None if moved_to else settings["revision"]
    name = moved_to or settings["name_or_path"]
    trust = settings["trust_remote_code"]
    source = ModelSource(locate(name, CACHE, revision), settings["class_name"], revision, trust)
    model = LanguageModel.load(
        source,
        load_tokenizer(source),
        outline(source, settings["edit_modules"], settings["auto_layers"]).shapes,
        dtype=DTYPES[Half[settings["half"]]],
        device=CPU,
        master=EditPrecision[settings["edit_precision"]] is EditPrecision.master,
    )
    require(model, run["model"]["fingerprint"], f"--model {name}: not the model that the run began with")
    return model


def require(model: LanguageModel, fingerprint: str, otherwise: str) -> None:
    """ValueError where the model's weights are others."""
    found = model.fingerprint()
    if found != fingerprint:
        raise ValueError(f"{otherwise}: its weights have the fingerprint {found}, not {fingerprint}")


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
    )


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
    """Turns that the run has behind it, those of meta-training not counted; a line that a kill cut short is none."""
    with (folder / "turns.jsonl").open(encoding="utf-8") as file:
        return sum(json.loads(line)["phase"] not in TRAINING for line in file if line.endswith("\n"))


# ---------------------------------------------------------------------------------------------------------------------
# From a delta


def apply(chosen: argparse.Namespace) -> str:
    """Base + delta: the model that was edited, bit for bit."""
    delta = read_delta(chosen.apply)
    origin = delta.origin
    name, revision = (chosen.model, None) if chosen.model else (origin.base, origin.revision)
    source = ModelSource(locate(name, CACHE, revision), origin.class_name, revision, bool(chosen.trust_remote_code))
    model = load(source, delta, origin.base_fingerprint, f"--model {name}: not the base model of {delta.path}")
    change(model, delta, added, origin.edited_fingerprint)
    model.export(chosen.to)
    return f"the edited model, after turn {origin.turn} of run {origin.run_id}"


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


def load(source: ModelSource, delta: Delta, fingerprint: str, otherwise: str) -> LanguageModel:
    """The model to change; ValueError where it is not the one that the delta belongs to."""
    try:
        shapes = outline(source, list(delta.origin.modules), 0).shapes
    except ValueError as error:
        raise ValueError(f"{otherwise} ({error})") from error
    for name, shape in delta.origin.modules.items():
        if shapes[name] != shape:
            raise ValueError(f"{otherwise}, in which {name} is {_by(*shape)}, not {_by(*shapes[name])}")
    dtype = getattr(torch, delta.origin.dtype)
    model = LanguageModel.load(source, load_tokenizer(source), shapes, dtype=dtype, device=CPU)
    require(model, fingerprint, otherwise)
    return model


def _by(d_k: int, d_v: int) -> str:
    return f"{d_k} x {d_v}"


def change(model: LanguageModel, delta: Delta, step: Callable[[Tensor, Difference], Tensor], fingerprint: str) -> None:
    """Every edited weight becomes step(weight, its difference)."""
    for name, edited in model.edited.items():
        edited.restore(step(edited.original, delta.difference(name)))
    require(
        model, fingerprint, f"{delta.path}: this machine does not come to the weights of the run, nothing is written"
    )
