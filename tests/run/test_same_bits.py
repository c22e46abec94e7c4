"""Float32 is float32 whatever the machine's environment asks of GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from harness.ask import edit, open_edited
from harness.job.devices import kind_of
from harness.run.places import ROOT

ASKED = "import torch; from harness.run import prepare_libraries; {}; print(torch.get_float32_matmul_precision())"


def test_products_are_not_rounded_to_tf32() -> None:
    environment = os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}

    def precision(first: str) -> str:
        line = [sys.executable, "-c", ASKED.format(first)]
        return subprocess.run(
            line, env=environment, cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.strip()

    assert precision("pass") == "high"
    assert precision("prepare_libraries()") == "highest"


@pytest.mark.parametrize(
    "call", [lambda: edit("no-such-model", [{"prompt": "a", "answer": "b"}]), lambda: open_edited("no/such/run")]
)
def test_nor_are_those_of_python_users(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """They write caches that runs read."""
    asked: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    with pytest.raises(ValueError, match="no"):
        call()
    assert asked == ["highest"]


def test_a_gpu_has_its_name_among_what_last_bits_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"the card at {device.index}")
    assert kind_of(torch.device("cuda", 1)) == "the card at 1"
    assert kind_of(torch.device("cpu")) == "cpu"
