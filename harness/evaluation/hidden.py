"""Hidden states of a few questions, before and after editing: what the report projects to two dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from safetensors.torch import load_file

from data.records import EditRecord
from data.stream import Tokenize, questions_of
from harness.evaluation.evaluate import sample_places
from harness.run import write_safetensors
from model import LanguageModel

FILE: Final = "hidden_states.safetensors"
QUESTIONS: Final = ("edit", "locality")  # what edits should move, and what they should leave alone


class HiddenStates:
    """Keeps hidden states of `size` of the records a run edits, drawn from the seed; 0 keeps none.

    The file in the run folder holds "base/edit", "base/locality", "edited/edit", "edited/locality", each (records, d);
    row i is the same record before and after, and records without a question are left out of its pair of tensors.
    """

    def __init__(
        self,
        model: LanguageModel,
        records: Sequence[EditRecord],
        tokenize: Tokenize,
        folder: Path,
        size: int,
        seed: int,
    ) -> None:
        self.model, self.tokenize, self.path = model, tokenize, folder / FILE
        self.records, self.places = records, sample_places(len(records), size, seed)

    def keep(self, moment: Literal["base", "edited"]) -> None:
        """Add the states of the model as it is now; those of the base model stay as they are once they are there."""
        kept = load_file(self.path) if self.path.is_file() else {}
        if not self.places or (moment == "base" and self.model.all_ranks(bool(kept))):
            return
        chosen = [self.records[place] for place in self.places]
        for field in QUESTIONS:
            questions = [question for record in chosen if (question := questions_of(record).get(field)) is not None]
            if questions:
                kept[f"{moment}/{field}"] = self.model.hidden_states(self.tokenize(questions))
        beside = self.path.with_name(f".{FILE}.part")
        write_safetensors(beside, kept)
        beside.replace(self.path)
