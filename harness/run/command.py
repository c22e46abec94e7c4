"""What the command lines beside main.py share."""

from __future__ import annotations

import argparse
import logging
from typing import NoReturn

import transformers

from harness.run.terminal import show_any_text


class Parser(argparse.ArgumentParser):
    """Its help is the module's own, as it stands; a mistake is a ValueError, which ends in one line."""

    def __init__(self, program: str, about: str | None) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=f"python -m {program}", description=about, formatter_class=layout)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def log_to_terminal() -> None:
    """Lines of our own, and none of transformers and httpx."""
    show_any_text()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.basicConfig(level=logging.INFO, format="%(levelname)-7s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
