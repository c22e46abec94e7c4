"""Text that a language model writes, and how likely it holds given ones, many prompts at a time."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from data.batches import PADDING
from model.source import context_length_of, ends_of, keeps_states
from model.tracing import count_within, select_head_rows

# Tokens whose keys and values a batch of text may keep, in compute batches: keeping costs less than computing.
KEPT = 4
# Texts that have ended leave their batch once no larger share than this is still written: the others are copied.
STILL_RUNNING = 0.75
# A beginning shared by all prompts is read by itself from this many tokens on; a batch of one token costs as much.
WORTH_SHARING = 16


@dataclass
class CachedPrompts:
    """Prompts that the model has read, and the key-value cache from which it reads on."""

    members: list[int]  # (B,) indices of the prompts
    mask: Tensor  # (B, L) int64, 0 = padding
    cache: Any = None  # keys and values of these L tokens; None before the first
    logits: Tensor = field(default_factory=lambda: torch.empty(0))  # (M, V) that were asked for last

    def keep(self, rows: list[int]) -> None:
        """Keep these rows alone, layer by layer, so that no second cache lies beside this one."""
        index = torch.tensor(rows, device=self.mask.device)  # one copy; of one on the host each layer would make two
        self.members, self.mask = [self.members[row] for row in rows], self.mask[index]
        self.cache.reorder_cache(index)

    def part(self, rows: list[int] | None = None) -> CachedPrompts:
        """Some of the rows, None for all, to read on from without a change to this."""
        if rows is None:
            return CachedPrompts(self.members, self.mask, _select(self.cache, None), self.logits)
        index, members = torch.tensor(rows, device=self.mask.device), [self.members[row] for row in rows]
        return CachedPrompts(members, self.mask[index], _select(self.cache, index), self.logits)


class TextModel:
    """The part of `LanguageModel` that reads prompts and goes on from them.

    Letters: B prompts, L and T tokens, M positions asked about, V vocabulary.
    """

    model: Any
    device: torch.device
    compute_tokens: int

    @property
    def context_length(self) -> int | None:
        """Tokens the model can look back on; None where its configuration sets no limit."""
        return context_length_of(self.model.config)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        watch: Callable[[int], object] = lambda _: None,
    ) -> list[list[int]]:
        """Greedy continuation of each prompt of token ids, special tokens included.

        It stops before the model's own end token, after `max_new_tokens`, and where the context is full. Token for
        token what transformers' `generate` writes for one prompt at a time, unless two tokens are as likely up to
        rounding. `watch(n)` is told of n more tokens that are written or will not be, `max_new_tokens` a prompt in
        all. Raises ValueError for a prompt without tokens or longer than the context.
        """
        self._check_lengths([len(prompt) for prompt in prompts])
        room = [self._room(len(prompt), max_new_tokens) for prompt in prompts]
        ends = ends_of(getattr(self.model, "generation_config", None))
        written: list[list[int]] = [[] for _ in prompts]
        for cached in self._prefill(prompts, max_new_tokens):
            running = set(cached.members)
            for step in range(1, max_new_tokens + 1):
                tokens = cached.logits.argmax(-1)
                for member, token in zip(cached.members, tokens.tolist(), strict=True):
                    if member in running and token not in ends:
                        written[member].append(token)
                    if token in ends or step == room[member]:
                        running.discard(member)
                rows = [row for row, member in enumerate(cached.members) if member in running]
                watch(len(cached.members))
                if len(rows) <= STILL_RUNNING * len(cached.members):
                    watch((len(cached.members) - len(rows)) * (max_new_tokens - step))
                    if not rows:
                        break
                    cached.keep(rows)
                    tokens = tokens[rows]
                self.extend(cached, tokens[:, None])
        return written

    @torch.inference_mode()
    def label_log_probs(
        self, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[tuple[float, int]]]:
        """For each prompt and each of its candidate continuations: sum of its tokens' log-probabilities, their number.

        A prompt is read once, whatever the number of its labels. Raises ValueError for a prompt or a label without
        tokens, and where a prompt and its label together are longer than the context.
        """
        longest = self._check_labels(prompts, labels)
        sums = [[0.0] * len(candidates) for candidates in labels]
        for cached in self._prefill(prompts, max(longest, default=1)):
            first = _log_softmax(cached.logits)
            pairs = [(row, m, k) for row, m in enumerate(cached.members) for k in range(len(labels[m]))]
            where = torch.tensor([(row, labels[m][k][0]) for row, m, k in pairs], dtype=torch.int64)
            rows, starts = where.view(-1, 2).to(self.device).unbind(1)
            for (_, m, k), value in zip(pairs, first[rows, starts].tolist(), strict=True):
                sums[m][k] = value
            longer = [pair for pair in pairs if len(labels[pair[1]][pair[2]]) > 1]
            size = max(1, KEPT * self.compute_tokens // (cached.mask.shape[1] + max(longest)))
            for chunk in (longer[start : start + size] for start in range(0, len(longer), size)):
                rests = self._rest_log_probs(cached, [row for row, *_ in chunk], [labels[m][k] for _, m, k in chunk])
                for (_, m, k), rest in zip(chunk, rests, strict=True):
                    sums[m][k] += rest
        return [
            [(total, len(label)) for total, label in zip(totals, candidates, strict=True)]
            for totals, candidates in zip(sums, labels, strict=True)
        ]

    def _rest_log_probs(self, cached: CachedPrompts, rows: list[int], labels: Sequence[Sequence[int]]) -> list[float]:
        """Log-probability of each label's tokens after its first, behind the given row of what was read."""
        ids = torch.full((len(rows), max(map(len, labels)) - 1), PADDING)
        for row, label in enumerate(labels):
            ids[row, : len(label) - 1] = torch.tensor(label[:-1])
        counts = torch.tensor([len(label) - 1 for label in labels])
        at = torch.arange(len(rows)).repeat_interleave(counts)
        targets = torch.tensor([token for label in labels for token in label[1:]], device=self.device)
        logits = self.extend(cached.part(rows), ids.to(self.device), (at, count_within(at)))
        chosen = _log_softmax(logits).gather(1, targets[:, None])[:, 0]
        return torch.zeros(len(rows), dtype=chosen.dtype).index_add_(0, at, chosen.cpu()).tolist()

    def _prefill(self, prompts: Sequence[Sequence[int]], to_come: int) -> Iterator[CachedPrompts]:
        """Read the prompts, longest first, in batches padded on the left; what all of them begin with is read once.

        `to_come` tokens at most will be read after each: they count towards the memory a batch may take.
        """
        if not prompts:
            return
        shared = self._shared_length(prompts, to_come)
        start = None
        if shared:
            ids = torch.tensor([list(prompts[0][:shared])], device=self.device)
            start = CachedPrompts([0], torch.empty(1, 0, dtype=torch.int64, device=self.device))
            self.extend(start, ids)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        while order:
            longest = len(prompts[order[0]])
            kept = KEPT * self.compute_tokens // (longest + to_come)
            size = max(1, min(self.compute_tokens // (longest - shared), kept))
            yield self._prefill_batch(prompts, order[:size], shared, start)
            order = order[size:]

    def prefill(self, heads: Sequence[Sequence[int]]) -> CachedPrompts:
        """The cache after these beginnings of texts, all of them empty or none."""
        if not any(heads):
            mask = torch.empty(len(heads), 0, dtype=torch.int64, device=self.device)
            return CachedPrompts(list(range(len(heads))), mask)
        return self._prefill_batch(heads, list(range(len(heads))), 0, None)

    def _prefill_batch(
        self, prompts: Sequence[Sequence[int]], members: list[int], shared: int, start: CachedPrompts | None
    ) -> CachedPrompts:
        width = max(len(prompts[member]) for member in members) - shared
        ids = torch.full((len(members), width), PADDING)
        mask = torch.zeros_like(ids)
        for row, member in enumerate(members):
            own = torch.tensor(prompts[member][shared:])
            ids[row, width - len(own) :], mask[row, width - len(own) :] = own, 1
        before = torch.ones(len(members), shared, dtype=mask.dtype)
        first = torch.zeros(len(members), dtype=torch.int64, device=self.device)
        cache = None if start is None else _select(start.cache, first)
        cached = CachedPrompts(members, before.to(self.device), cache)
        self.extend(cached, ids.to(self.device), mask=mask.to(self.device))
        return cached

    def extend(
        self,
        cached: CachedPrompts,
        ids: Tensor,  # (B, T)
        at: tuple[Tensor, Tensor] | None = None,  # rows and positions asked about; None = the last of each row
        mask: Tensor | None = None,  # (B, T), 0 = padding; None = all ones
    ) -> Tensor:  # (M, V)
        """Read T more tokens of each row; the logits asked about are also what `cached` then holds."""
        cached.mask = torch.cat([cached.mask, torch.ones_like(ids) if mask is None else mask], dim=1)
        options = {}
        if self._takes_positions:  # families that do not, derive them from the mask
            limit = self.context_length
            last = None if limit is None else limit - 1  # rows that have ended are read on beside the others
            options["position_ids"] = (cached.mask.cumsum(1) - 1).clamp(0, last)[:, -ids.shape[1] :]
        if at is None:
            at = torch.arange(len(ids)), torch.full((len(ids),), ids.shape[1] - 1)
        with select_head_rows(self.model, at[0].to(self.device), at[1].to(self.device)):
            output = self.model(
                input_ids=ids, attention_mask=cached.mask, past_key_values=cached.cache, use_cache=True, **options
            )
        cached.cache, cached.logits = output.past_key_values, output.logits[0].to(self.device)
        return cached.logits

    @property
    def _takes_positions(self) -> bool:
        return "position_ids" in inspect.signature(self.model.forward).parameters

    def can_extend(self, length: int) -> bool:
        """Whether a text of so many tokens may be read in two parts, the first padded on its left: positions of their
        own make up for the padding, but a window does not see it, and convolutions and recurrences read it.
        """
        config = self.model.config.get_text_config(decoder=True)
        window = getattr(config, "sliding_window", None)
        return self._takes_positions and not keeps_states(config) and (window is None or length <= window)

    def _shared_length(self, prompts: Sequence[Sequence[int]], to_come: int) -> int:
        """How many tokens all prompts begin with and need be read once only; 0 where it does not pay, or cannot be."""
        lengths = [len(prompt) for prompt in prompts]
        if len(prompts) == 1 or not self.can_extend(max(lengths) + to_come):
            return 0
        first, last = min(map(tuple, prompts)), max(map(tuple, prompts))  # all others begin with what these two share
        same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(lengths))
        same = min(same, min(lengths) - 1)
        return same if same >= WORTH_SHARING else 0

    def _room(self, length: int, max_new_tokens: int) -> int:
        """Tokens that may follow a prompt: the last of them is not read, so it needs no place in the context."""
        limit = self.context_length
        return max_new_tokens if limit is None else min(max_new_tokens, limit - length + 1)

    def _check_labels(
        self, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[Sequence[int]]]
    ) -> list[int]:  # tokens of each prompt's longest label
        if any(not label for candidates in labels for label in candidates):
            raise ValueError("a label has no token: give it a text that the tokenizer makes tokens of")
        longest = [max(map(len, candidates), default=1) for candidates in labels]
        lengths = [len(prompt) and len(prompt) + size - 1 for prompt, size in zip(prompts, longest, strict=True)]
        self._check_lengths(lengths)
        return longest

    def _check_lengths(self, lengths: Sequence[int]) -> None:
        limit = self.context_length
        for i, length in enumerate(lengths):
            if length == 0:
                raise ValueError(f"prompt {i} has no token: give it a text")
            if limit is not None and length > limit:
                raise ValueError(
                    f"prompt {i} has {length} tokens, more than the model's context of {limit}: shorten it"
                )


def _select(cache: Any, rows: Tensor | None) -> Any:
    """Some rows of a cache of keys and values, None for all of them, or some of one that also has states of
    convolutions; its layers may lie on several devices. Its own tensors are left as they are, not copied first: all
    rows together may fill a GPU. None where there is no cache yet.
    """
    if cache is None:
        return None
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    if rows is not None:
        for layer in chosen.layers:  # states lie in dictionaries, which both copies would share
            vars(layer).update({name: dict(held) for name, held in vars(layer).items() if isinstance(held, dict)})
        chosen.reorder_cache(rows)
    return chosen


def _log_softmax(logits: Tensor) -> Tensor:  # (M, V), at least float32
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
