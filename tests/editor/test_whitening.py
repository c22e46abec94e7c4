"""Whitening by a root that is followed from turn to turn, against decompositions in float64 written out here."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from data.records import Capture, Phase
from editor.stableedit import StableEdit, StableEditSettings
from nets import FOLLOWED_TO, MOST_STEPS, RENEWED_AT, FollowedRoot, LifelongNormalizer

CPU = torch.device("cpu")
D_V, ROWS, FLOOR = 256, 400, 0.01


def value_grads(turns: int, d_v: int = D_V) -> Iterator[Tensor]:  # (ROWS, d_v) float32
    """Rows of a heavy-tailed stream whose eigenvalues fall like 1/i, and whose directions turn as it goes on."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    spread = 1e-4 * torch.arange(1, d_v + 1, dtype=torch.float64) ** -0.5
    first = torch.linalg.qr(drawn(d_v, d_v)).Q
    last = torch.linalg.qr(first + drawn(d_v, d_v) / d_v**0.5).Q
    for turn in range(turns):
        rows = drawn(ROWS, 1).abs() * drawn(ROWS, d_v) * spread
        late = torch.rand(ROWS, 1, generator=generator) < turn / turns
        yield torch.where(late, rows @ last.T, rows @ first.T).float()


def test_a_followed_root_whitens_as_decompositions_do() -> None:
    """For 200 turns to 1e-4 in g_tilde, mostly without decomposing."""
    normalizer = LifelongNormalizer(1, D_V, full=True, follow=True)
    mean, scatter, seen = torch.zeros(D_V).double(), torch.zeros(D_V, D_V).double(), 0
    decomposed: list[float | None] = []
    steps: list[float] = []
    for turn, rows in enumerate(value_grads(200)):
        normalizer.observe([(torch.zeros(ROWS, 1), rows)])
        scatter += rows.double().T @ rows.double()
        mean, seen = (mean * seen + rows.double().sum(0)) / (seen + ROWS), seen + ROWS
        if seen <= D_V + 1:
            continue
        found = normalizer.whitening(0.0, FLOOR, "shift")
        decomposed.append(found.details["whitening_decomposed"])
        steps.append(found.details["whitening_steps"] or 0)
        if turn % 10:
            continue
        sigma = (scatter - seen * mean[:, None] * mean) / (seen - D_V - 1)
        values, vectors = torch.linalg.eigh(sigma)
        expected = (rows.double() - mean) @ (vectors * (values + FLOOR * values.mean()).rsqrt()) @ vectors.T
        assert (normalizer.whiten_values(rows, found) - expected).norm() <= 1e-4 * expected.norm()
        assert found.floored == pytest.approx(float((values < FLOOR * values.mean()).double().mean()), abs=0.02)
    assert decomposed[0] == 1  # nothing to follow yet
    renewals = math.log(seen / (D_V + 2), RENEWED_AT)
    assert sum(map(bool, decomposed)) <= renewals + 2
    assert max(steps) <= MOST_STEPS
    assert max(steps[10:]) <= 4
    assert sum(steps[20:]) <= 2.5 * len(steps[20:])


def test_a_leap_of_the_covariance_is_decomposed_and_said() -> None:
    root = FollowedRoot(24)
    for seed in (0, 0, 1):
        square = torch.randn(24, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        sigma = square @ square.T
        found = root.find(sigma, torch.tensor(100.0).double(), FLOOR)
        whole = found.factors[0] @ found.factors[1] @ found.factors[2]
        shifted = sigma + FLOOR * sigma.diagonal().mean() * torch.eye(24)
        torch.testing.assert_close(whole.double() @ shifted @ whole.double(), torch.eye(24).double(), atol=1e-3, rtol=0)
        followed = dict(found.details)
        if seed == 0:
            before = followed
    residual = before["whitening_residual"]
    assert (before["whitening_decomposed"], before["whitening_steps"]) == (0, 0)  # the same matrix again
    assert residual is not None
    assert residual <= FOLLOWED_TO
    assert followed["whitening_decomposed"] == 1
    assert followed["whitening_residual"] is None or not followed["whitening_residual"] <= FOLLOWED_TO


def settings(solver: str) -> StableEditSettings:
    return StableEditSettings(1e-3, 10.0, 512, "stable", "shape", FLOOR, "shift", 0.0, solver)  # type: ignore[arg-type]


def captures(turns: int, d_v: int) -> list[dict[str, Capture]]:
    return [{"m": Capture(rows[:, :16].contiguous(), rows)} for rows in value_grads(turns, d_v)]


@pytest.mark.parametrize("there", ["newton", "eigh"])
def test_a_state_is_taken_up_where_the_root_is_found_otherwise(there: str) -> None:
    """As on another kind of device: what is followed begins with a decomposition, and all else goes on."""
    here = {"newton": "eigh", "eigh": "newton"}[there]
    first, second = (StableEdit({"m": (16, 48)}, settings(solver), CPU) for solver in (there, here))
    *before, last = captures(5, 48)
    for capture in before:
        first.update(capture, Phase.EDIT)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    mine, theirs = (one.update(last, Phase.EDIT)["m"] for one in (first, second))
    assert (mine.right - theirs.right).norm() <= 1e-4 * theirs.right.norm()
    with pytest.raises(RuntimeError, match="Missing key"):
        second.load_state_dict({})


def test_solvers_give_the_same_updates_and_newton_goes_on_bit_for_bit() -> None:
    newton, eigh = (StableEdit({"m": (16, 48)}, settings(solver), CPU) for solver in ("newton", "eigh"))
    resumed = None
    for turn, capture in enumerate(captures(30, 48)):
        if turn == 15:
            resumed = StableEdit({"m": (16, 48)}, settings("newton"), CPU)
            resumed.load_state_dict(copy.deepcopy(newton.state_dict()))
        assert all(one.begin(Phase.EDIT) for one in (newton, eigh, *([resumed] if resumed else [])))
        mine, theirs = newton.update(capture, Phase.EDIT)["m"], eigh.update(capture, Phase.EDIT)["m"]
        assert (mine.right - theirs.right).norm() <= 1e-4 * theirs.right.norm()
        if resumed is not None:
            assert torch.equal(resumed.update(capture, Phase.EDIT)["m"].right, mine.right)
            assert resumed.statistics() == newton.statistics()
    statistics = newton.statistics()["16x48"]
    assert statistics["whitening_decomposed"] == 0
    for name in ("whitening_min", "whitening_median", "whitening_max"):
        assert statistics[name] == pytest.approx(eigh.statistics()["16x48"][name], rel=0.1)


@pytest.mark.parametrize(
    ("changes", "on_a_cpu", "on_a_gpu"),
    [
        ({}, False, True),
        ({"whitening_floor_mode": "relative"}, False, False),
        ({"RunningMeanStd_mode": "batch"}, False, False),
        ({"whitening_solver": "eigh"}, False, False),
        ({"whitening_solver": "newton"}, True, True),
    ],
)
def test_auto_follows_where_it_can_and_pays(changes: dict[str, str], on_a_cpu: bool, on_a_gpu: bool) -> None:
    chosen = StableEditSettings(**{**vars(settings("auto")), **changes})
    assert chosen.follows(CPU) is on_a_cpu
    assert chosen.follows(torch.device("cuda")) is on_a_gpu
