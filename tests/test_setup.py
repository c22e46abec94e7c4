"""setup.sh: it says what it is about to do, and on a machine that has it all already it does and says nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

PYTHON = """#!/bin/sh
# answers as Python would: -m venv makes a folder with this script in it; what else is asked is written down
echo "$*" >> asked.txt
if [ "$2" = venv ]; then
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
fi
case "$*" in *"$FAILS"*) exit 1 ;; esac
"""


@pytest.fixture
def house(tmp_path: Path) -> Path:
    for name in ("setup.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path


def set_up(house: Path, fails: str = "nothing of it") -> subprocess.CompletedProcess[str]:
    (house / "asked.txt").unlink(missing_ok=True)
    environment = {**os.environ, "PYTHON": str(house / "python"), "FAILS": fails}
    return subprocess.run(["sh", house / "setup.sh"], env=environment, capture_output=True, text=True, timeout=60)


def test_each_step_is_said_before_it_is_done(house: Path) -> None:
    done = set_up(house)
    assert (done.returncode, done.stdout) == (0, "")
    making, packages, model, converting = done.stderr.splitlines()
    asked = (house / "asked.txt").read_text().splitlines()[1:]  # the first asks for the version
    assert "making .venv" in making
    assert "venv" in asked[0]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = sum("==" in line and not line.startswith("#") for line in lines)
    assert f"installing {pinned} packages" in packages
    assert "pip --version" in asked.pop(1)
    assert "requirements.txt" in asked[1]
    assert "model" in model
    assert "smollm2" in asked[2]
    assert "converting" in converting
    assert "locate" in asked[3]


def test_a_step_that_failed_is_taken_and_said_again(house: Path) -> None:
    failed = set_up(house, fails="requirements.txt")
    assert failed.returncode == 1
    assert "installing" in failed.stderr.splitlines()[-1]
    again = set_up(house)
    assert again.returncode == 0
    assert again.stderr.splitlines()[0] == failed.stderr.splitlines()[-1]


def test_a_venv_without_pip_is_mended_or_told_and_never_emptied(house: Path) -> None:
    """As python -m venv leaves it where a system has split pip off."""
    told = set_up(house, fails="pip")  # neither pip nor ensurepip
    assert told.returncode == 1
    assert told.stderr.splitlines()[-1].startswith("error: .venv has no pip; install what makes one")
    (house / ".venv" / "own").write_text("of the user")
    assert set_up(house, fails="pip --version").returncode == 0
    assert "-m ensurepip" in (house / "asked.txt").read_text()
    assert (house / ".venv" / "own").exists()


def test_a_python_that_is_not_there_is_told(house: Path) -> None:
    (house / "python").unlink()
    told = set_up(house)
    assert told.returncode == 1
    assert "error: there is no" in told.stderr


def test_what_is_there_is_not_said(house: Path) -> None:
    set_up(house)
    again = set_up(house)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
