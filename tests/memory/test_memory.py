"""What a run will keep, against what it does keep."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedTokenizerFast

from config.compose import compose_config
from config.schema import EditorConfig, RunConfig, to_run_config
from harness.evaluation.locality import Distributions, Shift, compare_with
from harness.job import build_editor, source_of
from harness.job.devices import DTYPES
from harness.memory.asked import Facts, Item
from harness.memory.command import GIB, device_of, main, on_one_device
from harness.memory.items import items
from harness.memory.passes import LAYER_INSIDES, LAYER_WIDTHS, scored_bytes
from model import LanguageModel
from model.source import Outline, outline
from tests.commands import MODULES, save_tiny_model
from tests.conftest import ROOT

CPU, FACTS = torch.device("cpu"), Facts(tokens=10, answer_tokens=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerFast) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), byte_tokenizer)


def planned(folder: Path, *settings: str, device: torch.device = CPU) -> tuple[RunConfig, Outline, dict[str, Item]]:
    named = [f"model.name_or_path={folder}", f"model.edit_modules=[{','.join(MODULES)}]"]
    cfg = to_run_config(compose_config([*named, *settings]))
    sketch = outline(source_of(cfg), cfg.model.edit_modules, cfg.model.auto_layers)
    return cfg, sketch, {one.name: one for one in items(cfg, sketch, FACTS, device)}


def size(*tensors: Tensor) -> int:
    return sum(one.numel() * one.element_size() for one in tensors)


@pytest.mark.parametrize("half", ["fp32", "bf16"])
@pytest.mark.parametrize("precision", ["master", "in_place"])
def test_weights_are_those_of_the_loaded_model(folder: Path, half: str, precision: str) -> None:
    cfg, sketch, found = planned(folder, f"model.half={half}", f"model.edit_precision={precision}")
    model = LanguageModel.load(
        source_of(cfg), None, sketch.shapes, dtype=DTYPES[cfg.model.half], device=CPU, master=precision == "master"
    )
    own = {weight.data_ptr() for weight in model.model.parameters()}
    masters = [one.master for one in model.edited.values() if one.master.data_ptr() not in own]
    assert found["weights"].bytes == size(*model.model.parameters())
    assert found["originals"].bytes == size(*(one.original for one in model.edited.values()))
    assert size(*masters) == (found["masters"].bytes if "masters" in found else 0)
    assert found["set aside"].bytes == size(*model.snapshot().values())
    rows = (cfg.dataset.n_edits + cfg.editor.replay) * FACTS.answer_tokens
    captures = model.empty_captures(rows, None).values()
    assert found["captures"].bytes == size(*(side for one in captures for side in (one.keys, one.value_grads)))


def test_more_passes_and_more_tokens_are_more_memory(folder: Path) -> None:
    once = planned(folder, "editor=stableedit", "editor.passes=1")[2]
    five = planned(folder, "editor=stableedit", "editor.passes=5")[2]
    everywhere = planned(folder, "editor=stableedit", "editor.passes=1", "editor.token=all")[2]
    assert five["kept updates"].bytes == 5 * once["kept updates"].bytes
    assert five["passes"].bytes == 5 * once["captures"].bytes
    assert "passes" not in once
    for name in ("captures", "kept updates"):
        assert everywhere[name].bytes * FACTS.answer_tokens == once[name].bytes * (FACTS.tokens - 1)


@pytest.mark.parametrize(
    "settings",
    [
        ("editor=stableedit",),
        ("editor=stableedit", "editor.whitening_floor_mode=shift", "editor.whitening_solver=newton"),
        ("editor=ultraedit", "editor.statistics_scope=module"),
        ("editor=mend", "editor.rank=8"),
        ("editor=rledit", "editor.rank=8"),
    ],
)
@pytest.mark.parametrize("device", [CPU, torch.device("cuda")])
def test_the_editors_state_is_that_of_the_editor(folder: Path, settings: tuple[str, ...], device: torch.device) -> None:
    cfg, sketch, found = planned(folder, *settings, device=device)
    model: Any = type("Shapes", (), {"shapes": sketch.shapes, "devices": [CPU]})()
    editor = build_editor(cfg, model, CPU)
    assert found["statistics"].bytes == size(*editor.state_dict().values())
    parameters = list(editor.rule.parameters())  # type: ignore[attr-defined]
    assert (found["optimiser"].bytes if "optimiser" in found else 0) == 3 * size(*parameters)


@pytest.mark.parametrize("inside", [224, 512])
def test_activations_are_about_what_autograd_keeps(folder: Path, inside: int) -> None:
    """A layer more costs what it costs, or up to twice as much, whatever the size of its MLP."""
    cfg = planned(folder, "dataset.n_edits=3", "dataset.batch_size=1", "editor=stableedit")[0]
    estimated, kept = [], []
    for layers in (3, 6):
        sketch = Outline(
            None, {"m": (inside, 64)}, 0, width=64, vocabulary=64, layers=layers, lowest=1, keys_and_values=0
        )
        estimated += [one.bytes for one in items(cfg, sketch, FACTS, CPU) if one.name == "activations"]
        kept.append(bytes_kept(layers, inside))
    assert 1 < (estimated[1] - estimated[0]) / (kept[1] - kept[0]) < 2


def bytes_kept(layers: int, inside: int) -> int:
    """By autograd, for three questions of ten tokens, above the first layer's MLP but one."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=inside, num_hidden_layers=layers, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config).requires_grad_(False)
    model.get_submodule("model.layers.1.mlp.down_proj").register_forward_hook(lambda _m, _i, o: o.requires_grad_())
    kept: dict[int, Tensor] = {}
    own = {weight.data_ptr() for weight in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=torch.zeros(3, 10, dtype=torch.int64), use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("inside", [224, 512])
def test_a_layer_is_about_what_it_has_at_a_time(inside: int) -> None:
    """Where autograd keeps nothing, the most of any layer, or up to a quarter more."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=inside, num_hidden_layers=3, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config).base_model
    texts = torch.zeros(50, 10, dtype=torch.int64)
    with torch.inference_mode():
        most = most_bytes(lambda: model(input_ids=texts, use_cache=False))
    estimated = texts.numel() * (LAYER_WIDTHS * 64 + LAYER_INSIDES * inside) * 4
    assert 1 <= estimated / most < 1.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scored_logits_are_as_many_copies_as_are_made(dtype: torch.dtype) -> None:
    """At most, of the base model's answers and of an edited model's, all of them to locality questions."""
    rows, vocabulary = 8, 32768

    def scored(base: Distributions | None) -> Distributions | Shift:
        logits = torch.randn(rows, vocabulary, dtype=dtype)
        first, here = logits.argmax(-1), torch.ones(rows, dtype=torch.bool)
        return compare_with(logits[here], first[here], base)

    kept = scored(None)
    assert isinstance(kept, Distributions)
    most = max(most_bytes(lambda: scored(None)), most_bytes(lambda: scored(kept)))
    counted = rows * vocabulary * scored_bytes(dtype.itemsize)
    assert counted == pytest.approx(most, rel=0.05)


def most_bytes(work: Callable[[], object]) -> int:
    """Allocated at one time, beside what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    assert kept is not None
    changes = [one for one in profiler.profiler.kineto_results.events() if one.name() == "[memory]"]
    return max(accumulate(one.nbytes() for one in sorted(changes, key=lambda one: one.start_ns())))


def mistral(folder: Path) -> list[str]:
    """The folder of Mistral-7B v0.3 as far as its sizes go, without weights."""
    transformers.MistralConfig(vocab_size=32768, sliding_window=None).save_pretrained(folder)
    return ["model=mistral-7b", f"model.name_or_path={folder}"]


def test_stableedit_on_mistral_7b_fits_24_gib(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also with four modules, as a published row has them; what docs/runs.md says is what its command prints."""
    four = ",".join(f"model.layers.{layer}.mlp.down_proj" for layer in (28, 29, 30, 31))
    main([*mistral(tmp_path), f"model.edit_modules=[{four}]", "editor=stableedit", "--gib", "24"])
    assert "fits a GPU of 24 GiB" in capsys.readouterr().out
    page = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    shown = re.search(r"`python -m harness.memory model=mistral-7b (.+?)`", page)
    said = re.search(r"([0-9.]+) GiB for StableEdit on three\nmodules of Mistral-7B", page)
    assert shown
    assert said
    main([*mistral(tmp_path), *shown[1].split()])
    printed = capsys.readouterr().out
    assert f"{said[1]} GiB at most: fits a GPU of 24 GiB" in printed
    assert "7.25e+09 numbers in bf16" in printed


def test_an_editor_of_no_known_family_is_refused(folder: Path) -> None:
    cfg, sketch, _ = planned(folder, "editor=memit")
    unknown = replace(cfg, editor=EditorConfig(name="memit", lr=1.0))
    with pytest.raises(ValueError, match="editor=memit: nobody has said what it keeps"):
        items(unknown, sketch, FACTS, CPU)


def test_what_does_not_fit_names_what_makes_it_fit(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        main([*mistral(tmp_path), "editor=stableedit", "model.half=fp32", "--gib", "24"])
    assert "more than a GPU of 24 GiB; with model.half=bf16 it is 1" in str(end.value)
    with pytest.raises(SystemExit) as end:
        main([*mistral(tmp_path), "--gib", "10"])
    assert "still too much: edit fewer modules, or set model.device_map=auto" in str(end.value)


def test_a_model_that_is_laid_over_all_gpus_has_the_room_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    size = SimpleNamespace(total_memory=24 * GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: size)
    one, all_of_them = (
        device_of(to_run_config(compose_config([f"model.device_map={laid}"])), None) for laid in ("null", "auto")
    )
    assert all_of_them[1] == 3 * one[1]
    assert all_of_them[2] == "3 GPUs of 72.0 GiB together"


def test_two_gpus_are_not_one() -> None:
    for where, together in (("auto", True), ("cuda", True), ("cuda:0", True), ("cuda:1", False), ("cpu", False)):
        cfg = to_run_config(compose_config([f"editor_device={where}"]))
        assert on_one_device(cfg, torch.device("cuda")) == together
    both = to_run_config(compose_config(["model_device=cuda:1", "editor_device=cuda:1"]))
    assert on_one_device(both, device_of(both, 24)[0])
    laid = to_run_config(compose_config(["model.device_map=auto", "editor_device=cuda:1"]))
    assert on_one_device(laid, torch.device("cuda"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["--gib", "24", "model.device_map=auto"], "how many there are is not said; leave one of the two out"),
        (["--gib", "0"], "--gib 0.0: must be above"),
        (["--tokens", "4", "--answer-tokens", "4"], "below --tokens 4"),
        (["editor.alhpa=1"], "did you mean editor.alpha?"),
        (["--gib", "24", "editor.alhpa=1"], "did you mean editor.alpha?"),
        (["--gb", "1"], "see python -m harness.memory --help"),
        (["model=tiny", "editor=grace", "model.edit_modules=auto"], "2 modules, and editor=grace edits one"),
        (["model=tiny", "editor=malmen", "editor.rank=1920"], "editor.rank=1920: more than the "),
    ],
)
def test_mistakes_are_one_line(line: list[str], words: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(line)
    message = str(end.value)
    assert message.startswith("error: ")
    assert words in message
    assert "\n" not in message
