"""Runs of main.py in processes that are forked from one which has imported everything: a run starts in a moment.

`python -m tests.forked` reads from stdin, on a line each, JSON lists of processes that are to run at the same time; it
forks for each, and says their pids and, on a second line, how they ended.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from tests.conftest import ROOT


@dataclass(frozen=True)
class Process:
    """A command line, and what is special about its process."""

    line: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    before: str | None = None  # module:function, called in it first
    cwd: str = "."


class Forks:
    """The process to fork from, as a context manager."""

    def __init__(self, cwd: Path, cache: Path) -> None:
        self.cwd = cwd
        self.environment = {
            **os.environ,
            "XDG_CACHE_HOME": str(cache),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def __enter__(self) -> Self:
        self._log = (self.cwd / "stderr").open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked"],
            cwd=self.cwd,
            env=self.environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        assert self._line() == "ready"
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._log.close()

    def start(self, line: list[str]) -> int:
        """The pid of a process that runs `python main.py` with these arguments."""
        return self.start_together(Process(line))[0]

    def start_together(self, *processes: Process) -> list[int]:
        """The pids of processes that run at the same time."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([asdict(process) for process in processes]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._line())

    def end(self) -> int:
        """Wait for it: its exit code, or minus the signal that killed it."""
        return self.end_together()[0]

    def end_together(self) -> list[int]:
        """Wait for all of them."""
        return json.loads(self._line())

    def stderr(self) -> str:
        """What all of them said."""
        return (self.cwd / "stderr").read_text(encoding="utf-8")

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def serve() -> None:
    import main  # what takes seconds

    importlib.import_module("transformers.models.llama.modeling_llama")  # and what a model is loaded with, later

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the runs print
    print("ready", file=replies, flush=True)
    for text in sys.stdin:
        pids = []
        for process in (Process(**entry) for entry in json.loads(text)):
            pids.append(os.fork())
            if pids[-1] == 0:
                replies.close()
                sys.stdin.close()
                os.chdir(process.cwd)
                os.environ.update(process.environment)
                sys.argv = ["main.py", *process.line]
                if process.before is not None:
                    module, _, name = process.before.partition(":")
                    getattr(importlib.import_module(module), name)()
                main.main()
                sys.exit(0)
        print(json.dumps(pids), file=replies, flush=True)
        ended = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(ended), file=replies, flush=True)


if __name__ == "__main__":
    serve()
