"""Whole commands in this process: `main.main()` on a tiny random Llama and a few rows, all of it in one folder."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import transformers
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from transformers import PreTrainedTokenizerFast

import main
from config.compose import compose_config
from config.schema import PreheatMode, register, to_run_config
from data.records import Turn
from harness.export.command import main as export
from harness.run import interrupt, places
from tests.conftest import tiny_llama

MODULES = ("model.layers.2.mlp.down_proj", "model.layers.3.mlp.down_proj")
SPLITS = {"eval": "dataset.valid_path", "train": "dataset.train_path"}


def save_tiny_model(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Path:
    """A folder that `from_pretrained` reads."""
    tiny_llama(seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def zsre_row(i: int) -> dict[str, Any]:
    """Answers of one to five digits, so that token counts differ, and a turn of three facts has enough to whiten."""
    return {
        "src": f"What is the number of box {i}?",
        "rephrase": f"Which number has box {i}?",
        "ans": str(7919 * i % 100003),
        "loc": f"what is the colour of cup {i}",
        "loc_ans": f"c{i}",
        "subject": f"box {i}",
    }


QUICK = {  # keys that make a run short, of those editors that have them
    "num_steps": 2, "n_epochs": 0, "rank": 4, "v_num_grad_steps": 2, "prefixes": 1, "prefix_tokens": 2,
}  # fmt: skip


def short_run(editor: str) -> list[str]:
    """Overrides for a turn of three facts with any editor, in one module, after a turn of warm-up where it has that."""
    has = vars(to_run_config(compose_config([f"editor={editor}"])).editor)
    keys = [f"editor={editor}", f"model.edit_modules=[{MODULES[0]}]", "num_seq=1", "dataset.n_edits=3"]
    keys += [f"editor.{key}={value}" for key, value in QUICK.items() if key in has]
    if "fact_token" in has:
        keys += ["corpus.tokens=2000", "corpus.window=64", "corpus.questions=0"]
    if has["preheat_mode"] is not PreheatMode.none:
        keys.append("num_seq_zsre=1")
    return keys


@dataclass
class Commands:
    """Runs commands as users type them; each gets the tiny model, its data and the folder to write to."""

    folder: Path
    model: Path

    def write(self, split: str, rows: Any) -> Path:
        """The rows as the file of that split; text is written as it is."""
        path = self.folder / f"{split}.json"
        path.write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
        return path

    def line(self, *overrides: str, run: str = "run") -> list[str]:
        """The command line of a run of four turns of three facts after two of warm-up; `overrides` win."""
        defaults = {
            "model.name_or_path": self.model,
            "model.edit_modules": f"[{','.join(MODULES)}]",
            "model.lr": "0.1",
            "dataset.valid_path": self.folder / "eval.json",
            "dataset.train_path": self.folder / "train.json",
            "dataset.n_edits": "3",
            "dataset.batch_size": "2",
            "dataset.prompt_form": "raw",
            "dataset.answer_end": "none",
            "editor": "stableedit",
            "editor.passes": "1",
            "evaluation.perplexity": "off",  # its text is longer than all these questions
            "evaluation.generation": "off",
            "evaluation.examples": "0",  # a third of such a run's time
            "diagnostics.report": "false",
            "tracker.wandb": "disabled",
            "hydra.run.dir": self.folder / run,
        }
        flags = [word for word in overrides if word.startswith("-")]
        keys = {word.split("=")[0].lstrip("+") for word in overrides}
        settings = [f"{key}={value}" for key, value in defaults.items() if key not in keys]
        return [*flags, *settings, *(word for word in overrides if word not in flags)]

    def __call__(self, *overrides: str, run: str = "run") -> Run:
        """Run to the end; the folder of the run."""
        with command_line(self.line(*overrides, run=run)):
            main.main()
        return Run(self.folder / run)

    def broken_off_and_resumed(
        self, *overrides: str, turn: int, at: tuple[type, str], resume: str | None = None
    ) -> Run:
        """The run that fails in that turn, in a method of a class that is given the turn, and then goes on.

        It is found by `resume`, or by its folder.
        """
        kind, name = at
        method = getattr(kind, name)

        def fails(*arguments: Any) -> Any:
            if any(isinstance(one, Turn) and one.index == turn for one in arguments):
                raise FloatingPointError("stopped")
            return method(*arguments)

        with mock.patch.object(kind, name, fails):
            assert "stopped" in self.refused(*overrides, run="broken")
        return self(*overrides, f"resume={resume or self.folder / 'broken'}", run="broken")

    def no_model_to_save(self, *overrides: str) -> None:
        """An editor whose edits lie beside the weights is refused where a model with them is asked for."""
        beside = "this editor keeps its edits beside the weights"
        assert f"model_cache=true: {beside}" in self.refused(*overrides, "model_cache=true")
        done = self(*overrides, "checkpoint_every=2", run="done")
        with pytest.raises(SystemExit) as end:
            export([str(done.folder), "--to", str(self.folder / "model")])
        assert beside in str(end.value.code)
        assert not (self.folder / "model").exists()

    def refused(self, *overrides: str, run: str = "run") -> str:
        """The message that ends the run, which Python writes to stderr with exit code 1; its form is checked here."""
        with command_line(self.line(*overrides, run=run)), pytest.raises(SystemExit) as end:
            main.main()
        message = end.value.code
        assert isinstance(message, str), message
        assert message.startswith("error: ")
        assert "\n" not in message
        assert "Traceback" not in message
        return message


def commands_in(folder: Path, model: Path, patch: pytest.MonkeyPatch) -> Commands:
    """Commands in a folder of their own, with twelve facts to edit and nine to warm up with.

    Without the check of the command line, half of such a run's time: test_bad_input.py has it.
    """
    register()
    patch.setattr(main, "check_command_line", lambda argv: None)
    patch.setattr(places, "CACHE", folder / "cache")
    patch.chdir(folder)
    commands = Commands(folder, model)
    commands.write("eval", [zsre_row(i) for i in range(12)])
    commands.write("train", [zsre_row(i) for i in range(50, 59)])
    return commands


@dataclass
class Run:
    """What a run left behind."""

    folder: Path

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def lines(self, name: str) -> list[Any]:
        return [json.loads(line) for line in (self.folder / name).read_text(encoding="utf-8").splitlines()]

    def scores(self) -> dict[str, Any]:
        """results.json without what the run cost."""
        return {stage: scores for stage, scores in self.json("results.json").items() if stage != "cost"}

    def turns(self) -> list[dict[str, Any]]:
        """turns.jsonl without what the turns cost."""
        return [
            {key: value for key, value in line.items() if key not in ("seconds", "memory")}
            for line in self.lines("turns.jsonl")
        ]

    def phases(self) -> str:
        """One letter a turn: w for warm-up, e for edit."""
        return "".join(line["phase"][0] for line in self.lines("turns.jsonl"))


@contextmanager
def _composed_once() -> Iterator[None]:
    """Hydra composes every configuration twice, first to see whether it sets hydra.mode itself; none of ours does."""
    with mock.patch.object(Hydra, "get_mode", return_value=None):
        yield


@contextmanager
def command_line(arguments: list[str]) -> Iterator[None]:
    """sys.argv, and afterwards the logging and the Hydra that a process of its own would have taken with it."""
    before, root = sys.argv, logging.getLogger()
    handlers, level, environment = list(root.handlers), root.level, dict(os.environ)
    sys.argv = ["main.py", *arguments]
    try:
        with _composed_once():
            yield
    finally:
        sys.argv = before
        for handler in set(root.handlers) - set(handlers):
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
        interrupt._asked.clear()
        os.environ.clear()
        os.environ.update(environment)
        GlobalHydra.instance().clear()
        transformers.logging.set_verbosity_warning()
        transformers.logging.enable_progress_bar()
