"""`python -m benchmarks.gpu`, on a CPU and a small model: on a machine that has little installed, and when it fails."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bare import CUTS, Cut, bare
from benchmarks.gpu import checks, command, peak
from benchmarks.gpu.command import main
from benchmarks.gpu.cost import targets
from benchmarks.gpu.made import SHAPES, Facts, build, editable
from benchmarks.gpu.runs import METHODS, Course, Run
from config.compose import compose_config
from config.schema import to_run_config
from data.records import Phase
from editor.meta_train import MetaSettings
from editor.registry import EDITORS
from harness.job import settings_of
from model.language_model import BATCH_OVERHEAD, COMPUTE_TOKENS
from tests.conftest import ROOT

CPU = torch.device("cpu")
ENOUGH = {"torch", "transformers", "tokenizers", "numpy", "safetensors", "psutil", "rich", "tqdm", "xxhash"}
IMPORTED_AS = {"hydra-core": "hydra"}
SHORT = ("--device", "cpu", "--turns", "2", "--facts", "4", "--editors", "ultraedit")


def not_needed() -> list[str]:
    """The other packages that a run is said to need, and what comes with them."""
    lines = (ROOT / "requirements.txt").read_text().partition("# What tests it")[0].splitlines()
    names = {line.partition("==")[0] for line in lines if "==" in line and line[0] != "#"}
    assert names > ENOUGH
    return ["antlr4", *sorted(IMPORTED_AS.get(name, name) for name in names - ENOUGH)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_it_runs_where_little_is_installed(dtype: str, tmp_path: Path) -> None:
    """To the end, each check passed, with all packages out of reach that such a machine may lack."""
    arguments = ["--device", "cpu", "--turns", "3", "--facts", "10", "--dtype", dtype, "--out", "found.json"]
    program = (
        f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules.update(dict.fromkeys({not_needed()!r})); "
        f"sys.argv[1:] = {arguments!r}; runpy.run_module('benchmarks.gpu', run_name='__main__')"
    )
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]

    found = json.loads((tmp_path / "found.json").read_text())
    assert {check["passed"] for check in found["checks"]} == {True}
    assert f"{len(found['checks'])} of {len(found['checks'])} checks passed" in done.stdout
    assert set(found["editors"]) == set(METHODS)
    for name, cost in found["editors"].items():
        assert f"{name}: {cost['ms_together']:.3f} ms an edit" in done.stdout
        assert len(cost["turns"]) == 3
        assert cost["ms_together"] >= max(cost["ms"].values()) > 0
        assert 0 < cost["times_forward_backward"] < cost["times_forward"]
        assert cost["peak_bytes"] > 2**20
        assert bool(cost["training_ms"]) == (METHODS[name].meta is not None)
    assert found["bare"]["share_of_peak"] is None
    assert found["targets"] == {}


@pytest.mark.parametrize("absent", [ENOUGH, {"xxhash"}, {"tokenizers", "rich"}])
def test_missing_packages_are_named_in_one_line(absent: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, and before anything is imported that needs one."""
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as end:
        runpy.run_module("benchmarks.gpu", run_name="__main__")
    assert isinstance(end.value.code, str)
    said, _, remedy = end.value.code.partition("; ")
    assert set(said.removeprefix("error: not installed: ").split(", ")) == absent
    assert "-m pip install " in remedy
    assert "\n" not in remedy


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cuda:7"], "--device cuda:7: this machine has "),
        (["--device", "mps"], "--device mps: must be cpu, cuda or cuda:N"),
        (["--device", "gpu0"], "--device gpu0: must be cpu, cuda or cuda:N"),
        (["--turns", "1"], "--turns 1: must be 2 or more"),
        (["--facts", "0"], "--facts 0: must be 1 or more"),
        (["--facts", "many"], "argument --facts: invalid int value: 'many'"),
        (["--shape", "gpt-5"], "argument --shape: invalid choice: 'gpt-5'"),
        (["--editors", "rome"], "argument --editors: invalid choice: 'rome'"),
        (["--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8'"),
        (["--out", "no/such/folder.json"], "--out no/such/folder.json: no such folder"),
        (["--out", "."], "--out .: a folder"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert isinstance(end.value.code, str)
    assert end.value.code.startswith(f"error: {said}")
    assert "\n" not in end.value.code


def test_a_model_that_does_not_fit_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    room = 20 * 2**30
    monkeypatch.setattr(command.psutil, "virtual_memory", lambda: type("Memory", (), {"available": room}))
    with pytest.raises(ValueError, match=r"mistral-7b: its weights take 27.0 GiB in fp32, and cpu has 20.0 GiB left"):
        command.parse(["--device", "cpu", "--shape", "mistral-7b"])
    assert command.parse(["--device", "cpu", "--shape", "mistral-7b", "--dtype", "bf16"]).dtype == "bf16"


def test_a_check_that_fails_is_a_line_and_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two faults: bf16 that is asked to be exact, and a resumed run that comes without its statistics."""
    restore = Run.restore

    def forgetful(self: Run, folder: Path) -> None:
        fresh = {name: tensor.clone() for name, tensor in self.editor.state_dict().items()}
        restore(self, folder)
        self.editor.load_state_dict(fresh)

    monkeypatch.setattr(Run, "restore", forgetful)
    monkeypatch.setattr(checks, "BF16", 0.0)
    with pytest.raises(SystemExit) as end:
        main([*SHORT, "--out", str(tmp_path / "found.json")])
    assert isinstance(end.value.code, str)
    first, second = end.value.code.splitlines()
    assert first.startswith("FAILED  one layer in bf16 is that in float32 within 0: keys ")
    assert second.startswith("FAILED  ultraedit: resumed after turn 1 of 2, it gives the same: ")
    failed = [check for check in json.loads((tmp_path / "found.json").read_text())["checks"] if not check["passed"]]
    assert [f"FAILED  {check['name']}: {check['detail']}" for check in failed] == [first, second]


def test_what_is_not_finite_or_was_not_learned_is_told() -> None:
    shape = SHAPES["small"]
    course = Course(editable(build(shape, torch.float32, CPU)), shape, Facts(4, 1024), turns=1)
    run = Run(course, "ultraedit")
    run.begin()
    run.go_on(run.last)
    assert checks.finite("ultraedit", run).passed
    assert checks.learned("ultraedit", run).passed
    run.model.restore_original()
    assert not checks.learned("ultraedit", run).passed
    next(iter(run.model.edited.values())).weight[3, 5] = torch.inf
    assert "not so the weight of model.layers.1.mlp.down_proj" in checks.finite("ultraedit", run).detail


# ---------------------------------------------------------------------------------------------------------------------
# That it measures what it says


@pytest.mark.parametrize("name", METHODS)
def test_settings_are_those_of_the_presets(name: str) -> None:
    """But for the solver, which auto chooses by the device."""
    cfg = to_run_config(compose_config([f"editor={name}", "model=mistral-7b"]))
    wanted: dict[str, Any] = asdict(settings_of(EDITORS[name].Settings, cfg))
    if METHODS[name].warms_up:
        wanted["whitening_solver"] = "newton"
    assert asdict(METHODS[name].settings(SHAPES["mistral-7b"])) == wanted
    assert METHODS[name].warms_up == cfg.warms_up()
    meta = METHODS[name].meta
    assert meta is None or meta == settings_of(MetaSettings, cfg)


def test_a_turn_is_as_long_as_the_design_counts_with() -> None:
    """2,000 tokens and 400 rows a turn of 100 facts, and turn i a function of i."""
    facts = Facts(100, 1024)
    turns = [facts.turn(index, Phase.EDIT) for index in range(20)]
    sequences = [sequence for turn in turns for sequence in turn.sequences]
    assert sum(len(sequence.ids) - 1 for sequence in sequences) / 20 == pytest.approx(2000, rel=0.03)
    assert sum(sequence.answer_length for sequence in sequences) / 20 == pytest.approx(400, rel=0.03)
    assert turns[7] == facts.turn(7, Phase.EDIT)
    assert turns[7].sequences != turns[8].sequences
    training = facts.training_turn(3)
    answers = [[one.ids[one.answer_start :] for one in each] for each in (training.edits.sequences, training.rephrases)]
    assert answers[0] == answers[1]


def test_a_turn_on_a_gpu_has_little_padding() -> None:
    """Cut as a capture cuts it there; and the bare work that it is compared with is tried in that cut too."""
    capture = Cut(COMPUTE_TOKENS["cuda"], BATCH_OVERHEAD["cuda"])
    facts = Facts(100, 1024)
    turns = [facts.turn(index, Phase.EDIT).sequences for index in range(20)]
    real = sum(len(sequence.ids) - 1 for turn in turns for sequence in turn)
    batches = {cut: [batch for turn in turns for batch in cut.batches(turn)] for cut in (Cut(8192), capture)}
    padding = {cut: 1 - real / sum(one.input_ids.numel() for one in found) for cut, found in batches.items()}
    assert padding[Cut(8192)] > 0.3
    assert padding[capture] < 0.09
    assert len(batches[capture]) <= 4 * len(turns)
    assert capture in CUTS["cuda"]


def test_flops_are_those_that_torch_counts() -> None:
    """Of one batch without padding. Plain attention is counted for all pairs of positions, and norms are not."""
    shape = SHAPES["small"]
    model = editable(build(shape, torch.float32, CPU))
    model.model.set_attn_implementation("eager")
    sequence = Facts(1, 1024).turn(0, Phase.EDIT).sequences[0]
    with FlopCounterMode(display=False) as counter:
        bare(model, [sequence] * 3, Cut(512), backward=False)
    tokens, width, layers = len(sequence.ids) - 1, shape.sizes["hidden_size"], shape.sizes["num_hidden_layers"]
    norms = 2 * (2 * layers + 1) * width * tokens
    unseen = 2 * tokens**2 * width * layers
    assert peak.forward_flops(model, [sequence] * 3) == counter.get_total_flops() + 3 * (norms - unseen)


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10G", None),
        ("Tesla T4", None),
    ],
)
def test_cards_are_known_by_the_names_their_drivers_give(
    name: str, card: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a share of the peak is said only where there is one."""
    assert peak.card_of(name) == card
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: name)
    share, of = peak.share_of_peak(1e12, 0.01, torch.device("cuda"), torch.bfloat16)
    if card is None:
        assert (share, of) == (None, f"the table does not have {name}")
    else:
        assert share == 1e14 / peak.PEAKS[card]
    assert peak.share_of_peak(1e12, 0.01, torch.device("cuda"), torch.float32)[0] is None


def test_targets_are_judged_on_their_card_alone_and_on_the_mean() -> None:
    """Which the turns that decompose count in."""
    shape = replace(SHAPES["small"], target=SHAPES["mistral-7b"].target)
    course = Course(editable(build(shape, torch.bfloat16, CPU)), shape, Facts(4, 1024), turns=1)
    report: dict[str, Any] = {
        "machine": {"device": "NVIDIA H200"},
        "bare": {"share_of_peak": 0.39},
        "editors": {"stableedit": {"ms_together": 1.5, "ms_mean": 2.5}},
    }
    assert [each["met"] for each in targets(report, course).values()] == [False, False]
    report["editors"]["stableedit"]["ms_mean"] = 1.9
    assert [each["met"] for each in targets(report, course).values()] == [False, True]
    assert targets({**report, "machine": {"device": "NVIDIA H100 PCIe"}}, course) == {}
    assert targets(report, replace(course, shape=SHAPES["small"])) == {}
