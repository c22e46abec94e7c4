"""Which facts are asked again after later turns, and when (DESIGN section 5, retention).

A sample of each edit turn's records, fixed by the seed and the edits before it, is scored right after the turn and when
1, 2, 4, 8, ... more turns have gone by, warm-up turns among them; and once more at the end. The age of a score is that
number of turns.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from data.stream import EditStream


class RetentionPlan:
    """`sample` records of each turn (0: none): the same in a resumed run, and in one that warms up for more turns."""

    def __init__(self, stream: EditStream, sample: int, seed: int) -> None:
        self.stream, self.sample, self.seed = stream, sample, seed

    def due(self, done: int) -> list[int]:
        """Places, increasing, of the records to ask when `done` turns of the stream are done."""
        ages = [0, *(2**power for power in range(done.bit_length()))]
        return [place for age in reversed(ages) if age < done for place in self.places(done - 1 - age)]

    def at_end(self) -> Iterator[int]:
        """Places, increasing, of all samples."""
        return (place for turn in range(len(self.stream)) for place in self.places(turn))

    def places(self, turn: int) -> list[int]:
        """The sample of a turn; none of a warm-up turn."""
        written = range(len(self.stream.edited(turn)), len(self.stream.edited(turn + 1)))
        chosen = random.Random(f"retention {self.seed} {written.start}").sample(written, min(self.sample, len(written)))
        return sorted(chosen)
