"""What a value may be, as a function each, and a section that checks itself when it is built."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass


class ConfigError(ValueError):
    """A mistake in a setting, or several: the message is one line, and `mistakes` holds each on its own."""

    def __init__(self, mistakes: Iterable[str]) -> None:
        self.mistakes = tuple(" ".join(mistake.split()) for mistake in mistakes)
        super().__init__("; ".join(self.mistakes))


def quoted(text: str) -> str:
    """In quotes, as Hydra's command line reads any text: a quote, and backslashes before it, are escaped by another."""
    return '"' + re.sub(r'(\\*)("|$)', lambda found: 2 * found[1] + ('\\"' if found[2] else ""), text) + '"'


def positive(key: str, value: float | None) -> list[str]:
    """A finite number above 0; None passes."""
    good = value is None or (math.isfinite(value) and value > 0)
    return [] if good else [f"{key}={value}: must be a finite number above 0"]


def not_negative(key: str, value: float | None) -> list[str]:
    """A finite number, 0 or above; None passes."""
    good = value is None or (math.isfinite(value) and value >= 0)
    return [] if good else [f"{key}={value}: must be a finite number, 0 or above"]


def fraction(key: str, value: float) -> list[str]:
    """A number above 0, and at most 1."""
    return [] if 0 < value <= 1 else [f"{key}={value}: must lie in (0, 1]"]


def share(key: str, value: float) -> list[str]:
    """A number from 0 to 1."""
    return [] if 0 <= value <= 1 else [f"{key}={value}: must lie in [0, 1]"]


def at_least(key: str, value: int | None, low: int, remedy: str = "") -> list[str]:
    """A whole number not below `low`; None passes."""
    good = value is None or value >= low
    return [] if good else [f"{key}={value}: must be {low} or more{remedy and '; ' + remedy}"]


def filled(key: str, value: str | None) -> list[str]:
    """Text that is not blank; None passes, for it stands for something of its own."""
    return [f"{key}='{value}': must not be blank; leave the key out"] if value is not None and not value.strip() else []


def device(key: str, value: str) -> list[str]:
    """auto, cpu, cuda or cuda:N. Whether the machine has the device is for torch to say."""
    good = re.fullmatch(r"auto|cpu|cuda(:\d+)?", value)
    return [] if good else [f"{key}={value}: must be auto, cpu, cuda or cuda:N (N counts from 0)"]


@dataclass
class Section:
    """A part of the configuration that checks itself when it is built."""

    def __post_init__(self) -> None:
        mistakes = self.mistakes()
        if mistakes:
            raise ConfigError(mistakes)

    def mistakes(self) -> list[str]:
        """One line a value that is out of range: key, value, remedy."""
        return []
