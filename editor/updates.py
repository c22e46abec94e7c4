"""Several updates of a turn as one: those of passes, layers or facts that came one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from data.records import LowRankUpdate, WeightChange, read_together
from editor import linalg


def summed(
    updates: Sequence[Mapping[str, LowRankUpdate]],  # in order
    changes: Sequence[Mapping[str, WeightChange]],  # what each of them did
) -> tuple[dict[str, LowRankUpdate], dict[str, WeightChange]]:
    """By module, the sum of its updates and what that did; `largest` is that of a single update."""
    names = dict.fromkeys(name for each in updates for name in each)
    total = {name: _sum([each[name] for each in updates if name in each]) for name in names}
    if len(changes) < 2:
        return total, dict(*changes)
    by_name = {name: [each[name] for each in changes if name in each] for name in names}
    factors = [(update.left, update.right) for update in total.values()]
    squares = read_together([linalg.inner_product(one, one) for one in factors])
    return total, {  # of max, a nan that comes first stays
        name: WeightChange(max(square, 0.0) ** 0.5, max(change.largest for change in own), own[-1].drift)
        for (name, own), square in zip(by_name.items(), squares, strict=True)
    }


def _sum(updates: Sequence[LowRankUpdate]) -> LowRankUpdate:
    """Of one module, as factors where all are."""
    if len(updates) == 1:
        return updates[0]
    lefts = [update.left for update in updates if update.left is not None]
    if len(lefts) == len(updates):
        return LowRankUpdate(torch.cat(lefts, dim=1), torch.cat([update.right for update in updates]))
    return LowRankUpdate(None, torch.stack([linalg.dense((update.left, update.right)) for update in updates]).sum(0))


def first_unsolved(infos: Mapping[str, Tensor]) -> str | None:
    """The first module whose system has no factor, by the `info` of each (editor/linalg.py), all read together."""
    read = read_together(list(infos.values()))
    return next((name for name, info in zip(infos, read, strict=True) if info != 0), None)
