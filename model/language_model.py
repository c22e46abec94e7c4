"""The language model at work: captures keys and value gradients, takes updates, scores answers, writes, is saved.

model/source.py knows where it comes from.

Letters: N captured tokens of a turn, d_k key size, d_v value size, B sequences, L tokens, M answer tokens,
V vocabulary.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from data.batches import every_position, on_device
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
    read_together,
    row_offsets,
)
from model.edited import EditModule, checksums, sha256_of_tensor
from model.positions import PositionModel
from model.source import ModelSource, read_weights
from model.tracing import Tracer, answer_row_indices, count_within, hooks, require_ran, same_bits

# Padded tokens of a compute batch: the best of those measured on two cores; on a GPU, enough to fill it.
COMPUTE_TOKENS = {"cpu": 512, "cuda": 8192}
# Tokens that another compute batch is taken to cost, where sequences are cut by that; elsewhere batches are filled. One
# of a GPU would hold a turn of 100 facts of zsRE, 45% of it padding; cut at 64 there are 3.6, 10%. Counted, not timed.
BATCH_OVERHEAD = {"cuda": 64}
# By how much of its norm a module's input moves with what shares its compute batch: kernels choose the order of their
# sums by the batch. As far as was seen, 1.9e-6, 0.0068 and 0.053, on one core (SmolLM2-135M, tens of questions, alone
# and with others, seven layers): no bound.
INPUT_NOISE = {torch.float64: 1e-14, torch.float32: 4e-6, torch.float16: 0.01, torch.bfloat16: 0.06}
BESIDE_WEIGHTS = "this editor keeps its edits beside the weights, so there is no model to save that has them"

P = TypeVar("P")
R = TypeVar("R")


class LanguageModel(PositionModel):
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
        self._listener: Callable[[float], None] | None = None  # to how far a turn is
        self.is_wrapped = False  # whether an editor keeps edits beside the weights
        self.compute_tokens = compute_tokens or COMPUTE_TOKENS.get(self.device.type, COMPUTE_TOKENS["cpu"])
        self.overhead = BATCH_OVERHEAD.get(self.device.type)

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

    @property
    def input_noise(self) -> float:
        """By how much of its norm a module's input moves with what shares its compute batch: as far as was seen."""
        return max(INPUT_NOISE.get(edited.weight.dtype, max(INPUT_NOISE.values())) for edited in self.edited.values())

    def tell(self, share: float) -> None:
        """So much of the turn's work is done."""
        if self._listener is not None:
            self._listener(share)

    @contextlib.contextmanager
    def telling(self, listener: Callable[[float], None]) -> Iterator[None]:
        """As long as the context lasts, `listener` hears how far the turn is."""
        self._listener = listener
        try:
            yield
        finally:
            self._listener = None

    # -- work that several processes may share (harness/ranks/model.py)

    world_size = 1  # processes that do

    def partition(self, costs: Sequence[int]) -> list[list[int]]:
        """Which pieces of work with these costs each rank does: about as much each."""
        dearest = sorted(range(len(costs)), key=lambda piece: -costs[piece])
        return [sorted(dearest[rank :: self.world_size]) for rank in range(self.world_size)]

    def map_ranks(self, work: Callable[[LanguageModel, P], R], parts: Sequence[P]) -> list[R]:
        """work(model, part) of every part, one a rank, at the same time; `work` is a function of a module."""
        return [work(self, part) for part in parts]

    def all_ranks(self, holds: bool) -> bool:
        """Whether it holds in each of the processes."""
        return holds

    def require_same(self, state: Callable[[], Mapping[str, Tensor]]) -> None:
        """ValueError where a rank holds other bits of a tensor than the first one. One process asks for no state."""

    # -- capture

    def capture(self, turn: Turn, every_token: bool = False, allocate: Allocate | None = None) -> TurnCapture:
        """Keys and value gradients at the positions that predict the answer tokens (DESIGN section 1, capture).

        With `every_token`, at all positions that predict something. `allocate(name, shape)` gives the tensors to fill,
        by default float32 ones on the model's device (float64 ones where the model is). How sequences fall into
        compute batches changes no result.
        Raises FloatingPointError where the loss, a key or a gradient is not finite.
        """
        first_row = row_offsets(turn.sequences, every_token)
        captures = self.empty_captures(int(first_row[-1]), allocate)
        weights = torch.tensor(turn.loss_weights, dtype=torch.float64)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        wrong = torch.zeros(len(turn.sequences), dtype=torch.int64, device=self.device)  # answer tokens of each
        each = torch.zeros(len(turn.sequences), dtype=torch.float64, device=self.device)  # its loss, summed
        worst = torch.zeros(len(turn.sequences), dtype=self.precise, device=self.device)
        with same_bits():
            for batch in self.batches(turn.sequences):
                rows, positions = every_position(batch) if every_token else (batch.rows, batch.positions)
                target = first_row[batch.members[rows]] + count_within(rows)
                fact = batch.members[batch.rows]  # (M,)
                beside = (rows, positions, target, fact, weights[fact])
                here, (rows, positions, target, fact, weight) = on_device(batch, self.device, *beside)
                losses, missed = self._capture_batch(batch, here, (rows, positions), target, weight, captures)
                loss += (losses.double() * weight).sum()
                wrong.index_add_(0, fact, missed.long())
                each.index_add_(0, fact, losses.double())
                worst.scatter_reduce_(0, fact, losses, "amax")
        finite = [torch.isfinite(c.keys).all() & torch.isfinite(c.value_grads).all() for c in captures.values()]
        total, *are_finite = read_together([loss, *(one.double() for one in finite)])
        mini_batches = sum(w * s.answer_length for w, s in zip(turn.loss_weights, turn.sequences, strict=True))
        mean = total / mini_batches
        if not math.isfinite(mean):
            raise FloatingPointError(f"the loss is {mean}")
        for name, is_finite in zip(captures, are_finite, strict=True):
            if not is_finite:
                raise FloatingPointError(f"the keys or value gradients of {name} are not finite")
        missed_by, sums, largest = read_together([wrong.double(), each, worst.double()])
        means = (total / s.answer_length for total, s in zip(sums, turn.sequences, strict=True))
        return TurnCapture(captures, mean, tuple(number == 0 for number in missed_by), tuple(means), tuple(largest))

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
        here: TokenBatch,  # it, and the tensors that follow, on the model's device
        at: tuple[Tensor, Tensor],  # (N,) rows and positions to capture
        target: Tensor,  # (N,) rows of the captures where they go
        weights: Tensor,  # (M,) of each answer token's loss
        captures: Mapping[str, Capture],
    ) -> tuple[Tensor, Tensor]:  # (M,), (M,) bool
        """Fill the batch's rows of the captures; the losses of its answer tokens, and which it would not choose."""
        trace = Tracer(batch.input_ids.shape, *at)
        with hooks({edited.module: trace.hook(name) for name, edited in self.edited.items()}):
            logits = self._logits(batch, here)
            require_ran(self.edited, trace.outputs)
            losses = functional.cross_entropy(logits.to(self.precise), here.targets, reduction="none")
            loss = (losses * weights.to(losses)).sum()
            grads = torch.autograd.grad(loss, list(trace.outputs.values()))
        for name, grad in zip(trace.outputs, grads, strict=True):
            into = captures[name]
            there = target.to(into.keys.device)
            into.keys[there] = trace.keys[name].to(into.keys)
            into.value_grads[there] = trace.at_positions(grad).to(into.value_grads)
        return losses.detach(), logits.detach().argmax(-1) != here.targets

    # -- scoring

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

            with self.model.get_output_embeddings().register_forward_pre_hook(keep):
                self._logits(batch)
        return torch.stack([read[i] for i in range(len(questions))])

    # -- weight gradients

    @torch.no_grad()
    def reference_logits(self, sequences: Sequence[TokenSequence]) -> Tensor:  # (M, V)
        """The logits that predict each answer token, in the order of the sequences: a `LossTerm`'s reference."""
        first_row = row_offsets(sequences)
        reference: Tensor | None = None
        for batch in self.batches(sequences):
            here, (at,) = on_device(batch, self.device, answer_row_indices(batch, first_row))
            logits = self._logits(batch, here)
            if reference is None:
                reference = logits.new_empty((int(first_row[-1]), logits.shape[1]))
            reference[at] = logits
        assert reference is not None, "a loss term without sequences has no reference"
        return reference

    def weight_gradients(self, terms: Sequence[LossTerm]) -> tuple[dict[str, Tensor], list[float]]:
        """dL/dW (d_k, d_v) of each edit module for the weighted sum L of the terms, and each term's own mean loss.

        One backward a compute batch, down to the lowest edit module; no other weight's gradient is formed.
        """
        total = {name: torch.zeros_like(edited.weight, dtype=self.precise) for name, edited in self.edited.items()}
        weights = [edited.weight for edited in self.edited.values()]
        losses: list[Tensor] = []
        for weight in weights:
            weight.requires_grad_(True)
        try:
            with same_bits():
                for term in terms:
                    mean = torch.zeros((), dtype=torch.float64, device=self.device)
                    for loss in self._batch_losses(term):
                        gradients = torch.autograd.grad(term.weight * loss, weights)
                        for name, gradient in zip(total, gradients, strict=True):
                            total[name] += gradient
                        mean += loss.detach()
                    losses.append(mean)
        finally:
            for weight in weights:
                weight.requires_grad_(False)
        gradient_of = {n: total[n].T if edited.transposed else total[n] for n, edited in self.edited.items()}
        return gradient_of, read_together(losses)

    @torch.no_grad()
    def losses(self, terms: Sequence[LossTerm]) -> list[float]:
        """Each term's mean loss, not weighted."""
        means = []
        for term in terms:
            means.append(torch.zeros((), dtype=torch.float64, device=self.device))
            for loss in self._batch_losses(term):
                means[-1] += loss
        return read_together(means)

    def _batch_losses(self, term: LossTerm) -> Iterator[Tensor]:
        """Each compute batch's share of the term's mean."""
        first_row = row_offsets(term.sequences)
        for batch in self.batches(term.sequences):
            here, (at,) = on_device(batch, self.device, answer_row_indices(batch, first_row))
            logits = self._logits(batch, here).to(self.precise)
            if term.reference is None:
                loss = functional.cross_entropy(logits, here.targets, reduction="sum")
            else:
                expected = term.reference[at].to(self.precise).log_softmax(-1)
                loss = functional.kl_div(logits.log_softmax(-1), expected, reduction="sum", log_target=True)
            yield loss / int(first_row[-1])

    # -- weights

    def apply(self, updates: Mapping[str, LowRankUpdate]) -> dict[str, WeightChange]:
        """Add the updates to the weights: all of them, or none, with a FloatingPointError or, for a shape that is not
        the module's, a ValueError.
        """
        for name, update in updates.items():
            _require_shape(name, update, self.edited[name].shape)
        bounds = read_together([self.edited[name].bound(update) for name, update in updates.items()])
        for (name, update), bound in zip(updates.items(), bounds, strict=True):
            if not self.edited[name].can_add(update, bound):
                raise FloatingPointError(
                    f"the update of {name} is not finite; smaller steps may keep it finite: editor.lr or, where a "
                    "network learns it, editor.meta_lr; where targets are sought, editor.clamp_norm_factor"
                )
        sizes = read_together([self.edited[name].add(update) for name, update in updates.items()])
        return {
            name: WeightChange(norm, largest, moved / start if start else None)
            for name, (norm, moved, largest, start) in zip(updates, sizes, strict=True)
        }

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
        assert self._aside is None, "unedited already"
        self._aside = edited = self.snapshot()
        self.restore_original()
        try:
            yield
        finally:
            self.restore(edited)
            self._aside = None

    def is_original(self) -> bool:
        """Whether every edited weight is as it was loaded."""
        return all(edited.is_original() for edited in self.edited.values())

    def checksums(self) -> dict[str, int]:
        """A number for each edited weight, of all its bits."""
        return checksums({name: edited.master for name, edited in self.edited.items()})

    def fingerprint(self) -> str:
        """A hash of all weights, which names a model: the same on every device and for any number of threads.

        Of their bytes, not of sums, whose last bits hang on the order of adding.
        """
        weights = dict(self.model.named_parameters())  # tied weights once
        with ThreadPoolExecutor() as pool:
            digests = pool.map(sha256_of_tensor, weights.values())
            lines = [f"{n} {tuple(w.shape)} {w.dtype} {d}" for (n, w), d in zip(weights.items(), digests, strict=True)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def export(self, folder: Path, notes: Mapping[str, str] = {}) -> None:
        """Save the model and its tokenizer as `from_pretrained` reads them, and `notes`, texts by the names of files.

        Complete or absent.

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
                for name, text in notes.items():
                    (beside / name).write_text(text, encoding="utf-8")
                for path in (beside, *beside.iterdir()):
                    path.chmod(0o755 if path.is_dir() else 0o644)  # both were made for their owner alone
                    sync(path)
                beside.rename(folder)
            finally:
                if beside.exists():
                    shutil.rmtree(beside)
            sync(folder.parent)


def _require_shape(name: str, update: LowRankUpdate, shape: tuple[int, int]) -> None:
    """ValueError where the factors do not make a (d_k, d_v): products and sums would stretch some of them."""
    left, right = update.left, update.right
    found = right.shape if left is None else (left.shape[0], *right.shape[1:])
    if tuple(found) != shape or (left is not None and left.shape[1:] != right.shape[:1]):
        factors = " and ".join(str(tuple(factor.shape)) for factor in (left, right) if factor is not None)
        raise ValueError(
            f"the update of {name} has factors of shape {factors}, which do not make the {shape} of its map, (d_k, d_v)"
        )


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
