"""One process writes a run folder."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import platform
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)

FILE = "run.lock"
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class FolderLock:
    """The right to write a folder, for as long as this process lives or until `release`.

    The operating system holds it, so a process that is killed leaves none behind; `run.lock` says who has it.
    """

    def __init__(self, folder: Path) -> None:
        """ValueError, naming process and machine, where another process has it; OSError where none can be had."""
        self.path = folder / FILE
        self._file: IO[str] | None = self._take()
        self._file.truncate(0)
        json.dump({"pid": os.getpid(), "host": platform.node()}, self._file)
        self._file.flush()

    def _take(self) -> IO[str]:
        while True:
            file = self.path.open("a+", encoding="utf-8")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    return file
            except FileNotFoundError:
                pass
            except BlockingIOError:
                raise ValueError(f"{self.path.parent}: {self._holder()} writes this run; wait, or stop it") from None
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                log.warning("%s: no locks here; see to it that no other process writes this run", self.path.parent)
                return file
            file.close()  # its holder let go and took the file away between `open` and `flock`: once more

    def _holder(self) -> str:
        try:
            about = json.loads(self.path.read_text(encoding="utf-8"))
            return f"process {about['pid']} on {about['host']}"
        except (FileNotFoundError, ValueError):  # it is about to say so, or has just gone
            return "another process"

    def release(self) -> None:
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None
