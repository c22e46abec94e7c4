"""What a run shows while it goes on: lines and wandb, progress and tables, what each turn did."""

from harness.watch.console import show_results
from harness.watch.diagnostics import TurnDiagnostics
from harness.watch.tracking import Tracker
