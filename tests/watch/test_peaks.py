"""What a run took, and not what runs before it in the same process took."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from harness.watch import forget_peaks, memory

BYTES = 200 * 2**20


def take() -> None:
    torch.ones(BYTES // 4)


def test_a_run_has_the_peak_that_it_made() -> None:
    forget_peaks()
    before = memory()["resident_bytes"]
    take()
    now = memory()
    assert now["peak_bytes"] > before + 0.9 * BYTES
    assert now["resident_bytes"] < now["peak_bytes"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep a process's highest resident size")
def test_an_earlier_run_does_not_count() -> None:
    take()
    forget_peaks()
    now = memory()
    assert now["peak_bytes"] < now["resident_bytes"] + 0.5 * BYTES


def test_where_the_system_does_not_forget_a_lower_peak_is_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_peaks()
    monkeypatch.setattr(sys.modules[forget_peaks.__module__], "RESET", tmp_path)  # a folder, which nobody writes to
    take()
    forget_peaks()
    assert "peak_bytes" not in memory()
    three_times = torch.ones(3 * BYTES // 4)
    assert memory()["peak_bytes"] > three_times.nbytes
    monkeypatch.undo()
    forget_peaks()
