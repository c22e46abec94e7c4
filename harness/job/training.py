"""Meta-training as a run goes through it: the loop, its lines in turns.jsonl, its checkpoints, the network it keeps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from data.progress import progress_bar
from data.records import TrainingTurn
from data.training import TrainingStream
from editor.meta_train import MetaStep, MetaTrainer
from harness.job.resume import LoopState
from harness.run import Interrupted, Interruption, NetworkKeeper
from harness.watch import Tracker, memory


class MetaTraining:
    """Trains an editor's network on the turns of a stream, from wherever an interrupted run has left it."""

    def __init__(self, trainer: MetaTrainer, stream: TrainingStream, state: LoopState, tracker: Tracker) -> None:
        self.trainer, self.stream, self.editor = trainer, stream, trainer.editor
        self.state, self.tracker = state, tracker
        self.devices = state.diagnostics.devices
        self.held_out = stream.held_out()
        self.done = state.trained  # where the checkpoint stands that the run was restored from, or 0
        if self.done:
            first = max(0, self.done - trainer.horizon.back_depth)
            trainer.resume(state.training, (stream.turn(index) for index in range(first, self.done)))
            state.training = {}

    def run(self, every: int, network: NetworkKeeper, interruption: Interruption) -> None:
        """All turns that are left. The loss of the held-out turns is taken before the first pass and after each.

        A checkpoint every `every` turns and after each pass (0: none); the network after each pass goes to its keeper.
        """
        try:
            with progress_bar("training the editor", len(self.stream), "turns", done=self.done, keep=True) as bar:
                if not self.done:
                    with _named(network):
                        self._validate()
                for turn in self.stream.from_turn(self.done):
                    with interruption.held(), _named(network):
                        loss = self._step(turn, every, network)
                    bar.advance(1, f"loss {loss:.3f}")
            network.keep(self.editor, self.done, len(self.stream))  # also where that was wished for later
        except Interrupted:
            if every and self.done:
                self.state.save_training(self.done, self.trainer.state())
            raise

    def _step(self, turn: TrainingTurn, every: int, network: NetworkKeeper) -> float:
        with self.state.model.reading_once():
            step = self.trainer.turn(turn)
        self.tracker.turn(self._line(turn, step))
        self.done = turn.edits.index + 1
        ended = turn.index_in_epoch + 1 == turn.epoch_turns
        if ended:
            self._validate()  # before it is kept: there it shows whether it is any good
            network.keep(self.editor, self.done, len(self.stream))
        if every and (self.done % every == 0 or ended):
            self.state.save_training(self.done, self.trainer.state())
        return step.loss.total

    def _line(self, turn: TrainingTurn, step: MetaStep) -> dict[str, Any]:
        return {
            "turn": turn.edits.index,
            "phase": "meta_train",
            "epoch": turn.epoch,
            "edits": len(turn.edits.records),
            "loss": step.edit_loss,
            "meta_loss": asdict(step.loss),
            "grad_norm": step.grad_norm,
            "seconds": {**step.seconds, "total": sum(step.seconds.values())},
            "statistics": self.editor.statistics(),
            "memory": memory(*self.devices),
        }

    def _validate(self) -> None:
        """A line with the loss of the held-out turns, after as many training turns as `turn` says."""
        if not self.held_out:
            return
        start = time.perf_counter()
        try:
            with self.state.model.reading_once():
                loss = self.trainer.validate(self.held_out)
        except FloatingPointError as error:
            raise FloatingPointError(f"on the held-out turns, after {self.done} of training: {error}") from error
        self.tracker.turn(
            {
                "turn": self.done,
                "phase": "meta_valid",
                "meta_loss": asdict(loss),
                "seconds": {"total": time.perf_counter() - start},
                "memory": memory(*self.devices),
            }
        )


@contextlib.contextmanager
def _named(network: NetworkKeeper) -> Iterator[None]:
    """Its turns are counted by themselves: an error says so, and what there is to go on from."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"meta-training, {error}{network.what_is_left()}") from error
