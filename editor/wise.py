"""WISE (arXiv 2405.14768): a side memory of one edit module, and a router that decides what passes through it.

Letters: N positions, d_k key size, d_v value size, W the module's weight, W' the side memory, D = W' - W.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from data.records import LossTerm, Phase, Turn, row_indices, row_offsets
from editor import linalg
from editor.base import Edit, EditableModel, finite_loss
from editor.stopwatch import Stopwatch

MARGIN = 0.001  # epsilon is less by this part, or by `input_noise`: for the same input in other compute batches


@dataclass(frozen=True)
class WISESettings:
    """The keys of the same names in the configuration; `alpha`, `beta`, `gamma` are those of the margin loss."""

    lr: float
    num_steps: int
    facts_per_step: int | None
    stop_loss: float
    alpha: float
    beta: float
    gamma: float
    shards: int
    mask_ratio: float
    merge_density: float
    merge_weight: float
    route_ratio: float
    unrelated: int
    seed: int


class WISE:
    """An input a of the module goes through W' where ||a D|| > epsilon (the paper's routing), else through W.

    Position by position, so that it holds in batches, with padding, and in cached generation alike. The facts of a turn
    are dealt to `shards`, each of which trains a copy of D by gradient descent, at the entries of a random mask only,
    mini-batches of `facts_per_step` facts one after another (one fact at a time, as published), `num_steps` each, of

        -log p_W'(answer | prompt), the mean over answer tokens, every position of the facts going through W',
        + max(0, ||a_u D|| - alpha) + max(0, beta - ||a_e D||) + max(0, gamma - (||a_e D|| - ||a_u D||)),

    a_e at the positions that predict the facts' answers and a_u of unrelated text, means over both. What the shards
    have changed is merged by TIES (`ties`) and added to D. Epsilon is the least ||a_e D|| that any turn left behind,
    times `route_ratio` (1 is the paper's, 0.88 the release's), less what a compute batch does to inputs.

    Unrelated text is that of the warm-up turns: they edit nothing here, and leave `unrelated` of their inputs each.
    """

    Settings: ClassVar = WISESettings

    def __init__(self, model: EditableModel, settings: WISESettings, device: torch.device) -> None:
        """`model` has one edit module. The side memory lies on `device`."""
        ((self.name, (d_k, d_v)),) = model.shapes.items()
        self.settings, self.device = settings, device
        self.side = torch.zeros((d_k, d_v), device=device)  # D
        self.epsilon = math.inf
        self.unrelated = torch.zeros((0, d_k), device=device)
        self._in_training: Tensor | None = None  # D of the shard that is trained
        model.wrap(self.name, self._forward)

    def _forward(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        if self._in_training is None and self.epsilon == math.inf:
            return outputs
        side = self.side if self._in_training is None else self._in_training
        shift = inputs.detach().to(side) @ side
        moved = outputs + shift.to(outputs)
        if self._in_training is not None:
            return moved
        through = shift.norm(dim=-1, keepdim=True) > self.epsilon
        return torch.where(through.to(outputs.device), moved, outputs)

    def edit(self, model: EditableModel, turn: Turn) -> Edit:
        """Raises FloatingPointError, the side memory being that of the turn before, where a number is not finite.

        `details` of a turn that edits: the least activation of its facts, the share of unrelated inputs that go through
        the side memory, and `loss_after`, the loss of the facts with what the shards changed merged and the router in
        force.
        """
        watch = Stopwatch(*model.devices, self.device)
        if turn.phase is Phase.WARM_UP:
            with watch.measure("capture"):
                captured = model.capture(_as_one_batch(turn), every_token=True)
            self._remember(captured.modules[self.name].keys.to(self.device), turn.index)
            return Edit(captured.loss, {}, {}, watch.seconds)
        with watch.measure("capture"):
            captured = model.capture(_as_one_batch(turn))
        keys = captured.modules[self.name].keys.to(self.device)  # at the positions that predict answers
        self.side = self.side.to(keys)
        before = self.side, self.epsilon
        try:
            with watch.measure("train"):
                shards = enumerate(self._dealt(turn))
                changes = [self._trained(model, turn, keys, facts, shard) for shard, facts in shards]
            with watch.measure("merge"):
                side = self.side + self.settings.merge_weight * ties(changes, self.settings.merge_density)
                least = float((keys @ side).norm(dim=1).min())
                margin = 1 - max(MARGIN, model.input_noise)
            if not math.isfinite(least):
                raise FloatingPointError(f"what {self.name} adds is not finite; set a smaller editor.lr")
            self.side, self.epsilon = side, min(self.epsilon, margin * self.settings.route_ratio * least)
            with watch.measure("loss"):
                loss_after = finite_loss(model, LossTerm(turn.sequences, 1.0))
        except FloatingPointError as error:
            self.side, self.epsilon = before
            message = f"turn {turn.index}: {error}; the side memory is that of the turn before"
            raise FloatingPointError(message) from error
        routed = float(((self.unrelated.to(side) @ side).norm(dim=1) > self.epsilon).double().mean())
        details = {"loss_after": loss_after, "least_activation": least, "unrelated_routed": routed}
        return Edit(captured.loss, {}, {}, watch.seconds, details)

    def _remember(
        self,
        keys: Tensor,  # (N, d_k)
        turn: int,
    ) -> None:
        chosen = torch.randperm(len(keys), generator=self._generator("unrelated", turn))[: self.settings.unrelated]
        self.unrelated = torch.cat([self.unrelated, keys[chosen.to(keys.device)]])

    def _dealt(self, turn: Turn) -> list[list[int]]:
        """The facts of each shard, in the turn's order."""
        order = torch.randperm(len(turn.sequences), generator=self._generator("shards", turn.index)).tolist()
        dealt = [sorted(order[shard :: self.settings.shards]) for shard in range(self.settings.shards)]
        return [some for some in dealt if some]

    def _trained(
        self,
        model: EditableModel,
        turn: Turn,
        keys: Tensor,  # (N, d_k) at the positions that predict the answers of the turn
        facts: Sequence[int],  # of the turn, which the shard has
        shard: int,
    ) -> Tensor:  # (d_k, d_v)
        """What a shard changes in D."""
        generator = self._generator("mask", turn.index, shard)
        mask = (torch.rand(self.side.shape, generator=generator) < self.settings.mask_ratio).to(self.device)
        batches = [facts[some] for some in linalg.row_chunks(len(facts), self.settings.facts_per_step)]
        first_row = row_offsets(turn.sequences)
        self._in_training = self.side.clone()
        try:
            for number, some in enumerate(batches):
                edited = keys[row_indices(some, first_row).to(keys.device)]
                for step in self._steps(model, _as_one_batch(turn.part(some)), edited, mask):
                    done = (number + step / self.settings.num_steps) / len(batches)
                    model.tell((shard + done) / self.settings.shards)
            change = self._in_training - self.side
        finally:
            self._in_training = None
        if not bool(torch.isfinite(change).all()):
            raise FloatingPointError(f"the side memory of {self.name} is not finite; set a smaller editor.lr")
        return change

    def _steps(
        self,
        model: EditableModel,
        batch: Turn,
        edited: Tensor,  # (n, d_k) inputs at the positions that predict its answers, which no D moves
        mask: Tensor,  # (d_k, d_v)
    ) -> Iterator[int]:
        """Steps of a mini-batch on the D in training, counted from 1; fewer where its loss falls below `stop_loss`.

        dloss/dD = K^T G, with the inputs K of all positions and the gradients G at the module's output there.
        """
        for step in range(1, self.settings.num_steps + 1):
            captured = model.capture(batch, every_token=True)
            rows = captured.modules[self.name]
            gradient = rows.keys.to(self.side).T @ rows.value_grads.to(self.side)
            assert self._in_training is not None
            margin, margin_gradient = self._margin(edited, self._in_training)
            if captured.loss + margin < self.settings.stop_loss:
                break
            self._in_training = self._in_training - self.settings.lr * mask * (gradient + margin_gradient)
            yield step

    def _margin(
        self,
        edited: Tensor,  # (N, d_k)
        side: Tensor,  # (d_k, d_v)
    ) -> tuple[float, Tensor]:
        """The margin loss and its gradient by D."""
        with torch.enable_grad():
            leaf = side.detach().requires_grad_()
            loss = margin_loss(
                (edited @ leaf).norm(dim=1),
                (self.unrelated.to(leaf) @ leaf).norm(dim=1),
                self.settings.alpha,
                self.settings.beta,
                self.settings.gamma,
            )
            (gradient,) = torch.autograd.grad(loss, leaf)
        return float(loss.detach()), gradient

    def _generator(self, *what: str | int) -> torch.Generator:
        """Draws that follow from the seed and what they are for, on the CPU, whatever the device."""
        words = " ".join(map(str, ("wise", self.settings.seed, *what)))
        return torch.Generator().manual_seed(random.Random(words).getrandbits(63))

    def statistics(self) -> dict[str, dict[str, float | None]]:
        """||D||, epsilon, and how many inputs of unrelated text there are."""
        epsilon = None if self.epsilon == math.inf else self.epsilon
        return {self.name: {"norm": float(self.side.norm()), "epsilon": epsilon, "unrelated": len(self.unrelated)}}

    def state_dict(self) -> dict[str, Tensor]:
        epsilon = torch.tensor(self.epsilon, dtype=torch.float64)
        return {"side": self.side, "epsilon": epsilon, "unrelated": self.unrelated}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        self.side, self.unrelated = (state_dict[name].to(self.device) for name in ("side", "unrelated"))
        self.epsilon = float(state_dict["epsilon"])


def _as_one_batch(turn: Turn) -> Turn:
    """Each answer token weighs 1 / (answer tokens) in the loss; mini-batches of the stream are none of WISE's."""
    tokens = sum(one.answer_length for one in turn.sequences)
    return replace(turn, loss_weights=(1 / tokens,) * len(turn.sequences))


def margin_loss(
    edited: Tensor,  # (N,) ||a_e D||
    unrelated: Tensor,  # (M,) ||a_u D||
    alpha: float,
    beta: float,
    gamma: float,
) -> Tensor:  # ()
    """max(0, u - alpha) + max(0, beta - e) + max(0, gamma - (e - u)), means over rows and pairs."""
    apart = edited[:, None] - unrelated
    return (unrelated - alpha).relu().mean() + (beta - edited).relu().mean() + (gamma - apart).relu().mean()


def ties(
    changes: Sequence[Tensor],
    density: float,
) -> Tensor:
    """What several changes of one weight have in common (TIES, arXiv 2306.01708).

    Of each, the `density` part of its entries that are not 0 stays, the largest; where signs differ, that of the sum
    wins, and the mean is taken over those that have it and are not 0. TIES keeps a part of all entries of a change: of
    what is 0 because it was masked there is nothing to keep, and a part of all would be all that a mask has left.
    """
    trimmed = torch.stack([_trim(change, density) for change in changes])
    agree = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
    return (trimmed * agree).sum(0) / agree.sum(0).clamp_min(1)


def _trim(change: Tensor, density: float) -> Tensor:
    sizes = change.abs().flatten()
    kept = max(1, round(density * int(sizes.count_nonzero())))
    least = sizes.kthvalue(len(sizes) - kept + 1).values
    return change * (change.abs() >= least)
