"""What the benchmarks share: flags, and seconds of work on a device."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping

import torch

from editor.stopwatch import Stopwatch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Work = Callable[[], object]


def parser_with(description: str | None, **defaults: float | str) -> argparse.ArgumentParser:
    """A flag for each default, of its type: d_k=4096 makes --d-k. `half` is one of `DTYPES`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in defaults.items():
        choices = DTYPES if name == "half" else None
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, choices=choices)
    return parser


def seconds(work: Work, device: torch.device) -> float:
    """The device is synchronised at both ends."""
    watch = Stopwatch(device)
    with watch.measure("work"):
        work()
    return watch.seconds["work"]


def race(contenders: Mapping[str, Work], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after one round that does not count."""
    times = [{name: seconds(work, device) for name, work in contenders.items()} for _ in range(rounds + 1)]
    return {name: [took[name] for took in times[1:]] for name in contenders}


def median_seconds(work: Work, device: torch.device, rounds: int) -> float:
    """Over the rounds, after one that does not count."""
    return statistics.median(race({"work": work}, device, rounds)["work"])


def ratio(times: Mapping[str, list[float]], name: str, to: str) -> float:
    """The median over the rounds of one contender's time in another's."""
    return statistics.median(a / b for a, b in zip(times[name], times[to], strict=True))
