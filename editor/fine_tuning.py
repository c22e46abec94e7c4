"""Fine-tuning: FT-L, FT-M and LocFT-BF, which differ in their settings (config/editor/).

Letters: d_k key size, d_v value size of an edit module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from data.records import LossTerm, LowRankUpdate, TokenSequence, Turn, WeightChange
from editor import linalg
from editor.base import Edit, EditableModel, finite_loss
from editor.stopwatch import Stopwatch


@dataclass(frozen=True)
class FineTuningSettings:
    """The keys of the same names in the configuration.

    `order`: depth = each mini-batch of `facts_per_step` facts takes its `num_steps` steps before the next one begins
    (one fact at a time, as FT-L and FT-M were published); breadth = `num_steps` epochs, in each of which every
    mini-batch takes a step, the facts in the turn's order (LocFT-BF, arXiv 2509.22072).
    `answer_loss`: tokens = -log p(answer | prompt), teacher-forced, as ROME's paper has its FT+L (arXiv 2202.05262) and
    as FT-M is defined; prompt_last = as FT-L was released, the prompt's last token is to predict all answer tokens.
    """

    lr: float
    num_steps: int
    facts_per_step: int | None
    order: Literal["depth", "breadth"]
    answer_loss: Literal["tokens", "prompt_last"]
    stop_loss: float
    norm_constraint: float | None


class FineTuning:
    """Steps of Adam on the weights of the edit modules, the loss being the mean over a mini-batch's answer tokens.

    A mini-batch whose loss lies below `stop_loss` takes no step. After each step DeltaW, what the turn has changed so
    far, is projected onto ||DeltaW||_inf <= `norm_constraint` (Zhu et al., arXiv 2012.00363). Adam's moments start
    anew with each turn and, depth first, with each mini-batch: as published, where that is an edit of its own. Nothing
    is remembered from turn to turn but the weights.
    """

    Settings: ClassVar = FineTuningSettings

    def __init__(self, model: EditableModel, settings: FineTuningSettings, device: torch.device) -> None:
        """Computes where the weights are."""
        self.settings = settings

    def edit(self, model: EditableModel, turn: Turn) -> Edit:
        """Raises FloatingPointError, the weights being those of the turn before, where a number is not finite.

        `details`: the steps, and `loss_after`, the loss of the turn's facts as the last step leaves them.
        """
        watch = Stopwatch(*model.devices)
        facts = LossTerm(turn.sequences, 1.0)
        with watch.measure("loss"):
            (loss,) = model.losses([facts])
        tuned = _Tuned(model, self.settings)
        try:
            with watch.measure("steps"):
                groups = list(self._groups(turn.sequences))
                for number, group in enumerate(groups):
                    for epoch in tuned.fit(group):
                        model.tell((number + epoch / self.settings.num_steps) / len(groups))
            with watch.measure("loss"):
                loss_after = finite_loss(model, facts) if tuned.steps else loss
        except FloatingPointError as error:
            tuned.undo()
            message = f"turn {turn.index}: {error}; the weights are those of the turn before"
            raise FloatingPointError(message) from error
        details = {"steps": tuned.steps, "loss_after": loss_after}
        return Edit(loss, tuned.updates, tuned.changes, watch.seconds, details)

    def _groups(self, sequences: Sequence[TokenSequence]) -> Iterator[list[LossTerm]]:
        """Mini-batches that take their steps in turn, before those of the next group begin."""
        rows = linalg.row_chunks(len(sequences), self.settings.facts_per_step)
        batches = [self._term(sequences[some]) for some in rows]
        if self.settings.order == "breadth":
            yield batches
        else:
            yield from ([batch] for batch in batches)

    def _term(self, sequences: Sequence[TokenSequence]) -> LossTerm:
        if self.settings.answer_loss == "prompt_last":
            sequences = [
                TokenSequence((*one.ids[: one.answer_start], token), one.answer_start)
                for one in sequences
                for token in one.ids[one.answer_start :]
            ]
        return LossTerm(tuple(sequences), 1.0)

    def statistics(self) -> dict[str, dict[str, float | None]]:
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Nothing is kept from one turn to the next."""


class _Tuned:
    """The weights of a model while a turn is tuned into them."""

    def __init__(self, model: EditableModel, settings: FineTuningSettings) -> None:
        self.model, self.settings = model, settings
        self.steps = 0
        self.changes: Mapping[str, WeightChange] = {}
        self._start = model.snapshot()
        self._deltas: dict[str, Tensor] = {}  # (d_k, d_v) of the turn so far, by module

    @property
    def updates(self) -> dict[str, LowRankUpdate]:
        return {name: LowRankUpdate(None, delta) for name, delta in self._deltas.items()}

    def fit(self, batches: Sequence[LossTerm]) -> Iterator[int]:
        """`num_steps` epochs over the mini-batches, counted; fewer where none of them asks for a step any more."""
        optimizer: torch.optim.Adam | None = None
        for epoch in range(1, self.settings.num_steps + 1):
            before = self.steps
            for batch in batches:
                gradients, (loss,) = self.model.weight_gradients([batch])
                if loss < self.settings.stop_loss:
                    continue
                for name, gradient in gradients.items():
                    if name not in self._deltas:
                        self._deltas[name] = torch.zeros(gradient.shape, dtype=gradient.dtype, device=gradient.device)
                    self._deltas[name].grad = gradient
                optimizer = optimizer or torch.optim.Adam(self._deltas.values(), lr=self.settings.lr)
                optimizer.step()
                self._put()
            if self.steps == before:
                break
            yield epoch

    def undo(self) -> None:
        """Put the weights back as they were before the turn."""
        self.model.restore(self._start)

    def _put(self) -> None:
        """Into the weights as they were before the turn, so that they are rounded once, not with each step."""
        self.steps += 1
        bound = self.settings.norm_constraint
        for delta in self._deltas.values():
            delta.grad = None
            if bound is not None:
                delta.clamp_(-bound, bound)
        self.model.restore(self._start)
        self.changes = self.model.apply(self.updates)
