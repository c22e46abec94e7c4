"""What a run keeps in memory, item by item, before anything is loaded, and whether a device has room for it.

    python -m harness.memory model=mistral-7b editor=stableedit --gib 24

Settings are those of main.py. Of the model only its config.json is read: with model.name_or_path=FOLDER, a folder that
holds that file alone will do. Counted are weights, the editor's state, what it makes on the way (captures; factors of
second moments, and those while they are made; keys and values of what stands before a moved position; what a step of
fine-tuning or of a side memory has), and kept updates. What a state grows to is told from num_seq, where that is null
at its bound or, for GRACE, for 20,000 facts. Activations are estimated from sizes, and how many copies of matrices and
of logits there are at a time is assumed (the constants in harness/memory). Left out is what is there for a while only:
text generation, perplexity, GLUE-style tasks, the losses of meta-training. No GPU has been asked yet.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import psutil
import torch
import transformers
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from config.compose import check_command_line, compose_config
from config.schema import HyperNetworkConfig, RunConfig, to_run_config
from harness.job import check_modules, check_rank, check_registered, source_of
from harness.memory.asked import Facts, Item
from harness.memory.items import highest, items, what_fits
from harness.run.command import Parser
from model.source import Outline, outline

GIB = 1 << 30
OWN = 0.5  # GiB that CUDA, its libraries and torch's allocator keep for themselves


def main(arguments: Sequence[str] | None = None) -> None:
    """A mistake of the user's ends in one line, and exit code 1; so does a run that does not fit."""
    transformers.logging.set_verbosity_error()
    try:
        work(parse(arguments))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser("harness.memory", __doc__)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="as main.py takes them")
    parser.add_argument("--gib", type=float, help="room of a GPU that is not here; default: this machine's device")
    parser.add_argument("--tokens", type=int, default=24, help="of a fact with its answer; default 24")
    parser.add_argument("--answer-tokens", type=int, default=4, help="of those, the answer's; default 4")
    chosen = parser.parse_intermixed_args(arguments)
    if not 0 < chosen.answer_tokens < chosen.tokens:
        raise ValueError(
            f"--answer-tokens {chosen.answer_tokens}: must be above 0 and below --tokens {chosen.tokens}, which counts "
            "the question too"
        )
    if chosen.gib is not None and not chosen.gib > OWN:
        raise ValueError(f"--gib {chosen.gib}: must be above {OWN}, which CUDA keeps for itself")
    return chosen


def work(chosen: argparse.Namespace) -> None:
    check_command_line(chosen.settings)
    cfg = to_run_config(compose_config(chosen.settings))
    check_registered(cfg)
    device, room, about = device_of(cfg, chosen.gib)
    facts = Facts(chosen.tokens, chosen.answer_tokens)
    sketch = outline(source_of(cfg), cfg.model.edit_modules, cfg.model.auto_layers)
    check_modules(cfg, list(sketch.shapes))
    if isinstance(cfg.editor, HyperNetworkConfig):
        check_rank(cfg.editor, sketch.shapes)

    def size(other: RunConfig) -> int:
        return highest(items(other, sketch, facts, device), on_one_device(other, device))

    found, needed = items(cfg, sketch, facts, device), size(cfg)
    console = Console(file=sys.stdout, force_terminal=sys.stdout.isatty())
    console.print(as_table(found, needed, on_one_device(cfg, device)))
    if needed <= room:
        console.print(f"{needed / GIB:.1f} GiB at most: fits {about}")
        return
    switches, then = what_fits(cfg, size, room)
    last = "" if then <= room else f", which is still too much: {_remedy(cfg, sketch)}"
    smaller = f"; with {' '.join(switches)} it is {then / GIB:.1f} GiB" if switches else ""
    raise ValueError(f"{needed / GIB:.1f} GiB at most, more than {about}{smaller}{last}")


def _remedy(cfg: RunConfig, sketch: Outline) -> str:
    fewer = "edit fewer modules, or " if len(sketch.shapes) > 1 else ""
    return f"{fewer}{'set model.device_map=auto' if cfg.model.device_map is None else 'take more GPUs'}"


def on_one_device(cfg: RunConfig, device: torch.device) -> bool:
    """Whether the editor shares the room of the model, which is on that device."""
    if cfg.editor_device == "auto":
        return True
    if cfg.model.device_map is not None:  # which takes all GPUs, the editor's too
        return torch.device(cfg.editor_device).type == device.type
    editor = torch.device(cfg.editor_device)
    return (editor.type, editor.index or 0) == (device.type, device.index or 0)


def device_of(cfg: RunConfig, gib: float | None) -> tuple[torch.device, int, str]:
    """Where the model will be, the bytes that there are for it, and in words."""
    laid = cfg.model.device_map is not None
    if gib is not None:
        if laid:
            raise ValueError(
                f"--gib {gib:g} with model.device_map, which lays the model over all GPUs: how many there are is not "
                "said; leave one of the two out"
            )
        meant = cfg.model_device if cfg.model_device.startswith("cuda") else "cuda"
        return torch.device(meant), int((gib - OWN) * GIB), f"a GPU of {gib:g} GiB"
    named = cfg.model_device if cfg.model_device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(named).type == "cpu":
        total = psutil.virtual_memory().total
        return torch.device("cpu"), total, f"this machine's memory of {total / GIB:.1f} GiB"
    if not torch.cuda.is_available():
        raise ValueError(
            f"model_device={named}: this machine has no GPU; --gib 24 says how large the one is that is meant"
        )
    places = range(torch.cuda.device_count()) if laid else [torch.device(named)]
    sizes = [torch.cuda.get_device_properties(place).total_memory for place in places]
    large = f"{sum(sizes) / GIB:.1f} GiB"
    about = f"{len(sizes)} GPUs of {large} together" if laid else f"{named} of {large}"
    return torch.device(named), sum(sizes) - int(len(sizes) * OWN * GIB), about


def as_table(found: Sequence[Item], needed: int, together: bool) -> Table:
    table = Table(box=SIMPLE)
    for heading in ("item", "GiB", "when", "what"):
        table.add_column(heading, justify="right" if heading == "GiB" else "left")
    for one in found:
        where = "" if together or not one.of_editor else ", where the editor is"
        table.add_row(one.name, f"{one.bytes / GIB:.3f}", one.while_in or "always", one.about + where)
    table.add_row("at most", f"{needed / GIB:.3f}", "", "always, and in the most crowded part of a run")
    return table
