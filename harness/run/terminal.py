"""What is written to a terminal."""

from __future__ import annotations

import io
import sys


def show_any_text() -> None:
    """A character that the terminal's encoding lacks is shown as a question mark, and is no reason to fail."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
