"""StableEdit and ULTRAEDIT."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from config.schema.checks import at_least, not_negative, positive
from config.schema.editor.base import EditorConfig, PreheatMode


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


WHITENING_KEYS = ("whitening_floor", "whitening_floor_mode", "whitening_prior", "whitening_solver")
"""Keys of full whitening, of which the diagonal form and raw rows have no use."""

OF_PRESETS = {
    "whitening_floor": (0.01, 1e-6),
    "whitening_floor_mode": (WhiteningFloorMode.relative, WhiteningFloorMode.absolute, WhiteningFloorMode.shift),
}
"""Values of theirs that presets bring along: of those only somebody who typed the key need be told."""

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
