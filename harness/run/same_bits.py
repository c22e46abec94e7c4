"""Arithmetic that gives the same bits each time."""

from __future__ import annotations

import os

import torch


def prepare_libraries() -> None:
    """Settings that cuBLAS and MKL read; MKL's sums otherwise hang on where in memory a matrix begins.

    Products of float32 are those of float32: the environment of some containers has GPUs round them to TF32, in which a
    root of a covariance cannot be followed. To be called before either library has computed anything.
    """
    torch.set_float32_matmul_precision("highest")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("MKL_CBWR", "AUTO")


def use_deterministic_algorithms(wanted: bool = True) -> None:
    """Whether CUDA's kernels give the same result each time, where they have a form that does."""
    if wanted == torch.are_deterministic_algorithms_enabled():
        return  # telling torch so once more would import its compiler, which takes seconds
    torch.use_deterministic_algorithms(wanted, warn_only=wanted)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # all is written over
