"""The editors. A new one is a file here, a YAML in config/editor, and a line in this table."""

from typing import Any

from editor.malmen import MALMEN
from editor.mend import MEND
from editor.rledit import RLEdit
from editor.stableedit import StableEdit

# ULTRAEDIT is StableEdit with diagonal statistics, another ridge and no warm-up: config/editor/ultraedit.yaml.
EDITORS: dict[str, Any] = {  # classes of editor.base.Editor, each with the dataclass of its Settings
    "stableedit": StableEdit,
    "ultraedit": StableEdit,
    "mend": MEND,
    "malmen": MALMEN,
    "rledit": RLEdit,
}
