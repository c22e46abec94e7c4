"""What evaluation costs beside the language model's own work, as ratios measured in one run:

    python -m benchmarks.evaluation [--facts 300] [--data ZSRE] [--counterfact FILE] [--device cuda] [--half bf16]

Of each data set: the share of the tokens computed that are real, the rest being padding; and the speed of two
evaluations, tokenising and summaries included, as a ratio to the bare forward. `base` scores edits, rephrases and
localities and writes what is kept of the base model's answers; `edited` scores them and compares with that.

The bare forward computes the same tokens without padding: laid end to end and cut into rows of the mean length, in
batches of as many tokens as the evaluation's, with the head and the argmax at as many positions as there are answer
tokens. Every round times each contender once; ratios are medians over the rounds, tokens a second the bare forward's.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from benchmarks.bare import bare_logits
from benchmarks.common import race, ratio
from benchmarks.turn import load_model, parser_of, read_records
from data.records import EditRecord, TokenSequence
from data.stream import questions_of, tokenize
from harness.evaluation import BaseReader, BaseWriter, Locality, score_records, summarize
from harness.run.places import ROOT
from model import LanguageModel

RESAMPLES = 1000  # as a run has
SAMPLE = ROOT / "data" / "sample" / "counterfact_eval.json"


def score(model: LanguageModel, records: Sequence[EditRecord], locality: Locality | None = None) -> None:
    """Teacher-forced, as a run scores them."""
    as_tokens = partial(tokenize, tokenizer=model.tokenizer, answer_tokens="joint")
    summarize(score_records(model, enumerate(records), as_tokens, locality=locality), RESAMPLES, 0)


@contextmanager
def counted(model: nn.Module) -> Iterator[Counter[str]]:
    """Counts the tokens that the model is given, padding included."""
    given: Counter[str] = Counter()

    def add(_model: nn.Module, _args: tuple[object, ...], options: dict[str, Tensor]) -> None:
        given["tokens"] += options["input_ids"].numel()

    with model.register_forward_pre_hook(add, with_kwargs=True):
        yield given


# ---------------------------------------------------------------------------------------------------- the bare cost


def end_to_end(sequences: Sequence[TokenSequence], budget: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of rows without padding: token ids (B, L), and the rows and positions of answers (M,) in them."""
    ids = torch.tensor([token for sequence in sequences for token in sequence.ids[:-1]])
    inside = [[i + 1 >= s.answer_start for i in range(len(s.ids) - 1)] for s in sequences]
    asked = torch.tensor([one for each in inside for one in each])
    length = round(len(ids) / len(sequences))
    step = budget // length * length
    for start in range(0, len(ids), step):
        end = min(start + step, len(ids))
        whole = start + (end - start) // length * length
        for cut in (slice(start, whole), slice(whole, end)):  # the rest is a shorter row
            if cut.start < cut.stop:
                width = min(length, cut.stop - cut.start)
                at = asked[cut].view(-1, width).nonzero()
                yield ids[cut].view(-1, width), at[:, 0], at[:, 1]


@torch.inference_mode()
def bare(model: LanguageModel, batches: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    torch.cat([bare_logits(model, *batch).argmax(-1) for batch in batches]).cpu()


# ------------------------------------------------------------------------------------------------------------- main


def compare(model: LanguageModel, rounds: int, name: str, records: Sequence[EditRecord], folder: Path) -> None:
    questions = [question for record in records for question in questions_of(record).values()]
    sequences = tokenize(questions, model.tokenizer, "joint")
    real = sum(len(sequence.ids) - 1 for sequence in sequences)
    batches = list(end_to_end(sequences, model.compute_tokens))
    number, computed = count(), 0

    def base() -> None:
        nonlocal computed
        writer = BaseWriter(folder / str(next(number)))
        with counted(model.model) as given:
            score(model, records, writer)
        writer.flush()
        computed = given.total()

    contenders = {
        "bare": lambda: bare(model, batches),
        "base": base,
        "edited": lambda: score(model, records, BaseReader(folder / "0")),
    }
    times = race(contenders, model.device, rounds)
    ratios = [ratio(times, "bare", contender) for contender in ("base", "edited")]
    speed = real / statistics.median(times["bare"])
    print(f"{name:<14} {len(questions):>9,} {real:>9,} {real / computed:>7.3f} {speed:>14,.0f} "
          f"{ratios[0]:>7.3f} {ratios[1]:>7.3f}", flush=True)  # fmt: skip


def main() -> None:
    transformers.logging.disable_progress_bar()
    parser = parser_of(__doc__)
    parser.set_defaults(facts=300, rounds=5)
    parser.add_argument("--counterfact", type=Path, default=SAMPLE, help="rows in one of CounterFact's forms")
    arguments = parser.parse_args()
    model = load_model(arguments)
    print(f"batches of {model.compute_tokens:,} tokens")
    print(f"{'':<14} {'questions':>9} {'tokens':>9} {'real':>7} {'bare, tokens/s':>14} {'base':>7} {'edited':>7}")
    for name, file in {"zsre": arguments.data, "counterfact": arguments.counterfact}.items():
        with tempfile.TemporaryDirectory() as folder:
            compare(model, arguments.rounds, name, read_records(name, file, arguments.facts), Path(folder))


if __name__ == "__main__":
    main()
