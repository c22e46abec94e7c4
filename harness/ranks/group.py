"""The processes of a run, and what goes between them.

    torchrun --shutdown-timeout 600 --nproc-per-node 4 main.py dataset=zsre

(Left alone, torchrun kills all processes 30 seconds after a signal: less than a turn and its checkpoint may take.)
Every rank runs the same program. What one has found goes to all by collectives of torch.distributed, over NCCL between
GPUs and over gloo otherwise. Each carries an error where there is one, so what fails on one rank fails on all of them,
at the same place; an error outside of a collective is what its rank brings to the next one.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Self, TypeVar

import torch
from torch import Tensor, distributed

from harness.run import postponed

T = TypeVar("T")

VARIABLES: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells a process
ARRIVAL: Final = timedelta(minutes=10)  # by when all processes must have come together
PATIENCE: Final = timedelta(hours=6)  # more than any share takes: a machine that lost its power says nothing at all
MISTAKES: Final[dict[str, type[Exception]]] = {kind.__name__: kind for kind in (ValueError, FloatingPointError)}


class LostRankError(ValueError):
    """Another process of the run has ended."""


@dataclass(frozen=True)
class _Failure:
    """An error on its way to the other ranks."""

    kind: str
    text: str
    rank: int
    host: str
    level: int  # of `in_step`
    is_end: bool  # no error but the end of the process, as by a signal

    def error(self) -> Exception:
        return MISTAKES.get(self.kind, RuntimeError)(f"rank {self.rank} on {self.host}: {self.text}")


class Ranks:
    """The processes of this run, all of which make the same calls in the same order; `Ranks()` is one alone."""

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank, self.size = rank, size
        self._group = group
        self._level = 0
        self._told = False  # the last exchange said an error
        self._over = False  # one that nobody goes on after
        self._lost = False  # a collective was begun and not finished

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes, talks and takes signals."""
        return self.rank == 0

    @property
    def writes_cache(self) -> bool:
        """Whether this is the first rank of its machine: each machine has a cache of its own."""
        return self.rank % int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) == 0

    # -- collectives

    def all_gather(self, work: Callable[[], T]) -> list[T]:
        """work() on every rank; what each of them found, in their order. Raises the first error of any, on all."""
        if self.size == 1:
            return [work()]
        answer: T | None = None
        own: Exception | None = None
        try:
            answer = work()
        except LostRankError:
            raise
        except Exception as error:
            own = error
        answers, failures = self._exchange(answer, own)
        if not failures:
            return answers
        if own is not None and failures[0].rank == self.rank:
            raise own
        if self._over and not self.is_first:
            raise SystemExit(0)
        raise failures[0].error()

    def broadcast(self, work: Callable[[], T]) -> T:
        """work() on rank 0 alone; what it found, on every rank."""
        found: Any = self.all_gather(lambda: work() if self.is_first else None)
        return found[0]

    def all_gather_tensors(
        self, work: Callable[[], tuple[T, Sequence[Tensor]]], take: Callable[[int, T, Sequence[Tensor]], object]
    ) -> None:
        """work() on every rank; what each said, and its tensors, go to take(rank, said, tensors) on all of them.

        In the order of the ranks, and before those of the next one are received: they need not lie side by side. An
        error of `take` is raised once all have been received.
        """
        with self._whole():
            said, own = self._said(work)
            failure: Exception | None = None
            for rank, (answer, specs) in enumerate(said):
                tensors = self._from(rank, own, specs)
                try:
                    take(rank, answer, tensors)
                except Exception as error:
                    failure = failure or error
                del tensors  # before the next ones take their room
        if failure is not None:
            raise failure

    def all_reduce(self, work: Callable[[], tuple[T, Sequence[Tensor]]]) -> list[T]:
        """work() on every rank; what each said. Its tensors become the sums over the ranks."""
        with self._whole():
            said, own = self._said(work)
            if self.size > 1:
                self._together(lambda: [distributed.all_reduce(tensor, group=self._group) for tensor in own])
        return [answer for answer, _ in said]

    def _said(self, work: Callable[[], tuple[T, Sequence[Tensor]]]) -> tuple[list[tuple[T, Any]], Sequence[Tensor]]:
        own: list[Tensor] = []

        def say() -> tuple[T, list[tuple[torch.Size, torch.dtype, str]]]:
            answer, tensors = work()
            own.extend(tensors)
            return answer, [(tensor.shape, tensor.dtype, tensor.device.type) for tensor in own]

        return self.all_gather(say), own

    def _from(self, rank: int, own: Sequence[Tensor], specs: Sequence[Any]) -> Sequence[Tensor]:
        if self.size == 1:
            return own

        def receive() -> list[Tensor]:
            if rank == self.rank:
                tensors = [tensor.contiguous() for tensor in own]
            else:  # on this process's own device of that kind
                tensors = [torch.empty(shape, dtype=dtype, device=kind) for shape, dtype, kind in specs]
            for tensor in (tensor for tensor in tensors if tensor.numel()):
                distributed.broadcast(_bytes(tensor), rank, group=self._group)
            return tensors

        return self._together(receive)

    def _exchange(self, answer: Any, own: BaseException | None) -> tuple[list[Any], list[_Failure]]:
        said: list[Any] = [None] * self.size
        mine = (answer, None if own is None else self._failure(own))
        self._together(lambda: distributed.all_gather_object(said, mine, group=self._group))
        failures = [failure for _, failure in said if failure is not None]
        self._told = bool(failures)
        self._over = any(failure.is_end or failure.level < self._level for failure in failures)
        return [answer for answer, _ in said], failures

    def _together(self, collective: Callable[[], T]) -> T:
        """A collective from its beginning to its end. LostRankError where another process has ended."""
        with self._whole():
            self._lost = True
            try:
                found = collective()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # the other end of a connection is gone
                first = str(error).strip().splitlines()[0]
                raise LostRankError(f"another process of the run has ended, see what it said ({first})") from error
            self._lost = False
            return found

    def _whole(self) -> contextlib.AbstractContextManager[None]:
        """A signal between two collectives that belong together would leave the others behind."""
        return postponed() if self.size > 1 and self.is_first else contextlib.nullcontext()

    def _failure(self, error: BaseException) -> _Failure:
        """A mistake of the user's is said by rank 0 alone; of anything else this process shows where it was."""
        kind, text = type(error).__name__, str(error)
        if isinstance(error, OSError) and error.strerror:
            kind, text = "ValueError", f"{error.filename or 'a file'}: {error.strerror}"
        if kind not in MISTAKES:
            text = f"{kind}: {text}"
            if isinstance(error, Exception) and not self.is_first:
                sys.stderr.write(
                    f"rank {self.rank} on {platform.node()}:\n{''.join(traceback.format_exception(error))}"
                )
        return _Failure(kind, text, self.rank, platform.node(), self._level, not isinstance(error, Exception))

    # -- beginning and end

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """An error in the block ends the block on every rank; a rank that is through it waits for the others.

        Rank 0 raises the error, whichever rank's it is, and the others go on behind the block. Where rank 0 is ending
        (a signal), the others end too, with exit code 0: at any other one torchrun would kill rank 0.
        """
        if self.size == 1:
            yield
            return
        self._level += 1
        try:
            yield
            self.all_gather(lambda: None)
        except BaseException as error:
            if not (self._told or self._over or self._lost):
                with contextlib.suppress(LostRankError):
                    self._exchange(None, error)
            if self.is_first or self._lost:
                raise
            if self._over:
                raise SystemExit(0) from None
        finally:
            self._level -= 1
            self._told = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the process group: gloo's threads, at work while Python takes itself apart, would abort the process."""
        if self.size > 1 and not self._lost:
            self._lost = True
            distributed.destroy_process_group()


def _bytes(tensor: Tensor) -> Tensor:  # contiguous; any type travels, also where a backend knows few
    return tensor.detach().reshape(-1).view(torch.uint8)


@functools.cache
def init_ranks() -> Ranks:
    """The processes that torchrun or accelerate started, or this one alone; ValueError where the others do not come."""
    if any(name not in os.environ for name in VARIABLES) or os.environ["WORLD_SIZE"] == "1":
        return Ranks()
    has_gpu = _gpu_each()
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
    try:
        distributed.init_process_group(backend, timeout=ARRIVAL)
        group = distributed.new_group(backend=backend, timeout=PATIENCE)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        raise LostRankError(f"the {os.environ['WORLD_SIZE']} processes of the run did not meet ({first})") from error
    for name in VARIABLES:  # a process that this one starts is none of them
        del os.environ[name]
    return Ranks(distributed.get_rank(), distributed.get_world_size(), group)


def launch_command(ranks: Ranks) -> list[str]:
    """How main.py is started for these processes, up to its settings."""
    if ranks.size == 1:
        return ["python", "main.py"]
    here = os.environ.get("LOCAL_WORLD_SIZE", "1")
    count = str(ranks.size // int(here))
    machines = ["--nnodes", count, "--node-rank", "N", "--master-addr", "HOST"] if int(here) < ranks.size else []
    return ["torchrun", "--shutdown-timeout", "600", *machines, "--nproc-per-node", here, "main.py"]


def _gpu_each() -> bool:
    """Whether this machine has a GPU for every process that torchrun started on it."""
    return 0 < int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= torch.cuda.device_count()


def require_gpu_each() -> None:
    """ValueError where several processes of the run would have to share a GPU."""
    here = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not _gpu_each():
        raise ValueError(
            f"--nproc-per-node={here}: {platform.node()} has {torch.cuda.device_count()} GPUs; start as many processes "
            "or fewer, or set model_device=cpu"
        )
