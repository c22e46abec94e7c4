"""A run on its machine: its folder and lock, checkpoints and kept networks, signals and launchers, where caches lie."""

from harness.run.checkpoint import Checkpoints
from harness.run.folder import NoRecord, RunFolder
from harness.run.interrupt import Interrupted, Interruption, end_if_asked, end_on, leave_signals
from harness.run.launching import check_launcher, last_lines, launcher_errors, requeued_after_checkpoint, share_terminal
from harness.run.networks import MODEL

__all__ = [
    "MODEL",
    "Checkpoints",
    "Interrupted",
    "Interruption",
    "NoRecord",
    "RunFolder",
    "check_launcher",
    "end_if_asked",
    "end_on",
    "last_lines",
    "launcher_errors",
    "leave_signals",
    "requeued_after_checkpoint",
    "share_terminal",
]
