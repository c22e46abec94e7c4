"""Runs of main.py in processes that are forked from one which has imported everything: a run starts in a moment.

`python -m tests.forked SOCKET` is that one. Whoever connects hands it three standard streams and a process to run, is
told its pid, and, once it has ended, how. `Forks` starts it; tests ask it themselves, and what it writes for `stand_in`
asks it in place of python, for the shell scripts of sweeps/.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import selectors
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NoReturn, Self, TextIO

from tests.conftest import ROOT

STAND_IN = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({socket!r})
    socket.send_fds(server, [b" "], [0, 1, 2])
    process = {{"line": sys.argv[1:], "environment": dict(os.environ), "cwd": os.getcwd()}}
    server.sendall(json.dumps(process).encode())
    server.shutdown(socket.SHUT_WR)
    told = server.makefile()
    pid, code = told.readline(), told.readline()
    sys.exit(int(code))
"""


@dataclass(frozen=True)
class Process:
    """What follows `python`, and what is special about its process."""

    line: list[str]
    environment: dict[str, str] = field(default_factory=dict)  # beside that of the process it is forked from
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
        self._asked: list[TextIO] = []  # which say how the processes started last have ended

    def __enter__(self) -> Self:
        self._log = (self.cwd / "stderr").open("ab")
        self._folder = tempfile.TemporaryDirectory()  # the path of a socket is short
        self._socket = str(Path(self._folder.name) / "socket")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked", self._socket],
            cwd=self.cwd,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()
        self._log.close()

    def stand_in(self) -> str:
        """The text of an executable that does what python would do."""
        return STAND_IN.format(python=sys.executable, socket=self._socket)

    def start(self, line: list[str]) -> int:
        """The pid of a process that runs `python main.py` with these arguments."""
        return self.start_together(Process(line))[0]

    def start_together(self, *processes: Process) -> list[int]:
        """The pids of processes that run `python main.py` at the same time."""
        self._asked = [self._ask(process) for process in processes]
        return [int(asked.readline()) for asked in self._asked]

    def _ask(self, process: Process) -> TextIO:
        with socket.socket(socket.AF_UNIX) as server, open(os.devnull) as nothing:
            server.connect(self._socket)
            socket.send_fds(server, [b" "], [nothing.fileno(), self._log.fileno(), self._log.fileno()])
            server.sendall(json.dumps({**asdict(process), "line": ["main.py", *process.line]}).encode())
            server.shutdown(socket.SHUT_WR)
            return server.makefile()

    def end(self) -> int:
        """Wait for it: its exit code, or minus the signal that killed it."""
        return self.end_together()[0]

    def end_together(self) -> list[int]:
        """Wait for all of them."""
        return [int(asked.readline()) for asked in self._asked]

    def stderr(self) -> str:
        """What all of them said."""
        return (self.cwd / "stderr").read_text(encoding="utf-8")


def serve(path: str) -> NoReturn:
    importlib.import_module("main")  # what takes seconds
    for module in ("harness.report", "transformers.models.llama.modeling_llama"):  # and what comes later in a run
        importlib.import_module(module)
    with socket.socket(socket.AF_UNIX) as server, selectors.DefaultSelector() as waiting:
        server.bind(path)
        server.listen()
        waiting.register(server, selectors.EVENT_READ)
        print("ready", flush=True)
        while True:
            for key, _ in waiting.select():
                if key.data is None:
                    asking, _ = server.accept()
                    pid = started(asking)
                    asking.sendall(f"{pid}\n".encode())
                    waiting.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, asking))
                else:
                    pid, asking = key.data
                    waiting.unregister(key.fd)
                    os.close(key.fd)
                    with asking:
                        asking.sendall(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())


def started(asking: socket.socket) -> int:
    """The pid of the process that is asked for."""
    _, streams, _, _ = socket.recv_fds(asking, 1, 3)
    process = Process(**json.load(asking.makefile()))
    pid = os.fork()
    if pid == 0:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        become(process)
    for stream in streams:
        os.close(stream)
    return pid


def become(process: Process) -> NoReturn:
    os.chdir(process.cwd)
    os.environ.update(process.environment)
    if process.before is not None:
        module, _, name = process.before.partition(":")
        getattr(importlib.import_module(module), name)()
    if process.line[0] == "-m":
        sys.argv = ["", *process.line[2:]]
        runpy.run_module(process.line[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = process.line
        sys.modules["main"].main()
    sys.exit(0)


if __name__ == "__main__":
    serve(sys.argv[1])
