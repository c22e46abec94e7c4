"""The harness against the float64 reference: the same facts, the same model, turn after turn."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from data.records import Capture, Phase, TokenSequence, Turn
from data.stream import mini_batch_weights
from editor import linalg
from editor.capture import CaptureEditor, CaptureSettings
from editor.stableedit import StableEdit, StableEditSettings
from model import LanguageModel
from model.source import find_edit_modules
from tests.conftest import tiny_gpt2, tiny_llama
from tests.reference import Reference

LLAMA = ["model.layers.1.mlp.down_proj", "model.layers.3.mlp.down_proj"]
GPT2 = ["transformer.h.1.mlp.c_proj", "transformer.h.2.mlp.c_proj"]
WARM_UP, EDIT = Phase.WARM_UP, Phase.EDIT


def random_turn(index: int, phase: Phase, records: int = 17, batch_size: int = 5) -> Turn:
    """Sequences of differing lengths; the last mini-batch is a partial one."""
    generator = torch.Generator().manual_seed(index)
    sequences = []
    for _ in range(records):
        prompt, answer = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((3, 20), (1, 6)))
        ids = torch.randint(0, 256, (prompt + answer,), generator=generator)
        sequences.append(TokenSequence(tuple(ids.tolist()), prompt))
    return Turn(index, phase, (), tuple(sequences), mini_batch_weights(sequences, batch_size))


def settings(**changes: Any) -> StableEditSettings:
    values = {
        "lr": 1e-3, "alpha": 10.0, "batch_size": 512, "RunningMeanStd_mode": "stable", "statistics_scope": "shape",
        "whitening_floor": 0.01, "whitening_floor_mode": "relative", "whitening_prior": 0.0, **changes,
    }  # fmt: skip
    return StableEditSettings(**values)


def harness(make: Callable[..., Any], modules: list[str], compute_tokens: int = 90, **load: Any) -> LanguageModel:
    model = make(**load)
    return LanguageModel(model, None, find_edit_modules(model, modules, 0), compute_tokens=compute_tokens)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.detach().double() - expected.detach()).norm() / expected.detach().norm())


def dense(update: Any) -> torch.Tensor:
    return linalg.dense((update.left, update.right))


# with d_v = 24 and about 60 rows a turn, full whitening begins in the first edit turn
PHASES = [WARM_UP, EDIT, EDIT, EDIT]


@pytest.mark.parametrize("mode", ["stable", "original", "none", "batch", "frozen"])
@pytest.mark.parametrize("scope", ["shape", "module"])
@pytest.mark.parametrize(("make", "modules"), [(tiny_llama, LLAMA), (tiny_gpt2, GPT2)])
def test_updates_agree_with_the_reference(make: Callable[..., Any], modules: list[str], mode: str, scope: str) -> None:
    compare(make, modules, RunningMeanStd_mode=mode, statistics_scope=scope)


@pytest.mark.parametrize(
    ("floor", "mode", "floored"),
    [
        (0.01, "relative", 0.0),
        (0.5, "relative", 0.3),
        (2e-4, "absolute", 0.7),
        (1e-2, "absolute", 1.0),
        (0.5, "shift", 0.3),
    ],
)
@pytest.mark.parametrize("prior", [0.0, 1e-5])
def test_floors_and_prior_agree_with_the_reference(floor: float, mode: str, floored: float, prior: float) -> None:
    editor = compare(tiny_llama, LLAMA, whitening_floor=floor, whitening_floor_mode=mode, whitening_prior=prior)
    # the floors were chosen so: none, some, most and all of the eigenvalues lie below
    assert editor.statistics()["40x24"]["floored_fraction"] == pytest.approx(floored, abs=0.25)


def test_a_followed_root_agrees_with_the_reference() -> None:
    """In float32, and to its tolerance."""
    found = {"whitening_floor_mode": "shift", "whitening_floor": 0.5, "whitening_solver": "newton"}
    decomposed = []
    compare(
        tiny_llama,
        LLAMA,
        tolerance=1e-4,
        after=lambda editor: decomposed.append(editor.statistics()["40x24"].get("whitening_decomposed")),
        **found,
    )
    assert decomposed[0] is None  # warm-up
    assert set(decomposed[1:]) == {0.0, 1.0}, "one of the two ways was not taken, and this test shows nothing of it"


@pytest.mark.parametrize(("make", "modules"), [(tiny_llama, LLAMA), (tiny_gpt2, GPT2)])
@pytest.mark.parametrize("mode", ["stable", "batch"])
def test_shrinkage_agrees_with_the_reference(make: Callable[..., Any], modules: list[str], mode: str) -> None:
    """Also where fewer rows than dimensions have been seen: full whitening begins with the first edit turn."""
    editor = compare(
        make, modules, whitening_floor_mode="shrinkage", RunningMeanStd_mode=mode, statistics_scope="module"
    )
    for found in editor.statistics().values():
        assert 0 < (found["whitening_shrinkage"] or 0) < 1


@pytest.mark.parametrize(("make", "modules"), [(tiny_llama, LLAMA), (tiny_gpt2, GPT2)])
@pytest.mark.parametrize("beta", [3.0, 1e4])
def test_the_preserving_solve_agrees_with_the_reference(
    make: Callable[..., Any], modules: list[str], beta: float
) -> None:
    compare(make, modules, preserve=beta)


def test_where_rows_outnumber_keys_the_preserving_solve_is_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(90, 12, generator=generator, dtype=torch.float64)
    values = torch.randn(90, 5, generator=generator, dtype=torch.float64)
    text = torch.randn(400, 12, generator=generator, dtype=torch.float64)
    A = 2 * torch.eye(12, dtype=torch.float64) + 7 * text.T @ text / len(text)
    for rows in (slice(0, 90), slice(0, 6)):
        found = linalg.PreservingSystem(keys[rows], linalg.CholeskyCoordinates(A), chunk=4).update(values[rows])
        expected = torch.linalg.solve(keys[rows].T @ keys[rows] + A, keys[rows].T @ values[rows])
        torch.testing.assert_close(linalg.dense(found), expected, rtol=1e-10, atol=1e-12)


def test_what_is_preserved_moves_less_and_without_weight_nothing_changes() -> None:
    generator = torch.Generator().manual_seed(1)
    keys, text = (torch.randn(n, 30, generator=generator, dtype=torch.float64) for n in (8, 200))
    text *= torch.linspace(0, 3, 30)  # some directions matter to text, others do not
    values = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    plain = linalg.dense(linalg.ridge_update(keys, values, 1.0))
    moved = [float((text @ plain).norm())]
    for beta in (0.0, 1.0, 100.0):
        A = torch.eye(30, dtype=torch.float64) + beta * text.T @ text / len(text)
        update = linalg.dense(linalg.PreservingSystem(keys, linalg.CholeskyCoordinates(A)).update(values))
        if beta == 0:
            torch.testing.assert_close(update, plain)
        else:
            assert float((text @ update).norm()) < 0.9 * moved[-1]
        moved.append(float((text @ update).norm()))


def test_adaptive_warm_up_ends_when_the_covariance_stands_still() -> None:
    """Turns are passed over from then on, also by an editor that takes the state up."""
    chosen = settings(preheat_mode="adaptive", preheat_least=3, preheat_tolerance=0.8)
    model = harness(tiny_llama, LLAMA)

    def editor() -> tuple[StableEdit, CaptureEditor]:
        rule = StableEdit(model.shapes, chosen, torch.device("cpu"))
        return rule, CaptureEditor(rule, torch.device("cpu"))

    rule, whole = editor()
    edits = [whole.edit(model, random_turn(0, WARM_UP))]
    assert rule.begin(WARM_UP), "there was no covariance before that it could stand still against"
    edits += [whole.edit(model, random_turn(i, WARM_UP)) for i in (1, 2)]
    change = rule.statistics()["40x24"]["value_covariance_change"]
    assert change is not None
    assert change < 0.8
    edits.append(whole.edit(model, random_turn(3, WARM_UP)))
    assert [bool(edit.updates) for edit in edits] == [True, True, True, False]
    assert edits[-1].loss is None
    assert edits[-1].details == {"passed_over": True}
    again, resumed = editor()
    resumed.load_state_dict(whole.state_dict())
    assert not again.begin(WARM_UP)
    assert again.begin(EDIT)
    assert not resumed.edit(model, random_turn(4, WARM_UP)).updates
    assert resumed.edit(model, random_turn(5, EDIT)).updates


def compare(
    make: Callable[..., Any],
    modules: list[str],
    tolerance: float = 1e-5,
    after: Callable[[StableEdit], None] = lambda _: None,
    **changes: Any,
) -> StableEdit:
    """Both sides begin with the same weights, and from there each edits its own model; `after` is told each turn."""
    chosen = settings(**changes)
    model = harness(make, modules)
    generator = torch.Generator().manual_seed(7)
    text = {
        name: torch.randn(100, d_k, generator=generator, dtype=torch.float64) for name, (d_k, _) in model.shapes.items()
    }
    given = {"second_moments": lambda name: text[name].T @ text[name] / 100} if chosen.preserve else {}
    editor = StableEdit(model.shapes, chosen, torch.device("cpu"), **given)
    reference = Reference(
        make(dtype=torch.float64), modules, chosen.lr, chosen.alpha, chosen.RunningMeanStd_mode,
        chosen.statistics_scope, chosen.whitening_floor, chosen.whitening_floor_mode,
        chosen.whitening_prior, chosen.preserve, text,
    )  # fmt: skip
    for index, phase in enumerate(PHASES):
        turn = random_turn(index, phase)
        assert editor.begin(phase)
        updates = editor.update(model.capture(turn).modules, phase)
        model.apply(updates)
        expected = reference.turn([(list(s.ids), s.answer_start) for s in turn.sequences], 5, phase is WARM_UP)
        for name in modules:
            assert relative(dense(updates[name]), expected[name]) < tolerance, (index, name)
            assert relative(model.edited[name].master, reference.model.get_submodule(name).weight) < 1e-6
        after(editor)
    return editor


@pytest.mark.parametrize(("make", "modules"), [(tiny_llama, LLAMA), (tiny_gpt2, GPT2)])
def test_keys_times_value_grads_are_the_weight_gradient(make: Callable[..., Any], modules: list[str]) -> None:
    """sum_i k_i g_i^T over all positions is what autograd gives for the weight: orientation, alignment, scale."""
    turn = random_turn(0, EDIT)
    captures = harness(make, modules).capture(turn, every_token=True).modules
    plain = make()
    loss = sum(
        -plain(input_ids=torch.tensor([s.ids])).logits[0].log_softmax(-1)[place - 1, s.ids[place]] * weight
        for s, weight in zip(turn.sequences, turn.loss_weights, strict=True)
        for place in range(s.answer_start, len(s.ids))
    )
    loss.backward()
    for name in modules:
        module = plain.get_submodule(name)
        gradient = module.weight.grad.T if isinstance(module, torch.nn.Linear) else module.weight.grad
        product = captures[name].keys.T @ captures[name].value_grads
        torch.testing.assert_close(product, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("every_token", [False, True])
def test_compute_batches_change_nothing(every_token: bool) -> None:
    turn = random_turn(3, EDIT)
    whole = harness(tiny_llama, LLAMA, compute_tokens=10_000).capture(turn, every_token)
    for tokens, overhead in ((1, None), (60, None), (10_000, 8)):
        model = harness(tiny_llama, LLAMA, compute_tokens=tokens)
        model.overhead = overhead
        parts = model.capture(turn, every_token)
        assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
        for name in LLAMA:
            torch.testing.assert_close(parts.modules[name].keys, whole.modules[name].keys, rtol=1e-4, atol=1e-6)
            close = {"rtol": 1e-4, "atol": 1e-7}
            torch.testing.assert_close(parts.modules[name].value_grads, whole.modules[name].value_grads, **close)


@pytest.mark.parametrize("mode", ["stable", "original"])
@pytest.mark.parametrize(("make", "modules"), [(tiny_llama, LLAMA), (tiny_gpt2, GPT2)], ids=["primal", "dual"])
def test_chunks_inside_the_editor_change_nothing(make: Callable[..., Any], modules: list[str], mode: str) -> None:
    def weights(chunk: int) -> dict[str, torch.Tensor]:
        model = harness(make, modules)
        editor = StableEdit(model.shapes, settings(batch_size=chunk, RunningMeanStd_mode=mode), torch.device("cpu"))
        for index, phase in enumerate(PHASES):
            model.apply(editor.update(model.capture(random_turn(index, phase)).modules, phase))
        return model.snapshot()

    whole = weights(10_000)
    for chunk in (1, 7):
        for name, weight in weights(chunk).items():
            torch.testing.assert_close(weight, whole[name], rtol=1e-6, atol=1e-8)


def test_shared_and_own_statistics_differ() -> None:
    """Two modules of one shape: a scope that did nothing would pass every other test."""
    captures = harness(tiny_llama, LLAMA).capture(random_turn(0, EDIT)).modules
    shapes = {name: (c.keys.shape[1], c.value_grads.shape[1]) for name, c in captures.items()}
    updates = [
        StableEdit(shapes, settings(statistics_scope=scope), torch.device("cpu")).update(captures, EDIT)
        for scope in ("shape", "module")
    ]
    assert relative(dense(updates[0][LLAMA[0]]), dense(updates[1][LLAMA[0]]).double()) > 1e-2


def test_warm_up_turns_use_the_diagonal_form_and_report_it() -> None:
    model = harness(tiny_llama, LLAMA)
    editor = StableEdit(model.shapes, settings(), torch.device("cpu"))
    capture = model.capture(random_turn(0, WARM_UP)).modules
    editor.update(capture, WARM_UP)
    assert editor.statistics()["40x24"]["floored_fraction"] is None
    assert editor.begin(EDIT)
    editor.update(capture, EDIT)
    assert editor.statistics()["40x24"]["floored_fraction"] is not None


@pytest.mark.parametrize("changes", [{}, {"whitening_floor_mode": "shift", "whitening_solver": "newton"}])
def test_editor_state_survives_a_restart(changes: dict[str, Any]) -> None:
    model = harness(tiny_llama, LLAMA)
    captures = [model.capture(random_turn(index, EDIT)).modules for index in range(3)]
    whole, resumed = (StableEdit(model.shapes, settings(**changes), torch.device("cpu")) for _ in range(2))
    for capture in captures[:2]:
        whole.update(capture, EDIT)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert whole.begin(EDIT)
    assert resumed.begin(EDIT)
    ours, theirs = (editor.update(captures[2], EDIT) for editor in (whole, resumed))
    assert all(torch.equal(dense(ours[name]), dense(theirs[name])) for name in LLAMA)
    assert whole.statistics() == resumed.statistics()


def test_statistics_of_a_turn_alone_are_of_all_its_passes() -> None:
    """Later passes are of few facts, which alone would have no spread to be normalised by."""
    model, rows = harness(tiny_llama, LLAMA), []
    rule = StableEdit(model.shapes, settings(RunningMeanStd_mode="batch"), torch.device("cpu"))
    editor = CaptureEditor(rule, torch.device("cpu"), CaptureSettings(passes=3))
    update = rule.update

    def seen(captures: dict[str, Capture], phase: Phase) -> Any:
        rows.append(sum(len(each.keys) for each in captures.values()))
        found = update(captures, phase)
        assert rule.statistics()["40x24"]["n"] == sum(rows)
        return found

    with mock.patch.object(rule, "update", seen):
        editor.edit(model, random_turn(0, EDIT))
        assert len(rows) == 3
        rows.clear()
        editor.edit(model, random_turn(1, EDIT))


def test_frozen_statistics_are_decomposed_once() -> None:
    model, found = harness(tiny_llama, LLAMA), linalg.inverse_square_root
    rule = StableEdit(model.shapes, settings(RunningMeanStd_mode="frozen"), torch.device("cpu"))
    editor = CaptureEditor(rule, torch.device("cpu"), CaptureSettings(passes=2))
    with mock.patch.object(linalg, "inverse_square_root", side_effect=found) as decomposed:
        for index, phase in enumerate([WARM_UP, EDIT, EDIT]):
            editor.edit(model, random_turn(index, phase))
        assert decomposed.call_count == 1
        rule.load_state_dict(rule.state_dict())
        editor.edit(model, random_turn(3, EDIT))
        assert decomposed.call_count == 2, "of a state that was taken up"


def test_statistics_are_of_a_turn_whatever_its_passes() -> None:
    """Moments are compared with those of the turn before, and what following a root takes adds up."""
    model = harness(tiny_llama, LLAMA)
    chosen = settings(whitening_floor_mode="shift", whitening_floor=0.5, whitening_solver="newton")
    rule = StableEdit(model.shapes, chosen, torch.device("cpu"))
    editor = CaptureEditor(rule, torch.device("cpu"), CaptureSettings(passes=3))
    editor.edit(model, random_turn(0, EDIT))
    (normalizer,) = rule.normalizers.values()
    before, done = normalizer.moments(), []
    counted = StableEdit._over_passes

    def count(self: StableEdit, group: str, details: dict[str, float | None]) -> dict[str, float | None]:
        done.append(details)
        return counted(self, group, details)

    with mock.patch.object(StableEdit, "_over_passes", count):
        edit = editor.edit(model, random_turn(1, EDIT))
    assert len(done) == len(edit.details["passes"]["facts"]) == 3
    found = rule.statistics()["40x24"]
    for name, change in normalizer.changes_since(before).items():
        assert found[name] == change
    for name in ("whitening_decomposed", "whitening_steps", "whitening_products"):
        assert found[name] == sum(details[name] for details in done)
    assert found["whitening_residual"] == done[-1]["whitening_residual"]


def test_a_ridge_too_small_to_preserve_by_ends_in_one_line() -> None:
    """C is float32, so alpha I + beta C may have eigenvalues below 0."""
    rows = torch.randn(20, 40, generator=torch.Generator().manual_seed(0)) * 1e3
    rows[:, 0] *= 1e3
    small = settings(alpha=1e-5, preserve=100.0)
    with pytest.raises(ValueError, match=r"editor.alpha=1e-05: too small beside editor.preserve=100.0 .* set a larger"):
        StableEdit({"m": (40, 24)}, small, torch.device("cpu"), lambda _: rows.T @ rows / 20)


def test_value_gradients_of_zero_ask_for_no_update() -> None:
    """Nothing varies, so there is nothing to whiten by: the diagonal form serves, and gives zero."""
    captures = {name: Capture(torch.randn(60, 40), torch.zeros(60, 24)) for name in LLAMA}
    editor = StableEdit(dict.fromkeys(LLAMA, (40, 24)), settings(), torch.device("cpu"))
    assert not any(dense(update).any() for update in editor.update(captures, EDIT).values())


@pytest.mark.parametrize("beyond", [[0], [1], [0, 1]])
def test_keys_beyond_any_ridge_name_their_module(beyond: list[int]) -> None:
    """The first of them."""
    shapes = dict.fromkeys(LLAMA[:2], (40, 24))
    sizes = [1e25 if place in beyond else 1.0 for place in range(2)]
    captures = {
        name: Capture(size * torch.ones(30, 40), torch.randn(30, 24)) for name, size in zip(shapes, sizes, strict=True)
    }
    editor = StableEdit(shapes, settings(), torch.device("cpu"))
    with pytest.raises(FloatingPointError, match=rf"the keys of {re.escape(LLAMA[beyond[0]])} are too large"):
        editor.update(captures, EDIT)
