"""What ROME, MEMIT and AlphaEdit keep; and second moments of keys, for all who ask for those.

Letters: n facts sought together, s contexts of each, m kept keys, d_k key size, d_v value size of an edit module,
C second moments, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from config.schema import AlphaEditConfig, FactToken, LocateConfig, MemitConfig
from harness.memory.asked import DOUBLE, FACTORS, MOMENTS, SINGLE, Asked, Item
from harness.memory.passes import a_layer, read_once, searched

# Copies of C in float64 that are there beside what is kept of it: what is factored; what is decomposed, its vectors,
# and as much as two more, which LAPACK and its kin work in.
COPIES_FACTORED, COPIES_DECOMPOSED = 1, 4
# Of K_0^T K_0 where m has passed d_k: rows in float64, it, a turn's own, their sum, its factor, that as it is solved.
COPIES_OF_GRAM = 6
# Of a turn's keys in float64: as they are, rounded, as they enter, what they leave of each other, as they leave.
COPIES_OF_KEYS = 5
# Tokens of a prefix beside those that are asked for: its first word, and the stop behind it.
BESIDE_PREFIX = 2
# Numbers a fact has while its target vector is sought, in d_v: h, the offset, its gradient, Adam's two moments.
SOUGHT = 5


def of_moments(asked: Asked) -> Iterator[Item]:
    """While they are made, for editors that ask for them; on the CPU as float32 then, each until it is factored."""
    if not asked.cfg.editor.asks_for_text():
        return
    squares = [d_k**2 for d_k, _ in asked.shapes.values()]
    yield Item("sums", sum(squares) * DOUBLE, "of k k^T in float64", while_in=MOMENTS)
    keys = asked.budget * sum(d_k for d_k, _ in asked.shapes.values()) * SINGLE
    yield Item("keys over text", keys, f"a batch of {asked.budget} tokens", while_in=MOMENTS)
    yield Item("a product", max(squares) * SINGLE, "of a batch's keys", while_in=MOMENTS)
    yield a_layer(asked, asked.budget, MOMENTS)
    if asked.device.type == "cpu":
        made = sum(squares) * SINGLE
        texts = 2 if asked.cfg.moments_of_questions() and asked.cfg.corpus.questions < 1 else 1
        yield Item("as float32", made * texts, f"of each text, {texts} in all", while_in=MOMENTS)
        yield Item("as float32", made, "until they are factored", while_in=FACTORS)


def of_located(asked: Asked) -> Iterator[Item]:
    editor = asked.cfg.editor
    assert isinstance(editor, LocateConfig)
    search = _Search.of(asked, editor)
    yield from _of_factors(asked, editor)
    if isinstance(editor, MemitConfig | AlphaEditConfig):
        yield from _of_kept_keys(asked, editor.keep_keys)
    yield from _of_updates(asked)
    read = asked.turn * (search.contexts * search.longest + 2 * asked.facts.tokens)
    yield from read_once(asked, "read once", read, "a turn's facts in their contexts")
    yield from search.items(asked, editor)
    yield from _of_solve(asked, search.contexts)


def _of_factors(asked: Asked, editor: LocateConfig) -> Iterator[Item]:
    squares = [d_k**2 for d_k, _ in asked.shapes.values()]
    if isinstance(editor, AlphaEditConfig):
        kept, copies = sum(squares) * DOUBLE // 2, COPIES_DECOMPOSED
        yield Item("bases", kept, "of null spaces or of the rest, the narrower, in float64", of_editor=True)
    else:
        kept, copies = sum(squares) * DOUBLE, COPIES_FACTORED
        yield Item("factors", kept, "of second moments, in float64", of_editor=True)
    while_made = kept + copies * max(squares) * DOUBLE
    yield Item("being factored", while_made, f"all that is kept, {copies} of C", of_editor=True, while_in=FACTORS)


def _of_kept_keys(asked: Asked, keep_keys: bool) -> Iterator[Item]:
    """Rows and factor up to m = d_k, then the smaller K_0^T K_0 (editor.located.KeptKeys)."""
    if not keep_keys:
        return
    sizes = [d_k for d_k, _ in asked.shapes.values()]
    beyond = max(sizes) + 1
    edits, _ = asked.edits(beyond)
    by = "at their bound, for num_seq is null" if asked.cfg.num_seq is None else f"{edits} a module, of all turns"
    kept = sum(min(edits, d_k) * d_k * SINGLE + min(edits, d_k) ** 2 * DOUBLE for d_k in sizes)
    yield Item("kept keys", kept, by, of_editor=True)
    largest = max(sizes)
    m = min(edits, largest)
    anew = COPIES_OF_GRAM * largest**2 if edits >= beyond else max(m * largest, m**2 + m * largest // 2)
    about = "of a module, as rows in float64 or with a turn's own"
    yield Item("kept keys anew", anew * DOUBLE, about, of_editor=True, while_in="update")


def _of_updates(asked: Asked) -> Iterator[Item]:
    factors = asked.turn * sum(d_k + d_v for d_k, d_v in asked.shapes.values()) * SINGLE
    kept = factors * (asked.cfg.diagnostics.previous + 1)
    yield Item("kept updates", kept, "factors that later turns are compared with")
    yield Item("updates", 2 * factors, "factors of the turn, and where they become one", while_in="update")


def _of_solve(asked: Asked, contexts: int) -> Iterator[Item]:
    d_k = max(d_k for d_k, _ in asked.shapes.values())
    yield Item("keys", asked.turn * contexts * d_k * SINGLE, "of the facts in their contexts", while_in="update")
    solve = COPIES_OF_KEYS * asked.turn * d_k + (COPIES_OF_GRAM * d_k**2 if asked.turn > d_k else 0)
    yield Item("solve", solve * DOUBLE, "keys as they enter and leave, in float64", of_editor=True, while_in="update")


@dataclass(frozen=True)
class _Search:
    """For target vectors, of `facts` together; tokens are counted as if the position were the worst there is."""

    facts: int
    contexts: int  # of each
    longest: int  # tokens of a context without its last
    before: int
    tail: int

    @classmethod
    def of(cls, asked: Asked, editor: LocateConfig) -> _Search:
        prefix = editor.prefix_tokens + BESIDE_PREFIX if editor.prefixes else 0
        longest, before = asked.facts.tokens - 1 + prefix, asked.facts.before + prefix
        anywhere = editor.fact_token is FactToken.subject_last
        tail = asked.facts.tokens - 1 if anywhere else asked.facts.answer_tokens
        one_by_one = editor.has_one_module()  # ROME
        return cls(1 if one_by_one else asked.turn, 1 + editor.prefixes, longest, before, tail)

    def items(self, asked: Asked, editor: LocateConfig) -> Iterator[Item]:
        """With the prompts of the KL, one a fact, as if each were a context."""
        name, (_, d_v) = list(asked.shapes.items())[-1]
        sought = SOUGHT * self.facts * d_v * SINGLE
        yield Item("target vectors", sought, f"of {self.facts} facts, with Adam's moments", while_in="targets")
        if editor.kl_factor:
            reference = self.facts * asked.outline.vocabulary * SINGLE
            yield Item("reference", reference, "log-probabilities that the KL is to", while_in="targets")
        sequences = self.facts * (self.contexts + bool(editor.kl_factor))
        yield from searched(
            asked, name, sequences, longest=self.longest, before=self.before, tail=self.tail, part="targets"
        )
