"""What a run shows while it goes on: lines and wandb, progress and tables, what each turn did."""

from harness.watch.console import (
    EXAMPLE_TEXTS,
    FORM_NAMES,
    PROBE_NAMES,
    SCORE_NAMES,
    as_number,
    as_said,
    is_share,
    printable,
    score_words,
    show_results,
    turn_note,
)
from harness.watch.diagnostics import SMALLER_STEPS, TurnDiagnostics
from harness.watch.peaks import forget_peaks, memory
from harness.watch.tracking import Tracker, WandbMode, WandbSettings, check_wandb
