"""Where the model and the editor run, and in which arithmetic."""

from __future__ import annotations

import torch

from config.schema import Dtype, RunConfig
from harness.ranks import Ranks, require_gpu_each
from harness.run import use_deterministic_algorithms

DTYPES = {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16}


def devices(cfg: RunConfig, ranks: Ranks) -> tuple[torch.device, torch.device]:
    """Where the model runs and where the editor does; ValueError for a device this machine or this process lacks."""
    if ranks.size > 1:
        one_each = f"with {ranks.size} processes, each of which holds the whole model on a GPU of its own"
        if cfg.model.device_map is not None:
            raise ValueError(f"model.device_map={cfg.model.device_map.name} {one_each}: start one, without torchrun")
        for key, value in {"model_device": cfg.model_device, "editor_device": cfg.editor_device}.items():
            if ":" in value:
                raise ValueError(f"{key}={value} {one_each}: set {key}=auto")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    model = _with_index(torch.device(found if cfg.model_device == "auto" else cfg.model_device), ranks)
    editor = model if cfg.editor_device == "auto" else _with_index(torch.device(cfg.editor_device), ranks)
    for key, device in {"model_device": model, "editor_device": editor}.items():
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"{key}={device}: this machine has {torch.cuda.device_count()} GPUs; choose another, or auto"
            )
    if ranks.size > 1 and model.type == "cuda":
        require_gpu_each()
    use_deterministic_algorithms(cfg.model.deterministic and "cuda" in (model.type, editor.type))
    return model, editor


def kind_of(device: torch.device) -> str:
    """cpu, or the GPU by its name: from one to the next the last bits of products differ."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _with_index(device: torch.device, ranks: Ranks) -> torch.device:
    """`cuda` is the first GPU, or where several processes share a run, this one's own."""
    if device != torch.device("cuda"):
        return device
    shared = ranks.size > 1 and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device() if shared else 0)
