"""A few questions, drawn from the seed, and what the model wrote on them before and after a run's edits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from data.records import EditRecord
from data.stream import questions_of
from harness.evaluation.evaluate import sample_places
from harness.evaluation.generation import Generation
from model import LanguageModel

PROBES: Final = ("edit", "rephrase", "locality")


class Examples:
    """The questions of `generation.sample` of the records that a run edits, drawn from the seed."""

    def __init__(self, records: Sequence[EditRecord], generation: Generation, seed: int) -> None:
        self.generation = generation
        self.places = sample_places(len(records), generation.sample, seed)
        self.records = [records[place] for place in self.places]
        self._asked = [
            (probe, place, record, question)
            for probe in PROBES
            for place, record in zip(self.places, self.records, strict=True)
            if (question := questions_of(record).get(probe)) is not None
        ]

    def texts(self, model: LanguageModel) -> list[str]:
        """What the model writes on each of them as it is now."""
        return self.generation.texts(model, [question.prompt for *_, question in self._asked])

    def lines(self, base: Sequence[str], edited: Sequence[str]) -> list[dict[str, Any]]:
        """What examples.json holds, from the texts of both models: edited questions, rephrases, unrelated ones."""
        return [
            {
                "probe": probe,
                "place": place,
                "index": record.index,
                "question": question.prompt,
                "wanted": question.answer,
                "base": before,
                "edited": after,
            }
            for (probe, place, record, question), before, after in zip(self._asked, base, edited, strict=True)
        ]
