"""`python -m benchmarks.parts`: its measure, what it takes for a wait, and that no part waits once a module."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch

from benchmarks.bare import Cut, bare
from benchmarks.gpu.made import SHAPES, Facts, build, editable
from benchmarks.parts import Counter, a_turn, made_turn, own_flops
from data.records import Phase
from editor.capture import CaptureEditor
from editor.malmen import MALMEN
from editor.mend import MEND
from editor.meta_train import MetaSettings, MetaTrainer
from editor.rledit import RLEdit

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


@pytest.mark.parametrize("learns", [MEND, MALMEN, RLEdit])
def test_no_turn_of_a_trained_editor_waits_once_a_module(learns: Any) -> None:
    """Neither one of meta-training, nor one of edits, nor its line."""
    own: dict[str, Any] = {"alpha": 1.0} if learns is not MEND else {}
    if learns is RLEdit:
        own |= {"reg_coef": 0.1, "time_decay": 0.9, "back_depth": 2, "update_every": "turn", "trajectory_length": 2}
    facts = Facts(6, 1024)

    def waits(modules: int) -> dict[str, float]:
        model, counter = editable(build(SHAPES["small"], torch.float32, CPU), modules), Counter(CPU)
        editor = learns(model.shapes, learns.Settings(1e-3, 64, "shape", 8, 2, 0, **own), CPU)
        trainer = MetaTrainer(model, editor, MetaSettings(1e-3, 0.6, 1.0))
        for index in range(2):
            with counter.measure("meta-training"):
                trainer.turn(facts.training_turn(index))
        with counter.measure("edits"):
            CaptureEditor(editor, CPU).edit(model, facts.turn(0, Phase.EDIT))
        with counter.measure("statistics"):
            editor.statistics()
        return {part: found["waits"] for part, found in counter.parts.items()}

    assert waits(1) == waits(3)


@pytest.mark.parametrize("facts", [2, 9])
def test_a_capture_waits_for_its_checks_and_for_what_it_says_of_each_fact(facts: int) -> None:
    model, counter = editable(build(SHAPES["small"], torch.float32, CPU), 3), Counter(CPU)
    turn = Facts(facts, 1024).turn(0, Phase.EDIT)
    with counter.measure("capture"):
        model.capture(turn)
    no_wait = 1 + len(list(model.batches(turn.sequences)))  # reads of what lies on the host, wherever the model is
    transformers = len(list(model.batches(turn.sequences)))  # reads a number in its forward
    assert counter.parts["capture"]["waits"] - no_wait - transformers == 2


@pytest.mark.parametrize("whitens", [False, True])
def test_no_part_waits_once_a_module(whitens: bool) -> None:
    def waits(modules: int) -> dict[str, float]:
        shape = {"d_k": 14336, "d_v": 4096, "vocabulary": 32768, "tokens": 2560, "rows": 1280, "turn": 40}
        parts, _ = a_turn(whitens, argparse.Namespace(modules=modules, half="bf16", device="cpu", **shape), 64)
        return {part: found["waits"] for part, found in parts.items() if part != ROOT_OF_SIGMA}

    assert waits(1) == waits(3)
