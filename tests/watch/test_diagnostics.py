"""What a turn's line says of its updates and of the statistics, against dense and direct computations."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from config.schema import ConfigError, DiagnosticsConfig
from data.records import (
    Capture,
    EditRecord,
    LowRankUpdate,
    Phase,
    Question,
    TokenSequence,
    Turn,
    WeightChange,
)
from editor import linalg
from editor.base import Edit
from editor.stableedit import StableEdit, StableEditSettings
from harness.run.checkpoint import write_safetensors
from harness.watch.diagnostics import PastUpdate, TurnDiagnostics
from nets import LifelongNormalizer

SHAPES = {"a": (7, 5), "b": (4, 5)}
CPU = torch.device("cpu")


class Silent:
    """An editor that has nothing to say."""

    def statistics(self) -> dict[str, dict[str, float | None]]:
        return {}


def turn_updates(turn: int) -> dict[str, LowRankUpdate]:
    """Updates as editors give them: the left factor is a view of keys, or a tensor of its own, or there is none."""
    generator = torch.Generator().manual_seed(turn)
    updates = {}
    for name, (d_k, d_v) in SHAPES.items():
        keys, right = torch.randn(3, d_k, generator=generator), torch.randn(3, d_v, generator=generator)
        left = [keys.T, keys.T.contiguous(), None][turn % 3]
        updates[name] = LowRankUpdate(left, keys.T @ right if left is None else right)
    return updates


def delta(update: LowRankUpdate) -> Tensor:
    return (update.right if update.left is None else update.left @ update.right).double()


def line_of(
    diagnostics: TurnDiagnostics, index: int, drifts: Mapping[str, float | None] = MappingProxyType({})
) -> dict[str, Any]:
    updates = turn_updates(index)
    norms = {name: float(delta(one).norm()) for name, one in updates.items()}
    changes = {name: WeightChange(norm, 1.0, drifts.get(name, 0.1)) for name, norm in norms.items()}
    turn = Turn(index, Phase.EDIT, (EditRecord(0, Question("1", "2")),), (TokenSequence((1, 2), 1),), (1.0,))
    editor: Any = Silent()
    line = diagnostics.line(turn, Edit(1.0, updates, changes, {"capture": 1.0}), editor, 1.5)
    return {key: value for key, value in line.items() if key != "memory"}


def test_edits_that_outweigh_the_weights_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """Of the module that moved furthest, in the first turn in which one moved by more than its own norm."""
    diagnostics = TurnDiagnostics(CPU)
    drifts = [{"a": 0.2, "b": 1.0}, {"a": 1.5, "b": 2.25}, {"a": 3.0, "b": 1.0}]
    for index, by_module in enumerate(drifts):
        line_of(diagnostics, index, by_module)
    (warning,) = caplog.records
    assert warning.levelname == "WARNING"
    for words in ("turn 1", "moved b by 2.25 times", "take smaller steps"):
        assert words in warning.getMessage()
    resumed = TurnDiagnostics(CPU)
    resumed.load_state(*diagnostics.state())
    line_of(resumed, 3, drifts[-1])
    assert len(caplog.records) == 1, "a run that goes on has told it"


@pytest.mark.parametrize("drift", [float("inf"), 1e30, 1.0001])
def test_any_drift_above_one_is_too_much(drift: float, caplog: pytest.LogCaptureFixture) -> None:
    line_of(TurnDiagnostics(CPU), 0, {"a": drift, "b": 0.1})
    assert len(caplog.records) == 1


def told_of_losses(*losses: tuple[float | None, float | None], caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is said where turns have that loss before and after; None after: the editor does not tell."""
    diagnostics, editor = TurnDiagnostics(CPU), cast(Any, Silent())
    for index, (before, after) in enumerate(losses):
        turn = Turn(index, Phase.EDIT, (EditRecord(0, Question("1", "2")),), (TokenSequence((1, 2), 1),), (1.0,))
        details = {} if after is None else {"loss_after": after}
        line = diagnostics.line(turn, Edit(before, {}, {}, {}, details), editor, 1.0)
        assert line.get("loss_after") == after
    return caplog.messages


def test_facts_that_an_edit_unlearns_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    told = told_of_losses((4.0, 0.1), (4.0, None), (0.2, 0.2), (4.0, 11.25), (4.0, 12.0), caplog=caplog)
    (message,) = told
    assert message.startswith("turn 3: the loss of its facts was 4 nats a token before the edit and is 11.2 after it")
    assert "set a smaller editor.lr" in message


def cosine(turn: int, other: int, name: str) -> float:
    first, second = delta(turn_updates(turn)[name]), delta(turn_updates(other)[name])
    return float((first * second).sum() / (first.norm() * second.norm()))


def test_each_update_is_compared_with_the_last_few_and_one_from_before() -> None:
    diagnostics = TurnDiagnostics(CPU, previous=3, seed=1)
    for turn in range(12):
        line = line_of(diagnostics, turn)
        earlier = line["earlier_turn"]
        assert (earlier is None) == (turn <= 3)
        for name in SHAPES:
            module = line["modules"][name]
            expected = [cosine(turn, turn - lag, name) for lag in (1, 2, 3) if lag <= turn]
            assert module["cosines"] == pytest.approx(expected, abs=1e-6)
            assert module["cosine_previous"] == (module["cosines"] or [None])[0]
            if earlier is None:
                assert module["cosine_earlier"] is None
            else:
                assert earlier < turn - 3
                assert module["cosine_earlier"] == pytest.approx(cosine(turn, earlier, name), abs=1e-6)


class Scalings(TorchDispatchMode):
    """Counts the factors that are brought near 1."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "frexp" in func._schema.name
        return func(*args, **(kwargs or {}))


def test_an_update_that_is_compared_several_times_is_scaled_once() -> None:
    diagnostics = TurnDiagnostics(CPU, previous=3)
    for turn in (0, 3, 6):
        line_of(diagnostics, turn)
    with Scalings() as scalings:
        line_of(diagnostics, 9)
    assert scalings.count == 2 * len(SHAPES) * (1 + 3)
    updates = [turn_updates(turn)["a"] for turn in (9, 6)]
    now, before = ((update.left, update.right) for update in updates)
    with Scalings() as scalings:
        linalg.inner_products(now, [now, before, now])
    assert scalings.count == 2 * 2


def test_the_earlier_update_is_any_of_those_before_with_equal_chance() -> None:
    drawn = Counter()
    for seed in range(1000):
        diagnostics = TurnDiagnostics(CPU, previous=1, seed=seed)
        for turn in range(6):
            diagnostics._remember(PastUpdate(turn, {}, {}))
        assert diagnostics._earlier is not None
        drawn[diagnostics._earlier.turn] += 1
    assert set(drawn) == {0, 1, 2, 3, 4}
    assert all(150 < count < 250 for count in drawn.values()), drawn  # 200 each, 3 sigma are 38


@pytest.mark.parametrize("previous", [0, 1, 4])
def test_what_is_remembered_does_not_grow(previous: int) -> None:
    diagnostics = TurnDiagnostics(CPU, previous=previous)
    for turn in range(40):
        line = line_of(diagnostics, turn)
    tensors, state = diagnostics.state()
    assert len(state["norms"]) == (previous + 1 if previous else 0)
    assert len({name.split("/")[0] for name in tensors}) == len(state["norms"])
    assert len(line["modules"]["a"]["cosines"]) == previous


def test_what_is_remembered_of_updates_without_factors_is_themselves() -> None:
    """`previous` + 1 times d_k d_v numbers a module, as the docstring has it."""
    diagnostics = TurnDiagnostics(CPU, previous=2)
    for turn in range(20):
        updates = {name: LowRankUpdate(None, torch.full(shape, 1.0 + turn)) for name, shape in SHAPES.items()}
        changes = {name: WeightChange(1.0, 1.0, 0.1) for name in SHAPES}
        diagnostics.line(Turn(turn, Phase.EDIT, (), (), ()), Edit(1.0, updates, changes, {}), cast(Any, Silent()), 1.0)
    tensors, _ = diagnostics.state()
    assert sum(tensor.numel() for tensor in tensors.values()) == 3 * sum(d_k * d_v for d_k, d_v in SHAPES.values())


def test_a_resumed_run_writes_the_same_lines(tmp_path: Any) -> None:
    """Bitwise, though the state went through a safetensors file and JSON."""
    whole, broken = TurnDiagnostics(CPU, previous=2, seed=5), TurnDiagnostics(CPU, previous=2, seed=5)
    expected = [line_of(whole, turn) for turn in range(15)]
    for turn in range(8):
        line_of(broken, turn)
    tensors, state = broken.state()
    write_safetensors(tmp_path / "state.safetensors", tensors)
    resumed = TurnDiagnostics(CPU, previous=2, seed=5)
    resumed.load_state(load_file(tmp_path / "state.safetensors"), json.loads(json.dumps(state)))
    assert [line_of(resumed, turn) for turn in range(8, 15)] == expected[8:]


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"diagnostics\.previous=-1.*diagnostics\.hidden_states=-2"):
        DiagnosticsConfig(previous=-1, hidden_states=-2)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def rows(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(5, 5, generator=torch.Generator().manual_seed(99))
    return torch.randn(count, 7, generator=generator) + 1, torch.randn(count, 5, generator=generator) @ mixing + 1


def test_changes_are_those_of_the_moments_themselves() -> None:
    """Against moments of all rows computed at once, before and after the second batch."""
    (keys, grads), (more_keys, more_grads) = rows(30, 0), rows(20, 1)
    normalizer = LifelongNormalizer(7, 5, full=True)
    normalizer.observe([(keys, grads)])
    before = normalizer.moments()
    normalizer.observe([(more_keys, more_grads)])
    changes = normalizer.changes_since(before)

    def expected(first: Tensor, second: Tensor) -> Any:
        return pytest.approx(float((second - first).norm() / first.norm()), rel=1e-9)

    keys, grads, all_keys, all_grads = (
        x.double() for x in (keys, grads, torch.cat([keys, more_keys]), torch.cat([grads, more_grads]))
    )
    assert changes == {
        "key_mean_change": expected(keys.mean(0), all_keys.mean(0)),
        "value_mean_change": expected(grads.mean(0), all_grads.mean(0)),
        "key_std_change": expected(keys.std(0), all_keys.std(0)),
        "value_std_change": expected(grads.std(0), all_grads.std(0)),
        "value_covariance_change": expected(grads.T.cov(), all_grads.T.cov()),
    }


def test_before_the_first_row_nothing_can_change() -> None:
    normalizer = LifelongNormalizer(7, 5, full=False)
    before = normalizer.moments()
    normalizer.observe([rows(10, 0)])
    assert set(normalizer.changes_since(before).values()) == {None}


def test_changes_of_a_stationary_stream_fall_like_one_over_n() -> None:
    """The mean moves by about b/(n+b) of a batch mean's spread: a tenth after ten times the rows."""
    normalizer = LifelongNormalizer(7, 5, full=True)
    changes = []
    for batch in range(400):
        before = normalizer.moments()
        normalizer.observe([rows(20, batch)])
        changes.append(normalizer.changes_since(before)["value_covariance_change"])
    early, late = (sum(filter(None, changes[part])) for part in (slice(20, 40), slice(200, 400)))
    assert late / 200 < 0.2 * early / 20


def editor(mode: Any) -> StableEdit:
    return StableEdit({"m": (7, 5)}, StableEditSettings(1e-3, 1.0, 8, mode, "shape", 0.5, "relative", 0.0), CPU)


def run(chosen: StableEdit, phases: list[Phase]) -> list[dict[str, float | None]]:
    statistics = []
    for place, phase in enumerate(phases):
        assert chosen.begin(phase)
        chosen.update({"m": Capture(*rows(20, place))}, phase)
        statistics.append(chosen.statistics()["7x5"])
    return statistics


def test_the_spectrum_of_the_whitening_matrix() -> None:
    """Quantiles of the eigenvalues of Sigma^(-1/2) worked out directly; none in warm-up, which does not whiten."""
    warm, last = run(editor("stable"), [Phase.WARM_UP, Phase.EDIT])
    assert warm["floored_fraction"] is None
    assert "whitening_median" not in warm
    grads = torch.cat([rows(20, 0)[1], rows(20, 1)[1]]).double()
    values = torch.linalg.eigvalsh(grads.T.cov() * 39 / (40 - 5 - 1))
    expected = values.clamp_min(0.5 * values.mean()).rsqrt()
    found = [last[f"whitening_{name}"] for name in ("min", "q05", "median", "q95", "max")]
    assert found == pytest.approx(expected.quantile(torch.tensor([0, 0.05, 0.5, 0.95, 1.0]).double()).tolist())
    assert last["floored_fraction"] == pytest.approx(float((values < 0.5 * values.mean()).double().mean()))
    assert last["floored_fraction"] > 0


@pytest.mark.parametrize(
    ("mode", "moves"), [("stable", True), ("original", True), ("batch", True), ("frozen", False), ("none", False)]
)
def test_changes_are_told_where_rows_entered(mode: str, moves: bool) -> None:
    """Frozen statistics, and those of a mode that has none, are not said to change by nothing."""
    last = run(editor(mode), [Phase.WARM_UP, Phase.EDIT])[-1]
    assert ("value_std_change" in last) is moves
    assert ("value_covariance_change" in last) is (moves and mode != "original")
