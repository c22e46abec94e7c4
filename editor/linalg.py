"""Pure maths of the editors: tensors and floats in, tensors out.

Letters: N rows (captured tokens), d_k key size, d_v value size, r rank of a factor pair.
Systems are built and solved in float64: keys of a real model are nearly collinear, and a value gradient's covariance
spans ten decades, so float32 would lose the small directions that ridge and whitening are about. Beside the language
model the cost vanishes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

Factors = tuple[Tensor | None, Tensor]  # left (d_k, r) or None for the identity, right (r, d_v)


def ridge_update(
    keys: Tensor,  # (N, d_k)
    value_shifts: Tensor,  # (N, d_v)
    alpha: float,
    chunk: int | None = None,
) -> Factors:
    """DeltaW = (K^T K + alpha I)^(-1) K^T V = K^T (K K^T + alpha I)^(-1) V, by Cholesky on the smaller system.

    The minimiser of ||K DeltaW - V||^2 + alpha ||DeltaW||^2 (ULTRAEDIT section 3; StableEdit Algorithm 1). Returned as
    factors: with N <= d_k (K^T, the (N, d_v) solution), else (None, DeltaW). Rows are read `chunk` at a time. `alpha`
    must be positive; without rows the update is zero.
    """
    count, d_k = keys.shape
    if count <= d_k:
        return keys.T, _solve(_gram(keys, value_shifts.device, chunk), value_shifts.double(), alpha).float()
    normal = torch.zeros((d_k, d_k), dtype=torch.float64, device=value_shifts.device)
    target = torch.zeros((d_k, value_shifts.shape[1]), dtype=torch.float64, device=value_shifts.device)
    for rows in row_chunks(count, chunk):
        block = keys[rows].to(value_shifts.device).double()
        normal.addmm_(block.T, block)
        target.addmm_(block.T, value_shifts[rows].double())
    return None, _solve(normal, target, alpha).float()


def _gram(
    keys: Tensor,  # (N, d_k)
    device: torch.device,
    chunk: int | None,
) -> Tensor:
    """K K^T (N, N), the lower triangle computed `chunk` rows by `chunk` rows and mirrored."""
    count = keys.shape[0]
    product = torch.zeros((count, count), dtype=torch.float64, device=device)
    for rows in row_chunks(count, chunk):
        block = keys[rows].to(device).double()
        for columns in row_chunks(rows.stop, chunk):
            product[rows, columns] = block @ keys[columns].to(device).double().T
    return product.tril() + product.tril(-1).T


def row_chunks(count: int, chunk: int | None) -> Iterator[slice]:
    """Slices that cover `count` rows, `chunk` at a time; None takes all at once."""
    size = chunk or max(count, 1)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _solve(
    matrix: Tensor,  # (n, n) symmetric positive semi-definite
    target: Tensor,  # (n, m)
    alpha: float,
) -> Tensor:
    matrix.diagonal().add_(alpha)
    return torch.cholesky_solve(target, torch.linalg.cholesky(matrix))


def inverse_square_root(
    covariance: Tensor,  # (d, d) symmetric positive semi-definite
    floor: float,
    relative: bool,
) -> tuple[Tensor, float, Tensor]:
    """Sigma^(-1/2), the symmetric (ZCA) root; the fraction of eigenvalues raised to the floor; the root's eigenvalues.

    The floor is `floor` itself or, if `relative`, `floor` times the mean eigenvalue. A zero matrix has nothing to
    whiten by: a relative floor raises ValueError there.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    least = floor * float(values.mean()) if relative else floor
    if not least > 0:
        raise ValueError("the covariance of the value gradients is zero, so no relative floor exists")
    floored = float((values < least).double().mean())
    scale = values.clamp_min(least).rsqrt()
    return (vectors * scale) @ vectors.T, floored, scale


def inner_product(first: Factors, second: Factors) -> float:
    """<DeltaW_1, DeltaW_2> of two updates from their factors, at a cost of r_1 r_2 (d_k + d_v).

    <L1 R1, L2 R2> = sum of (L1^T L2) * (R1 R2^T), elementwise; nothing of size (d_k, d_v) is formed. Left and right
    factors may lie on different devices, as keys in memory-mapped files do.
    """
    (left, right), (other_left, other_right) = first, second
    if left is None and other_left is None:
        return float((right * other_right).sum(dtype=torch.float64))
    if left is None:
        return inner_product(second, first)
    if other_left is None:
        return float(((left.T.to(right.device) @ other_right) * right).sum(dtype=torch.float64))
    return float(((left.T @ other_left).to(right.device) * (right @ other_right.T)).sum(dtype=torch.float64))


def dense(update: Factors) -> Tensor:
    """DeltaW (d_k, d_v) of a factor pair."""
    left, right = update
    return right if left is None else left.to(right.device) @ right
