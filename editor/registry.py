"""The editors. A new one is a file here, a YAML in config/editor, and a line in this table."""

from __future__ import annotations

from typing import Any

import torch

from editor.alphaedit import AlphaEdit
from editor.base import EditableModel, Editor, LocateInputs, SecondMoments
from editor.capture import CaptureEditor, CaptureSettings
from editor.fine_tuning import FineTuning
from editor.grace import GRACE
from editor.malmen import MALMEN
from editor.memit import MEMIT
from editor.mend import MEND
from editor.rledit import RLEdit
from editor.rome import ROME
from editor.stableedit import StableEdit
from editor.wise import WISE

# A class with several names has a YAML for each: ULTRAEDIT is StableEdit with diagonal statistics, another ridge and no
# warm-up (config/editor/ultraedit.yaml); FT-L, FT-M and LocFT-BF are three ways to fine-tune.
EDITORS: dict[str, Any] = {  # classes, each with the dataclass of its Settings
    # gradient capture: classes of editor.base.UpdateRule, built from the shapes of the edit modules
    "stableedit": StableEdit,
    "stableedit_plus": StableEdit,
    "ultraedit": StableEdit,
    "mend": MEND,
    "malmen": MALMEN,
    "rledit": RLEdit,
    # locate then edit: classes of editor.base.Editor, built from the model and editor.base.LocateInputs
    "rome": ROME,
    "memit": MEMIT,
    "alphaedit": AlphaEdit,
    # any other family: classes of editor.base.Editor, built from the model
    # fine-tuning
    "ft_l": FineTuning,
    "ft_m": FineTuning,
    "locft_bf": FineTuning,
    # memory: beside the weights of one edit module
    "grace": GRACE,
    "wise": WISE,
}


def build(
    kind: Any,
    model: EditableModel,
    settings: Any,
    device: torch.device,
    capture: CaptureSettings,
    given: LocateInputs | SecondMoments | None = None,
) -> Editor:
    """An editor of the class `kind`; `capture` is for the gradient-capture family.

    `given`, for those who ask for it: second moments of keys over text, and for locate-then-edit contexts of the facts.
    """
    more = () if given is None else (given,)
    if hasattr(kind, "edit"):
        return kind(model, settings, device, *more)
    return CaptureEditor(kind(model.shapes, settings, device, *more), device, capture)
