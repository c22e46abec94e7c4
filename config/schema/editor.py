"""The editors' settings."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from omegaconf import MISSING

from config.schema.checks import Section, at_least, filled, fraction, not_negative, positive


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
    """Warm-up turns come before turn 0, T/4, T/2, 3T/4 or T-1 of T edit turns, or not at all.

    adaptive = before turn 0, and only as many as it takes until the value gradients' covariance stands still
    (editor.preheat_least, editor.preheat_tolerance); num_seq_zsre is the most.
    """

    start = "start"
    q1 = "q1"
    middle = "middle"
    q3 = "q3"
    end = "end"
    adaptive = "adaptive"
    none = "none"


class StatisticsScope(Enum):
    """Who shares running statistics: all modules of one shape, or nobody."""

    shape = "shape"
    module = "module"


class WhiteningFloorMode(Enum):
    """What keeps the eigenvalues of the value gradients' covariance from zero.

    relative, absolute = those below the floor are raised to it, a multiple of the mean eigenvalue or a number;
    shift = all are raised by it, a multiple of the mean eigenvalue; shrinkage = no floor: the covariance is shrunk
    towards its diagonal, by the coefficient that the number of rows calls for (oracle approximating shrinkage).
    """

    relative = "relative"
    absolute = "absolute"
    shift = "shift"
    shrinkage = "shrinkage"


class WhiteningSolver(Enum):
    """How a covariance's inverse root is found: by decomposition, or by Newton's method from the last turn's.

    auto = newton where whitening_floor_mode=shift and RunningMeanStd_mode is stable or frozen, on a GPU;
    else eigh.
    """

    auto = "auto"
    eigh = "eigh"
    newton = "newton"


class PreserveText(Enum):
    """The text whose keys are asked to stay.

    corpus = that of corpus.path; unrelated = unrelated questions with their answers, put as facts are: those of the
    warm-up turns or, where nothing warms up, all that the shipped training file of zsRE asks.
    """

    corpus = "corpus"
    unrelated = "unrelated"


class FactToken(Enum):
    """The position that holds a fact: the last token of the subject, or of the prompt."""

    subject_last = "subject_last"
    last = "last"


class UpdateEvery(Enum):
    """When the optimiser of the hypernetwork steps."""

    trajectory = "trajectory"
    turn = "turn"


class Order(Enum):
    """Whether a mini-batch takes all of its steps before the next one begins, or all take a step in each epoch."""

    depth = "depth"
    breadth = "breadth"


class AnswerLoss(Enum):
    """What predicts the answer's tokens: those before each, teacher-forced, or the prompt's last one all of them."""

    tokens = "tokens"
    prompt_last = "prompt_last"


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
    passes: int = 1
    """How often an edit turn is captured and updated; later passes push those facts that the model does not say yet.
    Warm-up turns have one."""
    pass_loss: float | None = None
    """-log p of each of its answer tokens, in nats, below which a fact leaves later passes; null = once each is the
    model's first choice."""
    replay: int = 0
    """Facts of earlier turns that each edit turn asks again; those that the model no longer says are pushed with the
    turn's own."""
    preheat_mode: PreheatMode = PreheatMode.none
    cache_dir: str | None = None
    """Folder that a turn's captures spill to, removed with the run; null = they stay in memory."""
    statistics_scope: StatisticsScope = StatisticsScope.shape

    def mistakes(self) -> list[str]:
        return [
            *positive("editor.lr", self.lr),
            *at_least("editor.batch_size", self.batch_size, 1, "it counts the rows of a chunk"),
            *at_least("editor.passes", self.passes, 1, "1 is as published"),
            *positive("editor.pass_loss", self.pass_loss),
            *at_least("editor.replay", self.replay, 0, "0 is as published"),
            *filled("editor.cache_dir", self.cache_dir),
        ]

    def needs_warm_up(self) -> str | None:
        """The setting that makes no sense without warm-up turns before the first edit; None where there is none."""
        return None

    def unused(self) -> tuple[str, ...]:
        """The keys of all editors that this one does not ask for."""
        return ()

    def ignored(self) -> dict[str, str]:
        """The keys that have no effect as its other settings stand, each with the setting that is the cause."""
        alone = self.passes == 1 and self.replay == 0 and "pass_loss" not in self.unused()
        return {"pass_loss": "editor.passes=1 and editor.replay=0"} if alone else {}

    def unused_elsewhere(self) -> tuple[str, ...]:
        """The keys of other sections that only other editors ask for, as they are typed."""
        return ()

    def has_one_module(self) -> bool:
        """Whether it is an editor of one module."""
        return False

    def asks_for_text(self) -> bool:
        """Whether it asks for second moments of keys over text."""
        return False

    def preserves_unrelated(self) -> bool:
        """Whether that text is unrelated questions, and not that of corpus.path."""
        return False


CAPTURE_KEYS = ("batch_size", "token", "passes", "pass_loss", "replay", "cache_dir", "statistics_scope")
"""Keys of the gradient-capture family that editors of other families have no use for."""

MINI_BATCH = "dataset.batch_size"
"""Scales captured value gradients, which other families do without."""

WHITENING_KEYS = ("whitening_floor", "whitening_floor_mode", "whitening_prior", "whitening_solver")
"""Keys of full whitening, of which the diagonal form and raw rows have no use."""

LASTING = (RunningMeanStdMode.stable, RunningMeanStdMode.frozen)
"""The modes whose covariance lasts from turn to turn."""


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
    whitening_solver: WhiteningSolver = WhiteningSolver.auto
    preserve: float = 0.0
    """Tokens of text whose keys count in the solve as ones that are to stay where they are: the ridge alpha I becomes
    alpha I + preserve C, C their second moments. 0 = as published."""
    preserve_text: PreserveText = PreserveText.corpus
    preheat_least: int = 1
    """Warm-up turns at least, with preheat_mode=adaptive."""
    preheat_tolerance: float = 0.1
    """Relative change of the value gradients' covariance in a warm-up turn at which no further one is made, with
    preheat_mode=adaptive."""

    def mistakes(self) -> list[str]:
        return [
            *super().mistakes(),
            *positive("editor.alpha", self.alpha),
            *not_negative("editor.preserve", self.preserve),
            *at_least("editor.preheat_least", self.preheat_least, 1),
            *positive("editor.preheat_tolerance", self.preheat_tolerance),
            *self._adaptive_mistakes(),
            *positive("editor.whitening_floor", self.whitening_floor),
            *not_negative("editor.whitening_prior", self.whitening_prior),
            *self._solver_mistakes(),
        ]

    def _adaptive_mistakes(self) -> list[str]:
        mode = self.RunningMeanStd_mode
        if self.preheat_mode is not PreheatMode.adaptive or mode in LASTING:
            return []
        return [
            f"editor.preheat_mode=adaptive with editor.RunningMeanStd_mode={mode.name}, which keeps no covariance that "
            "could come to stand still: set editor.preheat_mode=start"
        ]

    def ignored(self) -> dict[str, str]:
        found, mode = super().ignored(), self.RunningMeanStd_mode
        if self.preheat_mode is not PreheatMode.adaptive:
            cause = f"editor.preheat_mode={self.preheat_mode.name}"
            found |= dict.fromkeys(("preheat_least", "preheat_tolerance"), cause)
        if self.whitening_floor_mode is WhiteningFloorMode.shrinkage:
            found["whitening_floor"] = "editor.whitening_floor_mode=shrinkage"
        if mode in (RunningMeanStdMode.original, RunningMeanStdMode.none):
            found |= dict.fromkeys(WHITENING_KEYS, f"editor.RunningMeanStd_mode={mode.name}")
        if mode is RunningMeanStdMode.none:
            found["statistics_scope"] = f"editor.RunningMeanStd_mode={mode.name}"
        if not self.preserve:
            found["preserve_text"] = "editor.preserve=0"
        return found

    def asks_for_text(self) -> bool:
        return self.preserve > 0

    def preserves_unrelated(self) -> bool:
        return self.preserve > 0 and self.preserve_text is PreserveText.unrelated

    def _solver_mistakes(self) -> list[str]:
        if self.whitening_solver is not WhiteningSolver.newton:
            return []
        newton, auto = "editor.whitening_solver=newton", "or editor.whitening_solver=auto"
        floor, mode = self.whitening_floor_mode, self.RunningMeanStd_mode
        mistakes = []
        if floor is not WhiteningFloorMode.shift:
            why = "asks for a decomposition"
            remedy = f"set editor.whitening_floor_mode=shift, {auto}"
            mistakes.append(f"{newton} with editor.whitening_floor_mode={floor.name}, which {why}: {remedy}")
        if mode not in LASTING:
            why = "has no covariance that lasts from turn to turn"
            remedy = f"set editor.RunningMeanStd_mode=stable, {auto}"
            mistakes.append(f"{newton} with editor.RunningMeanStd_mode={mode.name}, which {why}: {remedy}")
        return mistakes

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
        return [
            *super().mistakes(),
            *not_negative("editor.reg_coef", self.reg_coef),
            *fraction("editor.time_decay", self.time_decay),
            *at_least("editor.back_depth", self.back_depth, 1, "1 answers for this turn only"),
            *at_least("editor.trajectory_length", self.trajectory_length, 1, "null takes a whole pass"),
        ]


@dataclass
class SteppingConfig(EditorConfig):
    """Editors that write a turn's facts by gradient steps of their own, of size editor.lr."""

    num_steps: int = 25
    """Steps, at most: of each mini-batch of facts; GRACE's is the turn."""
    stop_loss: float = 0.01
    """Nats a token: where the loss is smaller, no step is taken any more; 0 = all num_steps."""

    def mistakes(self) -> list[str]:
        return [
            *super().mistakes(),
            *at_least("editor.num_steps", self.num_steps, 1),
            *not_negative("editor.stop_loss", self.stop_loss),
        ]

    def unused(self) -> tuple[str, ...]:
        return CAPTURE_KEYS

    def unused_elsewhere(self) -> tuple[str, ...]:
        return (MINI_BATCH,)


@dataclass
class FineTuningConfig(SteppingConfig):
    """FT-L, FT-M and LocFT-BF: Adam on the weights of the edit modules."""

    facts_per_step: int | None = 1
    """Facts a mini-batch; null = all of the turn."""
    order: Order = Order.depth
    answer_loss: AnswerLoss = AnswerLoss.tokens
    norm_constraint: float | None = None
    """Largest |entry| of what a turn changes in a weight; null = no bound."""

    def mistakes(self) -> list[str]:
        return [
            *super().mistakes(),
            *at_least("editor.facts_per_step", self.facts_per_step, 1, "null takes all facts of the turn"),
            *positive("editor.norm_constraint", self.norm_constraint),
        ]

    def unused_elsewhere(self) -> tuple[str, ...]:
        return (MINI_BATCH, "editor_device")


@dataclass
class MemoryConfig(SteppingConfig):
    """Editors that keep what they learn beside the weights of one edit module."""

    num_steps: int = 100
    stop_loss: float = 0.0

    def has_one_module(self) -> bool:
        return True


@dataclass
class GraceConfig(MemoryConfig):
    """GRACE: a codebook of inputs, and what is put out near them."""

    eps_init: float = 1.0
    """Radius of a new entry, in the unit of the module's inputs (Euclidean)."""

    def mistakes(self) -> list[str]:
        return [*super().mistakes(), *positive("editor.eps_init", self.eps_init)]


@dataclass
class WiseConfig(MemoryConfig):
    """WISE: a side memory of one module, and a router."""

    facts_per_step: int | None = 1
    """Facts a mini-batch, which takes all its steps before the next begins; null = all that a shard has."""
    alpha: float = 5.0
    """Unrelated inputs should have a smaller activation ||a (W' - W)||."""
    beta: float = 20.0
    """Edited ones should have a larger one."""
    gamma: float = 10.0
    """And one that much larger than unrelated ones."""
    shards: int = 2
    """Parts of a turn's facts, each trained in a subspace of its own."""
    mask_ratio: float = 0.2
    """Part of the side memory's entries that a shard may change, in (0, 1]."""
    merge_density: float = 0.53
    """Part of the entries that a shard changed that TIES keeps, the largest, in (0, 1]."""
    merge_weight: float = 1.0
    """Factor of what was merged."""
    route_ratio: float = 1.0
    """Part of the least activation of an edited input above which the side memory is taken, in (0, 1]; 1 = the paper's,
    0.88 = as released."""
    unrelated: int = 64
    """Inputs kept of each warm-up turn: those are what unrelated text is known by."""

    def mistakes(self) -> list[str]:
        return [
            *super().mistakes(),
            *at_least("editor.facts_per_step", self.facts_per_step, 1, "null takes all facts of a shard"),
            *not_negative("editor.alpha", self.alpha),
            *positive("editor.beta", self.beta),
            *not_negative("editor.gamma", self.gamma),
            *at_least("editor.shards", self.shards, 1),
            *fraction("editor.mask_ratio", self.mask_ratio),
            *fraction("editor.merge_density", self.merge_density),
            *positive("editor.merge_weight", self.merge_weight),
            *fraction("editor.route_ratio", self.route_ratio),
            *at_least("editor.unrelated", self.unrelated, 1),
        ]

    def needs_warm_up(self) -> str | None:
        return "editor=wise, which knows unrelated text from warm-up turns,"


@dataclass
class LocateConfig(EditorConfig):
    """What ROME, MEMIT and AlphaEdit share: where a fact is, and how its target vector is found (DESIGN section 1)."""

    lr: float = 1.0
    """Has no effect: the step size of target vectors is v_lr."""
    fact_token: FactToken = FactToken.subject_last
    prefixes: int = 5
    """Generated texts that a fact is also put behind, one at a time, while its target vector and key are found."""
    prefix_tokens: int = 10
    """Tokens of each, after its first word."""
    v_num_grad_steps: int = 25
    """Steps of Adam for a target vector."""
    v_lr: float = 0.5
    """Their size."""
    v_weight_decay: float = 0.5
    """Weight of ||delta||^2 / ||h||^2."""
    kl_factor: float = 0.0625
    """Weight of the KL of what follows "{subject} is a"."""
    clamp_norm_factor: float = 0.75
    """Most that ||delta|| may be, in units of ||h||."""
    v_loss_stop: float = 0.05
    """A fact whose loss is smaller, in nats, is left; 0 = all steps."""

    MOST_PREFIXES: ClassVar[int] = 20

    def mistakes(self) -> list[str]:
        fewer = f"editor.prefixes={self.prefixes}: there are first words for {self.MOST_PREFIXES}; set that or less"
        return [
            *super().mistakes(),
            *at_least("editor.prefixes", self.prefixes, 0, "0 puts facts as they stand"),
            *([fewer] if self.prefixes > self.MOST_PREFIXES else []),
            *at_least("editor.prefix_tokens", self.prefix_tokens, 1),
            *at_least("editor.v_num_grad_steps", self.v_num_grad_steps, 1),
            *positive("editor.v_lr", self.v_lr),
            *not_negative("editor.v_weight_decay", self.v_weight_decay),
            *not_negative("editor.kl_factor", self.kl_factor),
            *positive("editor.clamp_norm_factor", self.clamp_norm_factor),
            *not_negative("editor.v_loss_stop", self.v_loss_stop),
        ]

    def unused(self) -> tuple[str, ...]:
        return ("lr", *CAPTURE_KEYS)

    def unused_elsewhere(self) -> tuple[str, ...]:
        return (MINI_BATCH,)

    def ignored(self) -> dict[str, str]:
        return super().ignored() | ({} if self.prefixes else {"prefix_tokens": "editor.prefixes=0"})

    def asks_for_text(self) -> bool:
        return True


@dataclass
class RomeConfig(LocateConfig):
    """ROME: a fact at a time into one module."""

    moment_ridge: float = 1e-6
    """Added to the diagonal of the keys' second moments, in units of their mean eigenvalue, so that they are
    invertible in finite precision, or over little text."""

    def mistakes(self) -> list[str]:
        return [*super().mistakes(), *not_negative("editor.moment_ridge", self.moment_ridge)]

    def has_one_module(self) -> bool:
        return True


@dataclass
class MemitConfig(LocateConfig):
    """MEMIT: a turn's facts into several layers."""

    mom2_update_weight: float = 15_000.0
    """lambda, the weight of the keys' second moments over text."""
    moment_ridge: float = 1e-6
    """Added to their diagonal, in units of their mean eigenvalue."""
    keep_keys: bool = False
    """Whether keys of earlier turns are to stay where they are; false = as published."""

    def mistakes(self) -> list[str]:
        return [
            *super().mistakes(),
            *positive("editor.mom2_update_weight", self.mom2_update_weight),
            *not_negative("editor.moment_ridge", self.moment_ridge),
        ]


@dataclass
class AlphaEditConfig(LocateConfig):
    """AlphaEdit: MEMIT within the null space of keys over text."""

    nullspace_threshold: float = 0.02
    """Eigenvalues of the keys' second moments below it span the null space."""
    L2: float = 10.0
    """Ridge."""
    keep_keys: bool = True
    """Whether keys of earlier turns are to stay where they are; true = as published."""

    def mistakes(self) -> list[str]:
        return [
            *super().mistakes(),
            *positive("editor.nullspace_threshold", self.nullspace_threshold),
            *positive("editor.L2", self.L2),
        ]
