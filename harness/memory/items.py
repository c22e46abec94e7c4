"""What a run keeps, in bytes, from its configuration and the outline of its model.

Letters: N rows (captured tokens) of a turn, d_k key size, d_v value size of an edit module, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from config.schema import Dtype, EditPrecision, HyperNetworkConfig, RunConfig, Token
from editor.registry import EDITORS
from harness.job import DTYPES, settings_of
from model.below import KEPT_TOKENS
from model.language_model import COMPUTE_TOKENS
from model.source import Outline

SINGLE, DOUBLE = 4, 8  # bytes of a float32, of a float64
# Numbers that autograd keeps for a token and traced layer, in widths of the hidden states and of the MLP's inside:
# two norms and their inputs, queries, keys, values, attention's output twice, residuals; gate, up, their product twice.
KEPT_WIDTHS, KEPT_INSIDES = 12, 4
# The most of these that one layer has at one time where autograd keeps nothing: the stream, its norm and what attention
# put out; gate, up and their product.
LAYER_WIDTHS, LAYER_INSIDES = 5, 3
# Copies of Sigma that whitening and the changes of the moments have at one time.
COPIES_OF_SIGMA = 6
# Of the logits of a capture: themselves, in float32, their log-softmax and its gradient.
FLOATS_OF_LOGITS = 3


@dataclass(frozen=True)
class Facts:
    tokens: int  # of a question with its answer
    answer_tokens: int


@dataclass(frozen=True)
class Item:
    name: str
    bytes: int
    about: str
    of_editor: bool = False  # it lies where the editor computes
    while_in: str | None = None  # kept for a part of a turn only; None: from beginning to end


def items(cfg: RunConfig, outline: Outline, facts: Facts, device: torch.device) -> list[Item]:
    """All that a run keeps; `device` is where the model will be."""
    entries = sum(prod(shape) for shape in outline.shapes.values())
    number = DTYPES[cfg.model.half].itemsize
    mastered = cfg.model.edit_precision is EditPrecision.master and number < SINGLE
    aside = entries * (SINGLE if mastered else number)
    rows = _facts(cfg) * (facts.tokens - 1 if cfg.editor.token is Token.all else facts.answer_tokens)
    captured = sum(rows * (d_k + d_v) for d_k, d_v in outline.shapes.values()) * SINGLE
    found = [
        Item("weights", outline.weights * number, f"{outline.weights:.3g} numbers in {cfg.model.half.name}"),
        Item("originals", entries * number, "edited weights as they were loaded"),
        Item("masters", entries * SINGLE * mastered, "edited weights in float32"),
        *_of_editor(cfg, outline.shapes, device),
        *_of_updates(cfg, captured),
        *_of_capture(cfg, outline, facts, captured, device),
        Item("set aside", aside, "edited weights, while the original ones answer", while_in="evaluation"),
        *_of_scoring(cfg, outline, facts, device),
    ]
    return [one for one in found if one.bytes]


def _of_updates(cfg: RunConfig, captured: int) -> Iterator[Item]:
    """As if every fact needed every pass: the factors of a turn are then those of all passes, end to end."""
    factors = captured * cfg.editor.passes
    yield Item("kept updates", factors * (cfg.diagnostics.previous + 1), "factors that later turns are compared with")
    if cfg.editor.passes > 1:
        yield Item("passes", factors, "factors of each pass, before they are one update", while_in="update")


def _of_editor(cfg: RunConfig, shapes: Mapping[str, tuple[int, int]], device: torch.device) -> Iterator[Item]:
    rule = _editor(cfg, shapes, device)
    state = list(rule.state_dict().values())
    yield Item("statistics", _size(state), "the editor's state, networks included", of_editor=True)
    covariances = [one for one in state if one.ndim == 2 and one.dtype is torch.float64]
    if covariances:
        copies = COPIES_OF_SIGMA * max(one.nbytes for one in covariances)
        yield Item("whitening", copies, "copies of a covariance", of_editor=True, while_in="update")
    if isinstance(cfg.editor, HyperNetworkConfig) and cfg.editor.trains():
        moments = 3 * _size(rule.parameters())
        yield Item("optimiser", moments, "gradients, and Adam's two moments", of_editor=True)
    if cfg.editor.asks_for_text():
        factors = sum(d_k**2 for d_k, _ in shapes.values()) * DOUBLE
        yield Item("preserved", factors, "factors of alpha I + preserve C", of_editor=True)
    chunk = 2 * cfg.editor.batch_size * max(d_k for d_k, _ in shapes.values()) * DOUBLE
    yield Item("solve", chunk, "a chunk of keys in float64", of_editor=True, while_in="update")


def _editor(cfg: RunConfig, shapes: Mapping[str, tuple[int, int]], device: torch.device) -> torch.nn.Module:
    """The editor itself, which knows best what it keeps; for a GPU, built where tensors have shapes alone."""
    kind = EDITORS[cfg.editor.name]
    if not hasattr(kind, "update"):
        raise ValueError(
            f"editor={cfg.editor.name}: works on the loaded model, so what it keeps cannot be told before; of other "
            "editors it can"
        )
    named = cfg.editor_device if cfg.editor_device != "auto" else device.type
    settings = settings_of(kind.Settings, cfg)
    if named == "cpu":  # editors choose by device, and nothing moves from meta to the CPU: it is built as it will be
        rule = kind(shapes, settings, torch.device("cpu"))
    else:
        with torch.device("meta"), _WithoutNumbers():
            rule = kind(shapes, settings, torch.device("meta"))
    assert isinstance(rule, torch.nn.Module)
    return rule


def _facts(cfg: RunConfig) -> int:
    """Of a turn, those of earlier turns included."""
    return cfg.dataset.n_edits + cfg.editor.replay


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


class _WithoutNumbers(TorchFunctionMode):
    """Nothing is drawn: tensors without memory take no generator of the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{key: value for key, value in (kwargs or {}).items() if key != "generator"})


def _of_capture(cfg: RunConfig, outline: Outline, facts: Facts, captured: int, device: torch.device) -> Iterator[Item]:
    number = DTYPES[cfg.model.half].itemsize
    batch = min(_batch(cfg, facts, device), _facts(cfg))
    tokens, answers = batch * facts.tokens, batch * facts.answer_tokens
    kept = min(KEPT_TOKENS, _facts(cfg) * facts.tokens) * outline.width * number
    yield Item("read once", kept, "what the blocks below the edits put out for a turn's texts")
    if cfg.editor.cache_dir is None:
        yield Item("captures", captured, "keys and value gradients of a turn", while_in="capture")
    a_token = (KEPT_WIDTHS * outline.width + KEPT_INSIDES * _inside(outline)) * outline.traced_layers
    yield Item("activations", tokens * a_token * number, f"{tokens} tokens, estimated", while_in="capture")
    logits = answers * outline.vocabulary * (number + FLOATS_OF_LOGITS * SINGLE)
    yield Item("logits", logits, f"{answers} answer tokens", while_in="capture")


def scored_bytes(number: int) -> int:
    """Bytes of a scored logit: as the model has it, twice where it is of locality; in float32, and its exponential."""
    as_float32 = SINGLE if number < SINGLE else 0
    return 2 * number + as_float32 + SINGLE


def _of_scoring(cfg: RunConfig, outline: Outline, facts: Facts, device: torch.device) -> Iterator[Item]:
    """Of one compute batch of questions; as if all were locality questions, whose logits are looked at closely."""
    number, batch = DTYPES[cfg.model.half].itemsize, _batch(cfg, facts, device)
    tokens, answers = batch * facts.tokens, batch * facts.answer_tokens
    a_token = LAYER_WIDTHS * outline.width + LAYER_INSIDES * _inside(outline)
    yield Item("a layer", tokens * a_token * number, f"{tokens} tokens, estimated", while_in="evaluation")
    logits = answers * outline.vocabulary * scored_bytes(number)
    yield Item("scored logits", logits, f"{answers} answer tokens", while_in="evaluation")


def _batch(cfg: RunConfig, facts: Facts, device: torch.device) -> int:
    """Questions that fill a compute batch."""
    tokens = cfg.model.compute_tokens or COMPUTE_TOKENS.get(device.type, COMPUTE_TOKENS["cpu"])
    return max(1, tokens // facts.tokens)


def _inside(outline: Outline) -> int:
    """The width of an MLP's inside."""
    return max(max(shape) for shape in outline.shapes.values())


def highest(found: list[Item], model_and_editor: bool) -> int:
    """Bytes at the most crowded time, on the model's device; with the editor's, where that is the same one."""
    here = [one for one in found if model_and_editor or not one.of_editor]
    always = sum(one.bytes for one in here if one.while_in is None)
    parts = {one.while_in for one in found} - {None}
    return always + max(sum(one.bytes for one in here if one.while_in == part) for part in parts)


SWITCHES: dict[str, Callable[[RunConfig], RunConfig]] = {
    # what makes a run smaller, what changes its numbers least first
    "diagnostics.previous=0": lambda cfg: replace(cfg, diagnostics=replace(cfg.diagnostics, previous=0)),
    "model.compute_tokens=1024": lambda cfg: replace(cfg, model=replace(cfg.model, compute_tokens=1024)),
    "editor.cache_dir=FOLDER": lambda cfg: replace(cfg, editor=replace(cfg.editor, cache_dir="FOLDER")),
    "editor_device=cpu": lambda cfg: replace(cfg, editor_device="cpu"),
    "model.half=bf16": lambda cfg: replace(cfg, model=replace(cfg.model, half=Dtype.bf16)),
    "model.edit_precision=in_place": lambda cfg: replace(
        cfg, model=replace(cfg.model, edit_precision=EditPrecision.in_place)
    ),
}


def what_fits(cfg: RunConfig, size: Callable[[RunConfig], int], limit: int) -> tuple[list[str], int]:
    """The fewest of the switches, taken in order, with which the run fits, and what it needs then.

    One that is enough alone is taken alone; otherwise they add up, each that saves something. All of them, where even
    those are too few.
    """
    alone = {name: size(change(cfg)) for name, change in SWITCHES.items()}
    enough = next((name for name, needed in alone.items() if needed <= limit), None)
    if enough is not None:
        return [enough], alone[enough]
    taken: list[str] = []
    needed = size(cfg)
    for name, change in SWITCHES.items():
        if size(change(cfg)) < needed:
            cfg, taken = change(cfg), [*taken, name]
            needed = size(cfg)
        if needed <= limit:
            break
    return taken, needed
