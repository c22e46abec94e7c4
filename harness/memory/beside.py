"""What GRACE and WISE keep beside the weights of their one module.

Letters: m entries, T positions of a compute batch, d_k key size, d_v value size of the module, D the side memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from config.schema import WiseConfig
from data.stream import DEFAULT_WARM_UP_TURNS
from editor.grace import AT_ONCE, Codebook
from harness.memory.asked import DOUBLE, SINGLE, Asked, Item
from harness.memory.captured import bytes_captured, rows_of_a_fact, shapes_alone
from harness.memory.passes import differentiated, read_once, searched

# Entries of GRACE where num_seq is null: the facts of the longest published runs on zsRE.
PUBLISHED_EDITS = 20_000
# The most results of AT_ONCE numbers that a look-up has at one time: distances at least and at most, and two of a step.
AT_A_LOOK_UP = 4
# Numbers of d_v a value has while it is trained: itself, stacked for the search, its gradient, Adam's two moments.
TRAINED = 5
# Float32 numbers that a step of WISE has of each entry of D: its copy, two gradients, their sum, the mask times the
# step size, what they make.
OF_A_STEP = 6
# Bytes that merging has of each entry and shard: what is left of its change, whether signs agree there, that as an
# integer to be counted; once: the sum of what agrees, and how many that are.
OF_A_MERGE, ONCE_A_MERGE = SINGLE + 1 + DOUBLE, SINGLE + DOUBLE


def of_grace(asked: Asked) -> Iterator[Item]:
    """A fact makes one entry at most; the codebook of the turn before stays until the turn has succeeded."""
    ((name, (d_k, d_v)),) = asked.shapes.items()
    entries, by = asked.edits(PUBLISHED_EDITS)
    book = _codebook_bytes(entries, d_k, d_v)
    yield Item("codebook", book, f"an entry a fact, {by}", of_editor=True)
    yield Item("grown codebook", book, "beside that of the turn before", of_editor=True, while_in="values")
    result = min(AT_ONCE, entries * max(asked.budget, d_k))
    look_up = (2 * asked.budget * d_k + AT_A_LOOK_UP * result) * SINGLE
    yield Item("look-up", look_up, "inputs of a batch in float32, twice; bounds of distances", of_editor=True)
    yield from read_once(asked, "read once", asked.turn * asked.facts.tokens, "a turn's texts")
    trained = TRAINED * asked.turn * d_v * SINGLE
    yield Item("values", trained, "in training, with Adam's moments", of_editor=True, while_in="values")
    tail = asked.facts.answer_tokens
    longest, before = asked.facts.tokens - 1, asked.facts.before
    yield from searched(asked, name, asked.turn, longest=longest, before=before, tail=tail, part="values")


def _codebook_bytes(entries: int, d_k: int, d_v: int) -> int:
    """Of its tensors: the codebook itself knows best, built where tensors have shapes alone."""
    with shapes_alone():
        keys, values, radii = (torch.empty(shape) for shape in ((entries, d_k), (entries, d_v), (entries,)))
        book = Codebook.of(keys, values, radii, ())
    return sum(part.nbytes for part in vars(book).values() if isinstance(part, Tensor))


def of_wise(asked: Asked) -> Iterator[Item]:
    editor = asked.cfg.editor
    assert isinstance(editor, WiseConfig)
    ((_, (d_k, d_v)),) = asked.shapes.items()
    change = asked.entries * SINGLE
    yield Item("side memory", change, "D in float32", of_editor=True)
    turns = DEFAULT_WARM_UP_TURNS if asked.cfg.dataset.num_warm_up is None else asked.cfg.dataset.num_warm_up
    every_token = rows_of_a_fact(asked, True)
    unrelated = turns * min(editor.unrelated, asked.turn * every_token)
    yield Item("unrelated inputs", unrelated * d_k * SINGLE, f"{unrelated} of {turns} turns", of_editor=True)
    router = asked.budget * ((d_k + d_v) * SINGLE + 2 * d_v * asked.number)
    yield Item("router", router, "inputs of a batch in float32, what D adds to them", of_editor=True)
    yield from read_once(asked, "read once", asked.turn * asked.facts.tokens, "a turn's texts")
    yield from _of_capture(asked, asked.turn, every_token, "capture")

    shards = min(editor.shards, asked.turn)
    of_facts = bytes_captured(asked, asked.turn * asked.facts.answer_tokens)
    for part in ("training", "merging"):
        yield Item("facts", of_facts, "keys and value gradients at the answers", while_in=part)
    yield Item("shards", (shards - 1) * change, "changes of the others", of_editor=True, while_in="training")
    about = "copy of D, gradients, step, in float32; mask"
    yield Item("step", OF_A_STEP * change + asked.entries, about, of_editor=True, while_in="training")
    of_a_shard = -(-asked.turn // shards)
    batch = min(editor.facts_per_step or of_a_shard, of_a_shard)
    yield from _of_capture(asked, batch, 2 * every_token, "training")

    yield Item("shards", shards * change, "changes of all", of_editor=True, while_in="merging")
    merging = (OF_A_MERGE * shards + ONCE_A_MERGE) * asked.entries
    yield Item("merge", merging, "what TIES keeps, where signs agree, sums", of_editor=True, while_in="merging")


def _of_capture(asked: Asked, facts: int, rows: int, part: str) -> Iterator[Item]:
    """So many rows of each fact; in training twice what one has, for the captures of a step stay until the next's."""
    yield Item("captures", bytes_captured(asked, facts * rows), "keys and value gradients", while_in=part)
    yield from differentiated(asked, facts, asked.facts, part)
