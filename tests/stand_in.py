"""A stand-in for python, for the shell scripts of sweeps/: each process that they start is forked from one that has
imported everything, so that it runs in a moment.

`python -m tests.stand_in SOCKET` is that one. The stand-in hands it its arguments, its folder, its environment and its
three standard streams, and ends as the fork ended.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import ROOT

EXECUTABLE = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({socket!r})
    socket.send_fds(server, [b" "], [0, 1, 2])
    request = [sys.argv[1:], os.getcwd(), dict(os.environ)]
    server.sendall(json.dumps(request).encode())
    server.shutdown(socket.SHUT_WR)
    sys.exit(int(server.recv(8)))
"""


@contextmanager
def stand_in(folder: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """The text of an executable; `environment` is that of the process to fork from."""
    path = str(folder / "socket")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.stand_in", path],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        text=True,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    try:
        yield EXECUTABLE.format(python=sys.executable, socket=path)
    finally:
        process.kill()
        process.wait()


def serve(path: str) -> None:
    import main

    for module in ("harness.report", "transformers.models.llama.modeling_llama"):
        importlib.import_module(module)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        print("ready", flush=True)
        while True:
            asking, _ = server.accept()
            with asking:
                _, streams, _, _ = socket.recv_fds(asking, 1, 3)
                arguments, folder, environment = json.load(asking.makefile())
                pid = os.fork()
                if pid == 0:
                    for number, stream in enumerate(streams):
                        os.dup2(stream, number)
                    os.chdir(folder)
                    os.environ.clear()
                    os.environ.update(environment)
                    if arguments[0] == "-m":
                        sys.argv = ["", *arguments[2:]]
                        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
                    else:
                        sys.argv = arguments
                        main.main()
                    sys.exit(0)
                for stream in streams:
                    os.close(stream)
                asking.sendall(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())


if __name__ == "__main__":
    serve(sys.argv[1])
