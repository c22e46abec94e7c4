"""ROME (Meng et al., NeurIPS 2022, arXiv 2202.05262): one fact at a time into one module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from data.records import FactContexts, LossTerm, LowRankUpdate, Turn, WeightChange
from editor.base import Edit, EditableModel, LocateInputs
from editor.located import SecondMomentFactor, as_put, mean_keys, mean_values
from editor.stopwatch import Stopwatch
from editor.target_vectors import Targets, TargetSettings, target_vectors
from editor.updates import summed


@dataclass(frozen=True)
class ROMESettings(TargetSettings):
    """The keys of the same names in the configuration; those of the target vectors are `TargetSettings`."""

    moment_ridge: float


class ROME:
    """DeltaW = C^(-1) k (v - k W)^T / (k^T C^(-1) k) (equation 2): afterwards the module puts v out at k.

    k is the mean key over the fact's contexts, v what the module puts out for the prompt plus the offset found there.
    The facts of a turn come one after another, each on the model as the one before left it.
    """

    Settings: ClassVar = ROMESettings

    def __init__(self, model: EditableModel, settings: ROMESettings, device: torch.device, given: LocateInputs) -> None:
        """`model` has one edit module."""
        (self.name,) = model.shapes
        self.settings, self.device, self.given = settings, device, given
        self.factor = SecondMomentFactor(self.name, given.second_moments(self.name), settings.moment_ridge, device)
        self.edited = 0  # facts

    def edit(self, model: EditableModel, turn: Turn) -> Edit:
        """Raises FloatingPointError, saying which weights the model has then, where a number is not finite."""
        watch = Stopwatch(*model.devices, self.device)
        (loss,) = model.losses([LossTerm(turn.sequences, 1.0)])
        updates: list[Mapping[str, LowRankUpdate]] = []
        changes: list[Mapping[str, WeightChange]] = []
        found: list[Targets] = []
        try:
            for fact in self.given.contexts(turn):
                with watch.measure("targets"):
                    start = model.values_at(self.name, *as_put([fact]))
                    found.append(target_vectors(model, self.name, [fact], start, self.settings))
                updates.append({self.name: self._update(model, fact, start + found[-1].offsets, watch)})
                with watch.measure("apply"):
                    changes.append(model.apply(updates[-1]))
                model.tell(len(changes) / len(turn.sequences))
        except FloatingPointError as error:
            raise FloatingPointError(
                f"turn {turn.index}: {error}; the weights hold {len(changes)} of the turn's {len(turn.sequences)} facts"
            ) from error
        self.edited += len(changes)
        return Edit(loss, *summed(updates, changes), watch.seconds, {"targets": Targets.of_all(found).details()})

    def _update(self, model: EditableModel, fact: FactContexts, value: Tensor, watch: Stopwatch) -> LowRankUpdate:
        with watch.measure("keys"):
            key = mean_keys(model, self.name, [fact])  # (1, d_k)
            shift = value - mean_values(model, self.name, [fact])  # (1, d_v) v - k W
        with watch.measure("solve"):
            white = self.factor.enter(key.to(self.device).double())
            left = self.factor.leave(white.T) / white.square().sum()
        return LowRankUpdate(left.to(key), shift)

    def statistics(self) -> dict[str, dict[str, float | None]]:
        """Facts edited so far."""
        return {self.name: {"facts": float(self.edited)}}

    def state_dict(self) -> dict[str, Tensor]:
        return {"edited": torch.tensor(self.edited)}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        self.edited = int(state_dict["edited"])
