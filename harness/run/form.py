"""How questions are put to an edited model, which whoever asks it later must know: a small file beside its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

PROMPT_FORMS: Final = ("raw", "chat", "qa")
FILE: Final = "edit.json"


def form_of_run(config: Mapping[str, Any]) -> str:
    """How a run puts questions to its model; `config` is that of its run.json."""
    return config["evaluation"]["prompt"] or config["dataset"]["prompt_form"]


def form_note(form: str) -> dict[str, str]:
    """The file that says it, for `LanguageModel.export`."""
    return {FILE: json.dumps({"prompt_form": form}, indent=2) + "\n"}


def form_of_folder(folder: Path) -> str:
    """How an exported model is asked; raw for a model that was not exported from here."""
    return stated_form(folder) or "raw"


def stated_form(folder: Path) -> str | None:
    """What the file of an exported model says; None where there is none."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        form = json.loads(path.read_text(encoding="utf-8"))["prompt_form"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: does not say a prompt_form; repair it, or take it away") from error
    if form not in PROMPT_FORMS:
        raise ValueError(f"{path}: prompt_form={form!r} must be one of {', '.join(PROMPT_FORMS)}")
    return str(form)
