"""Float32 is float32 whatever the machine's environment asks of GPUs."""

from __future__ import annotations

import os
import subprocess
import sys

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
