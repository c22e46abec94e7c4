"""How much memory a run takes, where a process may have had other runs before it, as the jobs of a sweep do."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import psutil
import torch

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")  # Linux: 5 makes the highest resident size begin anew (proc(5))

_earlier_peak = 0  # bytes, of runs before this one, where the system does not forget it


def forget_peaks() -> None:
    """From here on `memory` speaks of a new run."""
    global _earlier_peak
    try:
        RESET.write_text("5")
        _earlier_peak = 0
    except OSError:  # another system, or one that does not allow it
        _earlier_peak = _peak()
    for device in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        torch.cuda.reset_peak_memory_stats(device)


def memory(*devices: torch.device) -> dict[str, float]:
    """Resident memory of the process now and at its highest, and what each GPU held at its highest, in this run.

    Without its highest where that may have been in an earlier run of the process.
    """
    figures: dict[str, float] = {"resident_bytes": psutil.Process().memory_info().rss}
    if (peak := _peak()) > _earlier_peak:
        figures["peak_bytes"] = peak
    for device in devices:
        if device.type == "cuda":
            figures[f"{device}_peak_bytes".replace(":", "")] = torch.cuda.max_memory_allocated(device)
    return figures


def _peak() -> int:  # bytes
    if STATUS.exists():  # ru_maxrss is there also that of the program which started this one
        found = re.search(r"^VmHWM:\s*(\d+) kB", STATUS.read_text(), re.MULTILINE)
        assert found is not None
        return 1024 * int(found[1])
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
