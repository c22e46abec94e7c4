"""Runs of main.py in processes that are forked from one which has imported everything: a run starts in a moment.

`python -m tests.forked` reads command lines from stdin, each a JSON list on a line, forks for each, and says the pid of
the child and, on a second line, how it ended.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Self

from tests.conftest import ROOT


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
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()
        return int(self._line())

    def end(self) -> int:
        """Wait for it: its exit code, or minus the signal that killed it."""
        return int(self._line())

    def stderr(self) -> str:
        """What all of them said."""
        return (self.cwd / "stderr").read_text(encoding="utf-8")

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def serve() -> None:
    import main  # what takes seconds

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the runs print
    print("ready", file=replies, flush=True)
    for text in sys.stdin:
        pid = os.fork()
        if pid == 0:
            sys.argv = ["main.py", *json.loads(text)]
            replies.close()
            sys.stdin.close()
            main.main()
            sys.exit(0)
        print(pid, file=replies, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=replies, flush=True)


if __name__ == "__main__":
    serve()
