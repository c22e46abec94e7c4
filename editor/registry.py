"""The editors. A new one is a file here, a YAML in config/editor, and a line in this table."""

from __future__ import annotations

from typing import Any

import torch

from editor.base import EditableModel, Editor
from editor.capture import CaptureEditor, CaptureSettings
from editor.malmen import MALMEN
from editor.mend import MEND
from editor.rledit import RLEdit
from editor.stableedit import StableEdit

# ULTRAEDIT is StableEdit with diagonal statistics, another ridge and no warm-up: config/editor/ultraedit.yaml.
EDITORS: dict[str, Any] = {  # classes, each with the dataclass of its Settings
    # gradient capture: classes of editor.base.UpdateRule, built from the shapes of the edit modules
    "stableedit": StableEdit,
    "ultraedit": StableEdit,
    "mend": MEND,
    "malmen": MALMEN,
    "rledit": RLEdit,
    # any other family: classes of editor.base.Editor, built from the model
}


def build(kind: Any, model: EditableModel, settings: Any, device: torch.device, capture: CaptureSettings) -> Editor:
    """An editor of the class `kind`; `capture` is for those of the gradient-capture family."""
    if hasattr(kind, "update"):
        return CaptureEditor(kind(model.shapes, settings, device), device, capture)
    return kind(model, settings, device)
