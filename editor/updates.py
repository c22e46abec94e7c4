"""Several updates of a turn as one: those of passes, layers or facts that came one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from data.records import LowRankUpdate, WeightChange
from editor import linalg


def added_up(updates: Sequence[Mapping[str, LowRankUpdate]]) -> dict[str, LowRankUpdate]:
    """By module, the sum of its updates, as factors where all are."""
    names = dict.fromkeys(name for each in updates for name in each)
    return {name: _together([each[name] for each in updates if name in each]) for name in names}


def changed_by(
    updates: Mapping[str, LowRankUpdate],  # the sums
    changes: Sequence[Mapping[str, WeightChange]],  # of the single ones, in order
) -> dict[str, WeightChange]:
    """What the sums did; `largest` is that of a single update."""
    if len(changes) < 2:
        return dict(*changes)
    by_name = {name: [each[name] for each in changes if name in each] for name in updates}
    return {
        name: WeightChange(_norm(update), max(change.largest for change in by_name[name]), by_name[name][-1].drift)
        for name, update in updates.items()
    }


def _together(updates: Sequence[LowRankUpdate]) -> LowRankUpdate:
    """The sum of updates of one module, as factors where all are."""
    if len(updates) == 1:
        return updates[0]
    lefts = [update.left for update in updates if update.left is not None]
    if len(lefts) == len(updates):
        return LowRankUpdate(torch.cat(lefts, dim=1), torch.cat([update.right for update in updates]))
    return LowRankUpdate(None, torch.stack([linalg.dense((update.left, update.right)) for update in updates]).sum(0))


def _norm(update: LowRankUpdate) -> float:
    factors = (update.left, update.right)
    return max(0.0, linalg.inner_product(factors, factors)) ** 0.5
