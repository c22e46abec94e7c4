"""What a model knows: scores of facts, generated text, locality, retention, perplexity, downstream tasks."""

from harness.evaluation.downstream import Downstream
from harness.evaluation.evaluate import Evaluation
from harness.evaluation.scoring import Answering, Scoring

__all__ = [
    "Answering",
    "Downstream",
    "Evaluation",
    "Scoring",
]
