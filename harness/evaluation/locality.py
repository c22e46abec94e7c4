"""How far answers to unrelated questions moved from the base model's: LS_agree and LS_kl (DESIGN section 5).

At each locality answer token the base model's distribution p is kept as its `TOP` likeliest tokens and one mass r for
all others. Against q of the edited model, whose others have mass s,

    kl = sum over the top of p log(p / q)  +  r log(r / s)

is KL(p || q) after all others became one outcome: never more than KL(p || q), and less by at most

    error = r (log min_top p - log min_others q - log(r / s)),

because no other token is likelier than the least of the top. With TOP tokens or fewer in the vocabulary, kl is exact.

The base model's side lies on disk in shards of safetensors, so memory does not grow with the records.

Letters: M, N answer tokens, V vocabulary, K tokens kept of a distribution.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TOP = 256  # of a small model's mass at such tokens, 94% (zsRE's locality questions); 2 KiB a token
SHARD_TOKENS = 8192  # 16 MiB


class _Columns:
    """A dataclass of tensors that have a row for each of N tokens."""

    def __getitem__(self, rows: slice | Tensor) -> Self:
        return type(self)(*(part[rows] for part in self._parts()))

    def to(self, device: torch.device) -> Self:
        return type(self)(*(part.to(device) for part in self._parts()))

    def _parts(self) -> tuple[Tensor, ...]:
        return tuple(vars(self).values())


C = TypeVar("C", bound=_Columns)


def cat(pieces: Sequence[C]) -> C:
    """The rows of all pieces, which are of one class."""
    return type(pieces[0])(*(torch.cat(parts) for parts in zip(*(piece._parts() for piece in pieces), strict=True)))


@dataclass(frozen=True)
class Distributions(_Columns):
    """What is kept of the distributions at N tokens."""

    argmax: Tensor  # (N,) int32; of equals, the one that the model itself would choose
    ids: Tensor  # (N, K) int32
    log_probs: Tensor  # (N, K) float32, falling
    others: Tensor  # (N,) float32, log mass of all other tokens; -inf where there are none

    @classmethod
    def of(cls, logits: Tensor, first: Tensor) -> Distributions:  # (N, V), overwritten; (N,) their argmax
        logits = _at_least_float32(logits)
        top, ids = logits.topk(min(TOP, logits.shape[1]))
        log_others = logits.scatter_(1, ids, -torch.inf).logsumexp(-1)
        log_total = torch.logaddexp(top.logsumexp(-1), log_others)
        return cls(first.int(), ids.int(), top - log_total[:, None], log_others - log_total)


@dataclass(frozen=True)
class Shift(_Columns):
    """How the edited model differs at N tokens."""

    agree: Tensor  # (N,) bool: its first choice is the base model's
    kl: Tensor  # (N,) float32, nats
    error: Tensor  # (N,) float32: KL(base || edited) lies in [kl, kl + error]


def shift(base: Distributions, logits: Tensor, first: Tensor) -> Shift:
    """From `base` to the edited model's logits (N, V), which are overwritten; `first` (N,) is their argmax."""
    logits, ids = _at_least_float32(logits), base.ids.long()
    top = logits.gather(1, ids)
    log_others = logits.scatter_(1, ids, -torch.inf).logsumexp(-1)
    log_total = torch.logaddexp(top.logsumexp(-1), log_others)
    least = logits.masked_fill_(logits == -torch.inf, torch.inf).amin(-1) - log_total  # log min_others q
    kl = (base.log_probs.exp() * (base.log_probs - top + log_total[:, None])).sum(-1)
    ratio = base.others - log_others + log_total  # log(r / s)
    some = base.others > -torch.inf
    kl = kl + torch.where(some, base.others.exp() * ratio, 0)
    error = torch.where(some, base.others.exp() * (base.log_probs[:, -1] - least - ratio), 0)
    return Shift(first == base.argmax, kl.clamp(min=0), error.clamp(min=0))


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@dataclass(frozen=True, slots=True)
class RecordShift:
    """`Shift` over the locality answer of one record."""

    agree: int  # answer tokens
    kl: float  # mean over answer tokens
    error: float


class Locality(Protocol):
    """Keeps or compares what a model answers to unrelated questions, block by block in the order of the records."""

    def base(self, places: Sequence[int], lengths: Sequence[int]) -> Distributions | None:
        """The base model's distributions at a block's answers, laid end to end; None where this model is the base."""

    def finish_block(self, places: Sequence[int], lengths: Sequence[int], seen: Compared) -> list[RecordShift | None]:
        """Takes what was `seen` at the block's answers; the shift of each record, None of the base model's own."""


Compared = Distributions | Shift


def compare_with(logits: Tensor, first: Tensor, base: Distributions | None) -> Compared:  # (N, V); (N,) their argmax
    """The distributions of `logits`, which are overwritten, or where there is a `base`, how far they are from it."""
    return Distributions.of(logits, first) if base is None else shift(base, logits, first)


class BaseWriter:
    """Keeps the base model's distributions in a folder; nothing is to be said of the base model's own answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._places: list[int] = []  # of the shard being filled
        self._lengths: list[int] = []
        self._shard: list[Distributions] = []

    def base(self, places: Sequence[int], lengths: Sequence[int]) -> None:
        return None

    def finish_block(self, places: Sequence[int], lengths: Sequence[int], seen: Compared) -> list[RecordShift | None]:
        assert isinstance(seen, Distributions)
        self._places += places
        self._lengths += lengths
        self._shard.append(seen)
        if sum(self._lengths) >= SHARD_TOKENS:
            self.flush()
        return [None] * len(places)

    def flush(self) -> None:
        if not self._shard:
            return
        kept = cat(self._shard)
        tensors = {name: part.contiguous() for name, part in vars(kept).items()}
        index = {"places": torch.tensor(self._places), "lengths": torch.tensor(self._lengths)}
        save_file(tensors | index, self.folder / f"{self._places[0]:012d}.safetensors")
        self._places, self._lengths, self._shard = [], [], []


class BaseReader:
    """Compares answers with the base model's, of which one shard at a time is in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._starts = sorted(int(path.stem) for path in folder.iterdir())  # the first place of each shard
        self._loaded = -1
        self._rows: dict[int, slice] = {}
        self._shard: Distributions

    def base(self, places: Sequence[int], lengths: Sequence[int]) -> Distributions:
        kept = [self._of(place) for place in places]
        cut = [len(own.argmax) for own in kept]
        assert cut == list(lengths), "the base model's answers were cut into other tokens"
        return cat(kept)

    def finish_block(self, places: Sequence[int], lengths: Sequence[int], seen: Compared) -> list[RecordShift | None]:
        assert isinstance(seen, Shift)
        parts = zip(*(part.split(list(lengths)) for part in (seen.agree, seen.kl, seen.error)), strict=True)
        return [RecordShift(int(agree.sum()), float(kl.mean()), float(error.mean())) for agree, kl, error in parts]

    def _of(self, place: int) -> Distributions:
        start = self._starts[bisect.bisect_right(self._starts, place) - 1]
        if start != self._loaded:
            self._load(start)
        return self._shard[self._rows[place]]

    def _load(self, start: int) -> None:
        tensors = load_file(self.folder / f"{start:012d}.safetensors")
        places, ends = tensors.pop("places").tolist(), tensors.pop("lengths").cumsum(0).tolist()
        self._rows = {place: slice(a, b) for place, a, b in zip(places, [0, *ends[:-1]], ends, strict=True)}
        self._shard, self._loaded = Distributions(**tensors), start
