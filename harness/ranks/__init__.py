"""Several processes that share a run, as one program on all of them (SPMD)."""

from harness.ranks.group import Ranks, init_ranks, launch_command, require_gpu_each
from harness.ranks.model import SharedModel
