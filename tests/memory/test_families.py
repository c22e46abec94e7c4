"""What editors of the loaded model will keep, against what the editors themselves do keep.

Letters: m kept keys, n facts of a turn, d_k key size, d_v value size of an edit module.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from config.compose import compose_config
from config.schema import RunConfig, to_run_config
from data.records import Phase, TokenSequence, Turn
from editor.base import Editor, LocateInputs
from editor.located import KeptKeys, SecondMomentFactor, null_space
from harness.job import build_editor, source_of
from harness.job.moments import MomentSums
from harness.memory.asked import Asked, Facts, Item
from harness.memory.command import main
from harness.memory.items import highest, items
from harness.memory.passes import searched
from harness.watch import TurnDiagnostics
from model import LanguageModel
from model.offsets import OffsetLosses
from model.source import Outline, find_edit_modules, outline
from tests.commands import MODULES, save_tiny_model
from tests.conftest import ROOT
from tests.editor.test_located import contexts_of
from tests.memory.test_memory import mistral, most_bytes, size

CPU, FACTS = torch.device("cpu"), Facts(tokens=10, answer_tokens=3)
TURNS, N, D_K, D_V = 3, 3, 40, 24  # of the tiny Llama
SHORT = [
    f"num_seq={TURNS}", f"dataset.n_edits={N}", "diagnostics.previous=1", "dataset.prompt_form=raw",
    "dataset.answer_end=none", "editor_device=cpu", "model_device=cpu",
]  # fmt: skip
LOCATED = ["editor.v_num_grad_steps=2", "editor.prefixes=2"]
ONE, TWO = (f"model.edit_modules=[{','.join(names)}]" for names in (MODULES[:1], MODULES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerFast) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), byte_tokenizer)


def planned(folder: Path, *settings: str) -> tuple[RunConfig, dict[tuple[str, str | None], Item]]:
    """Items by name and part."""
    cfg = to_run_config(compose_config([f"model.name_or_path={folder}", *SHORT, *settings]))
    sketch = outline(source_of(cfg), cfg.model.edit_modules, cfg.model.auto_layers)
    return cfg, {(one.name, one.while_in): one for one in items(cfg, sketch, FACTS, CPU)}


def loaded(cfg: RunConfig, folder: Path) -> LanguageModel:
    base = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = cfg.model.edit_modules
    return LanguageModel(base, None, find_edit_modules(base, names, cfg.model.auto_layers))


def turn_of(index: int, phase: Phase = Phase.EDIT) -> Turn:
    """Facts as long as was said."""
    draw = torch.Generator().manual_seed(index)
    ids = torch.randint(0, 256, (N, FACTS.tokens), generator=draw).tolist()
    sequences = tuple(TokenSequence(tuple(row), FACTS.tokens - FACTS.answer_tokens) for row in ids)
    return Turn(index, phase, (), sequences, (1 / (N * FACTS.answer_tokens),) * N)


def second_moments(_name: str) -> Tensor:  # (d_k, d_k)
    """Half of the directions are null."""
    return torch.diag(torch.cat([torch.full((D_K // 2,), 1e-3), torch.ones(D_K // 2)])).double()


def edited(cfg: RunConfig, model: LanguageModel, warm_up: int = 0) -> tuple[Editor, dict[str, Tensor]]:
    """The editor after its turns, and the updates of earlier turns that are kept then."""
    given = LocateInputs(contexts_of, second_moments) if cfg.editor.asks_for_text() else None
    editor = build_editor(cfg, model, CPU, given=given)
    diagnostics = TurnDiagnostics(CPU, previous=cfg.diagnostics.previous, seed=0)
    for index in range(warm_up + TURNS):
        turn = turn_of(index, Phase.WARM_UP if index < warm_up else Phase.EDIT)
        diagnostics.line(turn, editor.edit(model, turn), editor, 1.0)
    return editor, diagnostics.state()[0]


# ---------------------------------------------------------------------------------------------------------------------
# Locate then edit


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (["editor=rome", ONE, *LOCATED], "factors"),
        (["editor=memit", TWO, *LOCATED, "editor.keep_keys=true"], "factors"),
        (["editor=alphaedit", TWO, *LOCATED], "bases"),
    ],
)
def test_located(folder: Path, settings: list[str], name: str) -> None:
    """To the byte: the null space is half of all directions, the largest that is kept as its own basis."""
    cfg, found = planned(folder, *settings)
    editor, updates = edited(cfg, loaded(cfg, folder))
    factors = [editor.factor] if hasattr(editor, "factor") else editor.coordinates.values()  # type: ignore[attr-defined]
    held = [one.factor if hasattr(one, "factor") else one._basis for one in factors]
    assert found[name, None].bytes == size(*held)
    assert found["kept updates", None].bytes == size(*updates.values())
    state = [tensor for key, tensor in editor.state_dict().items() if tensor.ndim]
    assert size(*state) == (found["kept keys", None].bytes if ("kept keys", None) in found else 0)
    assert ("kept keys", None) in found or name == "factors"


@pytest.mark.parametrize("turns", [1, 13, 20])
def test_kept_keys_are_never_more_than_is_said(folder: Path, turns: int) -> None:
    """Rows and factor, and from the turn on in which they are more than d_k, the Gram matrix; here of 3 keys a turn."""
    kept, most = KeptKeys(D_K, 10.0, torch.float32, CPU), 0
    draw = torch.Generator().manual_seed(0)
    for _ in range(turns):
        kept.left_factor(torch.randn((N, D_K), dtype=torch.float64, generator=draw), keep=True)
        most = max(most, size(*(part for part in kept.state().values() if part.ndim)))
    settings = ["editor=alphaedit", ONE]
    told = planned(folder, *settings, f"num_seq={turns}")[1]["kept keys", None].bytes
    bound = planned(folder, *settings, "num_seq=null")[1]["kept keys", None].bytes
    assert most <= told <= min(bound, 1.05 * most)
    assert ("kept keys", None) not in planned(folder, *settings, "editor.keep_keys=false")[1]


def test_sums_of_second_moments_are_a_part_of_their_own(folder: Path, tmp_path: Path) -> None:
    cfg, found = planned(folder, "editor=memit", TWO)
    model = loaded(cfg, folder)
    sums = MomentSums(model, list(model.shapes), tmp_path / "part.safetensors")
    assert found["sums", "second moments"].bytes == size(*sums.sums.values())
    here = [one for one in found.values() if one.while_in in (None, "second moments")]
    later = sum(one.bytes for one in here if one.while_in is None and one.name not in ("weights", "originals"))
    assert later
    assert highest(here, True) == sum(one.bytes for one in here) - later


@pytest.mark.parametrize("editor", ["memit", "alphaedit"])
def test_factoring_takes_what_is_told(editor: str) -> None:
    """Or up to half less, of one module; what the editor keeps of it included."""
    d_k = 200
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn((2 * d_k, d_k), generator=draw) * torch.linspace(0.01, 1, d_k)
    moments = keys.T @ keys / len(keys)
    told = told_at(d_k, f"editor={editor}", part="factoring")
    if editor == "memit":
        taken = most_bytes(lambda: SecondMomentFactor("m", moments, 1e-6, CPU))
    else:
        taken = most_bytes(lambda: null_space("m", moments, 0.2, CPU))
    assert 1 <= round(told["being factored"] / taken, 3) < 2


def told_at(d_k: int, *settings: str, part: str, n_edits: int = 20, budget: int = 512) -> dict[str, int]:
    """Bytes of a part, by item, of a model of three layers, d_v 64, with one edit module of that key size."""
    more = [f"dataset.n_edits={n_edits}", f"model.compute_tokens={budget}", "editor.prefixes=0"]
    cfg = to_run_config(compose_config(["model=tiny", *more, *settings]))
    sketch = Outline(None, {"m.1.m": (d_k, 64)}, 0, 64, 260, layers=3, lowest=1, keys_and_values=384)
    return {one.name: one.bytes for one in items(cfg, sketch, FACTS, CPU) if one.while_in == part}


@pytest.mark.parametrize("turns", [5, 11])
def test_a_solve_takes_what_is_told(turns: int) -> None:
    """Or up to half less; with fewer keys than d_k = 200, and in the turn in which they become more."""
    d_k, n = 200, 20
    kept = KeptKeys(d_k, 10.0, torch.float32, CPU)
    turn = torch.randn((n, d_k), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(turns - 1):
        kept.left_factor(turn, keep=True)
    taken = most_bytes(lambda: kept.left_factor(turn, keep=True))
    told = told_at(d_k, "editor=alphaedit", f"num_seq={turns}", part="update")
    assert 1 <= (told["kept keys anew"] + told["solve"]) / taken < 2


def test_second_moments_take_what_is_told(tmp_path: Path) -> None:
    """Or up to half less, beside the sums."""
    shape = {"hidden_size": 64, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 3}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=260, **shape)).requires_grad_(False)
    modules = find_edit_modules(base, ["model.layers.1.mlp.down_proj"], 0)
    sums = MomentSums(
        LanguageModel(base, None, modules, compute_tokens=512), list(modules), tmp_path / "part.safetensors"
    )
    windows = [TokenSequence((1,) * 65, 64)] * 32
    taken = most_bytes(lambda: sums._add(windows))
    told = told_at(512, "editor=memit", part="second moments")
    assert 1 <= sum(told[name] for name in ("keys over text", "a product", "a layer")) / taken < 2


@pytest.mark.parametrize("editor", ["memit", "grace"])
def test_a_search_keeps_what_stands_before(folder: Path, editor: str) -> None:
    """To the byte where positions are the last before the answer."""
    words = [*LOCATED, "editor.prefixes=0", "editor.fact_token=last", "editor.kl_factor=0"] if editor == "memit" else []
    part = "targets" if editor == "memit" else "values"
    cfg, found = planned(folder, f"editor={editor}", ONE, *words)
    losses = search(loaded(cfg, folder), MODULES[0], turn_of(0).sequences)
    caches = [layer for before in losses.before for layer in before.cache.layers]
    assert found["what stands before", part].bytes == size(*(side for one in caches for side in (one.keys, one.values)))
    assert found["tails read once", part].bytes == size(*losses.below._kept.values())


def search(model: LanguageModel, name: str, sequences: Sequence[TokenSequence]) -> OffsetLosses:
    """At the last position before each answer, with blocks below read already."""
    losses = model.offset_losses(name, sequences, [one.answer_start - 1 for one in sequences])
    losses(torch.zeros(len(sequences), model.shapes[name][1]))
    return losses


@pytest.mark.parametrize("answer_tokens", [4, 20])
def test_a_layer_of_a_search_takes_what_is_told(answer_tokens: int) -> None:
    """Or up to half less: few tails with much before them, and tails alone."""
    each, name = Facts(24, answer_tokens), "model.layers.1.mlp.down_proj"
    before, longest = each.tokens - answer_tokens - 1, each.tokens - 1
    told, taken = [], []
    for layers in (3, 6):
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": layers}
        config = transformers.LlamaConfig(vocab_size=260, hidden_size=64, intermediate_size=224, **heads)
        base = transformers.LlamaForCausalLM(config).requires_grad_(False)
        model = LanguageModel(base, None, find_edit_modules(base, [name], 0))
        losses = search(model, name, [TokenSequence((1,) * each.tokens, before + 1)] * 6)
        taken.append(most_bytes(lambda losses=losses: losses(torch.zeros(6, 64))))
        cfg = to_run_config(compose_config(["model=tiny", "editor=grace"]))
        sketch = Outline(None, model.shapes, 0, 64, 260, layers, lowest=1, keys_and_values=2 * 2 * 16 * layers)
        sizes = {"longest": longest, "before": before, "tail": answer_tokens}
        found = searched(Asked(cfg, sketch, each, CPU), name, 6, **sizes, part="values")
        told.append(sum(one.bytes for one in found if one.name in ("attended to", "activations")))
    assert 1 <= (told[1] - told[0]) / (taken[1] - taken[0]) < 2


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning


@pytest.mark.parametrize("editor", ["ft_l", "ft_m", "locft_bf"])
def test_fine_tuning(folder: Path, editor: str) -> None:
    cfg, found = planned(folder, f"editor={editor}", TWO, "editor.num_steps=2", "editor.stop_loss=0")
    model = loaded(cfg, folder)
    tuner, updates = edited(cfg, model)
    assert tuner.state_dict() == {}
    assert found["kept updates", None].bytes == size(*updates.values()) == 2 * 2 * D_K * D_V * 4
    assert found["start", "steps"].bytes == size(*model.snapshot().values())
    assert not {name for name, _ in found} & {"captures", "statistics", "factors", "sums"}


def wide(editor: str, *settings: str) -> tuple[int, int]:
    """Bytes of a turn at its most crowded, as they are told and as they are, where the edited weight outweighs all."""
    cfg = to_run_config(compose_config([*SHORT, "model=tiny", f"editor={editor}", *settings]))
    shape = {"vocab_size": 260, "hidden_size": 128, "intermediate_size": 2048, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**shape, num_hidden_layers=3, initializer_range=0.2)
    base = transformers.LlamaForCausalLM(config).requires_grad_(False)
    name = "model.layers.1.mlp.down_proj"
    model = LanguageModel(base, None, find_edit_modules(base, [name], 0))
    tuner, turn = build_editor(cfg, model, CPU), turn_of(5)
    if cfg.warms_up():
        tuner.edit(model, turn_of(4, Phase.WARM_UP))
    sketch = Outline(None, model.shapes, 0, width=128, vocabulary=260, layers=3, lowest=1, keys_and_values=3 * 256)
    told = items(cfg, sketch, FACTS, CPU)
    parts = [one for one in told if one.while_in in ("steps", "training", "merging") or one.name == "read once"]
    with model.reading_once():
        return highest(parts, True), most_bytes(lambda: tuner.edit(model, turn))


@pytest.mark.parametrize(
    ("editor", "settings"),
    [
        ("ft_m", ["editor.num_steps=2", "editor.stop_loss=0"]),
        ("locft_bf", ["editor.num_steps=2", "editor.stop_loss=0"]),
        ("wise", ["editor.num_steps=2", "num_seq_zsre=1", "editor.lr=0.01", "editor.shards=1"]),
        ("wise", ["editor.num_steps=2", "num_seq_zsre=1", "editor.lr=0.01", "editor.shards=2"]),
        ("wise", ["editor.num_steps=2", "num_seq_zsre=1", "editor.lr=0.01", "editor.shards=3"]),
    ],
)
def test_a_turn_takes_what_is_told(editor: str, settings: list[str]) -> None:
    """Or up to a third less: of a WISE with one shard training is the most, of others merging."""
    told, taken = wide(editor, *settings)
    assert 1 <= told / taken < 1.5


# ---------------------------------------------------------------------------------------------------------------------
# Memories


def test_grace(folder: Path) -> None:
    """To the byte where every fact makes an entry of its own."""
    cfg, found = planned(folder, "editor=grace", ONE, "editor.num_steps=2", "editor.eps_init=1e-6")
    editor, updates = edited(cfg, loaded(cfg, folder))
    book = editor.codebook  # type: ignore[attr-defined]
    assert len(book.keys) == TURNS * N
    assert found["codebook", None].bytes == size(*(part for part in vars(book).values() if isinstance(part, Tensor)))
    assert updates == {}
    assert not {name for name, _ in found} & {"captures", "kept updates"}
    null = planned(folder, "editor=grace", ONE, "num_seq=null")[1]["codebook", None]
    assert "20,000 facts, for num_seq is null" in null.about


def test_wise(folder: Path) -> None:
    cfg, found = planned(folder, "editor=wise", ONE, "editor.num_steps=2", "num_seq_zsre=2", "editor.unrelated=5")
    model = loaded(cfg, folder)
    editor, updates = edited(cfg, model, warm_up=2)
    state = editor.state_dict()
    assert found["side memory", None].bytes == size(state["side"])
    assert found["unrelated inputs", None].bytes == size(state["unrelated"])
    assert updates == {}
    rows = model.capture(turn_of(0), every_token=True).modules.values()
    assert found["captures", "capture"].bytes == size(*(side for one in rows for side in (one.keys, one.value_grads)))
    assert not {name for name, _ in found} & {"kept updates", "factors"}


# ---------------------------------------------------------------------------------------------------------------------
# At 7B


W, C = 14336 * 4096, 14336**2  # entries of an edited weight, of second moments
CLOSED_FORM = ("ultraedit", "stableedit", "stableedit_plus")
SHOWN = (*CLOSED_FORM, "rledit", "malmen", "rome", "memit", "alphaedit", "ft_m", "grace", "wise")
TOKEN = 2 * 32 * 8 * 128 * 2  # bytes of a token's keys and values: both, layers, heads, size, bf16


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["editor=rome"], {"factors": 8 * C, "sums": 8 * C, "what stands before": 22 * 31 * TOKEN}),
        (
            ["editor=memit"],
            {"factors": 40 * C, "sums": 40 * C, "originals": 10 * W, "masters": 20 * W, "being factored": 48 * C,
             "what stands before": 100 * 7 * 31 * TOKEN, "kept updates": 5 * 5 * 100 * (14336 + 4096) * 4},
        ),
        (
            ["editor=alphaedit", "num_seq=20"],
            {"bases": 20 * C, "kept keys": 5 * (2000 * 14336 * 4 + 2000**2 * 8), "sums": 40 * C},
        ),
        (["editor=alphaedit"], {"kept keys": 5 * 12 * C}),
        (["editor=ft_m"], {"kept updates": 20 * W, "start": 4 * W, "steps": 20 * W, "raw gradient": 2 * W}),
        (["editor=ft_m", "diagnostics.previous=0"], {"kept updates": 4 * W}),
        (
            ["editor=grace"],
            {"codebook": 4 * (20_000 * (14336 + 4096 + 896 + 3) + 14336 * 896), "what stands before": 100 * 19 * TOKEN},
        ),
        (["editor=grace", "num_seq=10"], {"codebook": 4 * (1000 * (14336 + 4096 + 896 + 3) + 14336 * 896)}),
        (["editor=wise"], {"side memory": 4 * W, "unrelated inputs": 20 * 64 * 14336 * 4, "step": 25 * W}),
    ],
)  # fmt: skip
def test_mistral_7b(tmp_path: Path, settings: list[str], expected: dict[str, int]) -> None:
    """A fact has 24 tokens, 4 of them the answer: 19 stand before the one that predicts it, 31 with a prefix of 12."""
    cfg = to_run_config(compose_config([*mistral(tmp_path), *settings]))
    sketch = outline(source_of(cfg), cfg.model.edit_modules, cfg.model.auto_layers)
    found = {one.name: one.bytes for one in items(cfg, sketch, Facts(24, 4), torch.device("cuda"))}
    assert {name: found[name] for name in expected} == expected


def test_what_the_page_says_is_what_the_command_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")
    table = page[page.index("`python -m harness.memory model=mistral-7b") :].partition("\n\n")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(editor=.+?)` \| (.+?) \| (.+?) \|", table, flags=re.MULTILINE)
    assert {words.split()[0] for words, *_ in rows} == {f"editor={name}" for name in SHOWN}
    for words, *said in rows:
        for more, gib in zip(([], ["model.compute_tokens=1024"]), said, strict=True):
            main([*mistral(tmp_path), *words.split(), *more, "--gib", "100"])
            assert f"{gib} GiB at most: fits a GPU of 100 GiB" in capsys.readouterr().out
