"""What the editors with a hypernetwork share: rows through the network, and an edit that gradients can go back through.

MEND's rule, an outer product, is in editor/mend.py; MALMEN's, a ridge solve, is here because RLEdit has it too.

Letters: N rows of a turn, b rows of a chunk, d_k key size, d_v value size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from data.records import Capture, LowRankUpdate, Phase, TrainingTurn, read_together
from editor import linalg
from editor.base import StatisticsScope, shape_name, statistics_group
from editor.updates import first_unsolved
from nets import HyperNetwork, LifelongNormalizer


@dataclass(frozen=True)
class HyperNetworkSettings:
    """The keys of the same names in the configuration.

    `lr` is where each module's learned step size eta_m starts; `batch_size` rows go through the network at a time,
    which bounds memory, never a result; `seed` draws the networks' first parameters.
    """

    lr: float
    batch_size: int
    statistics_scope: StatisticsScope
    rank: int
    n_blocks: int
    seed: int


@dataclass(frozen=True)
class RidgeSettings(HyperNetworkSettings):
    """`alpha` is where each module's learned ridge lambda_m starts."""

    alpha: float


@dataclass(frozen=True)
class Horizon:
    """How far the judgement of an edit reaches: what RLEdit adds to MALMEN's training."""

    trajectory: int | None  # turns that edits stay in the model for, before it is put back; None: a whole pass
    back_depth: int  # turns whose losses a turn answers for, itself included
    time_decay: float  # a turn of age a weighs time_decay^a
    reg_coef: float  # of ||DeltaW||^2, summed over modules
    step_every_turn: bool  # else the optimiser steps at the end of a trajectory

    def ends_with(self, turn: TrainingTurn) -> bool:
        """Whether a trajectory ends with this turn."""
        done = turn.index_in_epoch + 1
        return done == turn.epoch_turns or done % (self.trajectory or turn.epoch_turns) == 0


ALONE = Horizon(trajectory=1, back_depth=1, time_decay=1.0, reg_coef=0.0, step_every_turn=True)
"""Each turn edits the unedited model and is judged by itself (MEND, MALMEN)."""


class Proposal(Protocol):
    """A module's update, and the way back from it to the network's parameters."""

    @property
    def update(self) -> LowRankUpdate: ...

    def backward(self, gradient: Tensor) -> None:
        """Add to the parameters' gradients what dL/dDeltaW = `gradient` (d_k, d_v) makes of them.

        The second of two stages: the first one, through the language model, gave `gradient`. Rows go through the
        network in chunks, each with a graph of its own.
        """


class HyperNetworkEditor(nn.Module):
    """k', g' = h(LN([k | g])) for every row of a turn, one network a module shape; subclasses turn them into DeltaW."""

    horizon: Horizon  # of its training

    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], settings: HyperNetworkSettings, device: torch.device
    ) -> None:
        """`shapes` gives (d_k, d_v) of each edit module."""
        super().__init__()
        self.settings, self.device = settings, device
        self.shapes = dict(shapes)
        alike = {shape: [name for name in shapes if shapes[name] == shape] for shape in dict.fromkeys(shapes.values())}
        generator = torch.Generator().manual_seed(settings.seed)
        own_statistics = settings.statistics_scope == "module"
        self.networks = nn.ModuleDict(
            {
                shape_name(shape): HyperNetwork(
                    *shape, len(names), settings.rank, settings.n_blocks, own_statistics, generator
                )
                for shape, names in alike.items()
            }
        )
        self._number = {name: names.index(name) for names in alike.values() for name in names}  # within its network
        self._index = {name: i for i, name in enumerate(shapes)}  # in eta, lambda
        self.log_eta = nn.Parameter(torch.full((len(shapes),), math.log(settings.lr)))
        self.to(device)

    def update(self, captures: Mapping[str, Capture], phase: Phase) -> dict[str, LowRankUpdate]:
        """All rows of the turn enter the statistics before any of them is normalised."""
        self.observe(captures)
        updates = {name: self.propose(name, capture).update for name, capture in captures.items()}
        self.require_solved()
        return updates

    def observe(self, captures: Mapping[str, Capture]) -> None:
        """The rows enter the statistics, those of modules that share them one module after another."""
        sharing: dict[LifelongNormalizer, list[Capture]] = {}
        for name, capture in captures.items():
            sharing.setdefault(self.network(name).normalizer(self._number[name]), []).append(capture)
        for normalizer, own in sharing.items():
            normalizer.observe([(each.keys, each.value_grads) for each in own], self.settings.batch_size)

    def propose(self, name: str, capture: Capture) -> Proposal:
        """The update of one module from rows that are in the statistics already; it counts once `require_solved`."""
        raise NotImplementedError

    def require_solved(self) -> None:
        """FloatingPointError for the first module whose system, of those since the last call, had no solution."""

    def network(self, name: str) -> HyperNetwork:
        network = self.networks[shape_name(self.shapes[name])]
        assert isinstance(network, HyperNetwork)
        return network

    def eta(self, name: str) -> Tensor:  # ()
        """The step size, learned as its logarithm: it stays positive, and a step of Adam changes it in proportion."""
        return self.log_eta[self._index[name]].exp()

    def chunks(self, name: str, capture: Capture) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The rows of a chunk, k' (b, d_k) and g' (b, d_v)."""
        for rows in linalg.row_chunks(capture.keys.shape[0], self.settings.batch_size):
            yield rows, *self.network(name)(capture.keys[rows], capture.value_grads[rows], self._number[name])

    def statistics(self) -> dict[str, dict[str, float | None]]:
        """By group that shares them rows seen, mean |mu| and mean sigma of the value gradients; by module `learned`."""
        found: dict[str, dict[str, float | None]] = {}
        for name, shape in self.shapes.items():
            group = statistics_group(name, shape, self.settings.statistics_scope)
            if group not in found:
                found[group] = self.network(name).normalizer(self._number[name]).summary()
        for name, scalars in self.learned().items():
            found[name] = {**found.get(name, {}), **scalars}
        return found

    def learned(self) -> dict[str, dict[str, float]]:
        """The scalars that each module has learned, by their names."""
        by_name = self._learned()
        numbers = iter(read_together([scalar for scalars in by_name.values() for scalar in scalars.values()]))
        return {name: {what: next(numbers) for what in scalars} for name, scalars in by_name.items()}

    def _learned(self) -> dict[str, dict[str, Tensor]]:
        return {name: {"eta": self.eta(name).detach()} for name in self.shapes}


class RidgeEditor(HyperNetworkEditor):
    """D_i = -eta_m (k_i . k'_i) g'_i, then the ridge update of raw keys towards D with a learned ridge lambda_m.

    MALMEN (arXiv 2311.04661, sections 3.2 and 4), whose update RLEdit shares.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], settings: RidgeSettings, device: torch.device) -> None:
        super().__init__(shapes, settings, device)
        self.log_lambda = nn.Parameter(torch.full((len(shapes),), math.log(settings.alpha), device=device))
        self._infos: dict[str, Tensor] = {}  # of systems, not read yet

    def ridge(self, name: str) -> Tensor:  # ()
        return self.log_lambda[self._index[name]].exp()

    def propose(self, name: str, capture: Capture) -> Proposal:
        proposal = _RidgeProposal(self, name, capture)
        self._infos[name] = proposal.system.info
        return proposal

    def require_solved(self) -> None:
        infos, self._infos = self._infos, {}
        if name := first_unsolved(infos):
            raise FloatingPointError(
                f"the ridge lambda={self.ridge(name).item():.3g} of {name} is too small for the size of its keys; "
                "a larger editor.alpha to start from, or a smaller editor.meta_lr, may keep it in bounds"
            )

    def value_shifts(self, name: str, capture: Capture) -> Iterator[tuple[slice, Tensor]]:
        """The rows of a chunk and their D (b, d_v)."""
        for rows, new_keys, new_grads in self.chunks(name, capture):
            match = (capture.keys[rows].to(new_keys) * new_keys).sum(1, keepdim=True)
            yield rows, -self.eta(name) * match * new_grads

    def _learned(self) -> dict[str, dict[str, Tensor]]:
        return {name: {**own, "lambda": self.ridge(name).detach()} for name, own in super()._learned().items()}


class _RidgeProposal:
    def __init__(self, editor: RidgeEditor, name: str, capture: Capture) -> None:
        self.editor, self.name, self.capture = editor, name, capture
        ridge, chunk = editor.ridge(name).detach(), editor.settings.batch_size
        self.system = linalg.RidgeSystem(capture.keys, ridge, editor.device, chunk, check_errors=False)
        with torch.no_grad():
            shifts = torch.cat([shift for _, shift in editor.value_shifts(name, capture)])
        self.update = LowRankUpdate(*self.system.update(shifts))

    def backward(self, gradient: Tensor) -> None:
        shifts_gradient, ridge_gradient = self.system.adjoint(gradient, (self.update.left, self.update.right))
        for rows, shifts in self.editor.value_shifts(self.name, self.capture):
            shifts.backward(shifts_gradient[rows].to(shifts))
        ridge = self.editor.ridge(self.name)
        ridge.backward(ridge_gradient.to(ridge))
