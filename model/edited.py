"""One edit module: the only place that turns (d_k, d_v) maths to the layout of a module's own weight."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor, nn

from data.records import LowRankUpdate, read_together
from model.source import is_transposed, shape_of

# No entry of L R, nor any sum on the way to it, is larger than ||L|| ||R||: up to this, no float32 overflows.
SAFELY_FINITE = 1e38
# Entries of a weight that are handled together.
TOGETHER = 1 << 22
# Integer types by their size in bytes.
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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

    @torch.no_grad()
    def bound(self, update: LowRankUpdate) -> Tensor:  # () float64
        """Not below ||DeltaW||: the product of the norms of its factors."""
        return reduce(torch.mul, map(_norm, self._factors(update)))

    @torch.no_grad()
    def can_add(self, update: LowRankUpdate, bound: float) -> bool:
        """Whether DeltaW is finite. It is formed only where its `bound` does not vouch for that."""
        return bound < SAFELY_FINITE or math.isfinite(_norm(reduce(torch.matmul, self._factors(update))))

    @torch.no_grad()
    def add(self, update: LowRankUpdate) -> Tensor:  # (4,) float64
        """W += DeltaW in the master, then round into the weight the model computes with.

        By rows of the module's own layout, so that no second tensor of W's size is there and each row is fetched once.
        Returns ||DeltaW||, ||W_t - W_0||, the largest |entry| of DeltaW and ||W_0||, for `read_together`.
        """
        factors = self._factors(update)
        first, *others = [factor.T for factor in reversed(factors)] if self.transposed else factors
        sizes = []
        for rows in _row_chunks(self.master):
            delta = reduce(torch.matmul, others, first[rows])
            master = self.master[rows]
            master += delta
            self._round(rows)
            least, most = (extreme.double() for extreme in torch.aminmax(delta))
            sizes.append(torch.stack([_norm(delta), _norm(master - self.original[rows]), -least, most]))
        norms, extremes = torch.stack(sizes).split(2, dim=1)
        return torch.cat([torch.linalg.vector_norm(norms, dim=0), extremes.max()[None], self.original_norm[None]])

    def _factors(self, update: LowRankUpdate) -> list[Tensor]:
        """Those that there are, where the master is: keys may come from a memory-mapped file."""
        return [factor.to(self.master.device) for factor in (update.left, update.right) if factor is not None]

    def is_original(self) -> bool:
        return torch.allclose(self.master, self.original.to(self.master), rtol=0, atol=0, equal_nan=True)

    @torch.no_grad()
    def restore(self, master: Tensor) -> None:
        self.master.copy_(master)
        self._round()

    def _round(self, rows: slice = slice(None)) -> None:
        if self.master.data_ptr() != self.weight.data_ptr():
            self.weight[rows].copy_(self.master[rows])


def _row_chunks(weight: Tensor) -> list[slice]:
    size = max(1, TOGETHER // weight.shape[1])
    return [slice(start, start + size) for start in range(0, len(weight), size)]


def _norm(tensor: Tensor) -> Tensor:  # () float64
    return torch.linalg.vector_norm(tensor, dtype=torch.float64)


def sha256_of_tensor(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """A number for each tensor, made of all its bits in their order: the numbers of copies that differ, differ."""
    totals = read_together([checksum(tensor) for tensor in tensors.values()])
    return {name: total % 2**64 for name, total in zip(tensors, totals, strict=True)}


def checksum(tensor: Tensor) -> Tensor:  # () int64
    """Sum of all entries' bits, each times an odd number drawn from its place, modulo 2^64."""
    bits = tensor.view(INTEGERS[tensor.itemsize]).reshape(-1)
    places = torch.arange(1, min(len(bits), TOGETHER) + 1, device=bits.device) * 0x1E3779B97F4A7C15
    places = (places ^ (places >> 31)) * 0x3F58476D1CE4E5B9
    places = (places ^ (places >> 29)) | 1
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for first in range(0, len(bits), TOGETHER):
        piece = bits[first : first + TOGETHER].to(torch.int64, copy=True)  # where they are int64 too
        total = total * 0x2545F4914F6CDD1D + piece.mul_(places[: len(piece)]).sum()
    return total
