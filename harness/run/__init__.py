"""A run on its machine: its folder and lock, checkpoints and kept networks, signals and launchers, where caches lie."""

from harness.run.folder import RunFolder
from harness.run.interrupt import Interrupted, Interruption, end_if_asked, end_on
from harness.run.launching import check_launcher, last_lines, launcher_errors, requeued_after_checkpoint, share_terminal
from harness.run.networks import MODEL
from harness.run.same_bits import prepare_libraries
