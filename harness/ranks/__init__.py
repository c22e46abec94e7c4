"""Several processes of one run."""

from harness.ranks.group import Ranks, joined, program_of

__all__ = [
    "Ranks",
    "joined",
    "program_of",
]
