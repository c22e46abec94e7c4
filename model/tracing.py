"""What edit modules see and put out in one forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from data.records import TokenBatch


@contextlib.contextmanager
def hooks(functions: Mapping[nn.Module, Callable[..., object]]) -> Iterator[None]:
    """On each module's forward, as long as the context lasts."""
    with contextlib.ExitStack() as handles:
        for module, function in functions.items():
            handles.enter_context(module.register_forward_hook(function))
        yield


class Tracer:
    """Keeps the inputs and outputs of edit modules in one forward, as `hooks` on them.

    The output of the lowest module, which no parameter's graph reaches, becomes the leaf where the graph begins, so
    nothing below it is recorded.
    """

    def __init__(self, shape: torch.Size, rows: Tensor, positions: Tensor) -> None:
        self.keys: dict[str, Tensor] = {}  # (N, d_k) by module
        self.outputs: dict[str, Tensor] = {}
        self._shape = shape  # (B, L)
        self._at = (rows, positions)

    def at_positions(self, activations: Tensor) -> Tensor:  # (N, d)
        """The traced positions."""
        return rows_at(activations, self._shape, *self._at)

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def keep(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            assert name not in self.outputs, f"{name} runs twice in one forward; its gradient would not be one tensor"
            if not output.requires_grad:
                output.requires_grad_(True)
            self.keys[name] = self.at_positions(inputs[0].detach())
            self.outputs[name] = output
            return output.clone()  # some families add to it in place, which a leaf of the graph forbids

        return keep


def rows_at(
    activations: Tensor,  # (B, L, d), or (B L, d), to which some families flatten them inside their MLP
    shape: torch.Size,  # (B, L)
    rows: Tensor,  # (N,)
    positions: Tensor,  # (N,)
) -> Tensor:  # (N, d)
    rows, positions = (at.to(activations.device) for at in (rows, positions))
    return activations.reshape(*shape, -1)[rows, positions]


@contextlib.contextmanager
def select_head_rows(
    model: Any,  # of transformers
    rows: Tensor,  # (M,)
    positions: Tensor,  # (M,)
) -> Iterator[None]:
    def pick(_head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        at = rows.to(inputs[0].device), positions.to(inputs[0].device)
        return (inputs[0][at].unsqueeze(0), *inputs[1:])  # (1, M, d)

    with model.get_output_embeddings().register_forward_pre_hook(pick):
        yield


def count_within(
    rows: Tensor,  # (M,) sorted
) -> Tensor:  # (M,) 0, 1, 2, ... within each run of equal rows
    return torch.arange(len(rows)) - torch.searchsorted(rows, rows)


def answer_row_indices(
    batch: TokenBatch,
    first_row: Tensor,  # of `row_offsets`
) -> Tensor:  # (M,)
    """The index of each answer token of the batch among those of all sequences, counted in order."""
    return first_row[batch.members][batch.rows] + count_within(batch.rows)


@contextlib.contextmanager
def same_bits() -> Iterator[None]:
    """Makes the backward of attention deterministic too, where deterministic algorithms are asked for with a warning.

    `harness.run.use_deterministic_algorithms` asks for them so. Attention's kernels take their deterministic form only
    where torch is to fail without one. ValueError where an operation of the model has no such form.
    """
    if not (torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()):
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        first = str(error).strip().splitlines()[0].partition(", but you set")[0]
        raise ValueError(f"model.deterministic=true: {first}; set model.deterministic=false") from error
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def require_ran(wanted: Iterable[str], found: Collection[str]) -> None:
    """ValueError where an edit module was not called."""
    silent = [name for name in wanted if name not in found]
    if silent:
        raise ValueError(f"model.edit_modules: {silent[0]!r} takes no part in a forward on text; leave it out")
