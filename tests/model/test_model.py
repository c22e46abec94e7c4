"""The language model on tiny random models of the families that users edit."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedTokenizerFast, masking_utils

from data.records import LossTerm, LowRankUpdate, Phase, TokenSequence, Turn, WeightChange
from data.stream import mini_batch_weights
from harness.run.same_bits import use_deterministic_algorithms
from model import LanguageModel, edited, language_model
from model.source import ModelSource, find_edit_modules, load_tokenizer, locate, outline, read_weights
from tests.conftest import tiny_gpt2, tiny_llama

SMALL = {
    "vocab_size": 260,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 256,
    "eos_token_id": 256,
}
WIDTHS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
GPT_WIDTHS = {"n_embd": 16, "n_layer": 4, "n_head": 2}
GROUPED = {**WIDTHS, "num_key_value_heads": 1}
FAMILIES: dict[str, tuple[Any, dict[str, Any], str, tuple[int, int]]] = {
    # family: (config class, its sizes, the module `auto` takes in layer 3, its (d_k, d_v))
    "llama": (transformers.LlamaConfig, WIDTHS, "model.layers.3.mlp.down_proj", (24, 16)),
    "mistral": (transformers.MistralConfig, {**GROUPED, "sliding_window": 4}, "model.layers.3.mlp.down_proj", (24, 16)),
    "qwen2": (transformers.Qwen2Config, GROUPED, "model.layers.3.mlp.down_proj", (24, 16)),
    "gemma2": (
        transformers.Gemma2Config,
        {**GROUPED, "head_dim": 8, "final_logit_softcapping": 3.0},
        "model.layers.3.mlp.down_proj",
        (24, 16),
    ),
    "gpt2": (transformers.GPT2Config, GPT_WIDTHS, "transformer.h.3.mlp.c_proj", (64, 16)),
    "gpt-j": (
        transformers.GPTJConfig,
        {**GPT_WIDTHS, "rotary_dim": 4},
        "transformer.h.3.mlp.fc_out",
        (64, 16),
    ),
    "gpt-neox": (transformers.GPTNeoXConfig, WIDTHS, "gpt_neox.layers.3.mlp.dense_4h_to_h", (24, 16)),
    "falcon": (  # adds to the MLP's output in place
        transformers.FalconConfig,
        {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2},
        "transformer.h.3.mlp.dense_4h_to_h",
        (64, 16),
    ),
    "opt": (
        transformers.OPTConfig,
        {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "word_embed_proj_dim": 16},
        "model.decoder.layers.3.fc2",
        (24, 16),
    ),
}  # fmt: skip
LLAMA_MODULES = ["model.layers.2.mlp.down_proj", "model.layers.3.mlp.down_proj"]


def random_sequences(count: int = 9) -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(count)
    lengths = [(int(a), int(b)) for a, b in torch.randint(1, 8, (count, 2), generator=generator)]
    ids = [torch.randint(0, 256, (a + b,), generator=generator).tolist() for a, b in lengths]
    return [TokenSequence(tuple(i), a) for i, (a, _) in zip(ids, lengths, strict=True)]


def a_turn() -> Turn:
    sequences = random_sequences()
    return Turn(0, Phase.EDIT, (), tuple(sequences), mini_batch_weights(sequences, 4))


def llama(**options: Any) -> LanguageModel:
    dtype = options.pop("dtype", torch.float32)
    model = tiny_llama(dtype=dtype)
    return LanguageModel(model, None, find_edit_modules(model, LLAMA_MODULES, 0), **options)


def an_update(model: LanguageModel, scale: float = 1e-2) -> dict[str, LowRankUpdate]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: LowRankUpdate(torch.randn(d_k, 3, generator=generator), scale * torch.randn(3, d_v, generator=generator))
        for name, (d_k, d_v) in model.shapes.items()
    }


def logits_one_by_one(model: Any, sequences: list[TokenSequence]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([s.ids])).logits[0, s.answer_start - 1 : -1] for s in sequences])


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    """`auto` finds the output projections; batched answer logits are those of each sequence alone; edits move them."""
    config_class, sizes, last, shape = FAMILIES[family]
    torch.manual_seed(0)
    config = config_class(**dict(SMALL.items()), **sizes)
    plain = transformers.AutoModelForCausalLM.from_config(config).eval()
    model = LanguageModel(plain, None, find_edit_modules(plain, "auto", 2), compute_tokens=40)
    assert list(model.shapes)[-1] == last
    assert list(model.shapes.values()) == [shape, shape]

    sequences = random_sequences()
    alone = logits_one_by_one(plain, sequences).split([s.answer_length for s in sequences])
    for batch in model.batches(sequences):
        expected = torch.cat([alone[member] for member in batch.members])
        torch.testing.assert_close(model.answer_logits(batch), expected, rtol=1e-4, atol=1e-4)

    capture = model.capture(a_turn())
    answers = sum(s.answer_length for s in sequences)
    for name, (d_k, d_v) in model.shapes.items():
        assert capture.modules[name].keys.shape == (answers, d_k)
        assert capture.modules[name].value_grads.shape == (answers, d_v)
        assert capture.modules[name].value_grads.norm() > 0
    model.apply(an_update(model))
    assert not torch.allclose(torch.cat(alone), logits_one_by_one(plain, sequences))


def test_capture_forms_no_parameter_gradient_and_no_graph_below() -> None:
    model = llama()
    seen: dict[str, bool] = {}
    for name, module in model.model.named_modules():
        if name.endswith(".mlp"):  # hooks of the parent run after those of its edit module
            module.register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out.requires_grad))
    model.capture(a_turn())
    assert seen == {f"model.layers.{layer}.mlp": layer >= 2 for layer in range(4)}
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.model.parameters())


def test_captures_and_losses_are_cut_where_padding_is_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the device has an overhead; the facts are the same."""

    def tokens_computed(**overhead: int) -> int:
        monkeypatch.setattr(language_model, "BATCH_OVERHEAD", overhead)
        model, seen = llama(compute_tokens=10_000), []
        model.model.register_forward_pre_hook(
            lambda _model, _args, options: seen.append(options["input_ids"].numel()), with_kwargs=True
        )
        model.capture(a_turn())
        model.losses([LossTerm(a_turn().sequences, 1.0)])
        model.keys_at(a_turn().sequences, [len(one.ids) - 2 for one in a_turn().sequences])
        return sum(seen)

    real = 3 * sum(len(one.ids) - 1 for one in a_turn().sequences)
    assert tokens_computed(cuda=0) > 1.2 * real
    assert tokens_computed(cpu=0) == real


class Copies(TorchDispatchMode):
    """Counts copies from the host to the meta device, which asks for them where a GPU would."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, found = (
            {one.device.type for one in tree_leaves(part) if isinstance(one, torch.Tensor)} for part in (args, result)
        )
        self.count += "cpu" in given and "meta" in found
        return result


@pytest.mark.parametrize(
    "work",
    [
        lambda model, turn: model.capture(turn),
        lambda model, turn: model.capture(turn, every_token=True),
        lambda model, turn: model.losses([LossTerm(turn.sequences, 1.0)]),
        lambda model, turn: model.weight_gradients([LossTerm(turn.sequences, 1.0)]),
        lambda model, turn: model.reference_logits(turn.sequences),
        lambda model, turn: model.keys_at(turn.sequences, [len(one.ids) - 2 for one in turn.sequences]),
        lambda model, turn: list(model.token_keys(turn.sequences)),
    ],
)
def test_a_batch_goes_to_the_device_in_one_copy(
    work: Callable[[LanguageModel, Turn], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all that belongs to it."""
    # transformers reads there whether positions are those of several texts, which no tensor on meta can say
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda _positions: None)
    plain = tiny_llama().to("meta")
    model = LanguageModel(plain, None, find_edit_modules(plain, LLAMA_MODULES, 0), compute_tokens=30)
    with Copies() as copies, contextlib.suppress(RuntimeError):  # of the numbers that are read at the end
        work(model, a_turn())
    assert copies.count == len(list(model.batches(a_turn().sequences))) > 1


def test_an_update_step_lowers_the_loss() -> None:
    """A step against K^T G, the weight's gradient, must make the answers likelier."""
    model = llama()
    before = model.capture(a_turn())
    model.apply({n: LowRankUpdate(c.keys.T, -1e-2 * c.value_grads) for n, c in before.modules.items()})
    assert model.capture(a_turn()).loss < before.loss


def test_apply_reports_what_it_did() -> None:
    model = llama()
    updates = an_update(model)
    start = model.snapshot()
    changes = model.apply(updates)
    for name, update in updates.items():
        delta = update.left @ update.right
        assert changes[name].norm == pytest.approx(float(delta.norm()), rel=1e-5)
        assert changes[name].largest == pytest.approx(float(delta.abs().max()), rel=1e-5)
        assert changes[name].drift == pytest.approx(float(delta.norm() / start[name].norm()), rel=1e-4)
        torch.testing.assert_close(model.edited[name].weight - start[name], delta.T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("master", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_snapshot_and_restore_are_bitwise(dtype: torch.dtype, master: bool) -> None:
    model = llama(dtype=dtype, master=master)
    weights = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    snapshot = model.snapshot()
    model.apply(an_update(model))
    assert any(not torch.equal(weight, weights[name]) for name, weight in model.model.state_dict().items())
    model.restore(snapshot)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.model.state_dict().items())
    assert all(torch.equal(master, snapshot[name]) for name, master in model.snapshot().items())


@pytest.mark.parametrize("master", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_original_weights_come_back_bit_for_bit(dtype: torch.dtype, master: bool) -> None:
    """For good, or for as long as they are asked for: then the edited ones are back, masters included."""
    model = llama(dtype=dtype, master=master)
    start = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    assert model.is_original()
    model.apply(an_update(model))
    assert not model.is_original()
    edited, masters = {n: w.clone() for n, w in model.model.state_dict().items()}, model.snapshot()
    with model.unedited():
        assert model.is_original()
        assert all(torch.equal(weight, start[name]) for name, weight in model.model.state_dict().items())
    assert all(torch.equal(weight, edited[name]) for name, weight in model.model.state_dict().items())
    assert all(torch.equal(weight, masters[name]) for name, weight in model.snapshot().items())
    model.restore_original()
    assert model.is_original()
    assert all(torch.equal(weight, start[name]) for name, weight in model.model.state_dict().items())


def test_a_master_that_rounds_to_the_original_is_not_the_original() -> None:
    model = llama(dtype=torch.bfloat16)
    start = model.edited[LLAMA_MODULES[0]].weight.clone()
    model.apply({LLAMA_MODULES[0]: LowRankUpdate(None, 1e-6 * start.T.float())})
    assert torch.equal(model.edited[LLAMA_MODULES[0]].weight, start)
    assert not model.is_original()


def test_masters_keep_what_bf16_would_lose() -> None:
    """Hundreds of steps, each far below half a unit in the last place of the weight."""
    ends = {}
    for master in (True, False):
        model = llama(dtype=torch.bfloat16, master=master)
        start = model.edited[LLAMA_MODULES[0]].weight.float()
        step = LowRankUpdate(None, 1e-4 * start.T.sign())
        for _ in range(300):
            model.apply({LLAMA_MODULES[0]: step})
        moved = (model.edited[LLAMA_MODULES[0]].weight.float() - start).abs()
        ends[master] = float(moved.mean())
    assert ends[True] == pytest.approx(0.03, rel=0.05)
    assert ends[False] < 0.02


def test_an_update_that_is_not_finite_leaves_every_weight_as_it_was() -> None:
    model = llama()
    before = model.snapshot()
    updates = an_update(model)
    updates[LLAMA_MODULES[1]].right[0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match=r"the update of model\.layers\.3\.mlp\.down_proj is not finite"):
        model.apply(updates)
    assert all(torch.equal(weight, before[name]) for name, weight in model.snapshot().items())


@pytest.mark.parametrize("left", [True, False])
def test_an_update_of_another_shape_is_not_stretched(left: bool) -> None:
    """One row, say, would be added to every row."""
    model = llama()
    before, updates = model.snapshot(), an_update(model)
    name = LLAMA_MODULES[1]
    d_k, d_v = model.shapes[name]
    wrong = [(d_k, 1), (1, d_v), (d_v, d_k), (d_k, d_v + 1), (d_k,)]
    pairs = [((d_k, 2), (3, d_v)), ((1, 2), (2, d_v)), ((d_k, 2), (2, 1)), ((d_k, 1), (2, d_v))]
    for factors in pairs if left else [(shape,) for shape in wrong]:
        made = [torch.ones(shape) for shape in factors]
        updates[name] = LowRankUpdate(made[0] if left else None, made[-1])
        with pytest.raises(
            ValueError, match=rf"the update of {name} has factors of shape .* \({d_k}, {d_v}\) of its map"
        ):
            model.apply(updates)
    assert all(torch.equal(weight, before[name]) for name, weight in model.snapshot().items())


def test_finite_factors_of_an_update_that_is_not_finite() -> None:
    model = llama()
    before = model.snapshot()
    with pytest.raises(FloatingPointError, match=r"the update of .* is not finite"):
        model.apply(an_update(model, scale=1e38))
    assert all(torch.equal(weight, before[name]) for name, weight in model.snapshot().items())


def test_an_update_too_large_for_its_norms_to_vouch_for_it_is_looked_at_itself() -> None:
    """||left|| ||right|| is beyond float32, DeltaW is not: it is taken, like any other."""
    model = llama()
    name, (d_k, d_v) = LLAMA_MODULES[0], model.shapes[LLAMA_MODULES[0]]
    left, right = torch.zeros(d_k, 2), torch.zeros(2, d_v)
    left[0, 0], right[1, 0] = 1e20, 1e20
    assert model.apply({name: LowRankUpdate(left, right)})[name].norm == 0
    right[0, 0] = 1e-20
    assert model.apply({name: LowRankUpdate(left, right)})[name].largest == pytest.approx(1.0)


class Formed(TorchDispatchMode):
    """Counts the entries of matrix products."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.entries += result.numel() if func is torch.ops.aten.mm.default else 0
        return result


def test_each_update_is_formed_once() -> None:
    model = llama()
    with Formed() as formed:
        model.apply(an_update(model))
    assert formed.entries == sum(one.weight.numel() for one in model.edited.values())


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    ("make", "modules"), [(tiny_llama, LLAMA_MODULES), (tiny_gpt2, ["transformer.h.1.mlp.c_proj"])]
)
def test_rows_that_are_handled_together_change_nothing(
    make: Callable[..., Any], modules: list[str], dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [make() for _ in range(2)]
    whole, parts = (LanguageModel(one, None, find_edit_modules(one, modules, 0)) for one in models)
    updates = an_update(whole)
    if dense:
        updates = {name: LowRankUpdate(None, one.left @ one.right) for name, one in updates.items()}
    expected = whole.apply(updates)
    monkeypatch.setattr(edited, "TOGETHER", 100)
    for name, change in parts.apply(updates).items():
        assert vars_of(change) == pytest.approx(vars_of(expected[name]), rel=1e-6)
        torch.testing.assert_close(parts.edited[name].weight, whole.edited[name].weight, rtol=1e-6, atol=1e-8)


def vars_of(change: WeightChange) -> list[float | None]:
    return [change.norm, change.largest, change.drift]


def test_captures_that_are_not_finite_name_the_module() -> None:
    """The keys of one module overflow while the loss is finite."""
    model = llama()
    model.edited[LLAMA_MODULES[1]].module.register_forward_pre_hook(lambda _m, inputs: (inputs[0] + torch.inf,))
    model.edited[LLAMA_MODULES[1]].module.register_forward_hook(lambda _m, _i, output: output.nan_to_num(0, 0, 0))
    with pytest.raises(FloatingPointError, match=r"the keys or value gradients of model\.layers\.3\."):
        model.capture(a_turn())


def test_a_loss_that_is_not_finite_is_said() -> None:
    model = llama()
    model.model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        model.capture(a_turn())


def test_captures_go_where_they_are_told(tmp_path: Path) -> None:
    from harness.run.spill import CaptureFolder

    with CaptureFolder(tmp_path / "cache") as folder:
        spilled = llama().capture(a_turn(), allocate=folder.allocate)
        plain = llama().capture(a_turn())
        for name in LLAMA_MODULES:
            assert torch.equal(spilled.modules[name].keys, plain.modules[name].keys)
            assert torch.equal(spilled.modules[name].value_grads, plain.modules[name].value_grads)
        assert len(list(folder.folder.iterdir())) == 4
        with pytest.raises(ValueError, match="are free; free some, choose another folder"):
            folder.require({"huge": (10**9, 10**6)}, rows=10**3, kept=1)
    assert not list((tmp_path / "cache").iterdir())


def test_export_reloads_and_scores_the_same(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    model = llama()
    model.tokenizer = byte_tokenizer
    model.apply(an_update(model))
    model.export(tmp_path / "edited")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    sequences = random_sequences()
    assert torch.equal(logits_one_by_one(again, sequences), logits_one_by_one(model.model, sequences))
    source = ModelSource(locate(str(tmp_path / "edited"), tmp_path))
    assert load_tokenizer(source)("a b")["input_ids"] == byte_tokenizer("a b")["input_ids"]
    assert outline(source, "*.2.mlp.down_proj", 1).shapes == {"model.layers.2.mlp.down_proj": (40, 24)}
    assert [path.name for path in tmp_path.iterdir()] == ["edited"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("model.layers.9.mlp.down_proj", "matches no module.*named like 'model.layers.0.mlp.down_proj'"),
        ("*.ffn", "matches no module"),
        ("model.layers.3.mlp", "a LlamaMLP, which is no linear map"),
        ("model.embed_tokens", "an? Embedding, which is no linear map"),
    ],
)
def test_patterns_that_name_no_linear_map(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_edit_modules(tiny_llama(), [pattern], 0)


def test_globs_keep_the_models_order() -> None:
    found = find_edit_modules(tiny_llama(), ["*.3.mlp.down_proj", "*.[01].mlp.down_proj"], 0)
    assert list(found) == [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1, 3)]


def test_the_head_is_no_edit_module() -> None:
    with pytest.raises(ValueError, match="matches 'lm_head', the language-model head"):
        find_edit_modules(tiny_llama(), ["lm_head"], 0)


def test_a_concrete_class_serves_as_well(tmp_path: Path) -> None:
    tiny_llama().config.save_pretrained(tmp_path)
    source = ModelSource(str(tmp_path), class_name="LlamaForCausalLM")
    assert list(outline(source, "auto", 1).shapes) == ["model.layers.3.mlp.down_proj"]
    with pytest.raises(ValueError, match=r"model\.class_name=AutoModel: has no language-model head"):
        outline(ModelSource(str(tmp_path), class_name="AutoModel"), "auto", 1)


@pytest.mark.parametrize("pattern", ["auto", "model.layers.1.mlp.experts", "*.mlp.experts.down_proj"])
def test_fused_experts_are_refused_with_the_reason(pattern: str) -> None:
    config = transformers.MixtralConfig(**SMALL, **WIDTHS, num_key_value_heads=1, num_local_experts=2)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="mixture of experts, fused or routed"):
        find_edit_modules(model, pattern if pattern == "auto" else [pattern], 1)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/none", "a/b/c"])
def test_a_folder_that_does_not_exist(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.name_or_path=.*: no such folder"):
        locate(name, tmp_path)


def test_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json in that folder"):
        locate(str(tmp_path), tmp_path)


def test_a_model_that_cannot_be_fetched() -> None:
    with pytest.raises(
        ValueError, match=r"^model\.name_or_path=nobody/nothing: cannot be read \([^\n]*\); give a folder[^\n]*$"
    ):
        outline(ModelSource("nobody/nothing"), "auto", 1)


def test_a_class_transformers_does_not_have(tmp_path: Path) -> None:
    tiny_gpt2().config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.class_name=AutoModelForTelepathy: transformers has no such model"):
        outline(ModelSource(str(tmp_path), class_name="AutoModelForTelepathy"), "auto", 1)


def test_the_fingerprint_is_that_of_the_bits_alone() -> None:
    """Not of the number of threads, which changes the last bits of sums; a single bit, and an exchange, show."""
    torch.manual_seed(0)
    plain = nn.ModuleDict({"wide": nn.Linear(5760, 1536), "narrow": nn.Linear(3, 2)})
    nn.init.normal_(plain["wide"].weight)
    model, threads, seen = LanguageModel(plain, None, {}), torch.get_num_threads(), set()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            seen.add(model.fingerprint())
    finally:
        torch.set_num_threads(threads)
    assert len(seen) == 1
    weight = plain["narrow"].weight
    weight.view(-1)[:2] = weight.view(-1)[:2].flip(0)
    seen.add(model.fingerprint())
    weight.view(torch.int32)[1, 2] ^= 1
    seen.add(model.fingerprint())
    assert len(seen) == 3


@pytest.fixture
def _same_bits_asked() -> Iterator[None]:
    """As a run does on a GPU."""
    use_deterministic_algorithms()
    yield
    use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_same_bits_asked")
def test_gradients_are_asked_for_the_same_bits_in_earnest() -> None:
    """Attention's backward is deterministic only where torch would fail without; what never is, is refused by name."""
    plain = tiny_llama()
    model = LanguageModel(plain, None, {"down": plain.get_submodule("model.layers.1.mlp.down_proj")})
    seen = []
    head = plain.get_output_embeddings()
    look = head.register_forward_hook(
        lambda *_: seen.append((torch.is_grad_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()))
    )
    turn = a_turn()
    term = LossTerm(turn.sequences, 1.0)
    captured = model.capture(turn)
    model.weight_gradients([term])
    model.losses([term])
    assert {strict for asks, warns in seen if asks for strict in [not warns]} == {True}
    assert seen[-1] == (False, True)
    look.remove()

    def put(*_: object) -> None:
        torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))

    head.register_forward_hook(put)
    for compute in (lambda: model.capture(turn), lambda: model.weight_gradients([term])):
        with pytest.raises(ValueError, match=r"model.deterministic=true: .*put_.*; set model.deterministic=false"):
            compute()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    use_deterministic_algorithms(False)
    again = model.capture(turn)
    assert torch.equal(again.modules["down"].keys, captured.modules["down"].keys)


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> ModelSource:
    """A saved model whose file of weights holds something else."""
    tiny_llama().save_pretrained(folder)
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return ModelSource(str(folder))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()},
            r"39 of its weights are not in its files, which hold module\.lm_head\.weight instead \(the first is lm_h",
        ),
        (
            lambda tensors: {name: tensor for name, tensor in tensors.items() if "layers.2.mlp.down" not in name},
            r"1 of its weights are not in its files \(the first is model\.layers\.2\.mlp\.down_proj\.weight\); save",
        ),
        (
            lambda tensors: tensors | {"model.norm.weight": torch.ones(23)},
            r"model\.norm\.weight is 23 in its files and 24 in a model of its config\.json",
        ),
    ],
)
def test_weights_that_are_not_there_are_not_drawn_at_random(tmp_path: Path, change: Any, said: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.name_or_path={re.escape(str(tmp_path))}: {said}"):
        read_weights(rewritten(tmp_path, change), dtype=torch.float32, device=torch.device("cpu"))
