"""Whether the code knows what a YAML of somebody's own asks for, and the other way."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields

from config.schema import CAPTURE_KEYS, RunConfig, keys_without_effect
from data import DATASETS
from editor.registry import EDITORS


def check_registered(cfg: RunConfig) -> None:
    """ValueError for an editor or a data set without its line in the tables, and for settings that no key gives."""
    dataset, editor = cfg.dataset.name, cfg.editor.name
    if dataset not in DATASETS:
        raise ValueError(f"dataset={dataset}: no line for it in DATASETS; add one to data/__init__.py")
    if editor not in EDITORS:
        raise ValueError(f"editor={editor}: no line for it in EDITORS; add one, with its class, to editor/registry.py")
    settings, known = EDITORS[editor].Settings, {"seed", *vars(cfg.editor)}
    for name in (entry.name for entry in fields(settings) if entry.name not in known):
        raise ValueError(
            f"editor={editor}: {settings.__qualname__} has a {name!r}, and the keys of {type(cfg.editor).__name__}, "
            "which its YAML takes, have none; add it to a dataclass of config/schema (docs/editors.md)"
        )


def keys_of_rules_without_effect(cfg: RunConfig, typed: Collection[str] = ()) -> list[str]:
    """One line a key that is set, that only rules for captured gradients ask for, and that this editor's class is none.

    The shipped ones name such keys in `unused()`; this is for those of somebody's own.
    """
    kind = EDITORS[cfg.editor.name]
    if not hasattr(kind, "edit") or cfg.evaluate is not None:
        return []
    asked = {*cfg.editor.unused(), *(entry.name for entry in fields(kind.Settings))}
    cause = f"editor={cfg.editor.name}, which has an edit() of its own"
    return list(keys_without_effect(cfg.editor, {key: cause for key in CAPTURE_KEYS if key not in asked}, typed))
