"""What ROME, MEMIT and AlphaEdit share: keys of facts, factors of second moments, keys that earlier turns edited.

Letters: n facts of a turn, m of earlier turns, d_k key size, d_v value size, C = E[k k^T] second moments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from data.records import FactContexts, LossTerm, LowRankUpdate, TokenSequence, Turn, WeightChange
from editor import linalg
from editor.base import Edit, EditableModel, LocateInputs
from editor.stopwatch import Stopwatch
from editor.target_vectors import TargetSettings, in_contexts, target_vectors


def mean_keys(model: EditableModel, name: str, facts: Sequence[FactContexts]) -> Tensor:  # (n, d_k)
    """Each fact's key: the module's input at the fact token, the mean over the fact's contexts."""
    return _means(model.keys_at(*in_contexts(facts), [name])[name], facts)


def mean_values(model: EditableModel, name: str, facts: Sequence[FactContexts]) -> Tensor:  # (n, d_v)
    """What the module puts out at the mean key, for it is linear."""
    return _means(model.values_at(name, *in_contexts(facts)), facts)


def as_put(facts: Sequence[FactContexts]) -> tuple[list[TokenSequence], list[int]]:
    """Each fact's own sequence, without a prefix."""
    return [fact.sequences[0] for fact in facts], [fact.positions[0] for fact in facts]


def _means(rows: Tensor, facts: Sequence[FactContexts]) -> Tensor:
    return torch.stack([own.mean(0) for own in rows.split([len(fact.sequences) for fact in facts])])


# ---------------------------------------------------------------------------------------------------------------------
# Second moments


class SecondMomentFactor(linalg.CholeskyCoordinates):
    """Keys in coordinates in which C is the identity.

    `ridge`, in units of C's mean eigenvalue, is added to its diagonal: text with fewer tokens than d_k leaves
    directions that it says nothing of. ValueError where C has no factor all the same.
    """

    def __init__(self, name: str, second_moments: Tensor, ridge: float, device: torch.device) -> None:
        matrix = second_moments.to(device).double()
        matrix.diagonal().add_(ridge * matrix.diagonal().mean())
        try:
            super().__init__(matrix)
        except torch.linalg.LinAlgError as error:
            raise ValueError(
                f"editor.moment_ridge={ridge}: the second moments of the keys of {name} have no inverse; bring more "
                "text (corpus.path, corpus.tokens), or set a larger editor.moment_ridge"
            ) from error

    def statistics(self) -> dict[str, float | None]:
        return {}


def null_space(name: str, second_moments: Tensor, threshold: float, device: torch.device) -> dict[str, Tensor]:
    """Of the eigenvectors of C with eigenvalues below `threshold`: the parts of a `NullSpace`.

    ValueError where there is none, or where all are: nothing would be left alone.
    """
    values, vectors = torch.linalg.eigh(second_moments.to(device).double())
    size = int((values < threshold).sum())  # eigenvalues ascend
    if size == len(values):
        raise ValueError(
            f"editor.nullspace_threshold={threshold}: all eigenvalues of the second moments of the keys of {name} "
            f"lie below, the largest is {float(values[-1]):.3g}, so that nothing is left alone; set a smaller one"
        )
    if not size:
        raise ValueError(
            f"editor.nullspace_threshold={threshold}: no eigenvalue of the second moments of the keys of {name} "
            f"lies below, the least is {float(values[0]):.3g}; set a larger one"
        )
    is_complement = 2 * size > len(values)
    basis = vectors[:, size:] if is_complement else vectors[:, :size]
    return {
        "basis": basis.contiguous(),  # row by row, as a file has it: products of another layout have other bits
        "is_complement": torch.tensor(is_complement),
        "share": values[:size].sum() / values.sum(),
    }


class NullSpace:
    """Keys projected onto a null space: P k (AlphaEdit, section 3.2), P being kept as the narrower of two bases."""

    def __init__(
        self,
        basis: Tensor,  # (d_k, r) float64, orthonormal columns
        is_complement: Tensor | bool = False,  # it spans what P leaves out
        share: Tensor | None = None,  # of tr C within the null space
    ) -> None:
        self._basis, self._is_complement = basis, bool(is_complement)
        self._share = None if share is None else float(share)
        self.size = len(basis) - basis.shape[1] if self._is_complement else basis.shape[1]

    def enter(self, keys: Tensor) -> Tensor:  # (n, d_k) -> (n, d_k)
        inside = (keys @ self._basis) @ self._basis.T
        return keys - inside if self._is_complement else inside

    def leave(self, left: Tensor) -> Tensor:  # (d_k, n): it lies within the null space, as all projected keys do
        return left

    def statistics(self) -> dict[str, float | None]:
        """Dimensions of the null space, and the share of tr C there: what of the keys over text may be moved."""
        return {"null_space": float(self.size), "null_space_share": self._share}


class Coordinates(Protocol):
    """In which a layer is solved: `enter` maps keys into them, `leave`, its adjoint, the solution back to weights."""

    def enter(self, keys: Tensor) -> Tensor: ...
    def leave(self, left: Tensor) -> Tensor: ...
    def statistics(self) -> dict[str, float | None]: ...


# ---------------------------------------------------------------------------------------------------------------------
# Layers


class KeptKeys:
    """K_0, the m keys of earlier turns in a module's coordinates, and what each turn's solve has of them.

    Up to m = d_k these are the rows and the Cholesky factor of ridge I + K_0 K_0^T, which a turn borders with its own
    rows; beyond, K_0^T K_0, of which a turn factors ridge I + K_0^T K_0 + K^T K anew.
    """

    rows: Tensor  # (m, d_k)
    factor: Tensor  # (m, m) float64, lower
    gram: Tensor | None  # (d_k, d_k) float64

    def __init__(self, d_k: int, ridge: float, dtype: torch.dtype, device: torch.device) -> None:
        """`ridge` must be positive."""
        self.d_k, self.ridge, self.dtype, self.device = d_k, ridge, dtype, device
        self.count = 0
        self._clear()

    def _clear(self) -> None:
        self.rows = torch.zeros((0, self.d_k), dtype=self.dtype, device=self.device)
        self.factor = torch.zeros((0, 0), dtype=torch.float64, device=self.device)
        self.gram = None

    def left_factor(self, keys: Tensor, keep: bool = False) -> Tensor:  # (n, d_k) float64 -> (d_k, n)
        """(ridge I + K_0^T K_0 + K^T K)^(-1) K^T: times R (n, d_v) it is the update that moves K by R and K_0 little.

        With `keep` K is in K_0 from then on; while rows are kept it is rounded to their precision before anything is
        made of it. Raises torch.linalg.LinAlgError, K_0 being what it was, where rounding leaves the system without a
        factor.
        """
        few = self.gram is None and len(self.rows) + len(keys) <= self.d_k
        left = self._of_rows(keys, keep) if few else self._of_gram(keys, keep)
        if keep:
            self.count += len(keys)
        return left

    def _of_rows(self, keys: Tensor, keep: bool) -> Tensor:
        """The last n columns of X^T (X X^T + ridge I)^(-1), X = [K_0; K], whose factor is [[L, 0], [B^T, S]]."""
        if keep:
            keys = keys.to(self.dtype).double()
        border, corner = self._border(keys)
        outside = keys.T - self.rows.double().T @ torch.linalg.solve_triangular(self.factor.T, border, upper=True)
        if keep:
            self._extend(keys, border, corner)
        return torch.cholesky_solve(outside.T, corner).T

    def _border(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """B = L^(-1) K_0 K^T (m, n), and the factor S (n, n) of ridge I + K K^T - B^T B."""
        border = torch.linalg.solve_triangular(self.factor, self.rows.double() @ keys.T, upper=False)
        corner = keys @ keys.T - border.T @ border
        corner.diagonal().add_(self.ridge)
        return border, torch.linalg.cholesky(corner)

    def _extend(self, keys: Tensor, border: Tensor, corner: Tensor) -> None:
        m, n = border.shape
        factor = border.new_zeros((m + n, m + n))
        factor[:m, :m], factor[m:, :m], factor[m:, m:] = self.factor, border.T, corner
        self.factor, self.rows = factor, torch.cat([self.rows, keys.to(self.dtype)])

    def _of_gram(self, keys: Tensor, keep: bool) -> Tensor:
        rows, own = self.rows.double(), keys.T @ keys
        before = rows.T @ rows if self.gram is None else self.gram
        matrix = before + own
        matrix.diagonal().add_(self.ridge)
        left = torch.cholesky_solve(keys.T, torch.linalg.cholesky(matrix))
        if keep:
            self._clear()
            self.gram = before.add_(own)
        return left

    def state(self) -> dict[str, Tensor]:
        """With the factor, whose last bits hang on the sizes of all turns; it is never larger than the Gram matrix."""
        held = {"rows": self.rows, "factor": self.factor} if self.gram is None else {"gram": self.gram}
        return held | {"count": torch.tensor(self.count)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._clear()
        self.count = int(state["count"])
        if "gram" in state:
            self.gram = state["gram"].to(self.device)
        elif "factor" in state:
            self.rows, self.factor = state["rows"].to(self.device), state["factor"].to(self.device)
        else:  # of a checkpoint from before factors were kept
            rows = state["rows"].to(self.device).double()
            self._extend(rows, *self._border(rows))


class LayerByLayer:
    """The facts of a turn spread over layers (MEMIT, section 4.3): the update of MEMIT and of AlphaEdit.

    Target vectors z are found at the last layer L. Then, layer by layer, on the model as the layers before left it,
    R = (z - h_L)/(layers left) and DeltaW = (ridge M + K_0^T K_0 + K^T K)^(-1) K^T R, M being what `coordinates` say.
    """

    def __init__(
        self,
        model: EditableModel,
        coordinates: Callable[[str], Coordinates],  # of each edit module
        targets: TargetSettings,
        given: LocateInputs,
        *,
        ridge: float,
        ridge_setting: str,  # that gives it
        keep_keys: bool,
        device: torch.device,
    ) -> None:
        """ValueError for a module whose output is normed before it enters the residual stream, where z - h lies."""
        for name in model.shapes:
            if not model.adds_to_stream(name):
                raise ValueError(
                    f"model.edit_modules: the model norms what {name} puts out before it adds it to its hidden state, "
                    "which this editor moves; take another model or another editor, as editor=rome or stableedit"
                )
        self.coordinates = {name: coordinates(name) for name in model.shapes}
        self.targets, self.given = targets, given
        self.ridge, self.ridge_setting = ridge, ridge_setting
        self.keep_keys, self.device = keep_keys, device
        self.kept: dict[str, KeptKeys] = {}  # from the first turn on, when the keys' precision is known

    def edit(self, model: EditableModel, turn: Turn) -> Edit:
        """Raises FloatingPointError, saying which weights the model has then, where a number is not finite."""
        watch = Stopwatch(*model.devices, self.device)
        facts, names = self.given.contexts(turn), list(model.shapes)
        done: list[str] = []
        try:
            with watch.measure("targets"):
                (loss,) = model.losses([LossTerm(turn.sequences, 1.0)])
                start = model.hidden_at(names[-1], *as_put(facts))
                found = target_vectors(model, names[-1], facts, start, self.targets, model.tell)
            updates: dict[str, LowRankUpdate] = {}
            changes: dict[str, WeightChange] = {}
            for name in names:
                updates |= self._update(model, name, facts, start + found.offsets, len(names) - len(done), watch)
                with watch.measure("apply"):
                    changes |= model.apply({name: updates[name]})
                done.append(name)
        except FloatingPointError as error:
            raise FloatingPointError(f"turn {turn.index}: {error}; {_weights(done)}") from error
        return Edit(loss, updates, changes, watch.seconds, {"targets": found.details()})

    def _update(
        self,
        model: EditableModel,
        name: str,
        facts: Sequence[FactContexts],
        targets: Tensor,  # (n, d_v) z
        layers_left: int,
        watch: Stopwatch,
    ) -> dict[str, LowRankUpdate]:
        with watch.measure("keys"):
            raw = mean_keys(model, name, facts)
            residual = (targets - model.hidden_at(list(model.shapes)[-1], *as_put(facts))) / layers_left
        with watch.measure("solve"):
            keys = self.coordinates[name].enter(raw.to(self.device).double())
            kept = self.kept.setdefault(name, KeptKeys(raw.shape[1], self.ridge, raw.dtype, self.device))
            left = self.coordinates[name].leave(self._left_factor(name, kept, keys))
        return {name: LowRankUpdate(left.to(raw), residual)}

    def _left_factor(self, name: str, kept: KeptKeys, keys: Tensor) -> Tensor:  # (n, d_k) -> (d_k, n)
        """FloatingPointError for a system without a factor, which the host waits to see: layers come one by one."""
        try:
            return kept.left_factor(keys, self.keep_keys)
        except torch.linalg.LinAlgError as error:
            if not bool(torch.isfinite(keys).all()):
                raise FloatingPointError(f"the keys of {name} are not finite") from error
            raise FloatingPointError(
                f"the keys of {name} are too large for a ridge of {self.ridge_setting}={self.ridge}; set a larger one"
            ) from error

    def statistics(self) -> dict[str, dict[str, float | None]]:
        """Keys of earlier turns, by module, and what its coordinates have to say."""
        return {
            name: {"kept_keys": float(kept.count), **self.coordinates[name].statistics()}
            for name, kept in self.kept.items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{name}/{part}": held for name, kept in self.kept.items() for part, held in kept.state().items()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in state_dict.items():
            name, _, part = key.rpartition("/")
            parts.setdefault(name, {})[part] = tensor
        for name, state in parts.items():
            rows = state.get("rows", state.get("gram"))
            assert rows is not None
            self.kept[name] = KeptKeys(rows.shape[1], self.ridge, rows.dtype, self.device)
            self.kept[name].load(state)


def _weights(done: Sequence[str]) -> str:
    if not done:
        return "the weights are those of the turn before"
    return f"the weights are those of the turn before, but that {', '.join(done)} took the update"
