"""When to score, on what, and how; the GLUE-style tasks."""

from __future__ import annotations

from dataclasses import dataclass

from config.schema.checks import Section, at_least, filled
from config.schema.dataset import PromptForm


@dataclass
class EvaluationConfig(Section):
    """When to score, on what, and how."""

    every: int = 0
    """Turns between evaluations; 0 = base and final model only."""
    sample: int | None = 300
    """Records scored, drawn from the seed; null = all."""
    generation: int | str = 100
    """Records, of those scored, that are scored by greedy generation too: a number, `all`, or 0 (also written off)."""
    max_new_tokens: int = 16
    """Tokens that the model may generate, whatever the length of the answer."""
    prompt: PromptForm | None = None
    """Form in which a model that answers by itself is asked; null = that of the facts, dataset.prompt_form."""
    examples: int = 4
    """Records, drawn from the seed, that the run ends with: what is wanted, and what the model wrote before and after;
    0 = none."""
    retention: int = 0
    """Records of each edit turn that are scored after it and again after 1, 2, 4, 8, ... more turns; 0 = off."""
    perplexity: str = "passage"
    """Text whose perplexity each evaluation measures: passage = the shipped one, off, or a UTF-8 text file."""
    perplexity_window: int = 512
    """Tokens of that text seen at once, at most the model's context; windows overlap by half."""
    resamples: int = 1000
    """Bootstrap resamples behind a 95% interval."""

    def __post_init__(self) -> None:
        if self.generation == "off":
            self.generation = 0
        super().__post_init__()

    def mistakes(self) -> list[str]:
        return [
            *at_least("evaluation.every", self.every, 0, "0 scores the base and the final model only"),
            *at_least("evaluation.sample", self.sample, 1, "null scores all records"),
            *_generation_mistakes(self.generation),
            *at_least("evaluation.max_new_tokens", self.max_new_tokens, 1, "evaluation.generation=off for none"),
            *at_least("evaluation.examples", self.examples, 0, "0 keeps none"),
            *at_least("evaluation.retention", self.retention, 0, "0 turns it off"),
            *filled("evaluation.perplexity", self.perplexity),
            *at_least("evaluation.perplexity_window", self.perplexity_window, 2),
            *at_least("evaluation.resamples", self.resamples, 1),
        ]


def _generation_mistakes(value: int | str) -> list[str]:
    if value == "all" or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return []
    return [f"evaluation.generation={value}: must be off, a number of records, or all"]


@dataclass
class GlueConfig(Section):
    """GLUE-style tasks that downstream_eval_steps asks for (glue_eval/tasks.py)."""

    tasks: list[str] | None = None
    """Which of them; null = all eight."""
    rows: str | None = None
    """Folder that holds <task>.jsonl; hub = GLUE and MMLU from the Hugging Face hub; null = the small shipped set."""
    few_shot: int = 0
    """Examples shown before each question, from the task's pool (its first 100 rows)."""
    limit: int | None = 100
    """Rows asked a task, those behind the pool; null = all."""

    def mistakes(self) -> list[str]:
        empty = ["glue.tasks=[]: names no task; downstream_eval_steps=0 turns them off"] if self.tasks == [] else []
        return [
            *empty,
            *filled("glue.rows", self.rows),
            *at_least("glue.few_shot", self.few_shot, 0, "0 shows no example"),
            *at_least("glue.limit", self.limit, 1, "null asks all rows"),
        ]
