"""What fine-tuning keeps."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from config.schema import AnswerLoss, FineTuningConfig
from harness.memory.asked import DOUBLE, SINGLE, Asked, Facts, Item
from harness.memory.passes import differentiated, read_once

# Float32 numbers that a step has of each edited weight: what the turn has changed, Adam's two moments, its gradient,
# and that of the next step or the root that Adam divides by.
OF_A_STEP = 5


def of_tuned(asked: Asked) -> Iterator[Item]:
    editor = asked.cfg.editor
    assert isinstance(editor, FineTuningConfig)
    change = asked.entries * SINGLE
    kept = change * (asked.cfg.diagnostics.previous + 1)
    yield Item("kept updates", kept, "dense ones that later turns are compared with")
    each, facts = asked.facts, min(editor.facts_per_step or asked.turn, asked.turn)
    if editor.answer_loss is AnswerLoss.prompt_last:  # a sequence for every answer token
        facts, each = facts * each.answer_tokens, Facts(each.before + 2, 1)
    yield from read_once(asked, "read once", asked.turn * asked.facts.tokens, "a turn's texts")
    yield Item("start", asked.copy, "the edited weights of the turn before", while_in="steps")
    about = "change, two gradients, Adam's two moments, in float32"
    yield Item("steps", OF_A_STEP * change, about, while_in="steps")
    yield Item("raw gradient", asked.entries * asked.number, "of a compute batch", while_in="steps")
    largest = max(map(prod, asked.shapes.values())) * DOUBLE
    yield Item("norm", largest, "of a module's change, which float64 takes a copy of", while_in="steps")
    yield from differentiated(asked, facts, each, "steps")
