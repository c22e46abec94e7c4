"""Target vectors: what a fact's hidden state should be for the model to say the fact (ROME, section 3.1; MEMIT, 4.2).

Letters: n facts, d_v size of a hidden state, s sequences (each fact's contexts).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.records import FactContexts, TokenSequence
from editor.base import EditableModel

BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam, as Kingma and Ba have them


@dataclass(frozen=True)
class TargetSettings:
    """The keys of the same names in the configuration: steps and step size of Adam, the weights of the penalties, the
    bound of ||delta|| in units of ||h||, the loss below which a fact is left.
    """

    v_num_grad_steps: int
    v_lr: float
    v_weight_decay: float
    kl_factor: float
    clamp_norm_factor: float
    v_loss_stop: float


@dataclass(frozen=True)
class Targets:
    """Offsets that make the model say the facts, and how they were found."""

    offsets: Tensor  # (n, d_v) delta
    losses: Tensor  # (n,) -log p of the answer, mean over contexts and tokens, when last read: before the last step
    steps: Tensor  # (n,) of Adam

    @classmethod
    def of_all(cls, each: Sequence[Targets]) -> Targets:
        """As one, those of facts that were sought one after another."""
        parts = ([getattr(one, part) for one in each] for part in ("offsets", "losses", "steps"))
        return cls(*map(torch.cat, parts))

    def details(self) -> dict[str, float]:
        """For the turn's line: means over the facts."""
        return {"loss": float(self.losses.mean()), "steps": float(self.steps.double().mean())}


def in_contexts(facts: Sequence[FactContexts]) -> tuple[list[TokenSequence], list[int]]:
    """All sequences of all facts in order, and their positions."""
    return [s for fact in facts for s in fact.sequences], [at for fact in facts for at in fact.positions]


def target_vectors(
    model: EditableModel,
    name: str,  # of the module that the offsets are added to
    facts: Sequence[FactContexts],
    start: Tensor,  # (n, d_v) h, which the offsets are measured by
    settings: TargetSettings,
    tell: Callable[[float], None] | None = None,  # the share of the steps that are done
) -> Targets:
    """Minimise, by Adam and each fact for itself,

        mean_j -log p(o* | x_j + prompt; h + delta) + kl_factor KL(p(. | "{subject} is a") || p_delta)
            + v_weight_decay ||delta||^2 / ||h||^2

    over delta, the x_j being the fact's contexts and -log p the mean over the answer's tokens; a fact without a subject
    has no KL term, whose sides ROME's equation 4 has the other way round. After each step ||delta|| is clamped at
    clamp_norm_factor ||h||. A fact whose loss is below v_loss_stop takes no more steps.
    Raises FloatingPointError where a loss is not finite.
    """
    search = _Search(model, name, facts, start, settings)
    searching = list(range(len(facts)))
    for step in range(1, settings.v_num_grad_steps + 1):
        loss, gradient = search.loss(searching)
        if not bool(torch.isfinite(loss).all()):
            raise FloatingPointError(f"the loss of a target vector is not finite in step {step}")
        going = loss >= settings.v_loss_stop
        searching = [fact for fact, goes in zip(searching, going.tolist(), strict=True) if goes]
        if not searching:
            break
        search.step(searching, gradient[going], step)
        if tell is not None:
            tell(step / settings.v_num_grad_steps)
    return Targets(search.offsets, search.answer_losses, search.steps)


class _Search:
    """The offsets, and Adam's state, of all facts."""

    def __init__(
        self, model: EditableModel, name: str, facts: Sequence[FactContexts], start: Tensor, settings: TargetSettings
    ) -> None:
        self.settings = settings
        self.offsets = torch.zeros_like(start)
        self.answer_losses, self.steps = start.new_zeros(len(facts)), torch.zeros(len(facts), dtype=torch.int64)
        self.sizes = start.norm(dim=1)  # ||h||
        self.first, self.second = torch.zeros_like(start), torch.zeros_like(start)
        self.owner = [i for i, fact in enumerate(facts) for _ in fact.sequences]
        self.contexts = model.offset_losses(name, *in_contexts(facts))
        with_kl = [i for i, fact in enumerate(facts) if fact.kl_prompt and settings.kl_factor]
        self.kl_row = {i: row for row, i in enumerate(with_kl)}
        self.kl_losses = None
        if with_kl:
            kl_prompts = [prompt for i in with_kl if (prompt := facts[i].kl_prompt)]
            positions = [facts[i].kl_position for i in with_kl]
            reference = model.reference_logits(kl_prompts)
            self.kl_losses = model.offset_losses(name, kl_prompts, positions, reference=reference)

    def loss(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:  # (len(chosen),), (len(chosen), d_v)
        """The objective and its gradient."""
        offsets = self.offsets[chosen]
        answer_losses, gradient = self._answer_losses(chosen, offsets)
        self.answer_losses[chosen] = answer_losses
        kl, kl_gradient = self._kl(chosen, offsets)
        decay = self.settings.v_weight_decay / self.sizes[chosen].square()
        loss = answer_losses + self.settings.kl_factor * kl + decay * offsets.square().sum(1)
        return loss, gradient + self.settings.kl_factor * kl_gradient + 2 * decay[:, None] * offsets

    def _answer_losses(self, chosen: Sequence[int], offsets: Tensor) -> tuple[Tensor, Tensor]:
        """-log p of the answers, the mean over each fact's contexts."""
        row_of = {fact: i for i, fact in enumerate(chosen)}
        some = [i for i, fact in enumerate(self.owner) if fact in row_of]
        owner = torch.tensor([row_of[self.owner[i]] for i in some], device=offsets.device)
        losses, gradients = self.contexts(offsets[owner], some)
        share = 1 / torch.bincount(owner, minlength=len(chosen)).to(offsets)
        means = torch.zeros_like(share).index_add_(0, owner, losses.to(share)) * share
        return means, torch.zeros_like(offsets).index_add_(0, owner, gradients) * share[:, None]

    def _kl(self, chosen: Sequence[int], offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Of what follows "{subject} is a"; 0 where a fact has no subject."""
        kl, gradient = offsets.new_zeros(len(chosen)), torch.zeros_like(offsets)
        there = [i for i, fact in enumerate(chosen) if fact in self.kl_row]
        if there and self.kl_losses is not None:
            losses, gradients = self.kl_losses(offsets[there], [self.kl_row[chosen[i]] for i in there])
            kl[there], gradient[there] = losses.to(kl), gradients
        return kl, gradient

    def step(self, chosen: Sequence[int], gradient: Tensor, step: int) -> None:
        """One of Adam, then the clamp."""
        (beta1, beta2), settings = BETAS, self.settings
        self.first[chosen] = beta1 * self.first[chosen] + (1 - beta1) * gradient
        self.second[chosen] = beta2 * self.second[chosen] + (1 - beta2) * gradient.square()
        mean, square = self.first[chosen] / (1 - beta1**step), self.second[chosen] / (1 - beta2**step)
        offsets = self.offsets[chosen] - settings.v_lr * mean / (square.sqrt() + EPSILON)
        most = settings.clamp_norm_factor * self.sizes[chosen]
        self.offsets[chosen] = offsets * (most / offsets.norm(dim=1)).clamp_max(1.0)[:, None]
        self.steps[chosen] += 1
