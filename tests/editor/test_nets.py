"""The lifelong normaliser against one pass over all rows in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nets import EPSILON, LifelongNormalizer


def stream(count: int, d_k: int = 6, d_v: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with a mean a thousand times their spread, where a naive sum of squares would fail."""
    generator = torch.Generator().manual_seed(count)
    keys = torch.randn(count, d_k, generator=generator) + 1000
    return keys, 1e-5 * torch.randn(count, d_v, generator=generator) @ torch.randn(d_v, d_v, generator=generator)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 1), st.booleans())
def test_any_chunks_equal_one_pass(sizes: list[int], full: bool) -> None:
    keys, grads = stream(sum(sizes))
    normalizer = LifelongNormalizer(6, 4, full)
    normalizer.observe(zip(keys.split(sizes), grads.split(sizes), strict=True))
    k, g = keys.double(), grads.double()
    assert float(normalizer.count) == len(keys)
    torch.testing.assert_close(normalizer.key_mean, k.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(normalizer.key_std, k.std(0), rtol=1e-9, atol=0)
    torch.testing.assert_close(normalizer.value_std, g.std(0), rtol=1e-9, atol=0)
    if full:
        centred = g - g.mean(0)
        torch.testing.assert_close(normalizer.value_scatter, centred.T @ centred, rtol=1e-9, atol=1e-20)


@pytest.mark.parametrize("chunk", [1, 7, 20, 99])
def test_rows_in_chunks_are_those_rows_one_chunk_after_another(chunk: int) -> None:
    keys, grads = stream(20)
    whole, parts = LifelongNormalizer(6, 4, full=True), LifelongNormalizer(6, 4, full=True)
    whole.observe([(keys, grads)], chunk)
    for k, g in zip(keys.split(chunk), grads.split(chunk), strict=True):
        parts.observe([(k, g)])
    assert all(torch.equal(a, b) for a, b in zip(whole.buffers(), parts.buffers(), strict=True))


def test_diagonal_form() -> None:
    keys, grads = stream(50)
    normalizer = LifelongNormalizer(6, 4, full=False)
    normalizer.observe([(keys, grads)])
    expected = (grads.double() - grads.double().mean(0)) / (grads.double().std(0) + EPSILON)
    torch.testing.assert_close(normalizer.normalize_values(grads), expected)
    assert normalizer.normalize_keys(keys).std(0) == pytest.approx(1, rel=1e-5)


def test_whitened_covariance_is_the_identity() -> None:
    """Up to (n - d_v - 1)/(n - 1), the ratio of the posterior's denominator to the sample covariance's."""
    keys, grads = stream(200)
    normalizer = LifelongNormalizer(6, 4, full=True)
    normalizer.observe([(keys, grads)])
    whitening = normalizer.whitening(prior=0.0, floor=1e-9, mode="relative")
    white = normalizer.whiten_values(grads, whitening)
    assert whitening.floored == 0
    torch.testing.assert_close(white.T.cov() * 199 / 195, torch.eye(4).double(), atol=1e-6, rtol=0)


def test_prior_adds_to_the_scatter() -> None:
    normalizer = LifelongNormalizer(1, 1, full=True)
    normalizer.observe([(torch.zeros(5, 1), torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]]))])  # scatter 10
    (root,) = normalizer.whitening(prior=2.0, floor=1e-9, mode="relative").factors
    assert float(root) == pytest.approx(((2.0 + 10.0) / (5 - 1 - 1)) ** -0.5)


def test_whitening_waits_for_more_rows_than_dimensions() -> None:
    keys, grads = stream(6)
    normalizer = LifelongNormalizer(6, 4, full=True)
    normalizer.observe([(keys[:5], grads[:5])])
    assert not normalizer.can_whiten("relative")  # n = 5 = d_v + 1: the posterior mean does not exist
    normalizer.observe([(keys[5:], grads[5:])])
    assert normalizer.can_whiten("relative")


def test_a_single_row_normalises_to_zero() -> None:
    normalizer = LifelongNormalizer(6, 4, full=False)
    keys, grads = stream(1)
    normalizer.observe([(keys, grads)])
    assert not normalizer.normalize_keys(keys).any()
    assert not normalizer.normalize_values(grads).any()


def test_state_survives_a_restart() -> None:
    keys, grads = stream(20)
    first, second = LifelongNormalizer(6, 4, full=True), LifelongNormalizer(6, 4, full=True)
    first.observe([(keys, grads)])
    second.load_state_dict(first.state_dict())
    for normalizer in (first, second):
        normalizer.observe([(keys[:3], grads[:3])])
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))
