"""Which facts, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum
from typing import ClassVar

from omegaconf import MISSING

from config.schema.checks import Section, at_least, filled


class AnswerTokens(Enum):
    """How an answer becomes tokens: together with its prompt, or alone as released (DESIGN section 4)."""

    joint = "joint"
    separate = "separate"


class PromptForm(Enum):
    """How a question is put to the model: as it stands, as published; in the chat template; as "Q: ...", "A:"."""

    raw = "raw"
    chat = "chat"
    qa = "qa"


class AnswerEnd(Enum):
    """What follows an answer: nothing, as published, or the token at which the model ends a text by itself."""

    none = "none"
    eos = "eos"


@dataclass
class DatasetConfig(Section):
    """Which facts, and how many enter together."""

    name: str = MISSING
    """Key of data.DATASETS: how a row is read. Set by the group."""
    n_edits: int = 100
    """Facts a turn."""
    batch_size: int = 10
    """Facts a mini-batch, whose mean loss scales the value gradients: part of the method (DESIGN section 1)."""
    train_path: str | None = None
    """File whose facts fill the warm-up turns, and that networks are trained on; null = data/raw/<dataset>/, else the
    shipped sample."""
    valid_path: str | None = None
    """File whose facts are edited; null = as for train_path."""
    eval_mhop: bool = False
    """Score multi-hop questions too, where the data holds them."""
    answer_tokens: AnswerTokens = AnswerTokens.joint
    prompt_form: PromptForm = PromptForm.raw
    answer_end: AnswerEnd = AnswerEnd.none
    shuffle: bool = False
    """Edit in an order drawn from the seed, not in the order of the file."""
    num_warm_up: int | None = None
    """Warm-up turns; the group points it at num_seq_zsre or num_seq_wikibigedit, which users set. null = 20, or all
    there is; 0 = no warm-up."""

    has_sample: ClassVar[bool] = True
    """Rows ship with the project, so the paths may stay null."""
    warm_up_key: ClassVar[str] = "num_seq_zsre"
    """The key of the root that the group points num_warm_up at."""

    def mistakes(self) -> list[str]:
        return [
            *at_least("dataset.n_edits", self.n_edits, 1, "it counts the facts a turn"),
            *at_least("dataset.batch_size", self.batch_size, 1, "it counts the facts a mini-batch"),
            *filled("dataset.train_path", self.train_path),
            *filled("dataset.valid_path", self.valid_path),
            *self._multi_hop_mistakes(),
        ]

    def _multi_hop_mistakes(self) -> list[str]:
        if not self.eval_mhop or self.holds_multi_hop():
            return []
        return ["dataset.eval_mhop=true: this data set has no multi-hop questions; leave it false"]

    def holds_multi_hop(self) -> bool:
        """Whether rows of this data set can carry a multi-hop question."""
        return False

    def field_map(self) -> dict[str, str] | None:
        """{our name: the user's field}, None where the data set's own reader knows its fields."""
        return None

    def made_facts(self, split: str) -> int | None:
        """How many facts of a split, train or eval, are made where no file is named; None: they are not made."""
        return None


@dataclass
class WikiBigEditConfig(DatasetConfig):
    """The data set with personas and multi-hop questions."""

    warm_up_key: ClassVar[str] = "num_seq_wikibigedit"

    def holds_multi_hop(self) -> bool:
        return True


@dataclass
class SyntheticConfig(DatasetConfig):
    """Facts that nobody holds, made once into the cache."""

    facts: int = 2_000_000
    """Facts to edit, at most those there are names for; of warm-up and training there are 20,000 more."""

    MOST: ClassVar[int] = 16_000_000
    TRAINING: ClassVar[int] = 20_000

    def mistakes(self) -> list[str]:
        fewer = [f"dataset.facts={self.facts}: there are names for {self.MOST}; set that or less"]
        return [
            *super().mistakes(),
            *at_least("dataset.facts", self.facts, 1),
            *(fewer if self.facts > self.MOST else []),
        ]

    def made_facts(self, split: str) -> int | None:
        return {"eval": self.facts, "train": self.TRAINING}[split]


@dataclass
class FieldMap:
    """Names of the fields in a user's own file; null = the file has no such thing."""

    prompt: str | None = None
    """The prompt to edit; needed."""
    answer: str | None = None
    """What the prompt should be followed by; needed."""
    rephrase: str | None = None
    """The prompt in other words; its answer is `answer`."""
    locality: str | None = None
    """A prompt about something else; goes with `locality_answer`."""
    locality_answer: str | None = None
    persona: str | None = None
    """The prompt as a persona would put it; its answer is `answer`."""
    multi_hop: str | None = None
    """A question that needs the new fact; goes with `multi_hop_answer`."""
    multi_hop_answer: str | None = None
    subject: str | None = None
    """What the fact is about, as the prompt names it; null in a row without one."""


@dataclass
class JsonlConfig(DatasetConfig):
    """A user's own JSON Lines or JSON file."""

    fields: FieldMap = field(default_factory=FieldMap)

    has_sample: ClassVar[bool] = False

    def mistakes(self) -> list[str]:
        own_file = "dataset=jsonl reads your own file; set dataset.valid_path to it"
        names = self.fields
        return [
            *super().mistakes(),
            *([f"dataset.valid_path=null: {own_file}"] if self.valid_path is None else []),
            *(_unset_field(key) for key in ("prompt", "answer") if getattr(names, key) is None),
            *_half_pair("locality", names.locality, names.locality_answer),
            *_half_pair("multi_hop", names.multi_hop, names.multi_hop_answer),
        ]

    def holds_multi_hop(self) -> bool:
        return self.fields.multi_hop is not None

    def field_map(self) -> dict[str, str] | None:
        return {f.name: getattr(self.fields, f.name) for f in fields(FieldMap) if getattr(self.fields, f.name)}


def _unset_field(key: str) -> str:
    return f"dataset.fields.{key}=null: set it to the name of the field of your file that holds the {key}"


def _half_pair(key: str, prompt: str | None, answer: str | None) -> list[str]:
    if (prompt is None) == (answer is None):
        return []
    missing = f"dataset.fields.{key}" if prompt is None else f"dataset.fields.{key}_answer"
    return [f"{missing}=null: dataset.fields.{key} and .{key}_answer go together; set both or neither"]
