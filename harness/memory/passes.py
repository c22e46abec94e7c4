"""What passes through the model take, as far as sizes tell it.

Letters: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

from harness.memory.asked import SINGLE, Asked, Facts, Item
from model.below import KEPT_TOKENS
from model.offsets import tokens_searched
from model.text import KEPT

# Numbers that autograd keeps for a token and traced layer, in widths of the hidden states and of the MLP's inside:
# two norms and their inputs, queries, keys, values, attention's output twice, residuals; gate, up, their product twice.
KEPT_WIDTHS, KEPT_INSIDES = 12, 4
# The most of these that one layer has at one time where autograd keeps nothing: the stream, its norm and what attention
# put out; gate, up and their product.
LAYER_WIDTHS, LAYER_INSIDES = 5, 3
# Of the logits of a capture: themselves, in float32, their log-softmax and its gradient.
FLOATS_OF_LOGITS = 3


def read_once(asked: Asked, name: str, tokens: int, what: str, part: str | None = None) -> Iterator[Item]:
    """What the blocks below the edits put out for so many tokens."""
    if asked.outline.lowest:
        kept = min(KEPT_TOKENS, tokens) * asked.outline.width * asked.number
        yield Item(name, kept, f"what the blocks below the edits put out for {what}", while_in=part)


def differentiated(asked: Asked, questions: int, each: Facts, part: str) -> Iterator[Item]:
    """A compute batch of so many questions, forward and back to the lowest edit module."""
    batch = min(asked.batch(each), questions)
    yield activations(asked, batch * each.tokens, asked.outline.traced_layers, part)
    yield logits(asked, batch * each.answer_tokens, part)


def activations(asked: Asked, tokens: int, layers: int, part: str) -> Item:
    a_token = (KEPT_WIDTHS * asked.outline.width + KEPT_INSIDES * _inside(asked)) * layers
    return Item("activations", tokens * a_token * asked.number, f"{tokens} tokens, estimated", while_in=part)


def logits(asked: Asked, answers: int, part: str) -> Item:
    size = answers * asked.outline.vocabulary * (asked.number + FLOATS_OF_LOGITS * SINGLE)
    return Item("logits", size, f"{answers} answer tokens", while_in=part)


def a_layer(asked: Asked, tokens: int, part: str) -> Item:
    """Of a forward that autograd keeps nothing of."""
    a_token = LAYER_WIDTHS * asked.outline.width + LAYER_INSIDES * _inside(asked)
    return Item("a layer", tokens * a_token * asked.number, f"{tokens} tokens, estimated", while_in=part)


def scored(asked: Asked) -> Iterator[Item]:
    """Of one compute batch of questions; as if all were locality questions, whose logits are looked at closely."""
    batch = asked.batch(asked.facts)
    answers = batch * asked.facts.answer_tokens
    yield a_layer(asked, batch * asked.facts.tokens, "evaluation")
    size = answers * asked.outline.vocabulary * scored_bytes(asked.number)
    yield Item("scored logits", size, f"{answers} answer tokens", while_in="evaluation")


def scored_bytes(number: int) -> int:
    """Bytes of a scored logit: as the model has it, twice where it is of locality; in float32, and its exponential."""
    as_float32 = SINGLE if number < SINGLE else 0
    return 2 * number + as_float32 + SINGLE


def searched(
    asked: Asked,
    name: str,  # of the edit module whose output is moved
    sequences: int,
    *,
    longest: int,  # tokens of a sequence without its last, at most
    before: int,  # of these before the position that is moved, at most
    tail: int,  # from there on, at most
    part: str,
) -> Iterator[Item]:
    """Losses at any offsets (model/offsets.py), of all these sequences.

    What stands before is read once, its keys and values kept. A batch has as many tails as it may have tokens, unless
    too many stand before them; its keys and values are there once more, with those of the tails, and for
    attention, which shares none between heads, at the width of the queries.
    """
    outline, answers = asked.outline, asked.facts.answer_tokens
    kept = sequences * before
    cache = kept * outline.keys_and_values * asked.number
    yield Item("what stands before", cache, f"keys and values of {kept} tokens in all layers", while_in=part)
    layers = outline.layers_from(name)
    budget = tokens_searched(asked.budget, outline.width)
    attended = min(sequences * longest, KEPT * budget)
    a_token = outline.keys_and_values + 2 * outline.width * layers
    about = f"keys and values of {attended} tokens, estimated"
    yield Item("attended to", attended * a_token * asked.number, about, while_in=part)
    yield activations(asked, min(sequences * tail, budget), layers, part)
    yield logits(asked, min(sequences * answers, budget), part)
    yield from read_once(asked, "tails read once", sequences * tail, "the tails", part)


def _inside(asked: Asked) -> int:
    """The width of an MLP's inside."""
    return max(map(max, asked.shapes.values()))
