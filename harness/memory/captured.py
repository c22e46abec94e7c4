"""What an editor of the gradient-capture family keeps, its captures, and the updates made of them.

Letters: N rows (captured tokens) of a turn, d_k key size, d_v value size of an edit module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from config.schema import HyperNetworkConfig, Token
from editor.registry import EDITORS
from harness.job import settings_of
from harness.memory.asked import DOUBLE, SINGLE, Asked, Item
from harness.memory.passes import differentiated, read_once

# Copies of Sigma that whitening and the changes of the moments have at one time.
COPIES_OF_SIGMA = 6


def of_captured(asked: Asked) -> Iterator[Item]:
    rows = asked.turn * rows_of_a_fact(asked, asked.cfg.editor.token is Token.all)
    captured = bytes_captured(asked, rows)
    yield from _of_rule(asked)
    yield from _of_updates(asked, captured)
    yield from read_once(asked, "read once", asked.turn * asked.facts.tokens, "a turn's texts")
    if asked.cfg.editor.cache_dir is None:
        yield Item("captures", captured, "keys and value gradients of a turn", while_in="capture")
    yield from differentiated(asked, asked.turn, asked.facts, "capture")


def rows_of_a_fact(asked: Asked, every_token: bool) -> int:
    return asked.facts.tokens - 1 if every_token else asked.facts.answer_tokens


def bytes_captured(asked: Asked, rows: int) -> int:
    """Of the keys and value gradients of so many rows in each edit module."""
    return sum(rows * (d_k + d_v) for d_k, d_v in asked.shapes.values()) * SINGLE


def _of_updates(asked: Asked, captured: int) -> Iterator[Item]:
    """As if every fact needed every pass: the factors of a turn are then those of all passes, end to end."""
    factors = captured * asked.cfg.editor.passes
    kept = factors * (asked.cfg.diagnostics.previous + 1)
    yield Item("kept updates", kept, "factors that later turns are compared with")
    if asked.cfg.editor.passes > 1:
        yield Item("passes", factors, "factors of each pass, before they are one update", while_in="update")


def _of_rule(asked: Asked) -> Iterator[Item]:
    rule, cfg = _rule(asked), asked.cfg
    state = list(rule.state_dict().values())
    yield Item("statistics", _size(state), "the editor's state, networks included", of_editor=True)
    covariances = [one for one in state if one.ndim == 2 and one.dtype is torch.float64]
    if covariances:
        copies = COPIES_OF_SIGMA * max(one.nbytes for one in covariances)
        found = sum(one.nbytes for one in covariances)
        yield Item("statistics before", found, "covariances as the turn found them", of_editor=True)
        yield Item("whitening", copies, "copies of a covariance", of_editor=True, while_in="update")
    if isinstance(cfg.editor, HyperNetworkConfig) and cfg.editor.trains():
        moments = 3 * _size(rule.parameters())
        yield Item("optimiser", moments, "gradients, and Adam's two moments", of_editor=True)
    if cfg.editor.asks_for_text():
        factors = sum(d_k**2 for d_k, _ in asked.shapes.values()) * DOUBLE
        yield Item("preserved", factors, "factors of alpha I + preserve C", of_editor=True)
    chunk = 2 * cfg.editor.batch_size * max(d_k for d_k, _ in asked.shapes.values()) * DOUBLE
    yield Item("solve", chunk, "a chunk of keys in float64", of_editor=True, while_in="update")


def _rule(asked: Asked) -> torch.nn.Module:
    """The editor itself, which knows best what it keeps; for a GPU, built where tensors have shapes alone."""
    cfg, kind = asked.cfg, EDITORS[asked.cfg.editor.name]
    named = cfg.editor_device if cfg.editor_device != "auto" else asked.device.type
    settings = settings_of(kind.Settings, cfg)
    if named == "cpu":  # editors choose by device, and nothing moves from meta to the CPU: it is built as it will be
        rule = kind(asked.shapes, settings, torch.device("cpu"))
    else:
        with shapes_alone():
            rule = kind(asked.shapes, settings, torch.device("meta"))
    assert isinstance(rule, torch.nn.Module)
    return rule


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@contextlib.contextmanager
def shapes_alone() -> Iterator[None]:
    """What is built takes no memory: tensors have shapes, and nothing in them."""
    with torch.device("meta"), _WithoutNumbers():
        yield


class _WithoutNumbers(TorchFunctionMode):
    """Nothing is drawn: tensors without memory take no generator of the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{key: value for key, value in (kwargs or {}).items() if key != "generator"})
