"""Several processes that share a run, as one program on all of them (SPMD)."""

# ruff: noqa: F401  the names that others take from this room

from harness.ranks.group import Ranks, joined, program_of, require_gpu_each
from harness.ranks.model import SharedModel
