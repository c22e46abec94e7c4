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
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TOP = 256  # of a small model's mass at such tokens, 94% (zsRE's locality questions); 2 KiB a token
SHARD_TOKENS = 8192  # 16 MiB


@dataclass(frozen=True, slots=True)
class Distributions:
    """What is kept of the distributions at N tokens."""

    argmax: Tensor  # (N,) int32; of equals, the one that the model itself would choose
    ids: Tensor  # (N, K) int32
    log_probs: Tensor  # (N, K) float32, falling
    others: Tensor  # (N,) float32, log mass of all other tokens; -inf where there are none

    @classmethod
    def of(cls, logits: Tensor) -> Distributions:  # (N, V)
        log_p = _log_softmax(logits)
        top, ids = log_p.topk(min(TOP, log_p.shape[1]))
        return cls(logits.argmax(-1).int(), ids.int(), top, _others(log_p, ids).logsumexp(-1))

    def __getitem__(self, rows: slice | Tensor) -> Distributions:
        return Distributions(*(part[rows] for part in self._parts()))

    def to(self, device: torch.device) -> Distributions:
        return Distributions(*(part.to(device) for part in self._parts()))

    @staticmethod
    def cat(pieces: Sequence[Distributions]) -> Distributions:
        return Distributions(*(torch.cat(parts) for parts in zip(*(piece._parts() for piece in pieces), strict=True)))

    def _parts(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, entry.name) for entry in fields(self))


class Shift(NamedTuple):
    """How the edited model differs at N tokens."""

    agree: Tensor  # (N,) bool: its first choice is the base model's
    kl: Tensor  # (N,) float32, nats
    error: Tensor  # (N,) float32: KL(base || edited) lies in [kl, kl + error]


def shift(base: Distributions, logits: Tensor) -> Shift:  # logits (N, V) of the edited model at the same tokens
    log_q, ids = _log_softmax(logits), base.ids.long()
    others = _others(log_q, ids)
    ratio = base.others - others.logsumexp(-1)  # log(r / s)
    least = others.masked_fill(others == -torch.inf, torch.inf).amin(-1)
    some = base.others > -torch.inf
    kl = (base.log_probs.exp() * (base.log_probs - log_q.gather(1, ids))).sum(-1)
    kl = kl + torch.where(some, base.others.exp() * ratio, 0)
    error = torch.where(some, base.others.exp() * (base.log_probs[:, -1] - least - ratio), 0)
    return Shift(logits.argmax(-1) == base.argmax, kl.clamp(min=0), error.clamp(min=0))


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _others(log_p: Tensor, ids: Tensor) -> Tensor:
    """The log-probabilities with -inf in the places of `ids`."""
    return log_p.scatter(1, ids, -torch.inf)


@dataclass(frozen=True, slots=True)
class RecordShift:
    """`Shift` over the locality answer of one record."""

    agree: int  # answer tokens
    kl: float  # mean over answer tokens
    error: float


class Locality(Protocol):
    """Sees the locality answers of one block of records after the other go by, in the order of their places."""

    def open(self, places: Sequence[int], lengths: Sequence[int]) -> None:
        """A block begins: the places of its records, and the tokens of their locality answers."""

    def see(self, rows: Tensor, logits: Tensor) -> None:
        """Logits (N, V) at the tokens `rows` (N,) of the block, counted through its answers laid end to end."""

    def close(self) -> list[RecordShift | None]:
        """The block ends: what is to be said of each of its records."""


class BaseWriter:
    """Keeps the base model's distributions in a folder; nothing is to be said of the base model's own answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._places: list[int] = []  # of the shard being filled
        self._lengths: list[int] = []
        self._shard: list[Distributions] = []
        self._seen: list[tuple[Tensor, Distributions]] = []  # of the open block
        self._records = 0

    def open(self, places: Sequence[int], lengths: Sequence[int]) -> None:
        self._places += places
        self._lengths += lengths
        self._seen, self._records = [], len(places)

    def see(self, rows: Tensor, logits: Tensor) -> None:
        self._seen.append((rows, Distributions.of(logits).to(torch.device("cpu"))))

    def close(self) -> list[RecordShift | None]:
        if self._seen:
            order = torch.cat([rows for rows, _ in self._seen]).argsort()
            self._shard.append(Distributions.cat([seen for _, seen in self._seen])[order])
        if sum(self._lengths) >= SHARD_TOKENS:
            self.flush()
        return [None] * self._records

    def flush(self) -> None:
        """Write the shard that is being filled."""
        if not self._shard:
            return
        kept = Distributions.cat(self._shard)
        tensors = {entry.name: getattr(kept, entry.name).contiguous() for entry in fields(kept)}
        index = {"places": torch.tensor(self._places), "lengths": torch.tensor(self._lengths)}
        save_file(tensors | index, self.folder / f"{self._places[0]:012d}.safetensors")
        self._places, self._lengths, self._shard = [], [], []


class BaseReader:
    """Compares answers with the base model's, of which one shard at a time is in memory."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self._starts = sorted(int(path.stem) for path in folder.iterdir())  # the first place of each shard
        self._loaded = -1
        self._rows: dict[int, slice] = {}
        self._shard: Distributions
        self._base: Distributions
        self._lengths: list[int] = []
        self._shift: Shift

    def open(self, places: Sequence[int], lengths: Sequence[int]) -> None:
        self._lengths = list(lengths)
        self._base = Distributions.cat([self._of(place) for place in places]).to(self.device)
        tokens = len(self._base.argmax)
        assert tokens == sum(lengths), "the base model's answers were cut into other tokens"
        self._shift = Shift(torch.zeros(tokens, dtype=torch.bool), torch.zeros(tokens), torch.zeros(tokens))

    def see(self, rows: Tensor, logits: Tensor) -> None:
        for whole, part in zip(self._shift, shift(self._base[rows.to(self.device)], logits), strict=True):
            whole[rows] = part.cpu().to(whole.dtype)

    def close(self) -> list[RecordShift | None]:
        parts = zip(*(part.split(self._lengths) for part in self._shift), strict=True)
        return [RecordShift(int(agree.sum()), float(kl.mean()), float(error.mean())) for agree, kl, error in parts]

    def _of(self, place: int) -> Distributions:
        start = self._starts[bisect.bisect_right(self._starts, place) - 1]
        if start != self._loaded:
            self._load(start)
        return self._shard[self._rows[place]]

    def _load(self, start: int) -> None:
        tensors = load_file(self.folder / f"{start:012d}.safetensors")
        places, ends = tensors.pop("places").tolist(), tensors["lengths"].cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        self._rows = {place: slice(a, b) for place, a, b in zip(places, starts, ends, strict=True)}
        del tensors["lengths"]
        self._shard, self._loaded = Distributions(**tensors), start
