"""ROME, MEMIT and AlphaEdit against the float64 reference, turn after turn, and by what defines each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.records import FactContexts, LossTerm, Phase, TokenSequence, Turn
from editor import linalg
from editor.alphaedit import AlphaEdit, AlphaEditSettings
from editor.base import LocateInputs
from editor.located import KeptKeys, NullSpace, SecondMomentFactor, mean_keys, mean_values, null_space
from editor.memit import MEMIT, MEMITSettings
from editor.rome import ROME, ROMESettings
from editor.target_vectors import TargetSettings, target_vectors
from model import LanguageModel
from model.source import find_edit_modules
from tests.conftest import exact_llama, tiny_gpt2
from tests.located import Fact, Located

LLAMA = [f"model.layers.{layer}.mlp.down_proj" for layer in (1, 2)]
GPT2 = [f"transformer.h.{layer}.mlp.c_proj" for layer in (1, 2)]
FAMILIES = pytest.mark.parametrize(("make", "names"), [(exact_llama, LLAMA), (tiny_gpt2, GPT2)])
CPU = torch.device("cpu")
# few steps, so that some are clamped and some stop early
TARGETS = {
    "v_num_grad_steps": 4, "v_lr": 0.3, "v_weight_decay": 0.5, "kl_factor": 0.0625, "clamp_norm_factor": 0.75,
    "v_loss_stop": 0.05,
}  # fmt: skip
LAMBDA, L2, THRESHOLD = 0.5, 0.7, 0.3


def ids(count: int, draw: torch.Generator) -> tuple[int, ...]:
    return tuple(torch.randint(0, 256, (count,), generator=draw).tolist())


def contexts_of(turn: Turn) -> list[FactContexts]:
    """Two prefixes a fact; the second of each turn's facts has no subject."""
    draw = torch.Generator().manual_seed(100 + turn.index)
    facts = []
    for place, own in enumerate(turn.sequences):
        sequences, positions = [own], [own.answer_start - 2]
        for length in (2, 5):
            sequences.append(TokenSequence((*ids(length, draw), *own.ids), own.answer_start + length))
            positions.append(positions[0] + length)
        kl_prompt = (
            None if place == 1 else TokenSequence((*own.ids[: positions[0] + 1], *ids(3, draw)), positions[0] + 3)
        )
        facts.append(FactContexts(tuple(sequences), tuple(positions), kl_prompt, positions[0]))
    return facts


def turn_of(index: int, facts: int = 3) -> Turn:
    draw = torch.Generator().manual_seed(index)
    sequences = []
    for _ in range(facts):
        prompt, answer = (int(torch.randint(low, high, (), generator=draw)) for low, high in ((3, 9), (1, 4)))
        sequences.append(TokenSequence(ids(prompt + answer, draw), prompt))
    return Turn(index, Phase.EDIT, (), tuple(sequences), (1.0,) * facts)


def plain(facts: Sequence[FactContexts]) -> list[Fact]:
    """For the reference, which is told where a prompt ends and not that one token more follows."""
    return [
        Fact(
            [(list(s.ids), s.answer_start, at) for s, at in zip(fact.sequences, fact.positions, strict=True)],
            fact.kl_prompt and (list(fact.kl_prompt.ids[:-1]), fact.kl_position),
        )
        for fact in facts
    ]


def second_moments(name: str) -> Tensor:
    """Of keys whose spread falls over three decades, so that some directions are null."""
    d_k = 40 if "layers" in name else 96
    draw = torch.Generator().manual_seed(len(name) + int(name.split(".")[2]))
    keys = torch.randn((3 * d_k, d_k), generator=draw, dtype=torch.float64) * torch.logspace(0.5, -2.5, d_k).double()
    return keys.T @ keys / len(keys)


GIVEN = LocateInputs(contexts_of, second_moments)


def language_model(make: Callable[..., Any], names: Sequence[str]) -> LanguageModel:
    model = make(dtype=torch.float64)
    return LanguageModel(model, None, find_edit_modules(model, list(names), 0), compute_tokens=300)


def reference(make: Callable[..., Any], names: Sequence[str]) -> Located:
    t = TARGETS
    return Located(
        make(dtype=torch.float64), list(names), {name: second_moments(name) for name in names},
        steps=int(t["v_num_grad_steps"]), lr=t["v_lr"], decay=t["v_weight_decay"], kl=t["kl_factor"],
        clamp=t["clamp_norm_factor"], stop=t["v_loss_stop"],
    )  # fmt: skip


def memit(model: LanguageModel, keep_keys: bool = True, given: LocateInputs = GIVEN, **changes: Any) -> MEMIT:
    chosen = {**TARGETS, "moment_ridge": 0.0, **changes}
    settings = MEMITSettings(**chosen, mom2_update_weight=LAMBDA, keep_keys=keep_keys)
    return MEMIT(model, settings, CPU, given)


def alphaedit(model: LanguageModel, keep_keys: bool = True, given: LocateInputs = GIVEN, **changes: Any) -> AlphaEdit:
    settings = AlphaEditSettings(**{**TARGETS, **changes}, nullspace_threshold=THRESHOLD, L2=L2, keep_keys=keep_keys)
    return AlphaEdit(model, settings, CPU, given)


def rome(model: LanguageModel, moment_ridge: float = 0.0) -> ROME:
    return ROME(model, ROMESettings(**TARGETS, moment_ridge=moment_ridge), CPU, GIVEN)


def dense(update: Any) -> Tensor:
    return linalg.dense((update.left, update.right))


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


EDITORS: dict[str, tuple[Callable[..., Any], Callable[[Located, list[Fact]], dict[str, Tensor]]]] = {
    "memit": (memit, lambda plainly, facts: plainly.memit(facts, LAMBDA, True)),
    "published": (
        lambda model: memit(model, False),
        lambda plainly, facts: plainly.memit(facts, LAMBDA, False),
    ),
    "alphaedit": (alphaedit, lambda plainly, facts: plainly.alphaedit(facts, THRESHOLD, L2)),
    "rome": (rome, lambda plainly, facts: plainly.rome(facts)),
}


@FAMILIES
@pytest.mark.parametrize("kind", EDITORS)
def test_three_turns_agree_with_the_reference(kind: str, make: Callable[..., Any], names: list[str]) -> None:
    names = names[:1] if kind == "rome" else names
    build, refer = EDITORS[kind]
    model, plainly = language_model(make, names), reference(make, names)
    editor = build(model)
    for index in range(3):
        turn = turn_of(index)
        edit = editor.edit(model, turn)
        expected = refer(plainly, plain(contexts_of(turn)))
        for name in names:
            assert relative(dense(edit.updates[name]), expected[name]) < 1e-6, (index, name)
            weight = plainly.model.get_submodule(name).weight
            assert relative(model.edited[name].master, weight.detach()) < 1e-6
            assert edit.changes[name].norm == pytest.approx(float(expected[name].norm()), rel=1e-6)
    assert edit.seconds.keys() == {"targets", "keys", "solve", "apply"}
    assert edit.details["targets"]["steps"] > 0


@pytest.mark.parametrize("kind", ["memit", "rome"])
def test_the_ridge_of_the_second_moments_is_in_units_of_their_mean_eigenvalue(kind: str) -> None:
    names, ridge = LLAMA[: 1 if kind == "rome" else None], 0.3
    model, plainly = language_model(exact_llama, names), reference(exact_llama, names)
    for name, C in plainly.C.items():
        plainly.C[name] = C + ridge * torch.linalg.eigvalsh(C).mean() * torch.eye(len(C), dtype=torch.float64)
    turn = turn_of(0)
    build = memit if kind == "memit" else rome
    edit = build(model, moment_ridge=ridge).edit(model, turn)
    facts = plain(contexts_of(turn))
    expected = plainly.memit(facts, LAMBDA, True) if kind == "memit" else plainly.rome(facts)
    for name in names:
        assert relative(dense(edit.updates[name]), expected[name]) < 1e-6, name


# ---------------------------------------------------------------------------------------------------------------------
# What defines each


def test_memits_update_is_the_closed_form() -> None:
    """The stationary point of ||K D - R||^2 + ||K_0 D||^2 + lambda tr(D^T C D), also when kept keys outnumber d_k."""
    model = language_model(exact_llama, LLAMA)
    editor, seen = memit(model, v_num_grad_steps=1), {name: torch.zeros((0, 40), dtype=torch.float64) for name in LLAMA}
    for index in range(4):
        turn = turn_of(index, facts=15)
        before = [mean_keys(model, LLAMA[0], contexts_of(turn))]
        update = editor.edit(model, turn).updates[LLAMA[0]]
        K, R, D, K0 = before[0], update.right, dense(update), seen[LLAMA[0]]
        gradient = K.T @ (K @ D - R) + K0.T @ K0 @ D + LAMBDA * second_moments(LLAMA[0]) @ D
        assert float(gradient.norm() / (K.T @ R).norm()) < 1e-9
        seen[LLAMA[0]] = torch.cat([K0, K])
    assert editor.kept[LLAMA[0]].gram is not None  # 60 keys of size 40


def test_alphaedit_leaves_keys_outside_of_the_null_space_where_they_were() -> None:
    model = language_model(exact_llama, LLAMA)
    editor = alphaedit(model, v_num_grad_steps=1)
    for index in range(3):
        updates = editor.edit(model, turn_of(index, facts=25)).updates
        for name in LLAMA:
            values, vectors = torch.linalg.eigh(second_moments(name))
            outside = vectors[:, values >= THRESHOLD]
            assert 0 < outside.shape[1] < 40
            assert float((outside.T @ dense(updates[name])).norm() / dense(updates[name]).norm()) < 1e-9
    assert editor.kept[LLAMA[0]].gram is not None
    statistics = editor.statistics()[LLAMA[0]]
    assert statistics["kept_keys"] == 75
    values = torch.linalg.eigvalsh(second_moments(LLAMA[0]))
    assert statistics["null_space"] == int((values < THRESHOLD).sum())
    assert statistics["null_space_share"] == pytest.approx(float(values[values < THRESHOLD].sum() / values.sum()))


@pytest.mark.parametrize("threshold", [0.001, 0.3, 5.0])
def test_the_null_space_is_a_projection_whichever_basis_is_kept(threshold: float) -> None:
    moments = second_moments(LLAMA[0])
    space = NullSpace(**null_space("m", moments, threshold, CPU))
    keys = torch.randn((7, 40), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inside = space.enter(keys)
    torch.testing.assert_close(space.enter(inside), inside)
    spread = (inside @ moments * inside).sum(1)
    assert float((spread / inside.square().sum(1)).max()) < threshold
    assert space._is_complement == (2 * space.size > 40)


def test_a_null_space_from_a_file_has_the_bits_of_the_one_just_found(tmp_path: Path) -> None:
    """At a size where products depend on how the basis lies in memory."""
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn((600, 256), generator=draw) * torch.linspace(0.1, 2, 256)
    made = null_space("m", keys.T @ keys / 600, 0.5, CPU)
    save_file(made, tmp_path / "parts")
    read = load_file(tmp_path / "parts")
    rows = torch.randn((100, 256), dtype=torch.float64, generator=draw)
    assert torch.equal(NullSpace(**made).enter(rows), NullSpace(**read).enter(rows))


def test_a_null_space_that_is_all_there_is_is_refused() -> None:
    model = language_model(exact_llama, LLAMA)
    with pytest.raises(ValueError, match=rf"nullspace_threshold={THRESHOLD}: all .* {LLAMA[0]} lie below, the largest"):
        alphaedit(model, given=LocateInputs(contexts_of, lambda name: 1e-3 * second_moments(name)))


def test_whitened_second_moments_are_the_identity() -> None:
    moments = second_moments(LLAMA[0])
    whitening = SecondMomentFactor("m", moments, 0.0, CPU)
    torch.testing.assert_close(
        whitening.enter(whitening.enter(moments).T), torch.eye(40, dtype=torch.float64), rtol=1e-8, atol=1e-8
    )
    inverse = whitening.leave(whitening.enter(torch.eye(40, dtype=torch.float64)).T)
    torch.testing.assert_close(inverse @ moments, torch.eye(40, dtype=torch.float64), rtol=1e-7, atol=1e-7)


@FAMILIES
def test_rome_makes_the_module_put_out_the_value_at_the_key(make: Callable[..., Any], names: list[str]) -> None:
    model, name = language_model(make, names[:1]), names[0]
    facts = contexts_of(turn_of(0, 1))
    bare = [facts[0].sequences[0]], [facts[0].positions[0]]
    start = model.values_at(name, *bare)
    offset = target_vectors(model, name, facts, start, TargetSettings(**TARGETS)).offsets
    rome(model).edit(model, turn_of(0, 1))
    torch.testing.assert_close(mean_values(model, name, facts), start + offset)


@FAMILIES
@pytest.mark.parametrize("kind", ["memit", "alphaedit", "rome"])
def test_the_model_has_the_facts_afterwards(kind: str, make: Callable[..., Any], names: list[str]) -> None:
    model = language_model(make, names[:1] if kind == "rome" else names)
    strong = {**TARGETS, "v_num_grad_steps": 40, "clamp_norm_factor": 4.0, "v_weight_decay": 0.0, "kl_factor": 0.0}
    given = LocateInputs(lambda turn: [FactContexts((s,), (s.answer_start - 1,)) for s in turn.sequences],
                         second_moments)  # fmt: skip
    editor: Any = {
        "memit": lambda: MEMIT(model, MEMITSettings(**strong, mom2_update_weight=1e-3, moment_ridge=0.0,
                                                    keep_keys=True), CPU, given),
        "alphaedit": lambda: AlphaEdit(model, AlphaEditSettings(**strong, nullspace_threshold=5.0, L2=1e-4,
                                                                keep_keys=True), CPU, given),
        "rome": lambda: ROME(model, ROMESettings(**strong, moment_ridge=0.0), CPU, given),
    }[kind]()  # fmt: skip
    turn = turn_of(0, 1)
    before = editor.edit(model, turn).loss
    assert model.losses([LossTerm(turn.sequences, 1.0)])[0] < 0.5 * before


# ---------------------------------------------------------------------------------------------------------------------
# Keys of earlier turns

SIZES = (3, 1, 7, 12, 9, 6, 4)  # of turns; from the sixth on there are more rows than d_k = 32


def drawn_keys(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn((n, 32), generator=draw, dtype=torch.float64).to(dtype).double() for n in SIZES]


def kept_keys(dtype: torch.dtype = torch.float64) -> KeptKeys:
    return KeptKeys(32, 0.3, dtype, CPU)


def test_each_turn_is_the_solve_with_all_keys_so_far() -> None:
    kept, rows = kept_keys(), torch.zeros((0, 32), dtype=torch.float64)
    for keys in drawn_keys():
        rows = torch.cat([rows, keys])
        expected = torch.linalg.solve(rows.T @ rows + 0.3 * torch.eye(32, dtype=torch.float64), keys.T)
        assert relative(kept.left_factor(keys), expected) < 1e-12
        assert relative(kept.left_factor(keys, keep=True), expected) < 1e-12
        assert kept.count == len(rows)
        if kept.gram is None:
            ridge = 0.3 * torch.eye(len(rows), dtype=torch.float64)
            assert relative(kept.factor @ kept.factor.T, rows @ rows.T + ridge) < 1e-12
    assert kept.gram is not None
    assert relative(kept.gram, rows.T @ rows) < 1e-12
    assert kept.rows.untyped_storage().nbytes() == kept.factor.untyped_storage().nbytes() == 0


def test_a_turn_factors_its_own_keys_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    factored: list[int] = []
    cholesky = torch.linalg.cholesky
    monkeypatch.setattr(torch.linalg, "cholesky", lambda matrix: (factored.append(len(matrix)), cholesky(matrix))[1])
    kept = kept_keys()
    for keys in drawn_keys():
        kept.left_factor(keys, keep=True)
    assert factored == [3, 1, 7, 12, 9, 32, 32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stop", range(len(SIZES)))
def test_kept_keys_go_on_bit_for_bit(stop: int, dtype: torch.dtype) -> None:
    whole, stopped, again = (kept_keys(dtype) for _ in range(3))
    for keys in drawn_keys()[:stop]:
        whole.left_factor(keys, keep=True)
        stopped.left_factor(keys, keep=True)
    again.load({name: tensor.clone() for name, tensor in stopped.state().items()})
    for keys in drawn_keys()[stop:]:
        assert torch.equal(whole.left_factor(keys, keep=True), again.left_factor(keys, keep=True))
    assert whole.count == again.count == sum(SIZES)


def test_a_checkpoint_from_before_factors_were_kept_is_read() -> None:
    kept, again = kept_keys(), kept_keys()
    *before, last = drawn_keys()[:4]
    for keys in before:
        kept.left_factor(keys, keep=True)
    again.load({name: tensor for name, tensor in kept.state().items() if name != "factor"})
    assert relative(again.left_factor(last), kept.left_factor(last)) < 1e-12


def test_a_system_without_a_factor_leaves_the_keys_as_they_were() -> None:
    kept = KeptKeys(32, 1e-300, torch.float64, CPU)
    keys = drawn_keys()[0]
    kept.left_factor(keys, keep=True)
    before = {name: tensor.clone() for name, tensor in kept.state().items()}
    with pytest.raises(torch.linalg.LinAlgError):
        kept.left_factor(keys, keep=True)
    for name, tensor in kept.state().items():
        assert torch.equal(tensor, before[name])


# ---------------------------------------------------------------------------------------------------------------------
# Target vectors


def sought(**changes: Any) -> tuple[LanguageModel, list[FactContexts], Tensor, Any]:
    model = language_model(exact_llama, LLAMA)
    facts = contexts_of(turn_of(5, 6))
    start = model.hidden_at(LLAMA[1], [f.sequences[0] for f in facts], [f.positions[0] for f in facts])
    return model, facts, start, target_vectors(model, LLAMA[1], facts, start, TargetSettings(**{**TARGETS, **changes}))


def test_facts_are_sought_each_for_itself() -> None:
    model, facts, start, together = sought()
    for place, fact in enumerate(facts):
        alone = target_vectors(model, LLAMA[1], [fact], start[place : place + 1], TargetSettings(**TARGETS))
        torch.testing.assert_close(alone.offsets[0], together.offsets[place])
        assert int(alone.steps) == int(together.steps[place])


def test_offsets_are_clamped_and_lower_the_loss() -> None:
    *_, start, found = sought(v_num_grad_steps=15, clamp_norm_factor=0.4)
    sizes = found.offsets.norm(dim=1) / start.norm(dim=1)
    assert float(sizes.max()) == pytest.approx(0.4)
    *_, unmoved = sought(v_num_grad_steps=1)
    assert bool((found.losses < unmoved.losses).all())


def test_a_fact_that_is_said_is_left() -> None:
    *_, found = sought(v_loss_stop=1e9)
    assert not found.offsets.any()
    assert not found.steps.any()


def test_a_strong_weight_of_kl_keeps_the_subject_what_it_is() -> None:
    model, facts, _, free = sought(kl_factor=0.0, v_num_grad_steps=8)
    *_, held = sought(kl_factor=100.0, v_num_grad_steps=8)
    kl_prompts = [fact.kl_prompt for fact in facts if fact.kl_prompt]
    with_one = [place for place, fact in enumerate(facts) if fact.kl_prompt]
    at = [facts[place].kl_position for place in with_one]
    reference_logits = model.reference_logits(kl_prompts)
    drifts = [
        model.offset_losses(LLAMA[1], kl_prompts, at, reference=reference_logits)(found.offsets[with_one])[0].mean()
        for found in (free, held)
    ]
    assert drifts[1] < 0.3 * drifts[0]


def test_a_model_that_is_wrecked_is_told() -> None:
    model = language_model(exact_llama, LLAMA)
    model.edited[LLAMA[1]].master.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="turn 0: the loss of a target vector is not finite in step 1; the"):
        memit(model).edit(model, turn_of(0))


# ---------------------------------------------------------------------------------------------------------------------
# State and mistakes


@pytest.mark.parametrize("facts", [3, 25])  # kept as rows, and as their Gram matrix
@pytest.mark.parametrize("build", [memit, alphaedit])
def test_goes_on_bit_for_bit_from_its_state(build: Callable[..., Any], facts: int) -> None:
    model = language_model(exact_llama, LLAMA)
    editor = build(model, v_num_grad_steps=1)
    for index in range(2):
        editor.edit(model, turn_of(index, facts))
    other, again = build(model, v_num_grad_steps=1), model.snapshot()
    other.load_state_dict({name: tensor.clone() for name, tensor in editor.state_dict().items()})
    assert other.statistics() == editor.statistics()
    first = editor.edit(model, turn_of(2, facts)).updates
    model.restore(again)
    second = other.edit(model, turn_of(2, facts)).updates
    for name in LLAMA:
        assert torch.equal(dense(first[name]), dense(second[name]))


def test_a_ridge_that_is_too_small_is_named_and_what_the_weights_are_by_then() -> None:
    """60 facts have 60 keys, of which a layer's null space holds fewer."""
    model = language_model(exact_llama, LLAMA)
    editor = alphaedit(model, v_num_grad_steps=1)
    editor.ridge = 1e-300
    before = model.snapshot()
    with pytest.raises(FloatingPointError) as error:
        editor.edit(model, turn_of(0, facts=60))
    assert str(error.value) == (
        f"turn 0: the keys of {LLAMA[0]} are too large for a ridge of editor.L2=1e-300; set a larger one; the weights "
        "are those of the turn before"
    )
    assert all(torch.equal(weight, before[name]) for name, weight in model.snapshot().items())
    editor = alphaedit(model, v_num_grad_steps=1)
    editor.edit(model, turn_of(1, facts=60))
    editor.kept[LLAMA[1]].ridge = 1e-300
    with pytest.raises(FloatingPointError, match=rf"the keys of {LLAMA[1]} .*, but that {LLAMA[0]} took the update"):
        editor.edit(model, turn_of(2, facts=60))


def test_keys_that_are_not_finite_are_called_that(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model(exact_llama, LLAMA)
    editor = memit(model, v_num_grad_steps=1)
    monkeypatch.setattr("editor.located.mean_keys", lambda *_: torch.full((3, 40), float("nan")))
    with pytest.raises(FloatingPointError, match=rf"turn 0: the keys of {LLAMA[0]} are not finite; the weights"):
        editor.edit(model, turn_of(0))


def test_second_moments_of_too_little_text() -> None:
    def few(name: str) -> Tensor:
        keys = torch.randn((10, 40), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return keys.T @ keys - 1e-9 * torch.eye(40, dtype=torch.float64)

    model = language_model(exact_llama, LLAMA)
    with pytest.raises(ValueError, match=r"editor.moment_ridge=0.0: the second moments of the keys of model.layers.1"):
        memit(model, given=LocateInputs(contexts_of, few))
    with pytest.raises(ValueError, match=r"nullspace_threshold=0.3: no eigenvalue .* lies below, the least is 1"):
        alphaedit(model, given=LocateInputs(contexts_of, lambda _: torch.eye(40)))
