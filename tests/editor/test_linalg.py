"""Properties of the maths, on matrices whose conditioning is known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editor import linalg

shapes = st.tuples(st.integers(1, 24), st.integers(1, 16), st.integers(1, 8))  # N, d_k, d_v
seeds = st.integers(0, 2**31)


def rows(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@settings(deadline=None, max_examples=50)
@given(shapes, seeds, st.sampled_from([0.1, 1.0, 10.0]), st.sampled_from([None, 1, 5]))
def test_ridge_update_is_a_stationary_point(
    shape: tuple[int, int, int], seed: int, alpha: float, chunk: int | None
) -> None:
    """The gradient of ||K D - V||^2 + alpha ||D||^2 vanishes at D, on either side of N = d_k; of float32 keys the
    factors are those, rounded once. (Of a rounded D the gradient may be anything: it grows with ||K||^3 / alpha.)
    """
    count, d_k, d_v = shape
    keys, shifts = rows(seed, count, d_k), rows(seed + 1, count, d_v)
    k, v = keys.double(), shifts.double()
    update = linalg.ridge_update(k, v, alpha, chunk)
    delta = linalg.dense(update)
    gradient = k.T @ (k @ delta - v) + alpha * delta
    assert gradient.norm() <= 1e-10 * (k.T @ v).norm()
    assert torch.equal(linalg.ridge_update(keys, shifts, alpha, chunk)[1], update[1].float())


def test_ridge_update_of_the_textbook() -> None:
    """One key of norm 2 and alpha 4: DeltaW = k^T v / (||k||^2 + alpha) = k^T v / 8."""
    keys, shifts = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[8.0, -16.0]])
    expected = torch.tensor([[2.0, -4.0], [0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(linalg.dense(linalg.ridge_update(keys, shifts, 4.0)), expected)


def test_dual_and_primal_agree_where_they_meet() -> None:
    keys, shifts = rows(0, 12, 12), rows(1, 12, 5)
    dual = linalg.dense(linalg.ridge_update(keys, shifts, 1.0))
    padded = linalg.ridge_update(
        torch.cat([keys, keys.new_zeros(1, 12)]), torch.cat([shifts, shifts.new_zeros(1, 5)]), 1.0
    )
    assert padded[0] is None  # 13 rows of 12: the primal side
    assert relative(padded[1], dual.double()) < 1e-6


def test_nearly_collinear_keys_lose_nothing() -> None:
    """Keys as of a real model: one direction a thousand times the others, where a float32 Gram matrix is wrong."""
    keys = rows(0, 40, 64) + 1e3 * rows(1, 1, 64)
    shifts = rows(2, 40, 8)
    k, v = keys.double(), shifts.double()
    expected = k.T @ torch.linalg.solve(k @ k.T + 0.1 * torch.eye(40), v)
    right = linalg.ridge_update(keys, shifts, 0.1)[1]
    assert relative(k.T @ right.double(), expected) < 1e-3


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 20), seeds)
def test_inverse_square_root_whitens(size: int, seed: int) -> None:
    square = rows(seed, size, size).double()
    covariance = square @ square.T + 0.1 * torch.eye(size)
    root, floored, spectrum = linalg.inverse_square_root(covariance, 1e-12, "relative")
    assert floored == 0
    torch.testing.assert_close(root, root.T)
    torch.testing.assert_close(root @ covariance @ root, torch.eye(size).double(), atol=1e-8, rtol=0)
    torch.testing.assert_close(spectrum.sort().values, torch.linalg.eigvalsh(root))


@pytest.mark.parametrize(
    ("floor", "mode", "raised"),
    [(2.0, "absolute", (2.0, 3.0, 8.0)), (0.5, "relative", (2.0, 3.0, 8.0)), (0.5, "shift", (3.0, 5.0, 10.0))],
)
def test_floor_raises_small_eigenvalues(floor: float, mode: linalg.FloorMode, raised: tuple[float, ...]) -> None:
    """Eigenvalues 1, 3, 8 of mean 4: all floors stand at 2, and the first alone lies below; a shift raises all."""
    covariance = torch.diag(torch.tensor([1.0, 3.0, 8.0]))
    root, floored, spectrum = linalg.inverse_square_root(covariance, floor, mode)
    torch.testing.assert_close(root.diagonal(), torch.tensor(raised).double().rsqrt())
    torch.testing.assert_close(spectrum, root.diagonal())
    assert floored == pytest.approx(1 / 3)


def nearly_diagonal(seed: int, size: int, off: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A covariance of eigenvalues from 1 to 1e-4 whose unit-diagonal form has `off` beside the diagonal, and its root
    in float64."""
    spread = torch.logspace(0, -2, size, dtype=torch.float64)
    between = rows(seed, size, size).double()
    matrix = spread[:, None] * (torch.eye(size) + off * (between + between.T) / size**0.5) * spread
    values, vectors = torch.linalg.eigh(matrix)
    return matrix, (vectors * values.rsqrt()) @ vectors.T


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 40), seeds, st.sampled_from([0.0, 0.01, 0.1]))
def test_a_root_is_found_from_a_near_one(size: int, seed: int, off: float) -> None:
    matrix, expected = nearly_diagonal(seed, size, off)
    start = torch.diag(matrix.diagonal().rsqrt()).float()
    root, steps, products, residual = linalg.follow_root(matrix.float(), start, 1e-5, 8)
    assert residual <= 1e-5
    assert steps > 0 or off == 0
    assert 2 * (steps + 1) <= products <= 2 * (steps + 1) + 3 * steps
    assert torch.equal(root, root.T)
    assert relative(root, expected) < 1e-4


def test_a_root_is_not_found_from_one_too_far() -> None:
    """The residual says so, after no more steps than there are."""
    matrix, _ = nearly_diagonal(0, 40, 0.1)
    start = torch.diag(matrix.diagonal().rsqrt()).float()
    for scale, most in ((1.0, 1), (3.0, 4)):
        found = linalg.follow_root(matrix.float(), scale * start, 1e-5, most)
        assert found.residual > 1e-5
        assert found.steps <= most


def test_zero_covariance_has_no_relative_floor() -> None:
    with pytest.raises(ValueError, match="covariance of the value gradients is zero"):
        linalg.inverse_square_root(torch.zeros(3, 3), 0.01, "relative")


@given(seeds, st.booleans(), st.booleans())
@settings(deadline=None, max_examples=30)
def test_inner_product_equals_that_of_the_dense_updates(seed: int, first_dense: bool, second_dense: bool) -> None:
    def factors(seed: int, dense: bool) -> linalg.Factors:
        return (None, rows(seed, 7, 5)) if dense else (rows(seed, 7, 3), rows(seed + 1, 3, 5))

    first, second = factors(seed, first_dense), factors(seed + 9, second_dense)
    expected = float((linalg.dense(first).double() * linalg.dense(second).double()).sum())
    assert float(linalg.inner_product(first, second)) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_inner_product_of_updates_whose_products_leave_float32(scale: float) -> None:
    first, second = (rows(1, 7, 3), rows(2, 3, 5)), (rows(3, 7, 2), rows(4, 2, 5))
    scaled = [(left, right * scale) for left, right in (first, second)]
    expected = float(linalg.inner_product(first, second)) * scale**2
    assert float(linalg.inner_product(*scaled)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dense", [False, True])
def test_left_and_right_factors_may_lie_on_different_devices(dense: bool) -> None:
    """As keys in memory-mapped files and solutions on a GPU do; the meta device refuses what a GPU would refuse."""
    first = (torch.ones(7, 3), torch.ones(3, 5, device="meta"))
    second = (None, torch.ones(7, 5, device="meta")) if dense else first
    assert linalg.inner_product(first, second).device.type == "meta"


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("left", "right"), [("cpu", "meta"), ("meta", "meta")])
def test_factors_of_another_update_may_lie_elsewhere(left: str, right: str, dense: bool) -> None:
    """A resumed run puts all that it kept on two devices, wherever the editor leaves those of the next turn."""
    now = (torch.ones(7, 3, device=left), torch.ones(3, 5, device=right))
    kept = (None, torch.ones(7, 5)) if dense else (torch.ones(7, 2), torch.ones(2, 5))
    assert linalg.inner_product(now, kept).device.type == "meta"
    whole = (None, torch.ones(7, 5, device=right))
    assert linalg.inner_product(whole, kept).device.type == "meta"
