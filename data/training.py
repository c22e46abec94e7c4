"""Records to the turns that a hypernetwork is trained on.

Like the stream of edits, this keeps no place in the data: training turn i is a function of the seed and i.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data.records import EditRecord, Phase, TokenSequence, TrainingTurn
from data.stream import Rows, Tokenize, make_turn


class TrainingStream:
    """Passes over a training file, in turns of `n_edits` facts, as many as an edit turn has.

    Every pass draws a new order from the seed, so that other facts meet in a turn, and where `max_turns` bounds it,
    other facts altogether (None: every full turn). The file's last `held_out` full turns are never trained on.
    Raises ValueError, naming what to set, where that leaves no turn, or a turn without a question that its loss needs.
    """

    def __init__(
        self,
        records: Sequence[EditRecord],
        *,
        n_edits: int,
        batch_size: int,
        epochs: int,
        max_turns: int | None,
        held_out: int,
        needs_locality: bool,
        tokenize: Tokenize,
        seed: int,
    ) -> None:
        self.n_edits, self.batch_size, self.epochs = n_edits, batch_size, epochs
        self._records, self._tokenize, self._seed = records, tokenize, seed
        full = len(records) // n_edits
        if full <= held_out:
            raise ValueError(_too_short(len(records), full, n_edits, held_out))
        self.turns_per_epoch = min(full - held_out, max_turns or full)
        self._trained = range((full - held_out) * n_edits)
        self._held_out = range((full - held_out) * n_edits, full * n_edits)
        self._require("rephrase", *(["locality"] if needs_locality else []))

    def __len__(self) -> int:
        """Turns of all passes."""
        return self.epochs * self.turns_per_epoch

    def turn(self, index: int) -> TrainingTurn:
        """Turn `index`, counted from 0 over all passes; IndexError outside them."""
        if not 0 <= index < len(self):
            raise IndexError(f"turn {index} of a training of {len(self)} turns")
        epoch, i = divmod(index, self.turns_per_epoch)
        rows = self._order(epoch)[i * self.n_edits : (i + 1) * self.n_edits]
        return self._turn(index, epoch, i, self.turns_per_epoch, rows.tolist())

    def from_turn(self, first: int) -> Iterator[TrainingTurn]:
        """The turns from `first` to the end."""
        return (self.turn(index) for index in range(first, len(self)))

    def held_out(self) -> list[TrainingTurn]:
        """The turns that are never trained on, in the order of the file."""
        size, rows = self.n_edits, self._held_out
        turns = [rows[start : start + size] for start in range(0, len(rows), size)]
        return [self._turn(i, 0, i, len(turns), turn) for i, turn in enumerate(turns)]

    def records(self) -> Sequence[EditRecord]:
        """Every record that a turn may read, held-out ones included."""
        return Rows(self._records, range(self._held_out.stop))

    def _order(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._trained))[
            : self.turns_per_epoch * self.n_edits
        ]

    def _turn(self, index: int, epoch: int, index_in_epoch: int, epoch_turns: int, rows: Sequence[int]) -> TrainingTurn:
        records = tuple(self._records[row] for row in rows)
        return TrainingTurn(
            edits=make_turn(index, Phase.EDIT, records, self._tokenize, self.batch_size),
            rephrases=self._questions(records, "rephrase"),
            localities=self._questions(records, "locality"),
            epoch=epoch,
            index_in_epoch=index_in_epoch,
            epoch_turns=epoch_turns,
        )

    def _questions(self, records: Sequence[EditRecord], probe: str) -> tuple[TokenSequence, ...]:
        """Those that the data holds."""
        return tuple(self._tokenize([q for record in records if (q := getattr(record, probe)) is not None]))

    def _require(self, *probes: str) -> None:
        """ValueError for a turn of any pass, or held out, in which no record has one of the probes."""
        held = np.array([[getattr(record, probe) is not None for probe in probes] for record in self.records()])
        passes = [self._order(epoch) for epoch in range(self.epochs if not held.all() else 0)]
        for probe, has in zip(probes, held.T, strict=True):
            turns = [has[rows].reshape(-1, self.n_edits) for rows in (*passes, self._held_out)]
            if not all(turn.any(1).all() for turn in turns):
                raise ValueError(self._lacks(probe))

    def _lacks(self, probe: str) -> str:
        without = ", or editor.loc_coef=0" if probe == "locality" else ""
        return (
            f"the training data has turns of dataset.n_edits={self.n_edits} facts without any {probe} question, which "
            f"the loss of meta-training needs; choose another dataset.train_path{without}, or with dataset=jsonl name "
            f"the field that has them, dataset.fields.{probe}"
        )


def _too_short(rows: int, full: int, n_edits: int, held_out: int) -> str:
    kept = f" and editor.held_out_turns={held_out} of them are not trained on" if held_out else ""
    turns = f"{full} full turns of dataset.n_edits={n_edits}{kept}"
    return (
        f"dataset.train_path: the training data holds {rows} rows, {turns}, which leaves none to train on; "
        "set dataset.train_path to a larger file, or dataset.n_edits"
        + (" or editor.held_out_turns" if held_out else "")
        + " to less"
    )
