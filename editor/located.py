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


class NullSpace:
    """Keys projected onto a null space: P k (AlphaEdit, section 3.2), P being kept as a basis, of it or of the rest."""

    def __init__(
        self,
        basis: Tensor,  # (d_k, r) float64, orthonormal columns
        is_complement: bool = False,  # it spans what P leaves out
    ) -> None:
        self._basis, self._is_complement = basis, is_complement
        self.size = len(basis) - basis.shape[1] if is_complement else basis.shape[1]

    @classmethod
    def of(cls, name: str, second_moments: Tensor, threshold: float, device: torch.device) -> NullSpace:
        """Of the eigenvectors of C with eigenvalues below `threshold`, kept as the narrower of the two bases.

        ValueError where there is none.
        """
        values, vectors = torch.linalg.eigh(second_moments.to(device).double())
        size = int((values < threshold).sum())  # eigenvalues ascend
        if not size:
            raise ValueError(
                f"editor.nullspace_threshold={threshold}: no eigenvalue of the second moments of the keys of {name} "
                f"lies below, the least is {float(values[0]):.3g}; set a larger one"
            )
        is_complement = 2 * size > len(values)
        return cls(vectors[:, size:].clone() if is_complement else vectors[:, :size].clone(), is_complement)

    def enter(self, keys: Tensor) -> Tensor:  # (n, d_k) -> (n, d_k)
        inside = (keys @ self._basis) @ self._basis.T
        return keys - inside if self._is_complement else inside

    def leave(self, left: Tensor) -> Tensor:  # (d_k, n): it lies within the null space, as all projected keys do
        return left

    def statistics(self) -> dict[str, float | None]:
        """Dimensions of the null space."""
        return {"null_space": float(self.size)}


class Coordinates(Protocol):
    """In which a layer is solved: `enter` maps keys into them, `leave`, its adjoint, the solution back to weights."""

    def enter(self, keys: Tensor) -> Tensor: ...
    def leave(self, left: Tensor) -> Tensor: ...
    def statistics(self) -> dict[str, float | None]: ...


# ---------------------------------------------------------------------------------------------------------------------
# Layers


class KeptKeys:
    """K_0, the keys of earlier turns in a module's coordinates: rows or, once these outnumber d_k, K_0^T K_0."""

    def __init__(self, d_k: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = torch.zeros((0, d_k), dtype=dtype, device=device)
        self.gram: Tensor | None = None  # (d_k, d_k) float64
        self.count = 0

    def left_factor(self, keys: Tensor, ridge: float) -> Tensor:  # (n, d_k) float64 -> (d_k, n)
        """(ridge I + K_0^T K_0 + K^T K)^(-1) K^T: times R (n, d_v) it is the update that moves K by R and K_0 little.

        With rows it is the last n columns of X^T (X X^T + ridge I)^(-1), X = [K_0; K], wherever these are fewer than
        d_k. `ridge` must be positive. Raises torch.linalg.LinAlgError where rounding leaves the system without a
        factor.
        """
        if self.gram is not None:
            matrix = self.gram + keys.T @ keys
            matrix.diagonal().add_(ridge)
            return torch.cholesky_solve(keys.T, torch.linalg.cholesky(matrix))
        rows = torch.cat([self.rows.double(), keys])
        chosen = torch.zeros((len(rows), len(keys)), dtype=keys.dtype, device=keys.device)
        chosen[len(self.rows) :].fill_diagonal_(1.0)
        return linalg.dense(linalg.ridge_update(rows, chosen, ridge))

    def add(self, keys: Tensor) -> None:  # (n, d_k)
        self.count += len(keys)
        if self.gram is not None:
            self.gram += keys.T @ keys
            return
        self.rows = torch.cat([self.rows, keys.to(self.rows.dtype)])
        if len(self.rows) > self.rows.shape[1]:
            rows = self.rows.double()
            self.gram, self.rows = rows.T @ rows, self.rows[:0]

    def state(self) -> dict[str, Tensor]:
        held = {"rows": self.rows} if self.gram is None else {"gram": self.gram}
        return held | {"count": torch.tensor(self.count)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        device = self.rows.device
        self.count = int(state["count"])
        self.gram = state["gram"].to(device) if "gram" in state else None
        self.rows = state["rows"].to(device) if "rows" in state else self.rows[:0]


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
        self.targets, self.given, self.ridge = targets, given, ridge
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
                found = target_vectors(model, names[-1], facts, start, self.targets)
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
            coordinates = self.coordinates[name]
            keys = coordinates.enter(raw.to(self.device).double())
            kept = self.kept.setdefault(name, KeptKeys(raw.shape[1], raw.dtype, self.device))
            left = coordinates.leave(kept.left_factor(keys, self.ridge))
            if self.keep_keys:
                kept.add(keys)
        return {name: LowRankUpdate(left.to(raw), residual)}

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
            self.kept[name] = KeptKeys(rows.shape[1], rows.dtype, self.device)
            self.kept[name].load(state)


def _weights(done: Sequence[str]) -> str:
    if not done:
        return "the weights are those of the turn before"
    return f"the weights are those of the turn before, but that {', '.join(done)} took the update"
