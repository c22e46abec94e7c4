"""What a model knows: scores of facts, generated text, locality, retention, perplexity, downstream tasks."""

from harness.evaluation.downstream import Downstream
