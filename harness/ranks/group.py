"""The processes of a run: rank 0 leads, the others hold the same model and do their share of what it asks for.

    torchrun --shutdown-timeout 600 --nproc-per-node 4 main.py dataset=zsre

(Left alone, torchrun kills all processes 30 seconds after a signal: less than a turn and its checkpoint may take.)
Only the leader knows of data, editors, files and signals: what runs in one process runs in many without a second form.
It hands out work as function and argument, and gathers the results. A follower's error travels to the leader like a
result, so the processes stay in step and the leader ends the run with it.

Messages are pickled between processes of one program; no file is. Tensors in them go by themselves and unpickled, over
NCCL between GPUs and over gloo otherwise, in the layout they have: products of them are then the same, bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import pickle
import platform
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Self

import torch
from torch import Tensor, distributed

from harness.run.interrupt import postponed

Work = Callable[[Any, Any], Any]
"""work(held, part): a function by itself in a module, so that every process finds it by its name."""

Take = Callable[[int, Any], object]
"""take(rank, result)"""

VARIABLES: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells a process
ARRIVAL: Final = timedelta(minutes=10)  # by when all processes must have come together
PATIENCE: Final = timedelta(days=30)  # followers wait while the leader works alone; from then on who ends is noticed
ANSWER: Final = timedelta(hours=6)  # more than any task takes: a machine that lost its power says nothing at all
END, ONE_EACH, ALL_ALIKE = range(3)  # what the leader announces
MISTAKES: Final[dict[str, type[Exception]]] = {kind.__name__: kind for kind in (ValueError, FloatingPointError)}


class LostRankError(ValueError):
    """Another process of the run has ended."""


@dataclass(frozen=True)
class _Failure:
    """An error on its way to the leader."""

    kind: str
    text: str
    host: str


class Ranks:
    """The processes of this run, as one of them sees them; by itself, `Ranks()`, it is all there is."""

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank, self.size = rank, size
        self._wire = _Wire(group)
        self._in_step = True  # every task that was handed out has been answered

    # -- the leader

    def each(self, held: Any, work: Work, parts: Sequence[Any]) -> list[Any]:
        """work(held, parts[r]) on rank r, all at once; the results in that order.

        `held` is the leader's own; followers have theirs. Raises the first error of any of them, once all are done.
        """
        results: list[Any] = []
        self.gather(held, work, parts, lambda _rank, result: results.append(result))
        return results

    def gather(self, held: Any, work: Work, parts: Sequence[Any], take: Take) -> None:
        """As `each`, but every result goes to `take(rank, result)`, in the order of the ranks, before the next one is
        received: large ones need not lie side by side."""
        assert len(parts) == self.size
        self._hand_out(held, work, parts, ONE_EACH, take)

    def all(self, held: Any, work: Work, part: Any) -> list[Any]:
        """work(held, part) on every rank."""
        results: list[Any] = []
        self._hand_out(held, work, [part] * self.size, ALL_ALIKE, lambda _rank, result: results.append(result))
        return results

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let the followers go. Those that still work on something when the leader fails notice that it is gone."""
        if self.size > 1 and self.rank == 0 and self._in_step:
            self._in_step = False
            with contextlib.suppress(LostRankError):  # what has been done without it stands
                _unless_lost(lambda: self._wire.announce(END))
                self._wire.close()

    def _hand_out(self, held: Any, work: Work, parts: Sequence[Any], kind: int, take: Take) -> None:
        if self.size == 1:
            take(0, work(held, parts[0]))
            return
        if not self._in_step:
            raise LostRankError("the processes of the run are no longer in step; see what was said before")
        failure: Exception | None = None
        with postponed():  # a signal between a task and its answer would leave the others behind
            self._in_step = False
            _unless_lost(lambda: self._send_parts(work, parts, kind))
            for rank in range(self.size):
                try:
                    answer = work(held, parts[0]) if rank == 0 else self._answer_of(rank)
                    if failure is None:
                        take(rank, answer)
                    del answer  # before the next one takes its room
                except LostRankError:
                    raise
                except Exception as error:  # the others answer all the same
                    failure = failure or error
            self._in_step = True
        if failure is not None:
            raise failure

    def _answer_of(self, rank: int) -> Any:
        reply = _unless_lost(functools.partial(self._wire.receive, rank))
        if isinstance(reply, _Failure):
            raise MISTAKES.get(reply.kind, RuntimeError)(f"rank {rank} on {reply.host}: {reply.text}")
        return reply

    def _send_parts(self, work: Work, parts: Sequence[Any], kind: int) -> None:
        self._wire.announce(kind)
        if kind == ALL_ALIKE:
            self._wire.broadcast((work, parts[0]))
            return
        for rank in range(1, self.size):
            self._wire.send((work, parts[rank]), rank)

    # -- a follower

    def follow(self, held: Any) -> None:
        """Do what the leader asks for until it says that this is the end.

        Signals are the leader's concern: it finishes its turn first. LostRankError where it is gone.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        wire = self._wire
        while (kind := _unless_lost(wire.hear)) != END:
            come = wire.receive_broadcast if kind == ALL_ALIKE else functools.partial(wire.receive, 0)
            work, part = _unless_lost(come)
            reply = _attempt(held, work, part)
            if isinstance(reply, Exception):
                reply = self._failure(reply)
            _unless_lost(functools.partial(wire.send, reply, 0))
            del work, part, reply  # and with them what may fill a GPU
        wire.close()

    def _failure(self, error: Exception) -> _Failure:
        """A mistake of the user's is said by the leader alone; of anything else this process shows where it was."""
        kind = type(error).__name__
        if kind not in MISTAKES:
            sys.stderr.write(f"rank {self.rank} on {platform.node()}:\n{''.join(traceback.format_exception(error))}")
        text = str(error) if kind in MISTAKES else f"{kind}: {error}"
        return _Failure(kind, text, platform.node())


@functools.cache
def joined() -> Ranks:
    """The processes that this one was started with, by torchrun; without it, this one alone.

    ValueError where the others do not come.
    """
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


def program_of(ranks: Ranks) -> list[str]:
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


def _attempt(held: Any, work: Work, part: Any) -> Any:
    """The result, or the error: whoever waits for this process must hear of it either way."""
    try:
        return work(held, part)
    except Exception as error:
        return error


def _unless_lost(exchange: Callable[[], Any]) -> Any:
    try:
        return exchange()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # of torch.distributed: the other end of a connection is gone
        first = str(error).strip().splitlines()[0]
        raise LostRankError(f"another process of the run has ended, see what it said ({first})") from error


# ---------------------------------------------------------------------------------------------------------------------
# Messages: a length, a pickle with places for the tensors, and the bytes of each tensor


@dataclass(frozen=True)
class _Spec:
    """A tensor that travels beside the pickle."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    columns_first: bool  # a transposed matrix: sent as it lies, and turned back
    kind: str  # of device; the receiver's own one of that kind

    @classmethod
    def of(cls, tensor: Tensor) -> _Spec:
        transposed = _is_transposed(tensor)
        return cls(tensor.dtype, tuple(tensor.T.shape if transposed else tensor.shape), transposed, tensor.device.type)


def laid_out(tensor: Tensor) -> Tensor:
    """In one of the layouts that travel: contiguous, or the transpose of that."""
    return tensor if _is_transposed(tensor) else tensor.contiguous()


def _is_transposed(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and not tensor.is_contiguous() and tensor.T.is_contiguous()


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, place: int) -> Tensor:
        return self.tensors[place]


Carry = Callable[[Tensor], object]
"""Sends what a tensor holds, or fills it with what was sent."""


def _put(message: Any, carry: Carry) -> None:
    body = io.BytesIO()
    packer = _Packer(body)
    packer.dump(message)
    specs = [_Spec.of(tensor) for tensor in packer.tensors]
    content = bytearray(pickle.dumps((specs, body.getvalue()), protocol=pickle.HIGHEST_PROTOCOL))
    carry(torch.tensor([len(content)]))
    carry(torch.frombuffer(content, dtype=torch.uint8))
    for tensor, spec in zip(packer.tensors, specs, strict=True):
        if tensor.numel():
            carry(_bytes((tensor.T if spec.columns_first else tensor).detach().contiguous()))


def _take(carry: Carry) -> Any:
    length = torch.zeros(1, dtype=torch.int64)
    carry(length)
    content = torch.empty(int(length), dtype=torch.uint8)
    carry(content)
    specs, body = pickle.loads(content.numpy().tobytes())
    tensors = []
    for spec in specs:
        tensor = torch.empty(spec.shape, dtype=spec.dtype, device=spec.kind)
        if tensor.numel():
            carry(_bytes(tensor))
        tensors.append(tensor.T if spec.columns_first else tensor)
    return _Unpacker(io.BytesIO(body), tensors).load()


def _bytes(tensor: Tensor) -> Tensor:  # contiguous; any type travels, also where a backend knows few
    return tensor.reshape(-1).view(torch.uint8)


class _Wire:
    """Messages between the processes of a group."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def announce(self, kind: int) -> None:
        self._broadcast(torch.tensor([kind]))

    def hear(self) -> int:
        kind = torch.zeros(1, dtype=torch.int64)
        self._broadcast(kind)
        return int(kind)

    def broadcast(self, message: Any) -> None:
        _put(message, self._broadcast)

    def receive_broadcast(self) -> Any:
        return _take(self._broadcast)

    def send(self, message: Any, to: int) -> None:
        _put(message, lambda tensor: distributed.send(tensor, to, group=self._group))

    def receive(self, source: int) -> Any:
        def fill(tensor: Tensor) -> None:
            receiving = distributed.irecv(tensor, source, group=self._group)
            assert receiving is not None, "of a group that this process is in"
            # between GPUs, waiting with a limit would block; what is sent there comes right after what is sent here
            receiving.wait(ANSWER) if tensor.device.type == "cpu" else receiving.wait()

        return _take(fill)

    def close(self) -> None:
        """Leave in good order: gloo's threads, at work while Python takes itself apart, would abort the process."""
        distributed.destroy_process_group()

    def _broadcast(self, tensor: Tensor) -> None:
        distributed.broadcast(tensor, 0, group=self._group)
