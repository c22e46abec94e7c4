"""Folders of runs that never ran, and lines to write into them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.run.folder import RunFolder

CONFIG: dict[str, Any] = {
    "seed": 42,
    "dataset": {"name": "zsre", "train_path": None, "n_edits": 100},
    "editor": {"name": "stableedit", "cache_dir": None, "lr": 1e-3},
    "model": {"name_or_path": "somewhere/tiny-model", "edit_modules": ["layers.0.down_proj"]},
    "tracker": {"wandb": "disabled"},
}
SCORES = {"ES": {"mean": 0.6, "low": 0.5, "high": 0.7, "n": 10}, "perplexity": 18.5}


def create(path: Path, **changes: Any) -> RunFolder:
    arguments: dict[str, Any] = {
        "config": CONFIG,
        "overrides": ["seed=42"],
        "inputs": {"edits": "ab" * 32},
        "model": {"name": "tiny-model", "revision": "main", "fingerprint": "cd" * 32},
        "device": "cpu",
    }
    return RunFolder.create(path, **(arguments | changes))


def turn_line(turn: int, **changes: Any) -> dict[str, Any]:
    line = {
        "turn": turn,
        "phase": "warm_up" if turn == 0 else "edit",
        "edits": 100,
        "edits_total": 100 * (turn + 1),
        "answer_tokens": 300,
        "loss": 2.5,
        "seconds": {"capture": 3.0, "update": 0.5, "apply": 0.1, "total": 3.7},
        "modules": {
            "layers.0.down_proj": {"update_norm": 3.0, "update_max": 0.1, "cosine_previous": None, "drift": 0.01},
            "layers.1.down_proj": {"update_norm": 4.0, "update_max": 0.2, "cosine_previous": -0.3, "drift": 0.02},
        },
        "statistics": {"64x32": {"n": 300, "mean_abs": 0.1, "std_mean": 1.0, "floored_fraction": 0.25}},
        "memory": {"resident_bytes": 1000 + turn},
    }
    return line | changes


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
