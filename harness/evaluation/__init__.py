"""What a model knows: scores of facts, generated text, locality, retention, perplexity, downstream tasks."""

from harness.evaluation.downstream import Downstream
from harness.evaluation.evaluate import (
    SCORES_FORMAT,
    Evaluation,
    evaluated_counts,
    protocols_of,
    score_records,
    summarize,
)
from harness.evaluation.examples import Examples
from harness.evaluation.generation import Generation
from harness.evaluation.hidden import HiddenStates
from harness.evaluation.locality import BaseReader, BaseWriter, Locality
from harness.evaluation.perplexity import Passage, read_passage
from harness.evaluation.scoring import Scoring, ScoringWithoutRecord
