"""`python -m benchmarks.parts`: its measure, and what it takes for a wait."""

from __future__ import annotations

import torch

from benchmarks.bare import bare
from benchmarks.gpu.made import SHAPES, build, editable
from benchmarks.parts import Counter, made_turn, own_flops

CPU = torch.device("cpu")


def test_the_measure_is_what_the_bare_work_multiplies() -> None:
    model, counter = editable(build(SHAPES["small"], torch.float32, CPU), 3), Counter(CPU)
    with counter.measure("bare"):
        bare(model, made_turn(0, tokens=40, rows=20).sequences, budget=512)
    own = own_flops(layers=4, edited=3, d_k=336, d_v=96, kv=48, vocabulary=1024, tokens=40, rows=20)
    assert counter.parts["bare"]["other"] == sum(own)


def test_numbers_and_lists_that_are_read_are_waits() -> None:
    counter, numbers = Counter(CPU), torch.ones(3)
    with counter.measure("some"):
        numbers.tolist()
        float(numbers.sum())
        bool(numbers.any())
        numbers + numbers
    assert counter.parts["some"]["waits"] == 3
