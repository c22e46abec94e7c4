"""StableEdit (arXiv 2605.11836, Algorithm 1) and, with diagonal statistics, ULTRAEDIT (arXiv 2505.14679).

Letters: N rows of a turn, d_k key size, d_v value size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from data.records import Capture, LowRankUpdate, Phase
from editor import linalg
from editor.base import SecondMoments, StatisticsScope, statistics_group
from editor.updates import first_unsolved
from nets import LifelongNormalizer, Whitening

Mode = Literal["stable", "original", "none", "batch", "frozen"]

# The modes that whiten value gradients fully, and so keep all of their scatter.
FULL_WHITENING: frozenset[Mode] = frozenset({"stable", "batch", "frozen"})

# Those whose covariance changes little from one turn to the next, so that its root can be followed.
LASTING: frozenset[Mode] = frozenset({"stable", "frozen"})

# What followed roots are called in a state.
FOLLOWED = ".followed."

# Counts of what following a root takes.
DONE: frozenset[str] = frozenset({"whitening_decomposed", "whitening_steps", "whitening_products"})

# Names of the quantiles of the whitening matrix's eigenvalues in turns.jsonl.
SPECTRUM = {
    "whitening_min": 0.0,
    "whitening_q05": 0.05,
    "whitening_median": 0.5,
    "whitening_q95": 0.95,
    "whitening_max": 1.0,
}


@dataclass(frozen=True)
class StableEditSettings:
    """The keys of the same names in the configuration.

    `lr` is gamma, `alpha` the ridge; `batch_size` rows are handled at a time, which bounds memory, never a result.
    `RunningMeanStd_mode`: stable = statistics of every row ever seen, full whitening of value gradients; original = the
    same, diagonal. For ablations: none = raw rows; batch = this turn's rows (of its passes so far), frozen = those of
    the warm-up turns, both with full whitening.
    `whitening_solver` auto = newton on a GPU with whitening_floor_mode=shift and a mode in `LASTING`, else eigh, which
    is faster on a CPU at every size (benchmarks/whitening.py).
    `preserve` is beta of the preserving solve; preheat_mode=adaptive ends warm-up by itself (DESIGN section 1).
    """

    lr: float
    alpha: float
    batch_size: int
    RunningMeanStd_mode: Mode
    statistics_scope: StatisticsScope
    whitening_floor: float
    whitening_floor_mode: linalg.FloorMode
    whitening_prior: float
    whitening_solver: Literal["auto", "eigh", "newton"] = "auto"
    preserve: float = 0.0
    preheat_mode: str = "start"
    preheat_least: int = 1
    preheat_tolerance: float = 0.1

    def follows(self, device: torch.device) -> bool:
        """Whether a covariance's root is found from the last turn's (newton), rather than by decomposition (eigh)."""
        if self.whitening_solver != "auto":
            return self.whitening_solver == "newton"
        can = self.whitening_floor_mode == "shift" and self.RunningMeanStd_mode in LASTING
        return can and device.type != "cpu"


class StableEdit(nn.Module):
    """V_i = -gamma ||k_hat_i||^2 g_tilde_i, then the ridge update of raw keys towards V.

    k_hat is the diagonally normalised key; g_tilde the fully whitened value gradient, or in warm-up turns and until
    n > d_v + 1 the diagonally normalised one.
    """

    Settings: ClassVar = StableEditSettings

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        settings: StableEditSettings,
        device: torch.device,
        second_moments: SecondMoments | None = None,
    ) -> None:
        """`shapes` gives (d_k, d_v) of each edit module; the preserving solve asks for their second moments."""
        super().__init__()
        self.settings = settings
        self.device = device
        self.groups = {
            name: statistics_group(name, shape, settings.statistics_scope).replace(".", "/")  # no submodule has a '.'
            for name, shape in shapes.items()
        }
        self.normalizers = nn.ModuleDict()
        full = settings.RunningMeanStd_mode in FULL_WHITENING
        for name, (d_k, d_v) in shapes.items():
            if self.groups[name] not in self.normalizers:
                self.normalizers[self.groups[name]] = LifelongNormalizer(
                    d_k, d_v, full, follow=full and settings.follows(device)
                )
        self.warm_up = _WarmUp(settings) if settings.preheat_mode == "adaptive" else None
        self.to(device)
        self._preserving = {name: self._coordinates(second_moments(name)) for name in shapes} if second_moments else {}
        self._turn_statistics: dict[str, dict[str, float | None]] = {group: {} for group in self.normalizers}
        self._before: dict[str, dict[str, Tensor]] = {}  # moments as the turn found them
        self._frozen: dict[str, Whitening] = {}  # of statistics that change no more

    def begin(self, phase: Phase) -> bool:
        """Statistics are of a turn, whatever its passes; False where adaptive warm-up has come to its end."""
        self._turn_statistics = {group: {} for group in self.normalizers}
        self._before = {}
        return not (phase is Phase.WARM_UP and self.warm_up is not None and bool(self.warm_up.over))

    @torch.no_grad()
    def update(self, captures: Mapping[str, Capture], phase: Phase) -> dict[str, LowRankUpdate]:
        """All rows of the pass enter the statistics before any of them is normalised."""
        self._observe(captures, phase)
        return self._updates(captures, self._whitenings(phase))

    def _observe(self, captures: Mapping[str, Capture], phase: Phase) -> None:
        mode = self.settings.RunningMeanStd_mode
        if mode == "none":
            return
        if mode == "frozen" and phase is Phase.EDIT:
            seen = all(self._normalizer(group).count > 0 for group in self.normalizers)
            assert seen, "frozen statistics come from warm-up turns, and there were none"
            return
        for group in self.normalizers:
            normalizer = self._normalizer(group)
            if group not in self._before:  # in the turn's first pass
                self._before[group] = normalizer.moments()
                if mode == "batch":
                    normalizer.reset()
            own = [capture for name, capture in captures.items() if self.groups[name] == group]
            normalizer.observe([(capture.keys, capture.value_grads) for capture in own], self.settings.batch_size)
            self._turn_statistics[group] |= normalizer.changes_since(self._before[group])
        if self.warm_up is not None and phase is Phase.WARM_UP:
            self.warm_up.count([found["value_covariance_change"] for found in self._turn_statistics.values()])

    def _coordinates(
        self,
        second_moments: Tensor,  # C (d_k, d_k)
    ) -> linalg.CholeskyCoordinates:  # of A = alpha I + beta C
        matrix = second_moments.to(self.device).double() * self.settings.preserve
        matrix.diagonal().add_(self.settings.alpha)
        try:
            return linalg.CholeskyCoordinates(matrix)
        except torch.linalg.LinAlgError as error:
            raise ValueError(
                f"editor.alpha={self.settings.alpha}: too small beside editor.preserve={self.settings.preserve} times "
                "the second moments of keys, which rounding leaves without a factor; set a larger one"
            ) from error

    def _whitenings(self, phase: Phase) -> dict[str, Whitening]:
        """One a group and turn; none where the diagonal form serves."""
        found: dict[str, Whitening] = {}
        if phase is Phase.WARM_UP:
            return found
        for group in self.normalizers:
            if group in self._frozen or self._normalizer(group).can_whiten(self.settings.whitening_floor_mode):
                found[group] = self._whitening(group)
                self._turn_statistics[group] |= {
                    "floored_fraction": found[group].floored,
                    **_spectrum_quantiles(found[group].spectrum),
                    **self._over_passes(group, found[group].details),
                }
        return found

    def _whitening(self, group: str) -> Whitening:
        """Decomposed once where nothing enters the statistics any more; one that is followed is in the state."""
        if group in self._frozen:
            return self._frozen[group]
        settings, normalizer = self.settings, self._normalizer(group)
        found = normalizer.whitening(settings.whitening_prior, settings.whitening_floor, settings.whitening_floor_mode)
        if settings.RunningMeanStd_mode == "frozen" and normalizer.followed is None:
            self._frozen[group] = found
        return found

    def _over_passes(self, group: str, details: Mapping[str, float | None]) -> dict[str, float | None]:
        """What passes do adds up over a turn; of the rest that of the last stands."""
        so_far = self._turn_statistics[group]
        return {
            name: (value or 0) + (so_far.get(name) or 0) if name in DONE else value for name, value in details.items()
        }

    def _updates(
        self, captures: Mapping[str, Capture], whitenings: Mapping[str, Whitening]
    ) -> dict[str, LowRankUpdate]:
        """FloatingPointError for the first module whose system rounding leaves without a factor."""
        solved = {name: self._module_update(name, capture, whitenings) for name, capture in captures.items()}
        if unsolved := first_unsolved({name: info for name, (_, info) in solved.items()}):
            raise FloatingPointError(
                f"the keys of {unsolved} are too large for a ridge of editor.alpha={self.settings.alpha}; "
                "set a larger one"
            )
        return {name: update for name, (update, _) in solved.items()}

    def _module_update(
        self, name: str, capture: Capture, whitenings: Mapping[str, Whitening]
    ) -> tuple[LowRankUpdate, Tensor]:
        """And the `info` of its system."""
        chunks = linalg.row_chunks(capture.keys.shape[0], self.settings.batch_size)
        shifts = [
            self._value_shifts(name, capture.keys[rows], capture.value_grads[rows], whitenings) for rows in chunks
        ]
        system = self._system(name, capture.keys)
        return LowRankUpdate(*system.update(torch.cat(shifts))), system.info

    def _system(self, name: str, keys: Tensor) -> linalg.RidgeSystem | linalg.PreservingSystem:
        """Whether it has a factor is not looked at: the host would wait for the device, once a module."""
        alpha, chunk = self.settings.alpha, self.settings.batch_size
        assert bool(self._preserving) == (self.settings.preserve > 0), "the preserving solve takes second moments"
        if self._preserving:
            return linalg.PreservingSystem(keys, self._preserving[name], chunk, check_errors=False)
        return linalg.RidgeSystem(keys, alpha, self.device, chunk, check_errors=False)

    def _value_shifts(
        self,
        name: str,
        keys: Tensor,  # (b, d_k)
        value_grads: Tensor,  # (b, d_v)
        whitenings: Mapping[str, Whitening],
    ) -> Tensor:  # (b, d_v) float64
        group = self.groups[name]
        normalizer = self._normalizer(group)
        if self.settings.RunningMeanStd_mode == "none":
            normal_keys, normal_values = keys.to(self.device).double(), value_grads.to(self.device).double()
        else:
            normal_keys = normalizer.normalize_keys(keys)
            whitening = whitenings.get(group)
            normal_values = (
                normalizer.normalize_values(value_grads)
                if whitening is None
                else normalizer.whiten_values(value_grads, whitening)
            )
        return -self.settings.lr * normal_keys.square().sum(1, keepdim=True) * normal_values

    def statistics(self) -> dict[str, dict[str, float | None]]:
        """Rows seen, mean |mu| and mean sigma of the value gradients, floored fraction (None: diagonal form).

        Where rows entered this turn: each moment's relative change since the turn before. Where value gradients were
        whitened: quantiles of the eigenvalues of Sigma^(-1/2) and, where its root is followed, in how many passes Sigma
        was decomposed after all, Newton's steps, products and residual (`nets.FollowedRoot`), or the shrinkage
        coefficient. Of several passes: steps and products together, the rest as the last one has it.
        """
        return {
            group.replace("/", "."): {
                **self._normalizer(group).summary(),
                "floored_fraction": None,
                **self._turn_statistics[group],
            }
            for group in self.normalizers
        }

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Also that of a run that followed no root, or that followed one where this does not (GPUs do, CPUs do not).

        What is followed then begins anew, with a decomposition.
        """
        self._frozen = {}
        own = {name: tensor for name, tensor in self.state_dict().items() if FOLLOWED in name}
        rest = {name: tensor for name, tensor in state_dict.items() if FOLLOWED not in name or name in own}
        return super().load_state_dict({**own, **rest}, strict, assign)

    def _normalizer(self, group: str) -> LifelongNormalizer:
        normalizer = self.normalizers[group]
        assert isinstance(normalizer, LifelongNormalizer)
        return normalizer


class _WarmUp(nn.Module):
    """Warm-up that ends once no covariance changes by the tolerance any more in a turn."""

    turns: Tensor  # () that there have been
    over: Tensor  # () bool

    def __init__(self, settings: StableEditSettings) -> None:
        super().__init__()
        self.least, self.tolerance = settings.preheat_least, settings.preheat_tolerance
        self.register_buffer("turns", torch.zeros((), dtype=torch.int64))
        self.register_buffer("over", torch.zeros((), dtype=torch.bool))

    def count(self, changes: Sequence[float | None]) -> None:
        """A turn that changed the covariances so much; None where there was none before."""
        self.turns += 1
        stands = all(change is not None and change < self.tolerance for change in changes)
        self.over.fill_(stands and int(self.turns) >= self.least)


def _spectrum_quantiles(
    spectrum: Tensor,  # (d_v,)
) -> dict[str, float | None]:
    levels = torch.tensor(list(SPECTRUM.values()), dtype=spectrum.dtype, device=spectrum.device)
    return dict(zip(SPECTRUM, torch.quantile(spectrum, levels).tolist(), strict=True))
