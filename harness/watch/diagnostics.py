"""What a turn did, in numbers: one line of turns.jsonl (DESIGN section 6)."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.records import LowRankUpdate, Phase, Turn, WeightChange, read_together
from editor import linalg
from editor.base import Edit, Editor
from harness.watch.peaks import memory

log = logging.getLogger(__name__)

SMALLER_STEPS = "take smaller steps (editor.lr; for rome, memit and alphaedit editor.clamp_norm_factor)"
OUTWEIGHED = 1.0  # ||W_t - W_0|| / ||W_0||: beyond it there is more of the edits than of the weights they edit


@dataclass(frozen=True)
class PastUpdate:
    """The update of a turn that is over, kept to be compared with later ones."""

    turn: int
    updates: Mapping[str, LowRankUpdate]
    norms: Mapping[str, float]  # Frobenius, by module


class TurnDiagnostics:
    """Builds the line of each turn: loss, seconds, and what the update did to the weights (DESIGN section 6).

    Remembers the updates of the last `previous` turns and one drawn from all before them, each as the editor gives it:
    N (d_k + d_v) numbers a module as factors, compared at a cost of N^2 (d_k + d_v); or d_k d_v where it has no
    factors, as fine-tuning's never has, nor a ridge solve's where N > d_k (which is the smaller then). That is
    `previous` + 1 times so much in memory and in each checkpoint, however many turns there are: at 7B and with the
    defaults, 1.2 GB a module that is fine-tuned; `previous` = 0 keeps nothing.
    """

    def __init__(self, *devices: torch.device, previous: int = 4, seed: int = 0) -> None:
        """`devices`: those of the model, and the editor's. `previous` = 0 remembers, and compares, nothing."""
        self.devices = devices
        self.previous, self.seed = previous, seed
        self.edits_total = 0
        self._warned: set[str] = set()
        self._window: list[PastUpdate] = []  # newest first
        self._earlier: PastUpdate | None = None

    def line(
        self,
        turn: Turn,
        edit: Edit,
        editor: Editor,
        seconds: float,
    ) -> dict[str, Any]:
        """What `edit` did with the turn's facts, in so many seconds, those of its parts and what lies between them."""
        if turn.phase is Phase.EDIT:
            self.edits_total += len(turn.records)
        now = PastUpdate(turn.index, edit.updates, {name: change.norm for name, change in edit.changes.items()})
        cosines = _cosines(now, self._kept())
        earlier = cosines.pop() if self._earlier else {}
        earlier_turn = self._earlier.turn if self._earlier else None
        self._remember(now)
        self._warn_of_drift(turn.index, edit.changes)
        self._warn_of_loss(turn.index, edit)
        return {
            "turn": turn.index,
            "phase": turn.phase.value,
            "edits": len(turn.records),
            "edits_total": self.edits_total,
            "answer_tokens": sum(sequence.answer_length for sequence in turn.sequences),
            "loss": edit.loss,
            "seconds": {**edit.seconds, "total": seconds},
            **edit.details,
            "modules": {
                name: {
                    "update_norm": change.norm,
                    "update_max": change.largest,
                    "cosine_previous": cosines[0][name] if cosines else None,
                    "cosines": [of_turn[name] for of_turn in cosines],  # with the turn before, the one before that, ...
                    "cosine_earlier": earlier.get(name),
                    "drift": change.drift,
                }
                for name, change in edit.changes.items()
            },
            "earlier_turn": earlier_turn,
            "statistics": editor.statistics(),
            "memory": memory(*self.devices),
        }

    def _warn_of_loss(self, turn: int, edit: Edit) -> None:
        """Once, where an editor tells of a higher loss after the edit than before."""
        before, after = edit.loss, edit.details.get("loss_after")
        if before is None or after is None or after <= before or "loss" in self._warned:
            return
        self._warned.add("loss")
        log.warning(
            "turn %d: the loss of its facts was %.3g nats a token before the edit and is %.3g after it: they are "
            "farther from known than they were; set a smaller editor.lr (turns.jsonl has loss and loss_after of every "
            "turn)",
            turn,
            before,
            after,
        )

    def _warn_of_drift(self, turn: int, changes: Mapping[str, WeightChange]) -> None:
        """Once, where the edits outweigh the weights that they edit."""
        drifts = {name: change.drift for name, change in changes.items() if change.drift is not None}
        name = max(drifts, key=drifts.__getitem__, default=None)
        if name is None or drifts[name] <= OUTWEIGHED or "drift" in self._warned:
            return
        self._warned.add("drift")
        log.warning(
            "turn %d: the edits have moved %s by %.3g times the norm of its own weights (||W_t - W_0|| / ||W_0||): it "
            "is more edits than model; %s",
            turn,
            name,
            drifts[name],
            SMALLER_STEPS,
        )

    def _remember(self, now: PastUpdate) -> None:
        """The window moves on; what leaves it takes the earlier one's place with the chance that keeps all alike.

        Drawn from (seed, turn), so that a resumed run draws the same.
        """
        self._window.insert(0, now)
        if len(self._window) > self.previous:
            gone = self._window.pop()
            if self.previous and random.Random(f"earlier {self.seed} {gone.turn}").random() * (gone.turn + 1) < 1:
                self._earlier = gone

    def _kept(self) -> list[PastUpdate]:
        return [*self._window, *([self._earlier] if self._earlier else [])]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a resumed run needs to write the same lines: contiguous tensors by flat names, and a JSON object."""
        kept = self._kept()
        tensors: dict[str, Tensor] = {}
        for past in kept:
            for name, update in past.updates.items():
                tensors |= _update_state(f"{past.turn}/{name}", update)
        return tensors, {
            "edits_total": self.edits_total,
            "norms": {str(past.turn): dict(past.norms) for past in kept},
            "window": [past.turn for past in self._window],
            "earlier": self._earlier.turn if self._earlier else None,
            "warned": sorted(self._warned),
        }

    def load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on from `state()` of another process; bitwise, for the factors keep their layout."""
        past = {
            int(turn): PastUpdate(
                int(turn), {name: self._update_from(f"{turn}/{name}", tensors) for name in norms}, dict(norms)
            )
            for turn, norms in state["norms"].items()
        }
        self.edits_total = state["edits_total"]
        self._window = [past[turn] for turn in state["window"]]
        self._earlier = None if state["earlier"] is None else past[state["earlier"]]
        self._warned = set(state.get("warned", ()))  # which checkpoints from before it was kept have not

    def _update_from(self, prefix: str, tensors: Mapping[str, Tensor]) -> LowRankUpdate:
        left, rows = tensors.get(f"{prefix}/left"), tensors.get(f"{prefix}/left_rows")
        if rows is not None:
            left = rows.T
        return LowRankUpdate(
            None if left is None else left.to(self.devices[0]), tensors[f"{prefix}/right"].to(self.devices[-1])
        )


def _update_state(prefix: str, update: LowRankUpdate) -> dict[str, Tensor]:
    """The factors, each in the layout it has: a left factor is mostly a turn's keys, transposed without a copy."""
    tensors = {f"{prefix}/right": update.right.contiguous()}
    if update.left is not None and update.left.is_contiguous():
        tensors[f"{prefix}/left"] = update.left
    elif update.left is not None:
        tensors[f"{prefix}/left_rows"] = update.left.T.contiguous()
    return tensors


def _cosines(now: PastUpdate, kept: Sequence[PastUpdate]) -> list[dict[str, float | None]]:
    """<DeltaW_t, DeltaW_s> / (||.|| ||.||) with each of those kept, by module.

    None where one is zero, or it is no finite number.
    """
    scales = [{name: now.norms[name] * before.norms.get(name, 0.0) for name in now.updates} for before in kept]
    compared = {name: [i for i, of_turn in enumerate(scales) if of_turn[name] != 0] for name in now.updates}
    products = [
        linalg.inner_products(_factors(now.updates[name]), [_factors(kept[i].updates[name]) for i in turns])
        for name, turns in compared.items()
    ]
    asked = [(i, name) for name, turns in compared.items() for i in turns]
    found = dict(zip(asked, read_together([one for each in products for one in each]), strict=True))
    return [
        {name: _finite(found[i, name] / scale) if scale != 0 else None for name, scale in of_turn.items()}
        for i, of_turn in enumerate(scales)
    ]


def _factors(update: LowRankUpdate) -> linalg.Factors:
    return update.left, update.right


def _finite(cosine: float) -> float | None:
    return cosine if math.isfinite(cosine) else None
