"""The editor of a run, from its settings."""

from __future__ import annotations

from dataclasses import fields
from enum import Enum
from typing import Any

import torch

from config.schema import RunConfig, Token
from data.records import Allocate
from editor.base import EditableModel, Editor
from editor.capture import CaptureSettings
from editor.registry import EDITORS, build


def build_editor(
    cfg: RunConfig, model: EditableModel, device: torch.device, allocate: Allocate | None = None
) -> Editor:
    """The editor that the configuration names, with its settings."""
    kind = EDITORS[cfg.editor.name]
    capture = CaptureSettings(cfg.editor.passes, cfg.editor.token is Token.all, allocate)
    return build(kind, model, settings_of(kind.Settings, cfg), device, capture)


def settings_of(kind: Any, cfg: RunConfig) -> Any:
    """A dataclass of an editor's settings, each under the name that users type; `seed` is the run's."""
    typed = {"seed": cfg.seed, **vars(cfg.editor)}
    values = {key: value.name if isinstance(value, Enum) else value for key, value in typed.items()}
    return kind(**{entry.name: values[entry.name] for entry in fields(kind)})
