"""What a turn did, in numbers: one line of turns.jsonl (DESIGN section 6)."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from data.records import LowRankUpdate, Phase, Turn
from editor import linalg
from editor.base import Editor
from model import TurnCapture, WeightChange


class Stopwatch:
    """Seconds of each part of a turn, the devices synchronised at both ends."""

    def __init__(self, *devices: torch.device) -> None:
        self.gpus = {device for device in devices if device.type == "cuda"}
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[part] = self._now() - start

    def _now(self) -> float:
        for gpu in self.gpus:
            torch.cuda.synchronize(gpu)
        return time.perf_counter()


class TurnDiagnostics:
    """Builds the line of each turn; remembers the updates of the turn before, and nothing older."""

    def __init__(self, *devices: torch.device) -> None:
        self.devices = devices
        self.edits_total = 0
        self._previous: Mapping[str, LowRankUpdate] = {}
        self._previous_norms: dict[str, float] = {}

    def line(
        self,
        turn: Turn,
        capture: TurnCapture,
        updates: Mapping[str, LowRankUpdate],
        changes: Mapping[str, WeightChange],
        editor: Editor,
        seconds: Mapping[str, float],
    ) -> dict[str, Any]:
        if turn.phase is Phase.EDIT:
            self.edits_total += len(turn.records)
        cosines = {name: self._cosine(name, updates[name], changes[name].norm) for name in updates}
        self._previous = updates
        self._previous_norms = {name: change.norm for name, change in changes.items()}
        return {
            "turn": turn.index,
            "phase": turn.phase.value,
            "edits": len(turn.records),
            "edits_total": self.edits_total,
            "answer_tokens": sum(sequence.answer_length for sequence in turn.sequences),
            "loss": capture.loss,
            "seconds": {**seconds, "total": sum(seconds.values())},
            "modules": {
                name: {
                    "update_norm": change.norm,
                    "update_max": change.largest,
                    "cosine_previous": cosines[name],
                    "drift": change.drift,
                }
                for name, change in changes.items()
            },
            "statistics": editor.statistics(),
            "memory": memory(*self.devices),
        }

    def _cosine(self, name: str, update: LowRankUpdate, norm: float) -> float | None:
        """<DeltaW_t, DeltaW_(t-1)> / (||.|| ||.||); None without a turn before, and where it is no finite number."""
        scale = norm * self._previous_norms.get(name, 0.0)
        if scale == 0:
            return None
        before = self._previous[name]
        cosine = linalg.inner_product((update.left, update.right), (before.left, before.right)) / scale
        return cosine if math.isfinite(cosine) else None


def memory(*devices: torch.device) -> dict[str, float]:
    """Resident memory of the process now and at its highest, and what each GPU held at its highest."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes there, KiB elsewhere
    figures = {
        "resident_bytes": psutil.Process().memory_info().rss,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }
    for device in devices:
        if device.type == "cuda":
            figures[f"{device}_peak_bytes".replace(":", "")] = torch.cuda.max_memory_allocated(device)
    return figures
