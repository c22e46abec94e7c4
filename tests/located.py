"""ROME, MEMIT and AlphaEdit in float64, slow and plain, straight from the papers; shares no code with the harness.

One sequence through the model at a time, with full logits; torch's own Adam; the d_k x d_k systems solved as they
stand, with every key of earlier turns kept as a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Fact:
    contexts: list[tuple[list[int], int, int]]  # token ids, where the answer starts, position of the fact token
    kl_prompt: tuple[list[int], int] | None  # token ids of "{subject} is a", position of the fact token


@dataclass
class Located:
    """`C` are the second moments by module; modules in the order of the layers."""

    model: Any  # float64
    modules: list[str]
    C: dict[str, Tensor]
    steps: int
    lr: float
    decay: float
    kl: float
    clamp: float
    stop: float
    K0: dict[str, Tensor] = field(default_factory=dict)

    # -- what is inside the model

    def run(self, ids: Sequence[int], module: str | None = None, at: int = 0, offset: Tensor | None = None) -> Any:
        """Logits (L, V); by module its inputs, its outputs and the residual stream behind its layer, each (L, .)."""
        inside: dict[str, dict[str, Tensor]] = {}
        handles = []
        for name in self.modules:
            linear, layer = self.model.get_submodule(name), self.model.get_submodule(name.rsplit(".mlp", 1)[0])
            inside[name] = {}

            def keep(_m: nn.Module, args: Any, out: Tensor, name: str = name) -> Tensor | None:
                inside[name]["keys"] = args[0].detach()[0]
                if name == module and offset is not None:
                    shift = torch.zeros_like(out)
                    shift[0, at] = offset
                    out = out + shift
                inside[name]["values"] = out[0].detach()
                return out

            def keep_layer(_m: nn.Module, _args: Any, out: Any, name: str = name) -> None:
                inside[name]["hidden"] = (out[0] if isinstance(out, tuple) else out).detach()[0]

            handles += [linear.register_forward_hook(keep), layer.register_forward_hook(keep_layer)]
        logits = self.model(input_ids=torch.tensor([list(ids)])).logits[0]
        for handle in handles:
            handle.remove()
        return logits, inside

    def inside(self, what: str, name: str, ids: Sequence[int], at: int) -> Tensor:
        with torch.no_grad():
            return self.run(ids)[1][name][what][at]

    def add(self, name: str, delta: Tensor) -> None:  # (d_k, d_v)
        module = self.model.get_submodule(name)
        with torch.no_grad():
            module.weight += delta.T if isinstance(module, nn.Linear) else delta

    # -- target vectors

    def objective(self, name: str, fact: Fact, h: Tensor, base: Tensor | None) -> Callable[[Tensor], Tensor]:
        def loss(delta: Tensor) -> Tensor:
            said = []
            for ids, start, at in fact.contexts:
                log_p = self.run(ids, name, at, delta)[0].log_softmax(-1)
                said.append(-torch.stack([log_p[i - 1, ids[i]] for i in range(start, len(ids))]).mean())
            total = torch.stack(said).mean() + self.decay * delta.norm() ** 2 / h.norm() ** 2
            if fact.kl_prompt is not None and base is not None:
                ids, at = fact.kl_prompt
                moved = self.run(ids, name, at, delta)[0][-1].log_softmax(-1)
                total = total + self.kl * (base.exp() * (base - moved)).sum()
            return total

        return loss

    def offset(self, name: str, fact: Fact, h: Tensor) -> Tensor:
        base = None
        if fact.kl_prompt is not None:
            with torch.no_grad():
                base = self.run(fact.kl_prompt[0])[0][-1].log_softmax(-1)
        objective = self.objective(name, fact, h, base)
        delta = torch.zeros_like(h, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=self.lr)
        for _ in range(self.steps):
            loss = objective(delta)
            if float(loss.detach()) < self.stop:
                break
            (delta.grad,) = torch.autograd.grad(loss, delta)
            adam.step()
            with torch.no_grad():
                if delta.norm() > self.clamp * h.norm():
                    delta *= self.clamp * h.norm() / delta.norm()
        return delta.detach()

    # -- keys

    def key(self, name: str, fact: Fact) -> Tensor:
        return torch.stack([self.inside("keys", name, ids, at) for ids, _, at in fact.contexts]).mean(0)

    # -- the editors

    def rome(self, facts: Sequence[Fact]) -> dict[str, Tensor]:
        (name,) = self.modules
        total = torch.zeros(*self.shape(name), dtype=torch.float64)
        for fact in facts:
            ids, _, at = fact.contexts[0]
            m = self.inside("values", name, ids, at)
            v = m + self.offset(name, fact, m)
            k = self.key(name, fact)
            inverse = torch.linalg.inv(self.C[name])
            kW = self.apply_module(name, k)
            delta = torch.outer(inverse @ k, v - kW) / (k @ inverse @ k)
            self.add(name, delta)
            total += delta
        return {name: total}

    def memit(self, facts: Sequence[Fact], lam: float, keep: bool) -> dict[str, Tensor]:
        def solve(name: str, K: Tensor, R: Tensor) -> Tensor:
            K0 = self.K0.get(name, K[:0])
            return torch.linalg.solve(lam * self.C[name] + K0.T @ K0 + K.T @ K, K.T @ R)

        return self.spread(facts, solve, keep)

    def alphaedit(self, facts: Sequence[Fact], threshold: float, L2: float, keep: bool = True) -> dict[str, Tensor]:
        def solve(name: str, K: Tensor, R: Tensor) -> Tensor:
            values, vectors = torch.linalg.eigh(self.C[name])
            P = vectors @ torch.diag((values < threshold).double()) @ vectors.T
            K0 = self.K0.get(name, K[:0])
            system = P @ (K0.T @ K0 + K.T @ K) + L2 * torch.eye(len(P), dtype=torch.float64)
            return torch.linalg.solve(system, P @ K.T @ R)

        return self.spread(facts, solve, keep)

    def spread(self, facts: Sequence[Fact], solve: Callable[..., Tensor], keep: bool) -> dict[str, Tensor]:
        last = self.modules[-1]
        bare = [fact.contexts[0] for fact in facts]
        h = [self.inside("hidden", last, ids, at) for ids, _, at in bare]
        z = torch.stack([own + self.offset(last, fact, own) for fact, own in zip(facts, h, strict=True)])
        deltas = {}
        for place, name in enumerate(self.modules):
            K = torch.stack([self.key(name, fact) for fact in facts])
            now = torch.stack([self.inside("hidden", last, ids, at) for ids, _, at in bare])
            deltas[name] = solve(name, K, (z - now) / (len(self.modules) - place))
            self.add(name, deltas[name])
            if keep:
                self.K0[name] = torch.cat([self.K0.get(name, K[:0]), K])
        return deltas

    def apply_module(self, name: str, k: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model.get_submodule(name)(k[None])[0]

    def shape(self, name: str) -> tuple[int, int]:
        module = self.model.get_submodule(name)
        rows, columns = module.weight.shape
        return (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)
