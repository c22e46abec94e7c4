"""Every command that the README and the pages of docs/ show: what it starts is there, and takes what it is given.

Commands stand in indented blocks and between backticks. None is run: settings are composed, options are parsed, and a
script of sweeps/ is started with a Python that only notes what it is asked for.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shlex
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from config import compose
from config.compose import check_command_line
from tests.commands import command_line
from tests.conftest import ROOT
from tests.run.test_sweeps import SCRIPTS, jobs, started

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PYTHON = ("python", ".venv/bin/python")
STARTERS = (*PYTHON, "sh", "torchrun")
PARSERS = ("parse_args", "parse_intermixed_args")


# ---------------------------------------------------------------------------------------------------------------------
# What is shown


def commands_of(page: str) -> Iterator[list[str]]:
    """The words of each; a variable stands for what the page set it to last, as if one shell were given all blocks."""
    text = re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S).replace("\\\n", " ")
    variables: dict[str, str] = {}
    for line in re.findall(r"^    +(.+)$", text, flags=re.M):
        if assigned := re.fullmatch(r'([A-Z]+)="(.*)"', line):
            variables[assigned[1]] = assigned[2]
        else:
            yield from command(re.sub(r"\$([A-Z]+)\b", lambda found: variables[found[1]], line))
    prose = re.sub(r"^    .*$", "", text, flags=re.M)
    for span in re.findall(r"`([^`]+)`", prose):
        yield from command(span)


def command(line: str) -> Iterator[list[str]]:
    """Its words, where it is one of ours: without variables before it, pipes after it, "..." and brackets."""
    start = re.match(r"(?:[A-Z]+=\S+\s+)?(\S+)\s", line)
    if start and start[1] in STARTERS:
        usage = re.sub(r"\.\.\.|\[(--[^]]+)\]", r"\1", line[start.start(1) :])
        yield list(takewhile(lambda word: word not in ("<", ">", "|"), shlex.split(usage, comments=True)))


SHOWN = {shlex.join(words): words for page in PAGES for words in commands_of(page.read_text(encoding="utf-8"))}


def test_commands_are_found_in_blocks_and_in_prose_with_what_variables_stand_for() -> None:
    page = """A page: `python main.py -m
a=1,2`, `RUN`, `sh run.sh` and `A=b sh test.sh x ...`.

    D="c=3 \\
        d=4"
    python main.py $D e=5 \\
        f=6    # a remark

```text
    sh no.sh command
```
    python -m harness.report RUN... [--to FOLDER] < file
"""
    assert [shlex.join(words) for words in commands_of(page)] == [
        "python main.py c=3 d=4 e=5 f=6",
        "python -m harness.report RUN --to FOLDER",
        "python main.py -m a=1,2",
        "sh run.sh",
        "sh test.sh x",
    ]
    assert len(SHOWN) >= 70


# ---------------------------------------------------------------------------------------------------------------------
# What it would do


@pytest.fixture(autouse=True)
def _each_value_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a sweep, not each combination: test_sweeps.py has those of the scripts."""
    monkeypatch.setattr(compose, "MAX_JOBS", 1)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # other tests import the modules too
@pytest.mark.parametrize("shown", SHOWN)
def test_a_command_takes_what_it_is_given(shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "hydra/launcher" in shown:
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs requirements-launchers.txt")
        (tmp_path / "sbatch").touch(mode=0o755)  # as if on a login node
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    starter, *words = SHOWN[shown]
    if starter == "torchrun":  # whose own options come first
        words = words[min(words.index(word) for word in ("-m", "main.py") if word in words) :]
    if starter == "sh" and words[0] != "run.sh":
        check_script(words, tmp_path)
    elif words[0] == "-m":
        check_module(*words[1:])
    else:
        assert words[0] in ("main.py", "run.sh")
        if words[1:] != ["editor=plain"]:  # an editor of the reader's own: test_readme.py
            check_command_line(words[1:])


def check_script(words: Sequence[str], folder: Path) -> None:
    script = ROOT / words[0]
    assert script.is_file()
    if script.parent.name == "sweeps":
        code, calls = started(folder, script.name, *words[1:])
        assert code == 0
        for call in calls:
            if call[0] == "main.py":
                check_command_line(call[1:])


def test_pages_say_how_many_runs_a_script_starts(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8").replace("\\\n", " ")
    shown = re.findall(r"^ +sh sweeps/(\S+) (.*)# .*? (\d+) runs$", page, flags=re.M)
    assert len(shown) == len(SCRIPTS)
    for script, settings, runs in shown:
        folder = tmp_path / script
        folder.mkdir()
        _, calls = started(folder, script, *shlex.split(settings))
        assert sum(jobs(call) for call in calls if call[0] == "main.py") == int(runs)


class Parsed(BaseException):
    """Ends a command whose options have been understood, past all that it does about errors."""


def check_module(module: str, *arguments: str) -> None:
    """Start it as `python -m` does, up to where its options are parsed."""
    if module == "pip":
        assert arguments[:2] == ("install", "-r")
        assert (ROOT / arguments[2]).is_file()
        return

    def ending(parse: Any) -> Any:
        def parse_and_end(*given: Any, **named: Any) -> None:
            raise Parsed(parse(*given, **named))

        return parse_and_end

    patches = {name: ending(getattr(argparse.ArgumentParser, name)) for name in PARSERS}
    parsers = mock.patch.multiple(argparse.ArgumentParser, **patches)
    with command_line(list(arguments)), parsers, pytest.raises(Parsed) as end:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    (chosen,) = end.value.args
    check_command_line(getattr(chosen, "settings", []))
