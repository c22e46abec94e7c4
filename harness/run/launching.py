"""Jobs of a sweep in processes that a launcher starts: joblib's workers, submitit's tasks on a cluster."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger(__name__)

IN_TURN = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"  # one job after the other, in one process
MOST_LINES = 20
ASKED_BY = (signal.SIGUSR1, signal.SIGUSR2)  # submitit takes the second, or what SUBMITIT_PREEMPT_SIGNAL names
ERRORS = {
    "joblib.externals.loky.process_executor": "BrokenProcessPool",
    "submitit.core.utils": "UncompletedJobError",  # and FailedJobError, which is one
}
"""What launchers raise where a process has ended without its job's result, by the module that defines it."""


def launcher_errors() -> tuple[type[Exception], ...]:
    """Those of `ERRORS` that can have been raised: a launcher that is not in use has not been imported."""
    return tuple(getattr(sys.modules[module], name) for module, name in ERRORS.items() if module in sys.modules)


def last_lines(error: Exception) -> str:
    """The end of what a launcher says of such a job, which may be all that the job had logged, and its trace."""
    return "\n".join(str(error).splitlines()[-MOST_LINES:])


def check_launcher(arguments: Sequence[str], processes: int) -> None:
    """ValueError where jobs would run in processes of a launcher's, beside those that torchrun started."""
    chosen = [word for word in arguments if word.lstrip("+").startswith("hydra/launcher=")]
    if chosen and processes > 1:
        raise ValueError(f"{chosen[0]} with {processes} processes of torchrun: leave one of the two out")


def share_terminal(launcher: str) -> None:
    """Log lines in place of progress bars, where jobs beside this one write to the same terminal."""
    if launcher != IN_TURN:
        os.environ["TERM"] = "dumb"


@contextmanager
def requeued_after_checkpoint() -> Iterator[None]:
    """Where a launcher's signal handler requeues the job, the run is first stopped as by SIGTERM, with a checkpoint.

    SLURM sends a SIGTERM of its own later, and it may send its first signal twice: both change nothing from then on.
    """
    handlers = {number: handler for number in ASKED_BY if callable(handler := signal.getsignal(number))}
    if not handlers:
        yield
        return
    end = signal.getsignal(signal.SIGTERM)
    assert callable(end), "prepare_process() sets one"
    asked: list[int] = []

    def end_unless_asked(number: int, frame: FrameType | None) -> None:
        if not asked:
            end(number, frame)

    def stop_run(number: int, frame: FrameType | None) -> None:
        if asked:
            return
        asked.append(number)
        stop = signal.signal(signal.SIGTERM, end_unless_asked)  # which is also what the run leaves in place at its end
        stop = end if stop is end_unless_asked else stop
        assert callable(stop)
        stop(signal.SIGTERM, frame)

    signal.signal(signal.SIGTERM, end_unless_asked)
    for number in handlers:
        signal.signal(number, stop_run)
    try:
        yield
    except SystemExit:
        for asking in map(signal.Signals, asked):
            log.info("%s: the launcher puts the job back into its queue", asking.name)
            handlers[asking](asking, None)
        raise
    finally:
        for number, handler in {**handlers, signal.SIGTERM: end}.items():
            signal.signal(number, handler)
