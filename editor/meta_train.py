"""Meta-training: a hypernetwork learns from what the language model says after its edits (DESIGN section 1).

The gradient has two stages. One backward through the edited model gives G = dL/dDeltaW of each edit module; then G
goes on into the network, whose rows are many and whose graph knows nothing of the language model.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from data.records import Capture, LossTerm, LowRankUpdate, Phase, TrainingTurn, read_together
from editor import linalg
from editor.base import Edit, EditableModel
from editor.capture import CaptureEditor, CaptureSettings
from editor.hypernetwork import HyperNetworkEditor, Proposal
from editor.stopwatch import Stopwatch


@dataclass(frozen=True)
class MetaSettings:
    """The keys of the same names in the configuration."""

    meta_lr: float
    loc_coef: float
    max_grad_norm: float


@dataclass(frozen=True)
class MetaLoss:
    """What a turn's edit cost: its own rephrases and localities, the penalty, and the sum that is differentiated."""

    rephrase: float  # cross-entropy, nats, mean over answer tokens
    locality: float  # KL(unedited || edited), nats, mean over answer tokens; 0 where editor.loc_coef is 0
    regulariser: float  # reg_coef ||DeltaW||^2
    total: float  # with the losses of the turns that this one answers for


@dataclass(frozen=True)
class MetaStep:
    """What a training turn did."""

    edit_loss: float  # of the facts, before the edit, nats a token
    loss: MetaLoss
    grad_norm: float | None  # of the network's parameters before clipping; None where the optimiser did not step
    seconds: Mapping[str, float]  # by part


@dataclass(frozen=True)
class _Part:
    """A term of the loss by its name, and how many turns ago its questions' facts were edited."""

    name: str
    age: int
    term: LossTerm


class _Proposing:
    """The rule of an editor in training: it keeps what gradients must go back through."""

    def __init__(self, editor: HyperNetworkEditor) -> None:
        self.editor = editor
        self._proposals: dict[str, Proposal] = {}
        self.statistics, self.state_dict = editor.statistics, editor.state_dict
        self.load_state_dict = editor.load_state_dict

    def update(self, captures: Mapping[str, Capture], phase: Phase) -> dict[str, LowRankUpdate]:
        self.editor.observe(captures)
        self._proposals = {name: self.editor.propose(name, capture) for name, capture in captures.items()}
        self.editor.require_solved()
        return {name: proposal.update for name, proposal in self._proposals.items()}

    def taken(self) -> dict[str, Proposal]:
        """The proposals of the last update, which are kept no longer: they hold a turn's captures."""
        proposals, self._proposals = self._proposals, {}
        return proposals


class MetaTrainer:
    """Trains an editor's network on a language model, which between trajectories is as it was loaded, bit for bit."""

    def __init__(
        self,
        model: EditableModel,
        editor: HyperNetworkEditor,
        settings: MetaSettings,
        capture: CaptureSettings = CaptureSettings(),  # noqa: B008
    ) -> None:
        assert model.is_original(), "training would take its edits away"
        self.model, self.editor, self.settings = model, editor, settings
        self._rule = _Proposing(editor)
        self._capture_editor = CaptureEditor(self._rule, editor.device, replace(capture, passes=1))
        self.horizon = editor.horizon
        self.parameters = list(editor.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=settings.meta_lr)
        self._edits_in_model = False
        # token ids and reference logits of the turns that the next one answers for; no activations
        self._window: deque[tuple[TrainingTurn, Tensor | None]] = deque(maxlen=self.horizon.back_depth)

    def turn(self, turn: TrainingTurn) -> MetaStep:
        """Edit, judge, learn; at the end of a trajectory put the model back.

        Raises FloatingPointError, naming turn and term, where a loss, the network's gradient or what it learned is not
        finite.
        """
        watch = Stopwatch(*self.model.devices, self.editor.device)
        edit, proposals = self._edit(turn, watch)
        with watch.measure("gradient"):
            terms = self._terms(self.horizon.back_depth)
            gradients, losses = self.model.weight_gradients([part.term for part in terms])
            loss = self._judge(turn, terms, losses, edit.updates)
            sizes = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients.values()]
            for name, size in zip(gradients, read_together(sizes), strict=True):
                _require_finite(turn, f"the gradient of the loss at {name}", size)
        with watch.measure("backward"):
            for name, proposal in proposals.items():
                proposal.backward(self._penalised(gradients.pop(name), edit.updates[name]))
            ended = self.horizon.ends_with(turn)
            grad_norm = self._step(turn) if ended or self.horizon.step_every_turn else None
        if ended:
            self._end_trajectory()
        assert edit.loss is not None, "turns of training are no warm-up"
        return MetaStep(edit.loss, loss, grad_norm, watch.seconds)

    def validate(self, turns: Sequence[TrainingTurn]) -> MetaLoss:
        """Mean losses of turns that teach nothing: network, statistics and model stay as they are.

        For use between trajectories. Each turn is judged by itself, right after its edit.
        """
        assert not self._edits_in_model, "in the middle of a trajectory"
        statistics = {name: buffer.clone() for name, buffer in self.editor.named_buffers()}
        found = []
        for turn in turns:
            edit, _ = self._edit(turn, Stopwatch())
            terms = self._terms(1)
            found.append(self._judge(turn, terms, self.model.losses([part.term for part in terms]), edit.updates))
            if self.horizon.ends_with(turn):
                self._end_trajectory()
        for name, buffer in self.editor.named_buffers():
            buffer.copy_(statistics[name])
        return _mean(found)

    # -- a turn, in order

    def _edit(self, turn: TrainingTurn, watch: Stopwatch) -> tuple[Edit, Mapping[str, Proposal]]:
        with watch.measure("reference"):
            self._window.append((turn, self._reference(turn)))
        self._edits_in_model = True
        edit = self._capture_editor.edit(self.model, turn.edits)
        watch.seconds |= edit.seconds
        return edit, self._rule.taken()

    def _reference(self, turn: TrainingTurn) -> Tensor | None:
        """What the unedited model says at the locality answers; None where nobody asks."""
        if self.settings.loc_coef == 0 or not turn.localities:
            return None
        with self.model.unedited() if self._edits_in_model else nullcontext():
            return self.model.reference_logits(turn.localities)

    def _terms(self, depth: int) -> list[_Part]:
        """The losses of the last `depth` turns of the trajectory, this one's first."""
        parts = []
        for age, (turn, reference) in enumerate(list(reversed(self._window))[:depth]):
            weight = self.horizon.time_decay**age
            parts.append(_Part("rephrase", age, LossTerm(turn.rephrases, weight)))
            if reference is not None:
                term = LossTerm(turn.localities, weight * self.settings.loc_coef, reference)
                parts.append(_Part("locality", age, term))
        return parts

    def _judge(
        self,
        turn: TrainingTurn,
        parts: Sequence[_Part],
        losses: Sequence[float],
        updates: Mapping[str, LowRankUpdate],
    ) -> MetaLoss:
        for part, loss in zip(parts, losses, strict=True):
            _require_finite(turn, f"the {part.name} loss" + (f" of {part.age} turns before" if part.age else ""), loss)
        own = {part.name: loss for part, loss in zip(parts, losses, strict=True) if part.age == 0}
        weighted = sum(part.term.weight * loss for part, loss in zip(parts, losses, strict=True))
        regulariser = self._regulariser(updates)
        _require_finite(turn, "the regulariser", regulariser)
        return MetaLoss(own["rephrase"], own.get("locality", 0.0), regulariser, weighted + regulariser)

    def _regulariser(self, updates: Mapping[str, LowRankUpdate]) -> float:
        if self.horizon.reg_coef == 0:
            return 0.0
        factors = [(update.left, update.right) for update in updates.values()]
        return self.horizon.reg_coef * float(sum(linalg.inner_product(one, one) for one in factors))

    def _penalised(
        self,
        gradient: Tensor,  # (d_k, d_v)
        update: LowRankUpdate,
    ) -> Tensor:  # (d_k, d_v)
        """With 2 reg_coef DeltaW, the gradient of the regulariser, which goes on into the network like the rest."""
        if self.horizon.reg_coef == 0:
            return gradient
        delta = linalg.dense((update.left, update.right))
        return gradient.add(delta.to(gradient), alpha=2 * self.horizon.reg_coef)

    def _step(self, turn: TrainingTurn) -> float:
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm))
        _require_finite(turn, "the gradient of the hypernetwork", norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for name, scalars in self.editor.learned().items():
            for what, value in scalars.items():
                _require_finite(turn, f"{what} of {name}, after the step,", value)
        return norm

    def _end_trajectory(self) -> None:
        self.model.restore_original()
        self._edits_in_model = False
        self._window.clear()

    # -- stopping in the middle, and going on

    def state(self) -> dict[str, Tensor]:
        """All that the next turn depends on but the turns before it: `resume` is told those again."""
        tensors = {f"network/{name}": tensor for name, tensor in self.editor.state_dict().items()}
        tensors |= {f"gradient/{i}": p.grad for i, p in enumerate(self.parameters) if p.grad is not None}
        if self._edits_in_model:
            tensors |= {f"weight/{name}": weight for name, weight in self.model.snapshot().items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam/{i}/{name}": tensor for name, tensor in moments.items()}
        return tensors

    def resume(self, state: Mapping[str, Tensor], before: Iterable[TrainingTurn]) -> None:
        """Go on from a `state`; `before` are the last turns before the next one, oldest first, `back_depth` or more
        where there are as many."""
        network, gradients, weights = (_of_kind(state, kind) for kind in ("network", "gradient", "weight"))
        self.editor.load_state_dict(network)
        for i, gradient in gradients.items():
            self.parameters[int(i)].grad = gradient.to(self.parameters[int(i)].device)
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in _of_kind(state, "adam").items():
            i, name = key.split("/")
            moments.setdefault(int(i), {})[name] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        for turn in before if weights else ():
            if self.horizon.ends_with(turn):
                self._window.clear()
            else:
                self._window.append((turn, self._reference(turn)))
        if weights:
            self.model.restore(weights)
            self._edits_in_model = True


def _mean(losses: Sequence[MetaLoss]) -> MetaLoss:
    """Of each field."""
    return MetaLoss(*(sum(getattr(loss, field.name) for loss in losses) / len(losses) for field in fields(MetaLoss)))


def _of_kind(state: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{kind}/"): tensor for key, tensor in state.items() if key.startswith(f"{kind}/")}


def _require_finite(turn: TrainingTurn, what: str, value: float) -> None:
    if not math.isfinite(value):
        remedy = "a smaller editor.meta_lr or editor.lr may keep it finite"
        raise FloatingPointError(f"turn {turn.edits.index}: {what} is {value}; {remedy}")
