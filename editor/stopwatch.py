"""Seconds of the parts of a turn."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds of each part of a turn, the devices synchronised at both ends; a part that recurs is added up."""

    def __init__(self, *devices: torch.device) -> None:
        self.gpus = {device for device in devices if device.type == "cuda"}
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + self._now() - start

    def _now(self) -> float:
        for gpu in self.gpus:
            torch.cuda.synchronize(gpu)
        return time.perf_counter()
