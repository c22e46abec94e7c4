"""What a checkpoint costs beside writing its bytes, as ratios measured in one run:

    python -m benchmarks.checkpoint [--modules 7] [--d-k 14336] [--d-v 4096] [--rounds 7] [--folder FOLDER]

Every round writes the same bytes four ways, in an order drawn for it, so that a disk whose speed drifts or comes in
bursts does so for all of them: once into a plain file, synced; as a checkpoint; through the safetensors library,
synced; and so again with a SHA-256 afterwards. Figures are medians over the rounds, ratios are those of the medians,
and of the shortest times. It needs room for two checkpoints.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.common import parser_with
from harness.run import Checkpoints


def bare(tensors: dict[str, Tensor], folder: Path) -> None:
    """Each byte once, and synced."""
    with (folder / "bytes").open("wb") as file:
        for tensor in tensors.values():
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def library(tensors: dict[str, Tensor], folder: Path, hashed: bool) -> None:
    """What the safetensors library does, synced; with `hashed`, the SHA-256 of its file afterwards."""
    path = folder / "tensors.safetensors"
    save_file(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hashed:
            hashlib.file_digest(file, "sha256")


def checkpoint(tensors: dict[str, Tensor], folder: Path) -> None:
    Checkpoints(folder / "checkpoints", "turn", keep=1).save(1, {"model": tensors}, {"seconds": 0.0})


def race(contenders: dict[str, Callable[[Path], None]], rounds: int, where: Path) -> dict[str, list[float]]:
    """Seconds of each contender in each round, in an empty folder each time, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order, drawn = list(contenders.items()), random.Random(0)
    for _ in range(rounds + 1):
        drawn.shuffle(order)
        for name, work in order:
            folder = Path(tempfile.mkdtemp(dir=where))
            start = time.perf_counter()
            work(folder)
            times[name].append(time.perf_counter() - start)
            shutil.rmtree(folder)
            os.sync()  # what the last one left to do is not the next one's
    return {name: seconds[1:] for name, seconds in times.items()}


def main() -> None:
    parser = parser_with(__doc__, modules=7, d_k=14336, d_v=4096, rounds=7)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to be measured")
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.d_v, arguments.d_k)
    tensors = {f"module {i}": torch.randn(shape, generator=generator) for i in range(arguments.modules)}
    contenders: dict[str, Callable[[Path], None]] = {
        "bytes": partial(bare, tensors),
        "checkpoint": partial(checkpoint, tensors),
        "library": partial(library, tensors, hashed=False),
        "library, then SHA-256": partial(library, tensors, hashed=True),
    }
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        times = race(contenders, arguments.rounds, Path(folder))
    size = sum(tensor.nbytes for tensor in tensors.values())
    print(f"{arguments.modules} modules of {arguments.d_k} x {arguments.d_v} in float32, {size / 1e9:.2f} GB")
    for name, seconds in times.items():
        median, shortest = (choose(seconds) / choose(times["bytes"]) for choose in (statistics.median, min))
        print(f"  {name:<24} {statistics.median(seconds):8.3f} s   {median:.3f}, {shortest:.3f} x bytes", flush=True)


if __name__ == "__main__":
    main()
