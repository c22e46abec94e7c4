"""Pure maths of the editors: tensors and floats in, tensors out.

Letters: N rows (captured tokens), d_k key size, d_v value size, r rank of a factor pair.
Systems are built and solved in float64: keys of a real model are nearly collinear, and a value gradient's covariance
spans ten decades, so float32 would lose the small directions that ridge and whitening are about. Beside the language
model the cost vanishes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Factors = tuple[Tensor | None, Tensor]  # left (d_k, r) or None for the identity, right (r, d_v)
FloorMode = Literal["relative", "absolute", "shift", "shrinkage"]
"""What keeps the eigenvalues of a covariance from zero: `inverse_root_spectrum`."""


class RidgeSystem:
    """The normal equations of ||K DeltaW - V||^2 + alpha ||DeltaW||^2, factored once by Cholesky on the smaller side.

    With N <= d_k that is K K^T + alpha I (N, N), else K^T K + alpha I (d_k, d_k). Keys are read `chunk` rows at a time.
    `alpha` must be positive. Raises torch.linalg.LinAlgError where rounding leaves the system without a factor or, with
    `check_errors=False`, for which the host does not wait, has an `info` that is not 0; no solution then counts.
    """

    info: Tensor  # () int32

    def __init__(
        self,
        keys: Tensor,  # (N, d_k)
        alpha: float | Tensor,  # ()
        device: torch.device,
        chunk: int | None = None,
        *,
        check_errors: bool = True,
    ) -> None:
        self.keys, self.device, self.chunk = keys, device, chunk
        count, d_k = keys.shape
        self.dual = count <= d_k
        matrix = self._gram() if self.dual else self._transposed_keys_times(keys)
        matrix.diagonal().add_(alpha)
        self._factor, self.info = torch.linalg.cholesky_ex(matrix, check_errors=check_errors)

    def update(
        self,
        value_shifts: Tensor,  # (N, d_v)
    ) -> Factors:
        """DeltaW = (K^T K + alpha I)^(-1) K^T V = K^T (K K^T + alpha I)^(-1) V in the keys' precision.

        As factors: with N <= d_k (K^T, the (N, d_v) solution), else (None, DeltaW). Without rows the update is zero.
        """
        if self.dual:
            return self.keys.T, self._solve(value_shifts.double()).to(self.keys.dtype)
        return None, self._solve(self._transposed_keys_times(value_shifts)).to(self.keys.dtype)

    def adjoint(
        self,
        gradient: Tensor,  # (d_k, d_v) dL/dDeltaW
        update: Factors,  # what `update` gave
    ) -> tuple[Tensor, Tensor]:
        """dL/dV (N, d_v) and dL/dalpha (), float64 (MALMEN, section 3.2, from the implicit function theorem).

        dL/dV = K (K^T K + alpha I)^(-1) G and dL/dalpha = -<(K^T K + alpha I)^(-1) G, DeltaW>. In the dual form
        DeltaW = K^T B, so that these are dV = (K K^T + alpha I)^(-1) K G and -<dV, B>.
        """
        target = gradient.to(self.device).double()
        right = update[1].to(self.device).double()
        if self.dual:
            shifts_gradient = self._solve(self._keys_times(target))
            return shifts_gradient, -(shifts_gradient * right).sum()
        solution = self._solve(target)
        return self._keys_times(solution), -(solution * right).sum()

    def _solve(
        self,
        target: Tensor,  # (n, m)
    ) -> Tensor:
        return torch.cholesky_solve(target, self._factor)

    def _gram(self) -> Tensor:
        """K K^T (N, N), the lower triangle computed `chunk` rows by `chunk` rows and mirrored."""
        count = self.keys.shape[0]
        product = torch.zeros((count, count), dtype=torch.float64, device=self.device)
        for rows in row_chunks(count, self.chunk):
            block = self._block(rows)
            for columns in row_chunks(rows.stop, self.chunk):
                product[rows, columns] = block @ self._block(columns).T
        return product.tril() + product.tril(-1).T

    def _transposed_keys_times(
        self,
        matrix: Tensor,  # (N, m)
    ) -> Tensor:  # (d_k, m) float64
        product = torch.zeros((self.keys.shape[1], matrix.shape[1]), dtype=torch.float64, device=self.device)
        for rows in row_chunks(matrix.shape[0], self.chunk):
            product.addmm_(self._block(rows).T, matrix[rows].to(self.device).double())
        return product

    def _keys_times(
        self,
        matrix: Tensor,  # (d_k, m) float64
    ) -> Tensor:  # (N, m) float64
        product = matrix.new_empty((self.keys.shape[0], matrix.shape[1]))
        for rows in row_chunks(self.keys.shape[0], self.chunk):
            product[rows] = self._block(rows) @ matrix
        return product

    def _block(self, rows: slice) -> Tensor:
        return self.keys[rows].to(self.device).double()


def ridge_update(
    keys: Tensor,  # (N, d_k)
    value_shifts: Tensor,  # (N, d_v)
    alpha: float,
    chunk: int | None = None,
) -> Factors:
    """The minimiser DeltaW of ||K DeltaW - V||^2 + alpha ||DeltaW||^2 (ULTRAEDIT section 3; StableEdit Algorithm 1)."""
    return RidgeSystem(keys, alpha, value_shifts.device, chunk).update(value_shifts)


class CholeskyCoordinates:
    """Keys in coordinates in which a symmetric positive definite M (d, d) is the identity: y = L^(-1) k, M = L L^T.

    (M + K^T K)^(-1) K^T is there L^(-T) (I + Y^T Y)^(-1) Y^T, so that M is factored once, whatever K. Raises
    torch.linalg.LinAlgError where M has no factor.
    """

    def __init__(
        self,
        matrix: Tensor,  # M (d, d) float64
    ) -> None:
        self.factor = torch.linalg.cholesky(matrix)  # L

    def enter(self, keys: Tensor) -> Tensor:  # (n, d) -> (n, d)
        return torch.linalg.solve_triangular(self.factor, keys.T, upper=False).T

    def leave(self, left: Tensor) -> Tensor:  # (d, n) -> (d, n): L^(-T) left
        return torch.linalg.solve_triangular(self.factor.T, left, upper=True)


class PreservingSystem:
    """The normal equations of ||K DeltaW - V||^2 + tr(DeltaW^T A DeltaW), factored once (DESIGN section 1).

    With A = alpha I + beta C that is the ridge system of K and of beta tokens of text whose keys are asked to stay. It
    is solved in A's coordinates, where it is a `RidgeSystem` with a ridge of 1, whose `check_errors` and `info` it has.
    """

    def __init__(
        self,
        keys: Tensor,  # (N, d_k)
        coordinates: CholeskyCoordinates,  # of A
        chunk: int | None = None,
        *,
        check_errors: bool = True,
    ) -> None:
        self.coordinates, self.dtype = coordinates, keys.dtype
        device = coordinates.factor.device
        inside = coordinates.enter(keys.to(device).double())
        self._inside = RidgeSystem(inside, 1.0, device, chunk, check_errors=check_errors)

    @property
    def info(self) -> Tensor:  # () int32
        return self._inside.info

    def update(
        self,
        value_shifts: Tensor,  # (N, d_v)
    ) -> Factors:
        """DeltaW = A^(-1) K^T (K A^(-1) K^T + I)^(-1) V in the keys' precision."""
        left, right = self._inside.update(value_shifts)
        if left is None:
            return None, self.coordinates.leave(right).to(self.dtype)
        return self.coordinates.leave(left).to(self.dtype), right.to(self.dtype)


def row_chunks(count: int, chunk: int | None) -> Iterator[slice]:
    """Slices that cover `count` rows, `chunk` at a time; None takes all at once."""
    size = chunk or max(count, 1)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def inverse_square_root(
    covariance: Tensor,  # (d, d) symmetric positive semi-definite
    floor: float,
    mode: FloorMode,
) -> tuple[Tensor, float, Tensor]:
    """Sigma^(-1/2), the symmetric (ZCA) root, Sigma's eigenvalues kept from zero; the fraction of them below the floor;
    the root's eigenvalues. As `inverse_root_spectrum` has it.
    """
    vectors, scale, floored = inverse_root_spectrum(covariance, floor, mode)
    return (vectors * scale) @ vectors.T, floored, scale


def shrunk_to_diagonal(
    covariance: Tensor,  # S (d, d) float64, of rows around their mean, over their number less one
    rows: float,  # n, 2 or more
) -> tuple[Tensor, float]:
    """(1 - rho) S + rho diag(S), positive definite, and rho.

    rho is the oracle approximating shrinkage coefficient of the correlations R (Chen, Wiesel, Eldar and Hero, IEEE
    Transactions on Signal Processing 58(10), 2010, equation 23), whose target there is the identity, since tr(R) = d:
    rho = min(1, ((1 - 2/d) tr(R^2) + d^2) / ((n + 1 - 2/d) (tr(R^2) - d))). It falls as 1/n. A coordinate that never
    varied takes the mean variance: its rows are zero whatever they are divided by.
    """
    variances = covariance.diagonal()
    alive = variances > 0
    d, scale = len(variances), torch.where(alive, variances, 1).rsqrt()
    correlations = covariance * scale[:, None] * scale
    squares = float(correlations.square().sum()) + float((~alive).sum())  # of those that never varied, 1
    above = (rows + 1 - 2 / d) * (squares - d)
    share = min(1.0, ((1 - 2 / d) * squares + d * d) / above) if above > 0 else 1.0
    shrunk = covariance * (1 - share)
    shrunk.diagonal().copy_(torch.where(alive, variances, variances.mean()))
    return shrunk, share


def inverse_root_spectrum(
    covariance: Tensor,  # (d, d) symmetric positive semi-definite
    floor: float,
    mode: FloorMode,
) -> tuple[Tensor, Tensor, float]:  # (d, d) float64, (d,) float64
    """Sigma's eigenvectors, the eigenvalues of Sigma^(-1/2), and the fraction of Sigma's below the floor.

    The floor is `floor` itself (absolute), or `floor` times the mean eigenvalue. Eigenvalues below are raised to it, or
    with `shift` all of them by it: (Sigma + s I)^(-1/2); with `shrinkage` they are taken as they are, of a matrix that
    `shrunk_to_diagonal` made. A zero matrix has nothing to whiten by: a floor that is relative to it raises ValueError
    there.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    if mode == "shrinkage":
        return vectors, values.rsqrt(), 0.0
    least = floor if mode == "absolute" else floor * float(values.mean())
    if not least > 0:
        raise ValueError("the covariance of the value gradients is zero, so no relative floor exists")
    floored = float((values < least).double().mean())
    raised = values.clamp_min(0) + least if mode == "shift" else values.clamp_min(least)
    return vectors, raised.rsqrt(), floored


class RootFound(NamedTuple):
    """Where `follow_root` ended."""

    root: Tensor  # (d, d) symmetric, A^(-1/2) where the residual is small
    steps: int
    products: int  # of (d, d) matrices
    residual: float  # ||I - X A X||_F / sqrt(d)


def follow_root(
    matrix: Tensor,  # A (d, d) symmetric positive definite, in a basis that nearly diagonalises it
    root: Tensor,  # X_0 (d, d) symmetric, near A^(-1/2)
    tolerance: float,
    most: int,
) -> RootFound:
    """A^(-1/2) by an inexact Newton method on X A X = I from X_0.

    A step H solves X A H + H A X = I - X A X (Higham, Functions of Matrices, 2008, section 6.4) only as far as the next
    residual can profit from it: to the residual's square, a third of `tolerance`, or three corrections (Dembo,
    Eisenstat and Steihaug, SIAM Journal on Numerical Analysis 19(2), 1982). Where the residual stays above `tolerance`
    after `most` steps, or is not finite, X is no root.

    Newton-Schulz iterations from X_0 would not do: they need an X_0 that commutes with A. From another one they end at
    a root L of A^(-1) = L L^T that is not the symmetric one, with L A L^T = I and no residual that tells.
    """
    scale = matrix.diagonal().sqrt()
    sums = scale[:, None] + scale
    products = 0
    for step in range(most + 1):
        near = root @ matrix
        difference = -(near @ root)
        difference.diagonal().add_(1)
        products += 2
        residual = _norm_a_row(difference)
        if residual <= tolerance or step == most or not residual < 1:  # a step from beyond 1 leads further away
            break
        correction, spent = _newton_step(near, difference, sums, max(residual**2, tolerance / 3))
        root, products = root + correction, products + spent
    return RootFound(root, step, products, residual)


def _newton_step(
    near: Tensor,  # M = X A (d, d)
    left: Tensor,  # D (d, d)
    sums: Tensor,  # y_i + y_j (d, d)
    enough: float,
    most: int = 3,
) -> tuple[Tensor, int]:
    """A symmetric H that solves M H + (M H)^T = D up to `enough`, and the products that it took.

    Near the root M is A^(1/2), which in this basis is nearly diag(y), y_i = sqrt(A_ii), so that H_ij is nearly
    D_ij / (y_i + y_j). What that leaves of D is divided in the same way, up to `most` times, each correction scaled so
    that it leaves the least (minimal residuals).
    """
    found = torch.zeros_like(left)
    for products in range(most + 1):
        guess = left / sums
        guess = (guess + guess.T) / 2
        if products == most or _norm_a_row(left) <= enough:
            break
        image = near @ guess
        image = image + image.T
        share = (left * image).sum() / image.square().sum()
        found, left = found + share * guess, left - share * image
    return found + guess, products


def _norm_a_row(matrix: Tensor) -> float:  # (d, d)
    """||M||_F / sqrt(d), which is 1 for the identity."""
    return float(torch.linalg.vector_norm(matrix)) / len(matrix) ** 0.5


def inner_product(first: Factors, second: Factors) -> Tensor:  # () float64
    """<DeltaW_1, DeltaW_2>, as `inner_products` has it."""
    return inner_products(first, [second])[0]


def inner_products(update: Factors, others: Sequence[Factors]) -> list[Tensor]:  # () float64 each
    """<DeltaW, DeltaW_i> of an update with others from their factors, at a cost of r r_i (d_k + d_v) each.

    <L1 R1, L2 R2> = sum of (L1^T L2) * (R1 R2^T), elementwise; nothing of size (d_k, d_v) is formed. Left and right
    factors may lie on different devices, as keys in memory-mapped files do, and those of another update, as a resumed
    run has them, elsewhere than this one's: they are brought to them. Factors are brought near 1 first, those of
    each update once: those of a huge step have products that overflow float32.
    """
    if not others:
        return []
    near = _near_one(update)
    return [_product(near, near if other is update else _near_one(other)) for other in others]


_NearOne = tuple[Tensor | None, Tensor, Tensor]  # left, right, () float64 that their product is to be multiplied by


def _product(first: _NearOne, second: _NearOne) -> Tensor:  # () float64
    left, right, scale = first
    other_left, other_right, other_scale = second[0], second[1].to(right.device), second[2].to(right.device)
    if left is None and other_left is None:
        products = right * other_right
    elif other_left is None:
        assert left is not None
        products = (left.T.to(right.device) @ other_right) * right
    elif left is None:
        products = (other_left.T.to(right.device) @ right) * other_right
    else:
        products = (left.T @ other_left.to(left.device)).to(right.device) * (right @ other_right.T)
    return products.sum(dtype=torch.float64) * scale * other_scale


def _near_one(update: Factors) -> _NearOne:
    """The factors divided by powers of two, which rounds nothing."""
    left, right = update
    exponent = _exponent(right)
    right = torch.ldexp(right, -exponent)
    if left is not None:
        own = _exponent(left)
        left, exponent = torch.ldexp(left, -own), exponent + own.to(right.device)
    return left, right, torch.exp2(exponent.double())


def _exponent(factor: Tensor) -> Tensor:  # () of the largest |entry|
    least, most = torch.aminmax(factor)
    return torch.frexp(torch.maximum(-least, most)).exponent


def dense(update: Factors) -> Tensor:
    """DeltaW (d_k, d_v) of a factor pair."""
    left, right = update
    return right if left is None else left.to(right.device) @ right
