"""Scores of edited facts with 95% intervals: teacher-forced, generated, against the base model (DESIGN section 5)."""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.batches import compute_batches, on_device
from data.disk import sync
from data.intervals import bootstrap_interval
from data.progress import progress_bar
from data.records import EditRecord, Question, RecordScore, TokenBatch, TokenSequence
from data.stream import EditStream, Tokenize, questions_of
from harness.evaluation.generation import Generation, matches
from harness.evaluation.locality import (
    BaseReader,
    BaseWriter,
    Compared,
    Distributions,
    Locality,
    RecordShift,
    cat,
    compare_with,
)
from harness.evaluation.perplexity import Passage, perplexity
from harness.evaluation.retention import RetentionPlan
from model import LanguageModel

# What each probe of a record is called in the papers: efficacy, generalisation, specificity, personas, multi-hop.
PROTOCOLS = {"edit": "ES", "rephrase": "GS", "locality": "LS", "persona": "PS", "multi_hop": "MS"}
# What is said of a probe beside its token accuracy: all tokens right; these and the end after them; the generated text
# is the answer, contains it; first choices as the base model's, and KL(base || edited) in nats.
FORMS = ("", "_seq", "_end", "_gen", "_contains", "_agree", "_kl")
# What the questions of a block fill at least, which are scored together: compute batches of each process, and tokens of
# all; enough for batches of sequences of about one length, little enough to forget.
BLOCK_BATCHES = 32
BLOCK_TOKENS = 1 << 16
TOKENIZED_TOGETHER = 128  # questions
# Tokens that take as long as what another compute batch costs beside its own: 12 to 40 on CPUs, not measured on a GPU.
OVERHEAD = {"cpu": 32, "cuda": 256}
# To be raised when the same model and data would score differently: older copies of base scores are then left alone.
SCORES_FORMAT = 9

Score = dict[str, float | int]  # mean, low, high, n
Summary = dict[str, Score | float]  # perplexity has no interval
Watch = Callable[[RecordScore], None]
Advance = Callable[[int], object]


class Tally:
    """A histogram, so that memory does not grow with the records; of `digits` significant digits. The mean is exact."""

    def __init__(self, digits: int | None = None) -> None:
        self.counts: Counter[float] = Counter()
        self.total = 0.0
        self._digits = digits

    def add(self, value: float) -> None:
        self.total += value
        self.counts[value if self._digits is None else float(f"{value:.{self._digits}g}")] += 1

    def summary(self, resamples: int, seed: int) -> Score:
        """Mean and 95% percentile bootstrap over records."""
        values = np.array(sorted(self.counts))
        counts = np.array([self.counts[value] for value in values])
        n = self.counts.total()
        mean = self.total / n
        low, high = bootstrap_interval(mean, counts, lambda drawn: drawn @ values / n, resamples, seed)
        return {"mean": mean, "low": low, "high": high, "n": n}


def summarize(scores: Iterable[RecordScore], resamples: int, seed: int) -> Summary:
    """Each protocol's `FORMS`. `LS_kl` also says, as `error`, by how much at most its mean is too small."""
    kl_error = 0.0

    def values() -> Iterator[tuple[str, float]]:
        nonlocal kl_error
        for score in scores:
            yield from ((score.protocol + form, value) for form, value in score.forms())
            kl_error += score.kl_error or 0.0

    found = summarize_values(values(), resamples, seed)
    summary = {name: found[name] for form in FORMS for name in (p + form for p in PROTOCOLS.values()) if name in found}
    for name in summary:
        if name.endswith("_kl"):
            summary[name]["error"] = kl_error / summary[name]["n"]
    return {**summary}


def summarize_values(values: Iterable[tuple[str, float]], resamples: int, seed: int) -> dict[str, Score]:
    """The values of each name, in the order in which the names come up."""
    tallies: dict[str, Tally] = {}
    for name, value in values:
        tallies.setdefault(name, Tally(3 if name.endswith("_kl") else None)).add(value)
    return {name: tally.summary(resamples, seed) for name, tally in tallies.items()}


# --------------------------------------------------------------------------------------------------------------------
# Scoring


@dataclass(frozen=True, slots=True)
class _Probe:
    place: int
    record: EditRecord
    field: str  # key of PROTOCOLS
    question: Question


def score_records(
    model: LanguageModel,
    records: Iterable[tuple[int, EditRecord]],  # (place, record)
    tokenize: Tokenize,
    protocols: Mapping[str, str] = PROTOCOLS,
    *,
    locality: Locality | None = None,
    locality_only: Container[int] = (),  # places of which only the locality probe is scored
    generation: Generation | None = None,
    generated: Container[int] = (),  # places whose answers are generated too
    advance: Advance = lambda _: None,
) -> Iterator[RecordScore]:
    """Score every probe a record has, in the order of the records; a probe it lacks is left out.

    `advance(n)` is called when n more records have been computed. FloatingPointError for logits that are not finite.
    """
    asked = (
        _Probe(place, record, field, question)
        for place, record in records
        for field, question in questions_of(record).items()
        if field in protocols and (field == "locality" or place not in locality_only)
    )
    block = max(BLOCK_BATCHES * model.compute_tokens * model.world_size, BLOCK_TOKENS)
    for probes, sequences in _blocks(asked, tokenize, block):
        hits, moved = _teacher_forced(model, probes, sequences, locality)
        texts = _generated(model, probes, generation, generated)
        advance(sum(probe.field == "edit" for probe in probes))
        for i, (probe, sequence) in enumerate(zip(probes, sequences, strict=True)):
            name, said = protocols[probe.field], {**moved.get(i, {}), **texts.get(i, {})}
            tokens = sequence.answer_length - sequence.end_tokens
            ended = all(hits[i]) if sequence.end_tokens else None
            yield RecordScore(probe.place, probe.record.index, name, sum(hits[i][:tokens]), tokens, ended, **said)


def _blocks(
    probes: Iterator[_Probe],
    tokenize: Tokenize,
    size: int,  # tokens that a block holds at least, but for the last
) -> Iterator[tuple[list[_Probe], list[TokenSequence]]]:
    """The probes with their sequences, in order, a block at a time."""
    block: list[_Probe] = []
    sequences: list[TokenSequence] = []
    tokens = 0
    while read := list(islice(probes, TOKENIZED_TOGETHER)):
        cut = [
            sequence.without_end() if probe.field == "locality" else sequence  # the base model was taught no end
            for probe, sequence in zip(read, tokenize([probe.question for probe in read]), strict=True)
        ]
        block += read
        sequences += cut
        tokens += sum(len(sequence.ids) for sequence in cut)
        if tokens >= size:
            yield block, sequences
            block, sequences, tokens = [], [], 0
    if block:
        yield block, sequences


def _teacher_forced(
    model: LanguageModel, probes: Sequence[_Probe], sequences: Sequence[TokenSequence], locality: Locality | None
) -> tuple[list[list[bool]], dict[int, dict[str, Any]]]:
    """Of each probe which answer tokens are right; of locality probes what was said beside the base model."""
    local = [i for i, probe in enumerate(probes) if probe.field == "locality"] if locality else []
    places, lengths = [probes[i].place for i in local], [sequences[i].answer_length for i in local]
    base = locality.base(places, lengths) if locality and local else None
    tokens = dict(zip(local, torch.arange(sum(lengths)).split(lengths), strict=True))  # of all locality answers
    shares = model.partition([len(sequence.ids) for sequence in sequences])
    answered = model.map_ranks(_score_share, [_share_input(share, sequences, tokens, base) for share in shares])
    if broken := sum(part.broken for part in answered):
        asked = sum(sequence.answer_length for sequence in sequences)
        raise FloatingPointError(f"the logits are not finite at {broken} of {asked} answer tokens: nothing to score")
    hits = dict(zip(chain(*shares), chain(*(part.hits for part in answered)), strict=True))
    moved: list[RecordShift | None] = []
    if locality and local:
        order = torch.cat([tokens[i] for share in shares for i in share if i in tokens])
        seen = [part.local for part in answered if part.local is not None]
        moved = locality.finish_block(places, lengths, cat(seen)[order.argsort()])
    said = {i: {"agree": m.agree, "kl": m.kl, "kl_error": m.error} for i, m in zip(local, moved, strict=True) if m}
    return [hits[i] for i in range(len(probes))], said


@dataclass(frozen=True)
class _ShareInput:
    """Questions for one of the processes that share an evaluation."""

    sequences: list[TokenSequence]
    local: list[int]  # places, among these, of the locality questions, whose answers are looked at closely
    base: Distributions | None  # the base model's at their answer tokens, laid end to end; None: there is none yet


@dataclass(frozen=True)
class _ShareScores:
    hits: list[list[bool]]  # of each sequence's answer tokens, whether they are the first choice
    local: Compared | None  # at the answer tokens of locality questions; None where there were none
    broken: int = 0  # answer tokens whose logits are not finite


def _share_input(
    share: Sequence[int], sequences: Sequence[TokenSequence], tokens: Mapping[int, Tensor], base: Distributions | None
) -> _ShareInput:
    """The questions at the places of the share; `tokens` says where in `base` each locality question's answer lies."""
    local = [place for place, i in enumerate(share) if i in tokens]
    mine = [tokens[share[place]] for place in local]
    return _ShareInput([sequences[i] for i in share], local, base[torch.cat(mine)] if base and mine else None)


def _score_share(model: LanguageModel, share: _ShareInput) -> _ShareScores:
    if not share.sequences:  # there are more processes than questions
        return _ShareScores([], None)
    lengths = [sequence.answer_length for sequence in share.sequences]
    rows = _rows_of(share.local, lengths)
    base = share.base and share.base.to(model.device)
    hits = torch.zeros(sum(lengths), dtype=torch.bool, device=model.device)
    broken = torch.zeros((), dtype=torch.int64, device=model.device)  # stays there: read once, not every batch
    seen: list[tuple[Tensor, Compared]] = []
    for at, logits, batch in _answer_logits(model, share.sequences):
        ours = (rows[at] >= 0).nonzero()[:, 0]
        mine = rows[at[ours]]
        there, (at, ours, of_base) = on_device(batch, model.device, at, ours, mine)
        first = logits.argmax(-1)  # of a row with a nan, that one
        broken += logits.gather(-1, first[:, None]).isfinite().logical_not().sum()
        hits[at] = first == there.targets
        if len(mine):
            seen.append((mine, compare_with(logits[ours], first[ours], base and base[of_base])))
    by_sequence = [part.tolist() for part in hits.cpu().split(lengths)]
    if not seen:
        return _ShareScores(by_sequence, None, int(broken))
    order = torch.cat([mine for mine, _ in seen]).argsort()
    local = cat([found for _, found in seen]).to(torch.device("cpu"))[order]
    return _ShareScores(by_sequence, local, int(broken))


def _answer_logits(
    model: LanguageModel, sequences: Sequence[TokenSequence]
) -> Iterator[tuple[Tensor, Tensor, TokenBatch]]:
    """Batch by batch: which answer tokens (M,), of all answers laid end to end; their logits (M, V); the batch."""
    lengths = torch.tensor([sequence.answer_length for sequence in sequences])
    starts = torch.tensor([sequence.answer_start for sequence in sequences])
    overhead = OVERHEAD.get(model.device.type, OVERHEAD["cpu"])
    shift = lengths.cumsum(0) - lengths - (starts - 1)  # the first answer token is predicted one before it
    with progress_bar("answering", len(sequences), "questions", quiet=True) as bar:
        for batch in compute_batches(sequences, model.compute_tokens, overhead):
            yield shift[batch.members[batch.rows]] + batch.positions, model.answer_logits(batch), batch
            bar.advance(len(batch.members))


def _rows_of(chosen: Sequence[int], lengths: Sequence[int]) -> Tensor:  # (tokens,)
    """For each answer token of all sequences its number among those of the chosen ones; -1 for the others."""
    mine = torch.zeros(len(lengths), dtype=torch.bool)
    mine[list(chosen)] = True
    mine = mine.repeat_interleave(torch.tensor(lengths))
    return torch.where(mine, mine.cumsum(0) - 1, -1)


def _generated(
    model: LanguageModel, probes: Sequence[_Probe], generation: Generation | None, places: Container[int]
) -> dict[int, dict[str, Any]]:
    """What the model writes on the probes of these places, and whether that is the answer."""
    asked = [i for i, probe in enumerate(probes) if probe.place in places]
    if generation is None or not asked:
        return {}
    texts = generation.texts(model, [probes[i].question.prompt for i in asked])
    judged = {i: (text, *matches(text, probes[i].question.answer)) for i, text in zip(asked, texts, strict=True)}
    return {i: {"text": text, "exact": exact, "contains": has} for i, (text, exact, has) in judged.items()}


# --------------------------------------------------------------------------------------------------------------------
# Evaluations of a run


class Evaluation:
    """Scores the facts of a stream: on the base model, which the cache remembers, and on the edited one.

    It keeps nothing from one evaluation to the next: each is a function of the weights, the seed and the turn.
    """

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
        every: int = 0,  # turns between evaluations; says which records the base model will be compared on
        generation: Generation | None = None,
        passage: Passage | None = None,
        retention: int = 0,
    ) -> None:
        self.model, self.stream, self.tokenize, self.protocols = model, stream, tokenize, protocols
        self.sample, self.resamples, self.seed, self.every = sample, resamples, seed, every
        self.generation, self.passage = generation, passage
        self.retention = RetentionPlan(stream, retention, seed)
        self._base: BaseReader | None = None

    def run(
        self, upto: int | None, watch: Watch, cache: Path | None = None, advance: Advance = lambda _: None
    ) -> Summary:
        """Score the facts written before turn `upto` (None: all); `watch` gets every single score.

        `advance(n)` is called when n more records have been computed. With `cache` the model is the base: its scores
        are read from that folder, or computed and kept there, and later evaluations are compared with them.
        """
        if cache is None:
            scores = self._score(upto, self._base, advance)
        else:
            scores = kept_scores(cache, partial(self._score_base, advance), self.model.all_ranks)
        summary = summarize(_watched(scores, watch), self.resamples, self.seed)
        if cache is not None:
            self._base = BaseReader(cache / "locality")
        if self.passage is not None:
            kept = cache and (cache / "perplexity.json").read_text()
            summary["perplexity"] = json.loads(kept) if kept else perplexity(self.model, self.passage)
        return summary

    def compare_with_base(self, cache: Path) -> None:
        """As after `run` with `cache`, for a resumed run: a cache that is gone is made again, without the edits."""
        if not self.model.all_ranks(cache.is_dir()):
            with self.model.unedited():
                self.run(None, lambda _: None, cache)
        self._base = BaseReader(cache / "locality")

    def count(self, upto: int | None) -> int:
        """Records that `run` scores."""
        return len(self._places(upto))

    def retained(self, places: Iterable[int]) -> Iterator[RecordScore]:
        """Scores of written facts on everything that asks for them: all protocols but locality."""
        asked = {field: name for field, name in self.protocols.items() if field != "locality"}
        return score_records(self.model, self._records(places), self.tokenize, asked)

    def _places(self, upto: int | None) -> Sequence[int]:
        return sample_places(len(self.stream.edited(upto)), self.sample, self.seed)

    def _records(self, places: Iterable[int]) -> Iterator[tuple[int, EditRecord]]:
        records = self.stream.edited()
        return ((place, records[place]) for place in places)

    def _score(
        self,
        upto: int | None,
        locality: Locality | None,
        advance: Advance,
        beside: Container[int] = (),  # of `places`, those not to be scored but on their locality probes
        places: Sequence[int] | None = None,  # None: those that are scored
    ) -> Iterator[RecordScore]:
        chosen = self._places(upto)
        generated = () if self.generation is None else among(chosen, self.generation.sample, self.seed)
        return score_records(
            self.model,
            self._records(chosen if places is None else places),
            self.tokenize,
            self.protocols,
            locality=locality,
            locality_only=beside,
            generation=self.generation,
            generated=generated,
            advance=advance,
        )

    def _score_base(self, advance: Advance, folder: Path) -> Iterator[RecordScore]:
        """The base model's scores; into `folder` goes what later evaluations are compared with, on the way too."""
        beside = self._compared_beside()
        places = sorted({*self._places(None), *beside}) if beside else self._places(None)
        writer = BaseWriter(folder / "locality")
        for score in self._score(None, writer, advance, beside, places):
            if score.place not in beside:
                yield score
        writer.flush()
        if self.passage is not None:
            (folder / "perplexity.json").write_text(json.dumps(perplexity(self.model, self.passage)))

    def _compared_beside(self) -> set[int]:
        """Places that an evaluation on the way draws and the last one does not; none where all records are scored."""
        if self.sample is None:
            return set()
        drawn = (sample_places(n, self.sample, self.seed) for n in evaluated_counts(self.stream, self.every))
        return {place for places in drawn for place in places} - set(self._places(None))


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


def evaluated_counts(stream: EditStream, every: int) -> list[int]:
    """How many records are written when an evaluation on the way may be due; `every` 0 = never."""
    return [len(stream.edited(done)) for done in range(every, len(stream), every)] if every else []


def among(places: Sequence[int], size: int | None, seed: int) -> Container[int]:
    """A sample of `size` of the places, or all of them."""
    if isinstance(places, range) and (size is None or size >= len(places)):
        return places
    return frozenset(places[i] for i in sample_places(len(places), size, seed))


# --------------------------------------------------------------------------------------------------------------------
# What is kept of the base model: a folder with scores.jsonl, perplexity.json, locality/*.safetensors


def kept_scores(
    folder: Path, compute: Callable[[Path], Iterator[RecordScore]], all_ranks: Callable[[bool], bool] = bool
) -> Iterator[RecordScore]:
    """The scores kept in `folder`, or those of `compute(new folder)`, which becomes `folder` once all of them are.

    `all_ranks(holds)`: whether that holds in each process that shares the computation.
    """
    if all_ranks(folder.is_dir()):
        with (folder / "scores.jsonl").open(encoding="utf-8") as lines:
            yield from (RecordScore(**json.loads(line)) for line in lines)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as scratch:
        beside = Path(scratch) / "base"
        beside.mkdir()
        with (beside / "scores.jsonl").open("w", encoding="utf-8") as lines:
            for score in compute(beside):
                lines.write(json.dumps(score.line(), ensure_ascii=False) + "\n")
                yield score
        for path in (*beside.rglob("*"), beside):
            sync(path)  # a folder that is there is taken for whole from then on
        try:
            beside.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
