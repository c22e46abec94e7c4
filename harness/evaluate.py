"""Scores of edited facts: teacher-forced token accuracy, with 95% intervals (DESIGN section 5)."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from data.records import EditRecord, Question, TokenSequence
from data.stream import EditStream, questions_of
from model import LanguageModel

# What each probe of a record is called in the papers: efficacy, generalisation, specificity, personas, multi-hop.
PROTOCOLS = {"edit": "ES", "rephrase": "GS", "locality": "LS", "persona": "PS", "multi_hop": "MS"}
# Records scored together: enough for tight length buckets, few enough to forget.
BLOCK = 128
# To be raised when the same model and data would score differently: older copies of base scores are then left alone.
SCORES_FORMAT = 1

Tokenize = Callable[[Sequence[Question]], list[TokenSequence]]
Summary = dict[str, dict[str, float | int]]
Watch = Callable[["RecordScore"], None]


@dataclass(frozen=True, slots=True)
class RecordScore:
    """One line of records.jsonl: how many answer tokens of one probe of one record the model gets right."""

    place: int  # of the record among those that edit turns write
    index: int  # row of the data file
    protocol: str  # ES, GS, ...
    correct: int
    tokens: int


class Tally:
    """The scores of a protocol as a histogram, so that memory does not grow with the records."""

    def __init__(self) -> None:
        self.counts: Counter[float] = Counter()

    def add(self, score: float) -> None:
        self.counts[score] += 1

    def summary(self, resamples: int, seed: int) -> dict[str, float | int]:
        """Mean and 95% percentile bootstrap over records.

        Resampling n records with replacement draws the histogram from a multinomial, which is exact and costs nothing.
        """
        values = np.array(sorted(self.counts))
        counts = np.array([self.counts[value] for value in values])
        n = int(counts.sum())
        means = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples) @ values / n
        low, high = np.percentile(means, [2.5, 97.5])
        return {"mean": float(counts @ values / n), "low": float(low), "high": float(high), "n": n}


def summarize(scores: Iterable[RecordScore], resamples: int, seed: int) -> Summary:
    """Each protocol's token accuracy, and as `*_seq` the share of records with every answer token right."""
    tallies: dict[str, Tally] = {}
    for score in scores:
        tallies.setdefault(score.protocol, Tally()).add(score.correct / score.tokens)
        tallies.setdefault(f"{score.protocol}_seq", Tally()).add(float(score.correct == score.tokens))
    order = [name + form for form in ("", "_seq") for name in PROTOCOLS.values()]
    return {name: tallies[name].summary(resamples, seed) for name in order if name in tallies}


def score_records(
    model: LanguageModel,
    records: Iterable[tuple[int, EditRecord]],  # (place, record)
    tokenize: Tokenize,
    protocols: Mapping[str, str] = PROTOCOLS,
) -> Iterator[RecordScore]:
    """Score every probe a record has, in the order of the records; a probe it lacks is left out."""
    stream = iter(records)
    while block := list(islice(stream, BLOCK)):
        probes = [
            (place, record.index, name, question)
            for place, record in block
            for field, question in questions_of(record).items()
            if (name := protocols.get(field)) is not None
        ]
        sequences = tokenize([question for *_, question in probes])
        for (place, index, name, _), right, sequence in zip(probes, _correct(model, sequences), sequences, strict=True):
            yield RecordScore(place, index, name, right, sequence.answer_length)


def _correct(model: LanguageModel, sequences: Sequence[TokenSequence]) -> list[int]:
    """Answer tokens that are the model's most likely next token, for each sequence."""
    correct = torch.zeros(len(sequences), dtype=torch.int64, device=model.device)
    for batch in model.batches(sequences):
        hits = model.answer_logits(batch).argmax(-1) == batch.targets.to(model.device)
        correct.index_add_(0, batch.members[batch.rows].to(model.device), hits.long())
    return correct.tolist()


class Evaluation:
    """Scores the facts of a stream: on the base model, of which the cache keeps a copy, and on the edited one."""

    def __init__(
        self,
        model: LanguageModel,
        stream: EditStream,
        tokenize: Tokenize,
        *,
        protocols: Mapping[str, str],
        sample: int | None,
        resamples: int,
        seed: int,
    ) -> None:
        self.model, self.stream, self.tokenize, self.protocols = model, stream, tokenize, protocols
        self.sample, self.resamples, self.seed = sample, resamples, seed

    def run(self, upto: int | None, watch: Watch, cache: Path | None = None) -> Summary:
        """Score the facts written before turn `upto` (None: all); `watch(score)` sees every single score go by.

        With `cache`, scores kept there are read instead of computed, and computed ones are kept there.
        """
        scores = self._scores(upto) if cache is None else cached_scores(cache, lambda: self._scores(upto))
        return summarize(_watched(scores, watch), self.resamples, self.seed)

    def count(self, upto: int | None) -> int:
        """Records that `run` scores."""
        return len(self._places(upto))

    def _places(self, upto: int | None) -> Sequence[int]:
        return sample_places(len(self.stream.edited(upto)), self.sample, self.seed)

    def _scores(self, upto: int | None) -> Iterator[RecordScore]:
        records = self.stream.edited(upto)
        chosen = ((place, records[place]) for place in self._places(upto))
        return score_records(self.model, chosen, self.tokenize, self.protocols)


def _watched(scores: Iterable[RecordScore], watch: Watch) -> Iterator[RecordScore]:
    for score in scores:
        watch(score)
        yield score


def protocols_of(eval_multi_hop: bool) -> dict[str, str]:
    """The protocols to score; multi-hop questions only where asked for (`dataset.eval_mhop`)."""
    return {field: name for field, name in PROTOCOLS.items() if eval_multi_hop or field != "multi_hop"}


def sample_places(count: int, size: int | None, seed: int) -> Sequence[int]:
    """The places among `count` records to evaluate: all, or a sample of `size` fixed by the seed, in order."""
    if size is None or size >= count:
        return range(count)
    return sorted(random.Random(f"evaluation {seed} {count}").sample(range(count), size))


def cached_scores(path: Path, compute: Callable[[], Iterator[RecordScore]]) -> Iterator[RecordScore]:
    """The scores kept at `path`, or computed and kept there once all of them are."""
    if path.is_file():
        with path.open() as lines:
            yield from (RecordScore(**json.loads(line)) for line in lines)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{random.SystemRandom().getrandbits(64):016x}.part")
    try:
        with beside.open("w") as lines:
            for score in compute():
                lines.write(json.dumps(asdict(score)) + "\n")
                yield score
        beside.rename(path)
    finally:
        beside.unlink(missing_ok=True)
