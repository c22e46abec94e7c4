"""A run: its sections, its own keys, and what concerns two keys together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from config.schema.checks import Section, at_least, device, filled
from config.schema.corpus import CorpusConfig
from config.schema.dataset import DatasetConfig, PromptForm
from config.schema.editor import EditorConfig, HyperNetworkConfig, MemoryConfig, PreheatMode
from config.schema.evaluation import EvaluationConfig, GlueConfig
from config.schema.model import ModelConfig
from config.schema.tracker import DiagnosticsConfig, TrackerConfig


@dataclass
class RunConfig(Section):
    """A run."""

    dataset: DatasetConfig = MISSING
    model: ModelConfig = MISSING
    editor: EditorConfig = MISSING
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    glue: GlueConfig = field(default_factory=GlueConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    seed: int = 42
    """Every random choice follows from it; 0 or above."""
    num_seq: int | None = None
    """Edit turns; null = every full turn in the data."""
    num_seq_zsre: int | None = None
    """Warm-up turns of every data set but wikibigedit; null = 20, or all there is; 0 = no warm-up."""
    num_seq_wikibigedit: int | None = None
    """Warm-up turns of wikibigedit; null = 20, or all there is; 0 = no warm-up."""
    model_device: str = "auto"
    """Where the language model runs: auto, cpu, cuda or cuda:N; auto = a GPU where there is one."""
    editor_device: str = "auto"
    """Where statistics and solves live: auto, cpu, cuda or cuda:N; auto = where the model is."""
    evaluate: str | None = None
    """A model's folder or name to score, without editing, against the base model.name_or_path; null = edit."""
    downstream_eval_steps: int = 0
    """Turns between GLUE-style evaluations, beside those of the base and the final model; 0 = never."""
    model_cache: bool = False
    """Save the edited model at the end."""
    model_cache_dir: str | None = None
    """Folder for it; null = model/ in the run folder."""
    checkpoint_every: int = 50
    """Turns between checkpoints, the last turn always being one of them; 0 = none."""
    keep: int = 2
    """Checkpoints that stay."""
    resume: str | None = None
    """null = a new run; auto = the newest run of this configuration and data, where there is one; or a run folder.

    A run that is finished is not run again.
    """

    def mistakes(self) -> list[str]:
        return [
            *root_mistakes(vars(self)),
            *device_mistakes(self),
            *made_facts_mistakes(self),
            *export_mistakes(self),
            *warm_up_mistakes(self),
            *training_data_mistakes(self),
        ]

    def warms_up(self) -> bool:
        """Whether turns of the training file come before the facts to edit, or among them."""
        return self.editor.preheat_mode is not PreheatMode.none and self.dataset.num_warm_up != 0

    def moments_of_questions(self) -> bool:
        """Whether training questions have a share in the second moments of keys."""
        asks = self.evaluate is None and self.editor.asks_for_text() and not self.editor.preserves_unrelated()
        return asks and self.corpus.questions > 0

    def asked_form(self) -> PromptForm:
        """How a model that answers by itself is asked."""
        return self.evaluation.prompt or self.dataset.prompt_form


def root_mistakes(values: Mapping[str, Any]) -> list[str]:
    """Values of the root that are out of range."""
    all_turns, no_warm_up = "null takes every full turn in the data", "0 means no warm-up"
    return [
        *_seed_mistakes(values["seed"]),
        *at_least("num_seq", values["num_seq"], 1, all_turns),
        *at_least("num_seq_zsre", values["num_seq_zsre"], 0, no_warm_up),
        *at_least("num_seq_wikibigedit", values["num_seq_wikibigedit"], 0, no_warm_up),
        *device("model_device", values["model_device"]),
        *device("editor_device", values["editor_device"]),
        *filled("evaluate", values["evaluate"]),
        *at_least("downstream_eval_steps", values["downstream_eval_steps"], 0, "0 never evaluates"),
        *filled("model_cache_dir", values["model_cache_dir"]),
        *at_least("checkpoint_every", values["checkpoint_every"], 0, "0 makes no checkpoints"),
        *at_least("keep", values["keep"], 1, "checkpoint_every=0 makes no checkpoints"),
        *filled("resume", values["resume"]),
    ]


def _seed_mistakes(value: int) -> list[str]:
    return [] if 0 <= value < 2**63 else [f"seed={value}: must be 0 or more and below 2**63"]


def device_mistakes(run: RunConfig) -> list[str]:
    """A model that is laid over all devices and put on one of them."""
    if run.model.device_map is None or run.model_device == "auto":
        return []
    laid = f"model.device_map={run.model.device_map.name}"
    return [f"model_device={run.model_device} with {laid}, which takes all devices: set model_device=auto"]


def export_mistakes(run: RunConfig) -> list[str]:
    """A model to be saved that would not have the edits."""
    if not run.model_cache or run.evaluate is not None or not isinstance(run.editor, MemoryConfig):
        return []
    beside = "this editor keeps its edits beside the weights, so there is no model to save that has them"
    return [f"model_cache=true: {beside}; leave it out"]


def made_facts_mistakes(run: RunConfig) -> list[str]:
    """More turns than facts are made for: seen before they are made."""
    facts = run.dataset.made_facts("eval")
    if facts is None or run.num_seq is None or run.dataset.valid_path is not None:
        return []
    needed = run.num_seq * run.dataset.n_edits
    remedy = f"set dataset.facts={needed}, or num_seq to {facts // run.dataset.n_edits} or less"
    return [f"num_seq={run.num_seq}: takes {needed} facts, dataset.facts={facts} are made; {remedy}"] * (needed > facts)


def warm_up_mistakes(run: RunConfig) -> list[str]:
    """A number of warm-up turns that is out of range, or none where a setting needs some before the first edit."""
    key, turns, preheat = run.dataset.warm_up_key, run.dataset.num_warm_up, run.editor.preheat_mode
    mistakes = []
    if turns != getattr(run, key):  # the root speaks for the key that users set
        mistakes += at_least("dataset.num_warm_up", turns, 0, "0 means no warm-up")
    setting = run.editor.needs_warm_up() if run.evaluate is None else None
    if setting and preheat not in (PreheatMode.start, PreheatMode.adaptive):
        mistakes.append(f"{setting} with editor.preheat_mode={preheat.name}: set editor.preheat_mode=start")
    if setting and turns == 0:
        mistakes.append(f"{setting} with {key}=0, no warm-up: set {key} to 1 or more, or to null")
    return mistakes


def training_data_mistakes(run: RunConfig) -> list[str]:
    """Warm-up or meta-training that has no data."""
    if run.evaluate is not None:
        return []  # nothing is edited
    preheat, mistakes = run.editor.preheat_mode, []
    if run.dataset.train_path is None and not run.dataset.has_sample:
        if run.warms_up():
            no_warm_up = f"editor.preheat_mode=none or {run.dataset.warm_up_key}=0"
            reason = f"warm-up turns (editor.preheat_mode={preheat.name})"
            mistakes.append(f"dataset.train_path=null: {reason} need it; set it, or {no_warm_up}")
        if isinstance(run.editor, HyperNetworkConfig) and run.editor.trains():
            reason = f"meta-training (editor.n_epochs={run.editor.n_epochs})"
            mistakes.append(f"dataset.train_path=null: {reason} needs it; set it, or editor.n_epochs=0")
    return mistakes
