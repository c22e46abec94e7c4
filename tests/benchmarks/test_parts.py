"""`python -m benchmarks.parts`: its measure, what it takes for a wait, and that no part waits once a module."""

from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks.bare import Cut, bare
from benchmarks.gpu.made import SHAPES, build, editable
from benchmarks.parts import Counter, a_turn, made_turn, own_flops

CPU = torch.device("cpu")
ROOT_OF_SIGMA = "whitening, the root"  # its steps wait, however many modules there are


def test_the_measure_is_what_the_bare_work_multiplies() -> None:
    model, counter = editable(build(SHAPES["small"], torch.float32, CPU), 3), Counter(CPU)
    with counter.measure("bare"):
        bare(model, made_turn(0, tokens=40, rows=20).sequences, Cut(512))
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


@pytest.mark.parametrize("whitens", [False, True])
def test_no_part_waits_once_a_module(whitens: bool) -> None:
    def waits(modules: int) -> dict[str, float]:
        shape = {"d_k": 14336, "d_v": 4096, "vocabulary": 32768, "tokens": 2560, "rows": 1280, "turn": 40}
        parts, _ = a_turn(whitens, argparse.Namespace(modules=modules, half="bf16", device="cpu", **shape), 64)
        return {part: found["waits"] for part, found in parts.items() if part != ROOT_OF_SIGMA}

    assert waits(1) == waits(3)
