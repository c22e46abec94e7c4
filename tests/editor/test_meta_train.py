"""Meta-training against one plain autograd graph through edit and loss, in float64, on tiny models."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from data.records import Capture, LossTerm, Phase, TokenSequence, TrainingTurn, Turn
from data.stream import mini_batch_weights
from editor import linalg
from editor.hypernetwork import HyperNetworkEditor, HyperNetworkSettings, RidgeSettings
from editor.malmen import MALMEN
from editor.mend import MEND
from editor.meta_train import MetaSettings, MetaTrainer
from editor.rledit import RLEdit, RLEditSettings
from model import LanguageModel
from model.source import find_edit_modules
from tests.conftest import tiny_gpt2, tiny_llama

CPU = torch.device("cpu")
# two modules of one shape, so that a network is shared; N is about 18 rows, below d_k = 40 (Llama) and 96 (GPT-2)
LLAMA = ["model.layers.1.mlp.down_proj", "model.layers.3.mlp.down_proj"]
# two shapes, so that there are two networks
MIXED = ["model.layers.2.mlp.up_proj", "model.layers.2.mlp.down_proj"]
GPT2 = ["transformer.h.1.mlp.c_proj", "transformer.h.2.mlp.c_proj"]
MODELS = [(tiny_llama, LLAMA), (tiny_llama, MIXED), (tiny_gpt2, GPT2)]
BASE: dict[str, Any] = {"lr": 0.02, "batch_size": 7, "statistics_scope": "shape", "rank": 5, "n_blocks": 2, "seed": 3}
HORIZON: dict[str, Any] = {
    "reg_coef": 0.3, "time_decay": 0.7, "back_depth": 2, "update_every": "trajectory", "trajectory_length": None,
}  # fmt: skip
LOC_COEF = 0.6


def mend(**changes: Any) -> Callable[..., HyperNetworkEditor]:
    return lambda shapes: MEND(shapes, HyperNetworkSettings(**{**BASE, **changes}), CPU)


def malmen(**changes: Any) -> Callable[..., HyperNetworkEditor]:
    return lambda shapes: MALMEN(shapes, RidgeSettings(**{**BASE, "alpha": 2.0, **changes}), CPU)


def rledit(**changes: Any) -> Callable[..., HyperNetworkEditor]:
    return lambda shapes: RLEdit(shapes, RLEditSettings(**{**BASE, "alpha": 2.0, **HORIZON, **changes}), CPU)


def sequences(generator: torch.Generator, count: int) -> tuple[TokenSequence, ...]:
    made = []
    for _ in range(count):
        prompt, answer = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((3, 9), (1, 5)))
        made.append(
            TokenSequence(tuple(torch.randint(0, 256, (prompt + answer,), generator=generator).tolist()), prompt)
        )
    return tuple(made)


def training_turn(index: int, of: int = 3, facts: int = 7) -> TrainingTurn:
    generator = torch.Generator().manual_seed(index)
    edits = sequences(generator, facts)
    turn = Turn(index, Phase.EDIT, (), edits, mini_batch_weights(edits, 4))
    questions = sequences(generator, facts), sequences(generator, facts - 2)
    return TrainingTurn(turn, *questions, epoch=index // of, index_in_epoch=index % of, epoch_turns=of)


def language_model(make: Callable[..., Any], modules: list[str]) -> LanguageModel:
    model = make(dtype=torch.float64)
    for norm in (module for module in model.modules() if isinstance(module, LlamaRMSNorm)):
        norm.forward = partial(exact_norm, norm)  # transformers computes it in float32
    return LanguageModel(model, None, find_edit_modules(model, modules, 0), compute_tokens=40)


def exact_norm(norm: LlamaRMSNorm, rows: Tensor) -> Tensor:
    return norm.weight * rows * (rows.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()


def editor_for(model: LanguageModel, make: Callable[..., HyperNetworkEditor], stir: float = 0.3) -> HyperNetworkEditor:
    """With parameters away from where the fresh network has a kink; `stir` 0 keeps it fresh."""
    editor = make(model.shapes).double()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in editor.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += stir * drawn / max(parameter.shape) ** 0.5
    return editor


def trainer_for(model: LanguageModel, editor: HyperNetworkEditor, **changes: float) -> MetaTrainer:
    values: dict[str, float] = {"meta_lr": 0.0, "loc_coef": LOC_COEF, "max_grad_norm": 1e12, **changes}
    return MetaTrainer(model, editor, MetaSettings(**values))


# ------------------------------------------------------------------------------------------------ the plain graph


class Plain:
    """The same losses from one graph: network, update, edited model, loss. Written from DESIGN section 1."""

    def __init__(self, model: LanguageModel, editor: HyperNetworkEditor) -> None:
        self.model, self.editor = model, editor
        self.names = list(model.shapes)
        self.start = {name: model.edited[name].master.clone() for name in self.names}
        self.edited = dict(self.start)  # what earlier turns of the trajectory left, as constants
        self.seen: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        self.past: list[TrainingTurn] = []

    def loss(self, turn: TrainingTurn, depth: int = 1, decay: float = 1.0, reg_coef: float = 0.0) -> Tensor:
        captures = self.capture(turn)
        for name in self.names:
            self.seen.setdefault(self.group(name), []).append((captures[name].keys, captures[name].value_grads))
        deltas = {name: self.delta(name, captures[name]) for name in self.names}
        weights = {name: self.edited[name] + self.oriented(name, delta) for name, delta in deltas.items()}
        self.past.append(turn)
        total = torch.zeros((), dtype=torch.float64)
        for age, past in enumerate(self.past[::-1][:depth]):
            rephrase = self.cross_entropy(past.rephrases, weights)
            locality = self.divergence(past.localities, weights)
            total = total + decay**age * (rephrase + LOC_COEF * locality)
        total = total + reg_coef * sum((delta**2).sum() for delta in deltas.values())
        self.edited = {name: weight.detach() for name, weight in weights.items()}
        return total

    def group(self, name: str) -> Any:
        return name if self.editor.settings.statistics_scope == "module" else self.model.shapes[name]

    def capture(self, turn: TrainingTurn) -> dict[str, Capture]:
        self.model.restore(self.edited)
        captures = self.model.capture(turn.edits).modules
        self.model.restore(self.start)
        return captures

    def delta(self, name: str, capture: Capture) -> Tensor:
        K, G = capture.keys, capture.value_grads
        rows = self.seen[self.group(name)]
        all_k, all_g = torch.cat([k for k, _ in rows]), torch.cat([g for _, g in rows])
        eps = 2.0**-23
        x = torch.cat([(K - all_k.mean(0)) / (all_k.std(0) + eps), (G - all_g.mean(0)) / (all_g.std(0) + eps)], 1)
        alike = [other for other in self.names if self.model.shapes[other] == self.model.shapes[name]]
        network: Any = self.editor.network(name)
        for block in network.blocks:
            inner = torch.relu(x @ block.down @ block.up + block.bias)
            x = x + block.scale[alike.index(name)] * inner + block.shift[alike.index(name)]
        new_k, new_g = x.split([K.shape[1], G.shape[1]], 1)
        place = self.names.index(name)
        eta = self.editor.log_eta[place].exp()
        if isinstance(self.editor, MEND):
            return -eta * new_k.T @ new_g
        D = -eta * (K * new_k).sum(1, keepdim=True) * new_g
        ridge: Any = self.editor.log_lambda
        identity = torch.eye(K.shape[1], dtype=torch.float64)
        return torch.linalg.solve(K.T @ K + ridge[place].exp() * identity, K.T @ D)

    def oriented(self, name: str, delta: Tensor) -> Tensor:
        return delta.T if isinstance(self.model.edited[name].module, nn.Linear) else delta

    def log_probs(self, sequence: TokenSequence, weights: dict[str, Tensor]) -> Tensor:
        named = {f"{name}.weight": weight for name, weight in weights.items()}
        output = functional_call(self.model.model, named, kwargs={"input_ids": torch.tensor([sequence.ids])})
        return output.logits[0, sequence.answer_start - 1 : -1].log_softmax(-1)

    def cross_entropy(self, questions: Iterable[TokenSequence], weights: dict[str, Tensor]) -> Tensor:
        found = [
            -self.log_probs(s, weights)[i, s.ids[s.answer_start + i]] for s in questions for i in range(s.answer_length)
        ]
        return torch.stack(found).mean()

    def divergence(self, questions: Iterable[TokenSequence], weights: dict[str, Tensor]) -> Tensor:
        found = []
        for s in questions:
            before, after = self.log_probs(s, self.start), self.log_probs(s, weights)
            found.append((before.exp() * (before - after)).sum(1))
        return torch.cat(found).mean()


def gradients_of(editor: HyperNetworkEditor) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in editor.named_parameters()}


class Recorder(MetaTrainer):
    """Keeps the gradients instead of stepping."""

    kept: dict[str, Tensor]

    def _step(self, turn: TrainingTurn) -> float:
        self.kept = gradients_of(self.editor)  # type: ignore[arg-type]
        return 0.0


@pytest.mark.parametrize(("make", "modules"), MODELS, ids=["llama", "mixed", "gpt2"])
@pytest.mark.parametrize("method", [mend(), malmen(), malmen(statistics_scope="module", batch_size=512)])
def test_two_stages_give_the_gradient_of_one_graph(
    make: Callable[..., Any], modules: list[str], method: Callable[..., HyperNetworkEditor]
) -> None:
    model = language_model(make, modules)
    editor = editor_for(model, method)
    trainer = Recorder(model, editor, MetaSettings(0.0, LOC_COEF, 1.0))
    step = trainer.turn(training_turn(0))
    ours = trainer.kept

    editor.zero_grad()
    loss = Plain(model, editor).loss(training_turn(0))
    loss.backward()
    assert step.loss.total == pytest.approx(float(loss.detach()), rel=1e-10)
    assert_close(ours, gradients_of(editor))


def assert_close(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-8) -> None:
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (ours[name] - gradient).norm() / gradient.norm() < tolerance, name


@pytest.mark.parametrize("method", [mend(), malmen(), rledit()])
def test_two_stages_agree_where_rows_outnumber_keys(method: Callable[..., HyperNetworkEditor]) -> None:
    """N > d_k: DeltaW is dense and the system is the d_k x d_k one."""
    model = language_model(tiny_llama, MIXED)
    editor = editor_for(model, method)
    trainer = Recorder(model, editor, MetaSettings(0.0, LOC_COEF, 1.0))
    turn = training_turn(0, of=1, facts=30)
    assert sum(sequence.answer_length for sequence in turn.edits.sequences) > 40
    trainer.turn(turn)
    editor.zero_grad()
    Plain(model, editor).loss(turn, reg_coef=editor.horizon.reg_coef).backward()
    assert_close(trainer.kept, gradients_of(editor))


@pytest.mark.parametrize(("make", "modules"), MODELS, ids=["llama", "mixed", "gpt2"])
def test_a_trajectory_gives_the_gradient_of_its_plain_graphs(make: Callable[..., Any], modules: list[str]) -> None:
    """Three turns that stay in the model, decay, regulariser; each turn answers for itself and the one before."""
    model = language_model(make, modules)
    editor = editor_for(model, rledit())
    trainer = Recorder(model, editor, MetaSettings(0.0, LOC_COEF, 1.0))
    totals = [trainer.turn(training_turn(index)).loss.total for index in range(3)]
    ours = trainer.kept

    editor.zero_grad()
    plain = Plain(model, editor)
    losses = [plain.loss(training_turn(i), depth=2, decay=0.7, reg_coef=0.3) for i in range(3)]
    torch.stack(losses).sum().backward()
    assert totals == pytest.approx([float(loss.detach()) for loss in losses], rel=1e-10)
    assert_close(ours, gradients_of(editor))


def test_steps_are_adams_on_clipped_gradients_each_of_its_own_turn() -> None:
    model = language_model(tiny_llama, LLAMA)
    editor, by_hand = editor_for(model, malmen()), editor_for(model, malmen())
    trainer = trainer_for(model, editor, meta_lr=1e-2, max_grad_norm=0.05)
    adam = torch.optim.Adam(by_hand.parameters(), lr=1e-2)
    plain = Plain(model, by_hand)
    for index in range(3):
        step = trainer.turn(training_turn(index))
        plain.past.clear()  # each turn edits the unedited model and is judged by itself
        plain.edited = dict(plain.start)
        adam.zero_grad()
        plain.loss(training_turn(index)).backward()
        gradients = [parameter.grad for parameter in by_hand.parameters()]
        norm = torch.stack([(gradient**2).sum() for gradient in gradients if gradient is not None]).sum().sqrt()
        assert norm > 0.05, "nothing was clipped, and this test shows nothing"
        assert step.grad_norm == pytest.approx(float(norm), rel=1e-6)
        for gradient in gradients:
            assert gradient is not None
            gradient *= 0.05 / norm
        adam.step()
    for (name, ours), theirs in zip(editor.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_a_trajectory_has_its_length_and_ends_with_its_pass() -> None:
    ends = {
        length: [
            rledit(trajectory_length=length)({"m": (4, 3)}).horizon.ends_with(training_turn(i, of=5)) for i in range(6)
        ]
        for length in (None, 1, 2)
    }
    assert ends == {
        None: [False, False, False, False, True, False],
        1: [True] * 6,
        2: [False, True, False, True, True, False],
    }


def test_the_losses_of_held_out_turns_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model(tiny_llama, LLAMA)
    trainer = trainer_for(model, editor_for(model, malmen()))
    judged, judge = [], trainer._judge
    monkeypatch.setattr(trainer, "_judge", lambda *given: judged.append(judge(*given)) or judged[-1])
    found = trainer.validate([training_turn(0), training_turn(1)])
    for name in ("rephrase", "locality", "total"):
        one, other = (getattr(loss, name) for loss in judged)
        assert one != other
        assert getattr(found, name) == pytest.approx((one + other) / 2)


@pytest.mark.parametrize("method", [mend(), malmen()])
def test_the_gradient_agrees_with_finite_differences(method: Callable[..., HyperNetworkEditor]) -> None:
    """The loss of one turn, as the trainer itself measures it, along a random direction of all parameters at once."""
    model = language_model(tiny_gpt2, GPT2)
    editor = editor_for(model, method)
    trainer = Recorder(model, editor, MetaSettings(0.0, LOC_COEF, 1.0))
    trainer.turn(training_turn(1))
    gradients = trainer.kept
    generator = torch.Generator().manual_seed(0)
    ways = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in editor.named_parameters()}
    slope = sum(float((gradients[name] * way).sum()) for name, way in ways.items())

    def loss_at(step: float) -> float:
        moved = editor_for(model, method)
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                parameter += step * ways[name]
        return trainer_for(model, moved).validate([training_turn(1)]).total

    step = 1e-7  # between the two points no inner value may cross its kink, and on this turn none does
    assert (loss_at(step) - loss_at(-step)) / (2 * step) == pytest.approx(slope, rel=1e-6)


def test_a_fresh_network_hangs_on_its_seed_and_on_nothing_that_was_drawn_before() -> None:
    shapes = language_model(tiny_llama, MIXED).shapes
    first = malmen()(shapes).state_dict()
    state = torch.manual_seed(17).get_state()
    again, other = malmen()(shapes).state_dict(), malmen(seed=4)(shapes).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = {name for name in first if not torch.equal(first[name], other[name])}
    assert drawn == {name for name in first if name.endswith(".down")}
    blocks = [first[name] for name in sorted(drawn)]
    assert len(blocks) == 4
    assert not any(torch.equal(one, two) for i, one in enumerate(blocks) for two in blocks[:i])


@pytest.mark.parametrize(("make", "modules"), MODELS, ids=["llama", "mixed", "gpt2"])
def test_a_fresh_network_is_the_identity_after_normalisation(make: Callable[..., Any], modules: list[str]) -> None:
    """So fresh MALMEN is the closed form with D_i = -eta (k_i . k_hat_i) g_hat_i, and fresh MEND its outer products."""
    model = language_model(make, modules)
    captures = model.capture(training_turn(0).edits).modules
    closed, outer = (editor_for(model, method, stir=0).update(captures, Phase.EDIT) for method in (malmen(), mend()))
    for name, capture in captures.items():
        alike = [captures[other] for other in modules if model.shapes[other] == model.shapes[name]]
        all_k, all_g = (torch.cat([getattr(c, side) for c in alike]) for side in ("keys", "value_grads"))
        eps = 2.0**-23
        k_hat = (capture.keys - all_k.mean(0)) / (all_k.std(0) + eps)
        g_hat = (capture.value_grads - all_g.mean(0)) / (all_g.std(0) + eps)
        K, D = capture.keys, -0.02 * (capture.keys * k_hat).sum(1, keepdim=True) * g_hat
        expected = torch.linalg.solve(K.T @ K + 2.0 * torch.eye(K.shape[1], dtype=torch.float64), K.T @ D)
        for update, wanted in ((closed[name], expected), (outer[name], -0.02 * k_hat.T @ g_hat)):
            found = linalg.dense((update.left, update.right))
            assert (found - wanted).norm() / wanted.norm() < 1e-7  # log eta is float32 before it is float64


@pytest.mark.parametrize("method", [mend(), malmen(), rledit()])
def test_every_parameter_of_a_fresh_network_but_its_scales_can_move(method: Callable[..., HyperNetworkEditor]) -> None:
    """With B = 0 all inner values are exactly 0, where relu would have no gradient, and B would stay 0 for ever.

    A and the scales are multiplied by B, so they follow one step later.
    """
    model = language_model(tiny_llama, LLAMA)
    editor = editor_for(model, method, stir=0)
    trainer = trainer_for(model, editor, meta_lr=1e-3)
    fresh = {name: parameter.clone() for name, parameter in editor.named_parameters()}
    for index in range(3):
        trainer.turn(training_turn(index))
    still = {name for name, parameter in editor.named_parameters() if torch.equal(parameter, fresh[name])}
    assert {name.rpartition(".")[2] for name in still} <= {"down", "scale"}
    for index in range(3, 6):
        trainer.turn(training_turn(index))
    assert not [name for name, parameter in editor.named_parameters() if torch.equal(parameter, fresh[name])]


@pytest.mark.parametrize("method", [mend(), malmen(), rledit(), rledit(trajectory_length=2, update_every="turn")])
@pytest.mark.parametrize("master", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_after_training_is_the_model_before(
    method: Callable[..., HyperNetworkEditor], master: bool, dtype: torch.dtype
) -> None:
    plain = tiny_llama(dtype=dtype)
    model = LanguageModel(plain, None, find_edit_modules(plain, LLAMA, 0), master=master, compute_tokens=40)
    before = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    trainer = trainer_for(model, method(model.shapes), meta_lr=1e-2)
    trainer.validate([training_turn(8, of=9)])
    for index in range(6):
        trainer.turn(training_turn(index))
    assert all(torch.equal(weight, before[name]) for name, weight in model.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


def test_training_begins_with_the_original_weights() -> None:
    model = language_model(tiny_llama, LLAMA)
    editor = editor_for(model, malmen())
    model.apply(editor.update(model.capture(training_turn(0).edits).modules, Phase.EDIT))
    with pytest.raises(AssertionError, match="training would take its edits away"):
        trainer_for(model, editor)


def test_validation_leaves_no_trace() -> None:
    model = language_model(tiny_llama, LLAMA)
    plain, watched = (trainer_for(model, editor_for(model, rledit()), meta_lr=1e-2) for _ in range(2))
    for trainer in (plain, watched):
        for index in range(3):
            if trainer is watched and index == 0:
                trainer.validate([training_turn(7, of=9), training_turn(8, of=9)])
            trainer.turn(training_turn(index))
    ours, theirs = (trainer.editor.state_dict() for trainer in (plain, watched))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_chunks_change_nothing() -> None:
    model = language_model(tiny_llama, LLAMA)
    kept = []
    for size in (1, 7, 512):
        trainer = Recorder(model, editor_for(model, malmen(batch_size=size)), MetaSettings(0.0, LOC_COEF, 1.0))
        trainer.turn(training_turn(0))
        kept.append(trainer.kept)
    for gradients in kept[:2]:
        assert_close(gradients, kept[2], 1e-10)


def test_own_and_shared_statistics_differ() -> None:
    model = language_model(tiny_llama, LLAMA)
    captures = model.capture(training_turn(0).edits).modules
    shared, own = (
        editor_for(model, malmen(statistics_scope=scope)).update(captures, Phase.EDIT) for scope in ("shape", "module")
    )
    first, second = (linalg.dense((u[LLAMA[0]].left, u[LLAMA[0]].right)) for u in (shared, own))
    assert (first - second).norm() / first.norm() > 1e-2


def test_a_turn_remembers_token_ids_and_reference_logits_of_its_back_turns_and_no_more() -> None:
    """No gradient is formed but those of the edited weights, and none is left behind; the window has a fixed size."""
    model = language_model(tiny_llama, LLAMA)
    trainer = trainer_for(model, editor_for(model, rledit(back_depth=3)), meta_lr=1e-3)
    for index in range(7):
        trainer.turn(training_turn(index, of=9))
    assert len(trainer._window) == 3
    for turn, reference in trainer._window:
        assert reference is not None
        assert reference.shape == (sum(s.answer_length for s in turn.localities), 260)
        assert not reference.requires_grad
    assert not [name for name, parameter in model.model.named_parameters() if parameter.grad is not None]


def test_gradients_are_formed_for_edited_weights_and_nothing_below_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a loss is computed only edited weights ask for a gradient, and what lies below them has no graph."""
    model = language_model(tiny_llama, LLAMA)
    asking: set[str] = set()
    graphs: dict[int, bool] = {}
    forward = model._logits

    def watched(batch: Any, here: Any) -> Tensor:
        asking.update(name for name, weight in model.model.named_parameters() if weight.requires_grad)
        return forward(batch, here)

    monkeypatch.setattr(model, "_logits", watched)
    for place, layer in enumerate(model.model.model.layers):
        layer.register_forward_hook(
            lambda _module, _inputs, output, place=place: graphs.update(
                {place: (output[0] if isinstance(output, tuple) else output).requires_grad}
            )
        )
    model.weight_gradients([LossTerm(training_turn(0).rephrases, 1.0)])
    assert asking == {f"{name}.weight" for name in LLAMA}
    assert graphs == {0: False, 1: True, 2: True, 3: True}


@pytest.mark.parametrize("beyond", [[0], [1], [0, 1]])
def test_keys_beyond_any_ridge_name_their_module(beyond: list[int]) -> None:
    """The first of them."""
    shapes = dict.fromkeys(LLAMA, (40, 24))
    sizes = [1e25 if place in beyond else 1.0 for place in range(2)]
    rows = {
        name: Capture(size * torch.ones(30, 40), torch.randn(30, 24)) for name, size in zip(LLAMA, sizes, strict=True)
    }
    words = rf"the ridge lambda=2 of {re.escape(LLAMA[beyond[0]])} is too small"
    with pytest.raises(FloatingPointError, match=words):
        malmen()(shapes).update(rows, Phase.EDIT)


@pytest.mark.parametrize(
    ("part", "words"),
    [("rephrase", "turn 4: the rephrase loss is nan"), ("locality", "turn 4: the locality loss is nan")],
)
def test_a_loss_that_is_not_finite_names_turn_and_term(monkeypatch: pytest.MonkeyPatch, part: str, words: str) -> None:
    model = language_model(tiny_llama, LLAMA)
    editor = editor_for(model, malmen())
    trainer = trainer_for(model, editor, meta_lr=1e-2)
    before = {name: parameter.clone() for name, parameter in editor.named_parameters()}
    gradients = model.weight_gradients

    def broken(terms: Any) -> Any:
        found, losses = gradients(terms)
        return found, [float("nan") if (term.reference is None) == (part == "rephrase") else loss
                       for term, loss in zip(terms, losses, strict=True)]  # fmt: skip

    monkeypatch.setattr(model, "weight_gradients", broken)
    with pytest.raises(FloatingPointError, match=words):
        trainer.turn(training_turn(4))
    assert all(torch.equal(parameter, before[name]) for name, parameter in editor.named_parameters())
