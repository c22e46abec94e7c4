"""Models as edits left them: the base model that a run or a delta names, verified, with its edited weights in place.

Where an editor keeps its edits beside the weights, it is at work in the model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config.schema import Dtype, EditPrecision
from harness.export.delta import Delta, Difference, added
from harness.job import DTYPES, memory_of_run
from harness.run import TRAINING_PHASES, Checkpoint, Checkpoints, places
from model import BESIDE_WEIGHTS, LanguageModel
from model.source import ModelSource, load_tokenizer, locate, outline

log = logging.getLogger(__name__)

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------------------
# From a run


def edited_by_run(
    run: dict[str, Any],  # run.json
    checkpoint: Checkpoint,
    moved_to: str | None,
    device: torch.device = CPU,
) -> LanguageModel:
    """The model as a checkpoint of the run has it, in its weights or, with the run's editor, beside them.

    ValueError where the base model is no longer the run's.
    """
    settings = run["config"]["model"]
    source = source_of_run(run, moved_to)
    model = LanguageModel.load(
        source,
        load_tokenizer(source),
        outline(source, settings["edit_modules"], settings["auto_layers"]).shapes,
        dtype=DTYPES[Dtype[settings["half"]]],
        device=device,
        device_map=settings["device_map"] if device.type == "cuda" else None,
        master=EditPrecision[settings["edit_precision"]] is EditPrecision.master,
    )
    name = moved_to or settings["name_or_path"]
    require(model, run["model"]["fingerprint"], f"--model {name}: not the model that the run began with")
    for module, master in checkpoint.of_group("model"):
        model.edited[module].restore(master)
    if not checkpoint.state["in_weights"]:
        memory_of_run(run["config"], model, device).load_state_dict(dict(checkpoint.of_group("editor")))
    return model


def require_in_weights(checkpoint: Checkpoint) -> None:
    """ValueError where no weights hold the edits."""
    if not checkpoint.state["in_weights"]:
        raise ValueError(f"{checkpoint.path}: {BESIDE_WEIGHTS}")


def source_of_run(run: dict[str, Any], moved_to: str | None) -> ModelSource:
    """Where the run's base model comes from, `moved_to` being its name now where that has changed."""
    settings = run["config"]["model"]
    revision = None if moved_to else settings["revision"]
    path = locate(moved_to or settings["name_or_path"], places.CACHE, revision)
    return ModelSource(path, settings["class_name"], revision, settings["trust_remote_code"])


def require(model: LanguageModel, fingerprint: str, otherwise: str) -> None:
    """ValueError where the model's weights are others."""
    found = model.fingerprint()
    if found != fingerprint:
        raise ValueError(f"{otherwise}: its weights have the fingerprint {found}, not {fingerprint}")


def find_checkpoint(folder: Path, run: dict[str, Any], turn: int | None) -> tuple[Checkpoint, str]:
    """The checkpoint of that turn, None being the newest, and, in words, when in the run that is.

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
            "takes the newest there is"
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
        return sum(json.loads(line)["phase"] not in TRAINING_PHASES for line in file if line.endswith("\n"))


# ---------------------------------------------------------------------------------------------------------------------
# From a delta


def source_of_delta(delta: Delta, moved_to: str | None, trust_remote_code: bool) -> ModelSource:
    """Where the delta's base model comes from, `moved_to` being its name now where that has changed."""
    name, revision = (moved_to, None) if moved_to else (delta.origin.base, delta.origin.revision)
    return ModelSource(locate(name, places.CACHE, revision), delta.origin.class_name, revision, trust_remote_code)


def edited_by_delta(
    delta: Delta, moved_to: str | None, trust_remote_code: bool, device: torch.device = CPU
) -> LanguageModel:
    """Base + delta: the model that was edited, bit for bit."""
    source = source_of_delta(delta, moved_to, trust_remote_code)
    otherwise = f"--model {moved_to or delta.origin.base}: not the base model of {delta.path}"
    model = load(source, delta, delta.origin.base_fingerprint, otherwise, device)
    change(model, delta, added, delta.origin.edited_fingerprint)
    return model


def when_of(delta: Delta) -> str:
    """When in which run that is, in words."""
    return f"after turn {delta.origin.turn} of run {delta.origin.run_id}"


def load(
    source: ModelSource, delta: Delta, fingerprint: str, otherwise: str, device: torch.device = CPU
) -> LanguageModel:
    """The model to change; ValueError where it is not the one that the delta belongs to."""
    try:
        shapes = outline(source, list(delta.origin.modules), 0).shapes
    except ValueError as error:
        raise ValueError(f"{otherwise} ({error})") from error
    for name, (d_k, d_v) in delta.origin.modules.items():
        if shapes[name] != (d_k, d_v):
            here = " x ".join(map(str, shapes[name]))
            raise ValueError(f"{otherwise}, in which {name} is {d_k} x {d_v}, not {here}")
    dtype = getattr(torch, delta.origin.dtype)
    model = LanguageModel.load(source, load_tokenizer(source), shapes, dtype=dtype, device=device)
    require(model, fingerprint, otherwise)
    return model


def change(model: LanguageModel, delta: Delta, step: Callable[[Tensor, Difference], Tensor], fingerprint: str) -> None:
    """Every edited weight becomes step(weight, its difference)."""
    for name, edited in model.edited.items():
        edited.restore(step(edited.original.to(CPU), delta.difference(name)))
    require(model, fingerprint, f"{delta.path}: this machine does not come to the weights of the run")
