"""The editors. A new one is a file here, a YAML in config/editor, and a line in this table."""

from editor.stableedit import StableEdit

# ULTRAEDIT is StableEdit with diagonal statistics, another ridge and no warm-up: config/editor/ultraedit.yaml.
EDITORS = {"stableedit": StableEdit, "ultraedit": StableEdit}
