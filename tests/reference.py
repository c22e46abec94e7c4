"""The method in float64, slow and plain, straight from DESIGN section 1; shares no code with the harness.

It keeps every row it has ever seen and computes each statistic from scratch, puts sequences through the model without
padding (those of one length together), with full logits, and solves the d_k x d_k system.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor, nn

EPSILON = 2.0**-23  # machine epsilon of float32


@dataclass
class Reference:
    model: nn.Module  # float64
    modules: list[str]
    gamma: float
    alpha: float
    mode: str = "stable"
    scope: str = "shape"
    floor: float = 0.01
    floor_mode: str = "relative"
    prior: float = 0.0
    beta: float = 0.0
    text: dict[str, Tensor] = field(default_factory=dict)  # keys of each module over text, for the preserving solve
    rows: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def turn(self, sequences: Sequence[tuple[list[int], int]], batch_size: int, warm_up: bool) -> dict[str, Tensor]:
        """`sequences` are (token ids, where the answer starts). Edits the model; returns DeltaW (d_k, d_v)."""
        keys, grads = self.capture(sequences, batch_size)
        if self.mode == "batch":
            self.rows = {}
        if self.mode != "frozen" or warm_up:
            for name in self.modules:
                self.rows.setdefault(self.group(name, keys, grads), []).append((keys[name], grads[name]))
        updates = {name: self.update(name, keys, grads, warm_up) for name in self.modules}
        with torch.no_grad():
            for name, delta in updates.items():
                weight = self.model.get_submodule(name).weight
                weight += delta.T if isinstance(self.model.get_submodule(name), nn.Linear) else delta
        return updates

    def group(self, name: str, keys: dict[str, Tensor], grads: dict[str, Tensor]) -> str:
        return name if self.scope == "module" else f"{keys[name].shape[1]} {grads[name].shape[1]}"

    def update(self, name: str, keys: dict[str, Tensor], grads: dict[str, Tensor], warm_up: bool) -> Tensor:
        K, G = keys[name], grads[name]
        k_hat, g_tilde = K, G
        if self.mode != "none":
            seen = self.rows[self.group(name, keys, grads)]
            all_k, all_g = torch.cat([k for k, _ in seen]), torch.cat([g for _, g in seen])
            n, d_v = all_g.shape
            k_hat = (K - all_k.mean(0)) / (all_k.std(0) + EPSILON)
            if self.floor_mode == "shrinkage" and not warm_up:
                g_tilde = (G - all_g.mean(0)) @ shrunk_inverse_root(all_g)
            elif self.mode == "original" or warm_up or n <= d_v + 1:
                g_tilde = (G - all_g.mean(0)) / (all_g.std(0) + EPSILON)
            else:
                centred = all_g - all_g.mean(0)
                sigma = (self.prior * torch.eye(d_v, dtype=torch.float64) + centred.T @ centred) / (n - d_v - 1)
                values, vectors = torch.linalg.eigh(sigma)
                mean = torch.ones(()).double() if self.floor_mode == "absolute" else values.mean()
                least = self.floor * mean
                raised = values + least if self.floor_mode == "shift" else torch.maximum(values, least)
                inverse_root = vectors @ torch.diag(raised**-0.5) @ vectors.T
                g_tilde = (G - all_g.mean(0)) @ inverse_root
        V = -self.gamma * (k_hat**2).sum(1, keepdim=True) * g_tilde
        A = self.alpha * torch.eye(K.shape[1], dtype=torch.float64)
        if self.beta:
            A += self.beta * self.text[name].T @ self.text[name] / len(self.text[name])
        return torch.linalg.solve(K.T @ K + A, K.T @ V)

    def capture(
        self, sequences: Sequence[tuple[list[int], int]], batch_size: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Keys and value gradients of each answer token, at the position that predicts it."""
        longest_first = sorted(sequences, key=lambda item: -len(item[0]))
        keys: dict[str, list[Tensor]] = {name: [] for name in self.modules}
        grads: dict[str, list[Tensor]] = {name: [] for name in self.modules}
        for start in range(0, len(longest_first), batch_size):
            mini_batch = longest_first[start : start + batch_size]
            tokens = sum(len(ids) - answer for ids, answer in mini_batch)
            for _, group in groupby(mini_batch, lambda item: len(item[0])):
                alike = list(group)
                inputs, outputs = self._forward_backward(alike, tokens)
                for name in self.modules:
                    for row, (_, answer) in enumerate(alike):
                        keys[name].append(inputs[name][row, answer - 1 : -1])
                        grads[name].append(outputs[name][row, answer - 1 : -1])
        return {n: torch.cat(k) for n, k in keys.items()}, {n: torch.cat(g) for n, g in grads.items()}

    def _forward_backward(
        self, sequences: Sequence[tuple[list[int], int]], tokens: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        handles = []
        for name in self.modules:

            def keep(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor, name: str = name) -> Tensor:
                out = out if out.requires_grad else out.detach().requires_grad_()
                out.retain_grad()
                inputs[name], outputs[name] = args[0].detach(), out
                return out

            handles.append(self.model.get_submodule(name).register_forward_hook(keep))
        log_probs = self.model(input_ids=torch.tensor([ids for ids, _ in sequences])).logits.log_softmax(-1)
        said = [
            log_probs[row, place - 1, ids[place]]
            for row, (ids, answer) in enumerate(sequences)
            for place in range(answer, len(ids))
        ]
        (-sum(said) / tokens).backward()
        for handle in handles:
            handle.remove()
        return inputs, {name: out.grad for name, out in outputs.items()}


def shrunk_inverse_root(rows: Tensor) -> Tensor:
    """Sigma^(-1/2) of the rows' covariance, shrunk to its diagonal by OAS of the correlations (DESIGN section 1)."""
    n, d = rows.shape
    covariance = torch.cov(rows.T)
    R = torch.corrcoef(rows.T)
    trace_of_square, square_of_trace = torch.trace(R @ R), torch.trace(R) ** 2
    rho = ((1 - 2 / d) * trace_of_square + square_of_trace) / (
        (n + 1 - 2 / d) * (trace_of_square - square_of_trace / d)
    )
    rho = min(float(rho), 1.0)
    values, vectors = torch.linalg.eigh((1 - rho) * covariance + rho * torch.diag(torch.diag(covariance)))
    return vectors @ torch.diag(values**-0.5) @ vectors.T
