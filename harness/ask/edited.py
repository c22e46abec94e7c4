"""An edited model and its base model, opened from whatever a run has left, to be asked."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import torch

from data.prompts import FormName, prompt_form
from harness.evaluation import Generation
from harness.export import (
    edited_by_delta,
    edited_by_run,
    find_checkpoint,
    read_delta,
    source_of_delta,
    source_of_run,
    when_of,
)
from harness.job import memory_settings
from harness.run import PROMPT_FORMS, form_of_folder, form_of_run, places, prepare_libraries, read_run
from model import LanguageModel
from model.source import ModelSource, load_tokenizer, locate, stored_dtype

MAX_NEW_TOKENS: Final = 64


@dataclass(frozen=True)
class Answers:
    """What two models write on a question, greedily, up to their own end, without the blanks around it."""

    question: str
    base: str | None  # None: what the base model is, is not known
    edited: str


@dataclass(frozen=True)
class EditedModel:
    """A model that was edited, ready to be asked."""

    language_model: LanguageModel
    base: LanguageModel | None  # which is the same one, to be asked without its edits, wherever those are known
    about: str  # where the edits come from
    form: str  # of `PROMPT_FORMS`
    max_new_tokens: int

    @property
    def model(self) -> Any:
        """transformers' model, with the edited weights."""
        return self.language_model.model

    @property
    def tokenizer(self) -> Any:
        return self.language_model.tokenizer

    def ask(self, questions: Sequence[str]) -> list[Answers]:
        """The words of both models; ValueError for a question that is blank, no text, or longer than the context."""
        if isinstance(questions, str):
            raise ValueError("ask takes a list of questions: ask([question])")
        if blank := [place for place, question in enumerate(questions, 1) if not question.strip()]:
            raise ValueError(f"question {blank[0]} is blank: give it a text")
        if broken := [place for place, question in enumerate(questions, 1) if not _is_text(question)]:
            raise ValueError(f"question {broken[0]} is no UTF-8: write it in that encoding")
        edited = self._texts(self.language_model, questions)
        if self.base is None:
            return [Answers(question, None, after) for question, after in zip(questions, edited, strict=True)]
        with self.base.unedited():
            base = self._texts(self.base, questions)
        return [Answers(*texts) for texts in zip(questions, base, edited, strict=True)]

    def _texts(self, model: LanguageModel, questions: Sequence[str]) -> list[str]:
        asked = _generation(self.form, self.tokenizer, self.max_new_tokens)
        return [text.strip() for text in asked.texts(model, questions)]


def _is_text(question: str) -> bool:
    """Whether all of it could be read: bytes that are no UTF-8 become characters that nothing encodes."""
    try:
        question.encode()
    except UnicodeEncodeError:
        return False
    return True


def open_edited(
    path: str | Path,
    *,
    turn: int | None = None,
    model: str | None = None,
    prompt: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> EditedModel:
    """The edited model that `path` stands for, with its base model.

    `path` is a run's folder (its newest checkpoint, or that of `turn`), a checkpoint's folder, a delta, or a folder
    that `from_pretrained` reads, whose base model only `model` can name. `prompt` is raw, chat or qa; default: the
    run's own, raw for other folders. `device` is cpu, cuda, cuda:N or auto, a GPU where there is one; on it a run that
    laid its model over several devices does so again. ValueError, before weights are read, where there is nothing to
    open.
    """
    if prompt is not None and prompt not in PROMPT_FORMS:
        raise ValueError(f"--prompt {prompt}: must be one of {', '.join(PROMPT_FORMS)}")
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {max_new_tokens}: must be 1 or more")
    prepare_libraries()
    where = _device(device)
    found = _find(Path(path).expanduser().absolute(), turn, model, trust_remote_code)
    form = prompt or found.form
    _generation(form, load_tokenizer(found.source), max_new_tokens)
    edited, base = found.load(where)
    return EditedModel(edited, base, found.about, form, max_new_tokens)


def _device(name: str) -> torch.device:
    """ValueError where this machine has no such device."""
    count = torch.cuda.device_count()
    known = ["cpu", *["cuda"] * bool(count), *(f"cuda:{i}" for i in range(count))]
    if name not in ("auto", *known):
        raise ValueError(f"--device {name}: this machine has {', '.join(known)}; choose one of them, or auto")
    return torch.device(known[:2][-1] if name == "auto" else name)


def _generation(form: str, tokenizer: Any, max_new_tokens: int) -> Generation:
    """How the model is asked; ValueError for a form that the tokenizer lacks."""
    return Generation(tokenizer, prompt_form(tokenizer, cast(FormName, form), option="--prompt"), max_new_tokens, None)


# ---------------------------------------------------------------------------------------------------------------------
# What a path stands for


@dataclass(frozen=True)
class _Found:
    """An edited model, with all that can be known before its weights are read."""

    about: str
    form: str
    source: ModelSource
    load: Callable[[torch.device], tuple[LanguageModel, LanguageModel | None]]  # the edited and the base model


def _find(path: Path, turn: int | None, base: str | None, trust_remote_code: bool) -> _Found:
    folder, turn = _of_checkpoint(path, turn)
    if (folder / "run.json").is_file():
        if trust_remote_code:
            raise ValueError("--trust-remote-code has no effect with a run, which says it itself: leave it out")
        return _in_run(folder, turn, base)
    if turn is not None:
        raise ValueError(f"{path}: no run, and --turn {turn} is one of a run: name the run's folder, or leave it out")
    if path.suffix == ".safetensors":
        return _in_delta(path, base, trust_remote_code)
    if (path / "config.json").is_file():
        return _in_folder(path, base, trust_remote_code)
    what = "holds neither a run (run.json) nor a model (config.json)" if path.is_dir() else "no such folder"
    raise ValueError(
        f"{path}: {what}; name the folder of a run, of one of its checkpoints, of an exported model, or a delta "
        "(*.safetensors)"
    )


def _of_checkpoint(path: Path, turn: int | None) -> tuple[Path, int | None]:
    """RUN/checkpoints/turn_5 is turn 5 of RUN; anything else is itself."""
    place = re.fullmatch(r"turn_(\d+)", path.name)
    if place is None or path.parent.name != "checkpoints":
        return path, turn
    if turn is not None:
        raise ValueError(f"--turn {turn} has no effect with {path}, which is of one turn: leave it out")
    return path.parents[1], int(place[1])


def _in_run(folder: Path, turn: int | None, base: str | None) -> _Found:
    run = read_run(folder)
    checkpoint, when = find_checkpoint(folder, run, turn)
    if not checkpoint.state["in_weights"]:
        memory_settings(run["config"])

    def load(device: torch.device) -> tuple[LanguageModel, LanguageModel]:
        model = edited_by_run(run, checkpoint, base, device)
        return model, model

    return _Found(f"the edited model, {when}", form_of_run(run["config"]), source_of_run(run, base), load)


def _in_delta(path: Path, base: str | None, trust_remote_code: bool) -> _Found:
    delta = read_delta(path)

    def load(device: torch.device) -> tuple[LanguageModel, LanguageModel]:
        model = edited_by_delta(delta, base, trust_remote_code, device)
        return model, model

    about = f"the edited model, {when_of(delta)}"
    return _Found(about, delta.origin.prompt_form, source_of_delta(delta, base, trust_remote_code), load)


def _in_folder(folder: Path, base: str | None, trust_remote_code: bool) -> _Found:
    """Whoever exported it has left the base model behind: `base` is read beside it, in the same precision."""
    source = ModelSource(str(folder), trust_remote_code=trust_remote_code)
    before = None if base is None else ModelSource(locate(base, places.CACHE), trust_remote_code=trust_remote_code)
    if before and load_tokenizer(before).get_vocab() != load_tokenizer(source).get_vocab():
        raise ValueError(f"--model {base}: not the base model of {folder}, its tokenizer is another one")
    return _Found(f"the model in {folder}", form_of_folder(folder), source, partial(_side_by_side, source, before))


def _side_by_side(
    source: ModelSource, before: ModelSource | None, device: torch.device
) -> tuple[LanguageModel, LanguageModel | None]:
    read = partial(LanguageModel.load, tokenizer=load_tokenizer(source), edit_modules=(), device=device)
    dtype = stored_dtype(source)
    return read(source, dtype=dtype), None if before is None else read(before, dtype=dtype)
