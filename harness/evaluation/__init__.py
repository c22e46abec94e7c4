"""What a model knows: scores of facts, generated text, locality, retention, perplexity, downstream tasks."""

# ruff: noqa: F401  the names that others take from this room

from harness.evaluation.downstream import Downstream
