"""What a turn costs the language model alone, in plain torch: a forward, and the backward to the edit modules.

Logits at answer positions only; nothing of the harness but the choice of batches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from data.batches import compute_batches
from data.records import TokenBatch, TokenSequence, Turn
from model import LanguageModel

BUDGETS = {"cpu": (256, 384, 512, 768, 1024), "cuda": (4096, 8192, 16384)}  # padded tokens of a compute batch


@dataclass(frozen=True)
class Race:
    model: LanguageModel
    rounds: int

    def seconds(self, work: Callable[[], object]) -> float:
        self._synchronize()
        start = time.perf_counter()
        work()
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def race(self, contenders: dict[str, Callable[[], object]], rounds: int | None = None) -> dict[str, list[float]]:
        """Seconds of each contender in each round, after one round that does not count."""
        for work in contenders.values():
            work()
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds or self.rounds):
            for name, work in contenders.items():
                times[name].append(self.seconds(work))
        return times


@dataclass(frozen=True)
class Bench(Race):
    turn: Turn


def ratio(times: dict[str, list[float]], name: str, to: str) -> float:
    """The median over the rounds of one contender's time in another's."""
    return statistics.median(a / b for a, b in zip(times[name], times[to], strict=True))


def bare_batch(model: LanguageModel, batch: TokenBatch, backward: bool) -> None:
    """A forward, and the backward to the outputs of the edit modules, in plain torch."""
    device = model.device
    outputs: list[torch.Tensor] = []

    def begin(_module: object, _inputs: object, output: torch.Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_(True)
        outputs.append(output)

    handles = [edited.module.register_forward_hook(begin) for edited in model.edited.values()] if backward else []
    hidden = model.model.base_model(input_ids=batch.input_ids.to(device), use_cache=False).last_hidden_state
    logits = model.model.get_output_embeddings()(hidden[batch.rows.to(device), batch.positions.to(device)])
    for handle in handles:
        handle.remove()
    if backward:
        loss = functional.cross_entropy(logits.float(), batch.targets.to(device), reduction="sum")
        torch.autograd.grad(loss, outputs)


def bare(model: LanguageModel, sequences: Sequence[TokenSequence], budget: int, backward: bool = True) -> None:
    with torch.set_grad_enabled(backward):
        for batch in compute_batches(sequences, budget):
            bare_batch(model, batch, backward)


def best_budget(bench: Race, sequences: Sequence[TokenSequence]) -> int:
    """The compute batch, in padded tokens, in which the bare work is fastest."""
    budgets = {f"bare in batches of {size}": size for size in BUDGETS[bench.model.device.type]}
    times = bench.race({name: partial(bare, bench.model, sequences, size) for name, size in budgets.items()}, rounds=2)
    for name, rounds in times.items():
        print(f"  {name:<28} {statistics.median(rounds):8.3f} s", flush=True)
    return budgets[min(times, key=lambda name: statistics.median(times[name]))]
