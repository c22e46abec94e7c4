"""The language model at work: captures keys and value gradients, takes updates, scores answers, writes, is saved.

The only file that touches it; model_source.py knows where it comes from.

Letters: N captured tokens of a turn, d_k key size, d_v value size, B sequences, L tokens, M answer tokens,
V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from data.batches import PADDING, compute_batches
from data.disk import sync
from data.records import (
    Allocate,
    Capture,
    LossTerm,
    LowRankUpdate,
    TokenBatch,
    TokenSequence,
    Turn,
    TurnCapture,
    WeightChange,
    first_rows,
)
from model_source import ModelSource, context_length_of, is_transposed, read_weights, shape_of

# Padded tokens of a compute batch: the best of those measured on two cores; on a GPU, enough to fill it.
COMPUTE_TOKENS = {"cpu": 512, "cuda": 8192}
# Tokens whose keys and values a batch of text may keep, in compute batches: keeping costs less than computing.
KEPT = 4
# No entry of L R, nor any sum on the way to it, is larger than ||L|| ||R||: up to this, no float32 overflows.
SAFELY_FINITE = 1e38
# A beginning shared by all prompts is read by itself from this many tokens on; a batch of one token costs as much.
WORTH_SHARING = 16

BESIDE_WEIGHTS = "this editor keeps its edits beside the weights, so there is no model to save that has them"

# Entries of a weight that are checked together.
CHECKED = 1 << 22
# Integer types by their size in bytes.
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

P = TypeVar("P")
R = TypeVar("R")


# ------------------------------------------------------------------------------------------------ one edit module


class EditModule:
    """A linear map whose weight is edited; the one place that turns (d_k, d_v) maths to the module's own layout.

    With `master`, a weight of lower precision holds the rounded copy of a float32 master, which takes the updates.
    """

    def __init__(self, module: nn.Module, master: bool = True) -> None:
        self.module = module
        weight = module.weight
        assert isinstance(weight, Tensor)
        self.weight = weight
        self.transposed = is_transposed(module)
        self.shape = shape_of(module)  # (d_k, d_v)
        self.original = weight.detach().clone()
        self.original_norm = _norm(self.original)
        precise = torch.promote_types(weight.dtype, torch.float32) if master else weight.dtype
        self.master = weight.detach().to(precise)  # no copy where it is precise already

    def delta(self, update: LowRankUpdate) -> Tensor:  # (d_k, d_v)
        return reduce(torch.matmul, self._factors(update))

    def _factors(self, update: LowRankUpdate) -> list[Tensor]:
        """Those that there are, where the master is: keys may come from a memory-mapped file."""
        return [factor.to(self.master.device) for factor in (update.left, update.right) if factor is not None]

    @torch.no_grad()
    def can_add(self, update: LowRankUpdate) -> bool:
        """Whether DeltaW is finite. It is formed only where the norms of its factors do not vouch for that."""
        bound = math.prod(float(_norm(factor)) for factor in self._factors(update))
        return bound < SAFELY_FINITE or math.isfinite(_norm(self.delta(update)))

    @torch.no_grad()
    def add(self, update: LowRankUpdate) -> WeightChange:
        """W += DeltaW in the master, then round into the weight the model computes with."""
        delta = self.delta(update)
        self.master += delta.T if self.transposed else delta
        self._round()
        sizes = [_norm(delta), delta.abs().max().double(), _norm(self.master - self.original), self.original_norm]
        norm, largest, moved, start = torch.stack(sizes).tolist()
        return WeightChange(norm, largest, moved / start if start else None)

    def is_original(self) -> bool:
        return torch.allclose(self.master, self.original.to(self.master), rtol=0, atol=0, equal_nan=True)

    @torch.no_grad()
    def restore(self, master: Tensor) -> None:
        self.master.copy_(master)
        self._round()

    def _round(self) -> None:
        if self.master.data_ptr() != self.weight.data_ptr():
            self.weight.copy_(self.master)


def _norm(tensor: Tensor) -> Tensor:  # () float64
    return torch.linalg.vector_norm(tensor, dtype=torch.float64)


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def _checksum(tensor: Tensor) -> int:
    """Sum of all entries' bits, each times an odd number drawn from its place, modulo 2^64."""
    bits = tensor.view(INTEGERS[tensor.itemsize]).reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for first in range(0, len(bits), CHECKED):
        piece = bits[first : first + CHECKED].to(torch.int64)
        places = torch.arange(first + 1, first + 1 + len(piece), device=bits.device) * 0x1E3779B97F4A7C15
        places = (places ^ (places >> 31)) * 0x3F58476D1CE4E5B9
        total += (piece * ((places ^ (places >> 29)) | 1)).sum()
    return int(total) % 2**64


class _Tracer:
    """Hooks on edit modules that keep the inputs and outputs of one forward.

    The output of the lowest module, which no parameter's graph reaches, becomes the leaf where the graph begins, so
    nothing below it is recorded.
    """

    def __init__(self, modules: Mapping[str, EditModule], shape: torch.Size, rows: Tensor, positions: Tensor) -> None:
        self.keys: dict[str, Tensor] = {}  # (N, d_k) by module
        self.outputs: dict[str, Tensor] = {}
        self._shape = shape  # (B, L)
        self._at = (rows, positions)
        self._modules = modules
        self._handles: list[Any] = []

    def __enter__(self) -> _Tracer:
        self._handles = [
            edited.module.register_forward_hook(self._hook(name)) for name, edited in self._modules.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def at_positions(self, activations: Tensor) -> Tensor:  # (N, d)
        """The traced positions; some families flatten (B, L, d) to (B L, d) inside their MLP."""
        rows, positions = (at.to(activations.device) for at in self._at)
        return activations.reshape(*self._shape, -1)[rows, positions]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def keep(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            assert name not in self.outputs, f"{name} runs twice in one forward; its gradient would not be one tensor"
            if not output.requires_grad:
                output.requires_grad_(True)
            self.keys[name] = self.at_positions(inputs[0].detach())
            self.outputs[name] = output
            return output.clone()  # some families add to it in place, which a leaf of the graph forbids

        return keep


@dataclass
class _Read:
    """Prompts that the model has read, and what it needs to read on behind them."""

    members: list[int]  # (B,) places among the prompts
    mask: Tensor  # (B, L) int64, 0 = padding
    cache: Any  # keys and values of these L tokens; None before the first
    logits: Tensor  # (M, V) that were asked for last


# ------------------------------------------------------------------------------------------------ the language model


class LanguageModel:
    """A frozen causal language model with edit modules."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        edit_modules: Mapping[str, nn.Module],
        *,
        master: bool = True,
        compute_tokens: int | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.device = next(model.parameters()).device
        self.precise = torch.promote_types(next(model.parameters()).dtype, torch.float32)  # of losses and gradients
        self.edited = {name: EditModule(module, master) for name, module in edit_modules.items()}
        self._aside: dict[str, Tensor] | None = None  # edited weights, while the original ones are in place
        self.is_wrapped = False  # whether an editor keeps edits beside the weights
        self.compute_tokens = compute_tokens or COMPUTE_TOKENS.get(self.device.type, COMPUTE_TOKENS["cpu"])

    @classmethod
    def load(
        cls,
        source: ModelSource,
        tokenizer: Any,
        edit_modules: Iterable[str],
        *,
        dtype: torch.dtype,
        device: torch.device,
        device_map: str | None = None,
        master: bool = True,
        compute_tokens: int | None = None,
    ) -> LanguageModel:
        """Read the weights (`read_weights`); `edit_modules` are names from the model's `outline`."""
        model = read_weights(source, dtype=dtype, device=device, device_map=device_map)
        chosen = {name: model.get_submodule(name) for name in edit_modules}
        return cls(model, tokenizer, chosen, master=master, compute_tokens=compute_tokens)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(d_k, d_v) of each edit module."""
        return {name: edited.shape for name, edited in self.edited.items()}

    @property
    def devices(self) -> list[torch.device]:
        """Those that hold a part of it, in the order of its layers."""
        return list(dict.fromkeys(weight.device for weight in self.model.parameters()))

    # -- work that several processes may share (harness/ranks/model.py)

    hands = 1  # how many do

    def shares(self, costs: Sequence[int]) -> list[list[int]]:
        """Places of pieces of work with these costs, for each of `hands`: to each about as much."""
        dearest = sorted(range(len(costs)), key=lambda place: -costs[place])
        return [sorted(dearest[hand :: self.hands]) for hand in range(self.hands)]

    def each(self, work: Callable[[LanguageModel, P], R], parts: Sequence[P]) -> list[R]:
        """work(model, part) for one part each of `hands`, at the same time; `work` is a function of a module."""
        return [work(self, part) for part in parts]

    def everywhere(self, holds: bool) -> bool:
        """Whether it holds in each of the processes."""
        return holds

    # -- capture

    def capture(self, turn: Turn, every_token: bool = False, allocate: Allocate | None = None) -> TurnCapture:
        """Keys and value gradients at the positions that predict the answer tokens (DESIGN section 1, capture).

        With `every_token`, at all positions that predict something. `allocate(name, shape)` gives the tensors to fill,
        by default float32 ones on the model's device (float64 ones where the model is). How sequences fall into
        compute batches changes no result.
        Raises FloatingPointError where the loss, a key or a gradient is not finite.
        """
        first_row = first_rows(turn.sequences, every_token)
        captures = self.empty_captures(int(first_row[-1]), allocate)
        weights = torch.tensor(turn.loss_weights, dtype=torch.float64)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        wrong = torch.zeros(len(turn.sequences), dtype=torch.int64, device=self.device)  # answer tokens of each
        with _same_bits():
            for batch in compute_batches(turn.sequences, self.compute_tokens):
                at = _every_position(batch) if every_token else (batch.rows, batch.positions)
                share, missed = self._capture_batch(
                    batch, at, weights[batch.members], first_row[batch.members], captures
                )
                loss += share
                wrong.index_add_(0, batch.members[batch.rows].to(self.device), missed.long())
        mini_batches = sum(w * s.answer_length for w, s in zip(turn.loss_weights, turn.sequences, strict=True))
        mean = float(loss) / mini_batches
        if not math.isfinite(mean):
            raise FloatingPointError(f"the loss is {mean}")
        for name, capture in captures.items():
            if not bool(torch.isfinite(capture.keys).all() & torch.isfinite(capture.value_grads).all()):
                raise FloatingPointError(f"the keys or value gradients of {name} are not finite")
        return TurnCapture(captures, mean, tuple((wrong == 0).tolist()))

    def empty_captures(self, rows: int, allocate: Allocate | None) -> dict[str, Capture]:
        """Room for the captures of a turn of that many rows."""
        make = allocate or (lambda _name, shape: torch.empty(shape, dtype=self.precise, device=self.device))
        return {
            name: Capture(make(f"{name}.keys", (rows, d_k)), make(f"{name}.value_grads", (rows, d_v)))
            for name, (d_k, d_v) in self.shapes.items()
        }

    def _capture_batch(
        self,
        batch: TokenBatch,
        at: tuple[Tensor, Tensor],  # rows and positions to capture
        weights: Tensor,  # (B,) loss weight of each sequence's answer tokens
        first_row: Tensor,  # (B,) where each sequence's rows begin in the captures
        captures: Mapping[str, Capture],
    ) -> tuple[Tensor, Tensor]:  # (), (M,) bool
        """Fill the batch's rows of the captures; its share of the loss, and which answer tokens it would not choose."""
        within = _count_within(at[0])
        rows, positions = at[0].to(self.device), at[1].to(self.device)
        with _Tracer(self.edited, batch.input_ids.shape, rows, positions) as trace:
            logits = self._logits(batch)
            self._check_all_ran(trace)
            targets = batch.targets.to(self.device)
            losses = functional.cross_entropy(logits.to(self.precise), targets, reduction="none")
            loss = (losses * weights[batch.rows].to(losses)).sum()
            grads = torch.autograd.grad(loss, list(trace.outputs.values()))
        target = first_row[at[0]] + within
        for name, grad in zip(trace.outputs, grads, strict=True):
            into = captures[name]
            there = target.to(into.keys.device)
            into.keys[there] = trace.keys[name].to(into.keys)
            into.value_grads[there] = trace.at_positions(grad).to(into.value_grads)
        return loss.detach().double(), logits.detach().argmax(-1) != targets

    def _check_all_ran(self, trace: _Tracer) -> None:
        silent = [name for name in self.edited if name not in trace.outputs]
        if silent:
            raise ValueError(f"model.edit_modules: {silent[0]!r} takes no part in a forward on text; leave it out")

    # -- scoring

    def _logits(self, batch: TokenBatch) -> Tensor:  # (M, V)
        """Logits at the answer positions only.

        The head sees only the rows it is asked about: a hook picks them from its input, so whatever a model does to its
        logits afterwards is kept. No attention mask is needed: padding stands on the right and attention is causal.
        """
        at = (batch.rows.to(self.device), batch.positions.to(self.device))
        with self._head_sees(*at):
            logits = self.model(input_ids=batch.input_ids.to(self.device), use_cache=False).logits
        assert logits.shape[:2] == (1, len(batch.rows)), "the model's head is not the module it names as such"
        return logits[0].to(self.device)

    @contextlib.contextmanager
    def _head_sees(
        self,
        rows: Tensor,  # (M,)
        positions: Tensor,  # (M,)
    ) -> Iterator[None]:
        def pick(_head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            at = rows.to(inputs[0].device), positions.to(inputs[0].device)
            return (inputs[0][at].unsqueeze(0), *inputs[1:])  # (1, M, d)

        handle = self.model.get_output_embeddings().register_forward_pre_hook(pick)
        try:
            yield
        finally:
            handle.remove()

    @torch.inference_mode()
    def answer_logits(self, batch: TokenBatch) -> Tensor:  # (M, V)
        """The logits that predict each answer token of the batch, teacher-forced."""
        return self._logits(batch)

    @torch.inference_mode()
    def hidden_states(self, sequences: Sequence[TokenSequence]) -> Tensor:  # (sequences, d) float32, on the CPU
        """What the head reads at the position that predicts each sequence's first answer token."""
        questions = [TokenSequence(s.ids[: s.answer_start + 1], s.answer_start) for s in sequences]
        read: dict[int, Tensor] = {}
        for batch in self.batches(questions):

            def keep(_head: nn.Module, inputs: tuple[Tensor, ...], batch: TokenBatch = batch) -> None:
                at = batch.rows.to(inputs[0].device), batch.positions.to(inputs[0].device)
                rows = inputs[0][at].float().cpu()
                read.update(zip(batch.members[batch.rows].tolist(), rows, strict=True))

            handle = self.model.get_output_embeddings().register_forward_pre_hook(keep)
            try:
                self._logits(batch)
            finally:
                handle.remove()
        return torch.stack([read[place] for place in range(len(questions))])

    def batches(self, sequences: Sequence[TokenSequence]) -> Iterator[TokenBatch]:
        """The compute batches of this model for these sequences."""
        return compute_batches(sequences, self.compute_tokens)

    # -- weight gradients

    @torch.no_grad()
    def reference_logits(self, sequences: Sequence[TokenSequence]) -> Tensor:  # (M, V)
        """The logits that predict each answer token, in the order of the sequences: a `LossTerm`'s reference."""
        first_row = first_rows(sequences)
        reference: Tensor | None = None
        for batch in self.batches(sequences):
            logits = self._logits(batch)
            if reference is None:
                reference = logits.new_empty((int(first_row[-1]), logits.shape[1]))
            reference[_places(batch, first_row).to(self.device)] = logits
        assert reference is not None, "a loss term without sequences has no reference"
        return reference

    def weight_gradients(self, terms: Sequence[LossTerm]) -> tuple[dict[str, Tensor], list[float]]:
        """dL/dW (d_k, d_v) of each edit module for the weighted sum L of the terms, and each term's own mean loss.

        One backward a compute batch, down to the lowest edit module; no other weight's gradient is formed.
        """
        total = {name: torch.zeros_like(edited.weight, dtype=self.precise) for name, edited in self.edited.items()}
        weights = [edited.weight for edited in self.edited.values()]
        losses = []
        for weight in weights:
            weight.requires_grad_(True)
        try:
            with _same_bits():
                for term in terms:
                    mean = torch.zeros((), dtype=torch.float64, device=self.device)
                    for loss in self._batch_losses(term):
                        gradients = torch.autograd.grad(term.weight * loss, weights)
                        for name, gradient in zip(total, gradients, strict=True):
                            total[name] += gradient
                        mean += loss.detach()
                    losses.append(float(mean))
        finally:
            for weight in weights:
                weight.requires_grad_(False)
        return {n: total[n].T if edited.transposed else total[n] for n, edited in self.edited.items()}, losses

    @torch.no_grad()
    def losses(self, terms: Sequence[LossTerm]) -> list[float]:
        """Each term's mean loss, not weighted."""
        return [float(sum(loss.double() for loss in self._batch_losses(term))) for term in terms]

    def _batch_losses(self, term: LossTerm) -> Iterator[Tensor]:
        """Each compute batch's share of the term's mean."""
        first_row = first_rows(term.sequences)
        for batch in self.batches(term.sequences):
            logits = self._logits(batch).to(self.precise)
            if term.reference is None:
                loss = functional.cross_entropy(logits, batch.targets.to(self.device), reduction="sum")
            else:
                expected = term.reference[_places(batch, first_row).to(self.device)].to(self.precise).log_softmax(-1)
                loss = functional.kl_div(logits.log_softmax(-1), expected, reduction="sum", log_target=True)
            yield loss / int(first_row[-1])

    # -- text

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
        ends = self._end_tokens()
        written: list[list[int]] = [[] for _ in prompts]
        for read in self._read(prompts, max_new_tokens):
            running = set(read.members)
            for step in range(1, max_new_tokens + 1):
                tokens = read.logits.argmax(-1)
                for member, token in zip(read.members, tokens.tolist(), strict=True):
                    if member in running and token not in ends:
                        written[member].append(token)
                    if token in ends or step == room[member]:
                        running.discard(member)
                watch(len(read.members) * (1 if running else max_new_tokens - step + 1))
                if not running:
                    break
                self._read_on(read, tokens[:, None])
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
        for read in self._read(prompts, max(longest, default=1)):
            first = _log_softmax(read.logits)
            pairs = [(row, m, k) for row, m in enumerate(read.members) for k in range(len(labels[m]))]
            where = torch.tensor([(row, labels[m][k][0]) for row, m, k in pairs], dtype=torch.int64)
            rows, starts = where.view(-1, 2).to(self.device).unbind(1)
            for (_, m, k), value in zip(pairs, first[rows, starts].tolist(), strict=True):
                sums[m][k] = value
            longer = [pair for pair in pairs if len(labels[pair[1]][pair[2]]) > 1]
            size = max(1, KEPT * self.compute_tokens // (read.mask.shape[1] + max(longest)))
            for chunk in (longer[start : start + size] for start in range(0, len(longer), size)):
                rests = self._rest_log_probs(read, [row for row, *_ in chunk], [labels[m][k] for _, m, k in chunk])
                for (_, m, k), rest in zip(chunk, rests, strict=True):
                    sums[m][k] += rest
        return [
            [(total, len(label)) for total, label in zip(totals, candidates, strict=True)]
            for totals, candidates in zip(sums, labels, strict=True)
        ]

    def _rest_log_probs(self, read: _Read, rows: list[int], labels: Sequence[Sequence[int]]) -> list[float]:
        """Log-probability of each label's tokens after its first, behind the given row of what was read."""
        ids = torch.full((len(rows), max(map(len, labels)) - 1), PADDING)
        for row, label in enumerate(labels):
            ids[row, : len(label) - 1] = torch.tensor(label[:-1])
        counts = torch.tensor([len(label) - 1 for label in labels])
        at = torch.arange(len(rows)).repeat_interleave(counts)
        targets = torch.tensor([token for label in labels for token in label[1:]], device=self.device)
        copied = _Read(rows, read.mask[rows], _select(read.cache, rows), read.logits)
        logits = self._read_on(copied, ids.to(self.device), (at, _count_within(at)))
        chosen = _log_softmax(logits).gather(1, targets[:, None])[:, 0]
        return torch.zeros(len(rows), dtype=chosen.dtype).index_add_(0, at, chosen.cpu()).tolist()

    def _read(self, prompts: Sequence[Sequence[int]], to_come: int) -> Iterator[_Read]:
        """Read the prompts, longest first, in batches padded on the left; what all of them begin with is read once.

        `to_come` tokens at most will be read after each: they count towards the memory a batch may take.
        """
        if not prompts:
            return
        shared = self._shared_length(prompts, to_come)
        start = None
        if shared:
            ids = torch.tensor([list(prompts[0][:shared])], device=self.device)
            start = _Read([0], torch.empty(1, 0, dtype=torch.int64, device=self.device), None, torch.empty(0))
            self._read_on(start, ids)
        order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
        while order:
            longest = len(prompts[order[0]])
            kept = KEPT * self.compute_tokens // (longest + to_come)
            size = max(1, min(self.compute_tokens // (longest - shared), kept))
            yield self._read_batch(prompts, order[:size], shared, start)
            order = order[size:]

    def _read_batch(
        self, prompts: Sequence[Sequence[int]], members: list[int], shared: int, start: _Read | None
    ) -> _Read:
        width = max(len(prompts[member]) for member in members) - shared
        ids = torch.full((len(members), width), PADDING)
        mask = torch.zeros_like(ids)
        for row, member in enumerate(members):
            own = torch.tensor(prompts[member][shared:])
            ids[row, width - len(own) :], mask[row, width - len(own) :] = own, 1
        before = torch.ones(len(members), shared, dtype=mask.dtype)
        cache = None if start is None else _select(start.cache, [0] * len(members))
        read = _Read(members, before.to(self.device), cache, torch.empty(0))
        self._read_on(read, ids.to(self.device), mask=mask.to(self.device))
        return read

    def _read_on(
        self,
        read: _Read,
        ids: Tensor,  # (B, T)
        at: tuple[Tensor, Tensor] | None = None,  # rows and positions asked about; None = the last of each row
        mask: Tensor | None = None,  # (B, T), 0 = padding; None = all ones
    ) -> Tensor:  # (M, V)
        """Read T more tokens of each row; the logits asked about are also what `read` then holds."""
        read.mask = torch.cat([read.mask, torch.ones_like(ids) if mask is None else mask], dim=1)
        options = {}
        if self._takes_positions:  # families that do not, derive them from the mask
            limit = self.context_length
            last = None if limit is None else limit - 1  # rows that have ended are read on beside the others
            options["position_ids"] = (read.mask.cumsum(1) - 1).clamp(0, last)[:, -ids.shape[1] :]
        if at is None:
            at = torch.arange(len(ids)), torch.full((len(ids),), ids.shape[1] - 1)
        with self._head_sees(at[0].to(self.device), at[1].to(self.device)):
            output = self.model(
                input_ids=ids, attention_mask=read.mask, past_key_values=read.cache, use_cache=True, **options
            )
        read.cache, read.logits = output.past_key_values, output.logits[0].to(self.device)
        return read.logits

    @property
    def _takes_positions(self) -> bool:
        return "position_ids" in inspect.signature(self.model.forward).parameters

    def _shared_length(self, prompts: Sequence[Sequence[int]], to_come: int) -> int:
        """How many tokens all prompts begin with and need be read once only; 0 where it does not pay, or cannot be.

        Padding then stands behind these tokens, which positions of their own make up for, but a window does not see.
        """
        if not self._takes_positions or len(prompts) == 1:
            return 0
        lengths = [len(prompt) for prompt in prompts]
        window = getattr(self.model.config.get_text_config(), "sliding_window", None)
        if window is not None and max(lengths) + to_come > window:
            return 0
        first, last = min(map(tuple, prompts)), max(map(tuple, prompts))  # all others begin with what these two share
        same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(lengths))
        same = min(same, min(lengths) - 1)
        return same if same >= WORTH_SHARING else 0

    def _end_tokens(self) -> set[int]:
        """The tokens at which the model itself ends a text; none for a model that never does."""
        ends = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)

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
        read = [len(prompt) and len(prompt) + size - 1 for prompt, size in zip(prompts, longest, strict=True)]
        self._check_lengths(read)
        return longest

    def _check_lengths(self, lengths: Sequence[int]) -> None:
        limit = self.context_length
        for place, length in enumerate(lengths):
            if length == 0:
                raise ValueError(f"prompt {place} has no token: give it a text")
            if limit is not None and length > limit:
                raise ValueError(
                    f"prompt {place} has {length} tokens, more than the model's context of {limit}: shorten it"
                )

    # -- weights

    def apply(self, updates: Mapping[str, LowRankUpdate]) -> dict[str, WeightChange]:
        """Add the updates to the weights: all of them, or, with a FloatingPointError, none."""
        for name, update in updates.items():
            if not self.edited[name].can_add(update):
                raise FloatingPointError(
                    f"the update of {name} is not finite; a smaller editor.lr may keep it finite, or where a network "
                    "learns it, a smaller editor.meta_lr"
                )
        return {name: self.edited[name].add(update) for name, update in updates.items()}

    def wrap(self, name: str, forward: Callable[[Tensor, Tensor], Tensor]) -> None:
        """From now on `forward(inputs, outputs)` is what an edit module puts out, but for the `unedited` model."""

        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output if self._aside is not None else forward(inputs[0], output)

        self.edited[name].module.register_forward_hook(hook)
        self.is_wrapped = True

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of every edited weight, in the precision that takes the updates."""
        return {name: edited.master.clone() for name, edited in self.edited.items()}

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Put a snapshot back, bit for bit."""
        for name, master in snapshot.items():
            self.edited[name].restore(master)

    def restore_original(self) -> None:
        """Put every edited weight back as it was loaded, bit for bit."""
        self.restore({name: edited.original for name, edited in self.edited.items()})

    @contextlib.contextmanager
    def unedited(self) -> Iterator[None]:
        """The weights as they were loaded, for as long as the context lasts; then the edited ones, bit for bit."""
        self.set_aside()
        try:
            yield
        finally:
            self.bring_back()

    def set_aside(self) -> None:
        """Keep the edited weights for `bring_back`, and put those back that were loaded."""
        assert self._aside is None, "set aside already"
        self._aside = self.snapshot()
        self.restore_original()

    def bring_back(self) -> None:
        """Put the weights back that were set aside, bit for bit."""
        assert self._aside is not None, "nothing is set aside"
        self.restore(self._aside)
        self._aside = None

    def is_original(self) -> bool:
        """Whether every edited weight is as it was loaded."""
        return all(edited.is_original() for edited in self.edited.values())

    def checksums(self) -> dict[str, int]:
        """A number for each edited weight, of all its bits in their places, in which two copies that differ differ."""
        return {name: _checksum(edited.master) for name, edited in self.edited.items()}

    def fingerprint(self) -> str:
        """A hash of all weights, which names a model: the same on every device and for any number of threads.

        Of their bytes, not of sums, whose last bits hang on the order of adding.
        """
        weights = dict(self.model.named_parameters())  # tied weights once
        with ThreadPoolExecutor() as pool:
            digests = pool.map(_sha256, weights.values())
            lines = [f"{n} {tuple(w.shape)} {w.dtype} {d}" for (n, w), d in zip(weights.items(), digests, strict=True)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def export(self, folder: Path) -> None:
        """Save the model and its tokenizer as `from_pretrained` reads them; complete or absent.

        ValueError, nothing being left behind, where something stands there or the disk refuses, and where weights
        are not all there is to it.
        """
        if self.is_wrapped:
            raise ValueError(f"{folder}: {BESIDE_WEIGHTS}")
        with _written_or_refused(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
            try:
                self.model.save_pretrained(beside)
                self.tokenizer.save_pretrained(beside)
                for path in (beside, *beside.iterdir()):
                    path.chmod(0o755 if path.is_dir() else 0o644)  # both were made for their owner alone
                    sync(path)
                beside.rename(folder)
            finally:
                if beside.exists():
                    shutil.rmtree(beside)
            sync(folder.parent)


@contextlib.contextmanager
def _written_or_refused(folder: Path) -> Iterator[None]:
    """One line for what a disk, or a library on its behalf, says no with."""
    try:
        yield
    except Exception as error:
        by_tokenizers = type(error) is Exception and "(os error " in str(error)  # they have no kind of their own
        if not (isinstance(error, OSError | SafetensorError) or by_tokenizers):
            raise
        raise ValueError(
            f"{folder}: the model could not be written ({getattr(error, 'strerror', None) or error}); make room, or "
            "choose another folder"
        ) from error


@contextlib.contextmanager
def _same_bits() -> Iterator[None]:
    """Where torch is to give the same bits each time (`Plan` asks for it on GPUs), so does the backward of attention:
    its kernels have a deterministic form, but take it only where torch is to fail without one.

    ValueError where an operation of the model has no such form.
    """
    if not (torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()):
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        first = str(error).strip().splitlines()[0].partition(", but you set")[0]
        raise ValueError(f"model.deterministic=true: {first}; set model.deterministic=false") from error
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def _select(cache: Any, rows: list[int]) -> Any:
    """Some rows of a cache, whose layers may lie on several devices. Its own tensors are left as they are, not copied
    first: all rows together may fill a GPU.
    """
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(torch.tensor(rows))
    return chosen


def _log_softmax(logits: Tensor) -> Tensor:  # (M, V), at least float32
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _every_position(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    inside = torch.arange(batch.input_ids.shape[1]) < batch.lengths[:, None]
    rows, positions = inside.nonzero(as_tuple=True)
    return rows, positions


def _places(
    batch: TokenBatch,
    first_row: Tensor,  # of `first_rows`
) -> Tensor:  # (M,)
    """Where the batch's answer tokens stand when those of all sequences are counted in order."""
    return first_row[batch.members][batch.rows] + _count_within(batch.rows)


def _count_within(
    rows: Tensor,  # (M,) sorted
) -> Tensor:  # (M,) 0, 1, 2, ... within each run of equal rows
    return torch.arange(len(rows)) - torch.searchsorted(rows, rows)
