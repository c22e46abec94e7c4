"""GRACE (arXiv 2211.11031): a codebook beside one edit module, which puts a learned value out for inputs near a key.

Letters: m entries, n facts of a turn, T positions, d_k key size, d_v value size, r size of a sketch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from data.records import LossTerm, TokenSequence, Turn
from editor import linalg
from editor.base import Edit, EditableModel
from editor.stopwatch import Stopwatch

SKETCH = 128  # dimensions of a sketch at least, and ...
SKETCHED = 16  # ... at least d_k divided by this
ROUNDING = 1e-4  # relative error of a squared distance between sketches, an upper bound
SAME_INPUT = 0.01  # keys nearer than this part of eps_init are of the same input
COVERED = 1.001  # an expanded radius holds the key it was expanded to, whatever rounding does to its distance
AT_ONCE = 1 << 24  # numbers in the largest intermediate result


@dataclass(frozen=True)
class GRACESettings:
    """The keys of the same names in the configuration."""

    lr: float
    num_steps: int
    eps_init: float
    stop_loss: float


@dataclass(frozen=True)
class Codebook:
    """Entries: keys, what is put out near them, how near, and the answer that each stands for.

    The look-up is exact, and costs one product of sketches: ||Q^T (x - k)|| <= ||x - k|| for Q with orthonormal
    columns, so that only pairs whose sketches lie within the largest radius need their d_k numbers compared.
    """

    keys: Tensor  # (m, d_k)
    values: Tensor  # (m, d_v)
    radii: Tensor  # (m,)
    answers: tuple[tuple[int, ...], ...]  # token ids, m of them
    projection: Tensor  # (d_k, r)
    sketches: Tensor  # (m, r)
    largest: float  # radius

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, radii: Tensor, answers: Sequence[tuple[int, ...]]) -> Codebook:
        projection = _projection(keys)
        largest = float(radii.max()) if len(radii) else 0.0
        return cls(keys, values, radii, tuple(answers), projection, keys @ projection, largest)

    def grown(
        self,
        keys: Tensor,  # (new, d_k)
        radii: Sequence[float],  # of all
        answers: Sequence[tuple[int, ...]],  # of all
    ) -> Codebook:
        """With more keys, whose values are still 0."""
        projection = self.projection.to(keys)
        keys_of_all = torch.cat([self.keys, keys])
        return Codebook(
            keys=keys_of_all,
            values=torch.cat([self.values, keys.new_zeros((len(keys), self.values.shape[1]))]),
            radii=keys_of_all.new_tensor(radii),
            answers=tuple(answers),
            projection=projection,
            sketches=torch.cat([self.sketches, keys @ projection]),
            largest=max(radii, default=0.0),
        )

    def hits(
        self,
        inputs: Tensor,  # (T, d_k)
    ) -> tuple[Tensor, Tensor]:  # (hits,) int64 each
        """The positions whose nearest key is nearer than its radius, in order, and its entry."""
        inputs = inputs.to(self.keys)
        size = max(1, AT_ONCE // len(self.keys))
        found = [self._hits(inputs[rows]) for rows in linalg.row_chunks(len(inputs), size)]
        starts = range(0, len(inputs), size)
        at = torch.cat([at + start for (at, _), start in zip(found, starts, strict=True)])
        return at, torch.cat([entries for _, entries in found])

    def _hits(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        sketches = inputs @ self.projection
        exact = 1 - ROUNDING
        own, theirs = (exact * each.square().sum(1) for each in (sketches, self.sketches))
        apart = torch.addmm(theirs, sketches, self.sketches.T, alpha=-2)  # squared distance less the input's own part
        at, entries = (apart <= (self.largest**2 - own)[:, None]).nonzero(as_tuple=True)
        distances = self._distances(inputs, at, entries)
        nearest_first = distances.argsort(stable=True)
        nearest_first = nearest_first[at[nearest_first].argsort(stable=True)]
        at, entries, distances = at[nearest_first], entries[nearest_first], distances[nearest_first]
        nearest = torch.ones_like(at, dtype=torch.bool)
        nearest[1:] = at[1:] != at[:-1]
        hit = nearest & (distances < self.radii[entries])
        return at[hit], entries[hit]

    def _distances(self, inputs: Tensor, at: Tensor, entries: Tensor) -> Tensor:
        """||x - k|| of each pair."""
        chunks = linalg.row_chunks(len(at), max(1, AT_ONCE // self.keys.shape[1]))
        parts = [(inputs[at[some]] - self.keys[entries[some]]).norm(dim=1) for some in chunks]
        return torch.cat(parts) if parts else inputs.new_empty(0)

    def nearest(
        self,
        keys: Tensor,  # (n, d_k)
    ) -> tuple[list[int], list[float]]:
        """The nearest entry of each, and its distance, however far; entry -1 where there are none."""
        if not len(self.keys):
            return [-1] * len(keys), [math.inf] * len(keys)
        entries = torch.cdist(keys, self.keys).argmin(1)
        return entries.tolist(), (keys - self.keys[entries]).norm(dim=1).tolist()


class GRACE:
    """An input nearer to a key than that key's radius puts out its value; any other, what the module puts out.

    Each position is judged by itself, so padding and cached generation change nothing. The key of a fact is the
    module's input at the prompt's last token. Its value starts as the module's output there, and Adam trains it on
    -log p(answer | prompt) until that is below `stop_loss` a token. With d the distance to the nearest key, of radius
    eps:

        d > eps + eps_init    an entry of radius eps_init is added
        the same answer       eps expands to hold the key
        another answer        the old radius becomes d/2, where it was larger, and the new entry's is d/2
        another answer, d = 0 (which the paper leaves open)    the value is trained anew
    """

    Settings: ClassVar = GRACESettings

    def __init__(self, model: EditableModel, settings: GRACESettings, device: torch.device) -> None:
        """`model` has one edit module. The codebook lies on `device`."""
        ((self.name, (d_k, d_v)),) = model.shapes.items()
        self.settings, self.device = settings, device
        keys, values, radii = (torch.zeros(size, device=device) for size in ((0, d_k), (0, d_v), (0,)))
        self.codebook = Codebook.of(keys, values, radii, ())
        model.wrap(self.name, self._forward)

    def _forward(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        if not len(self.codebook.keys):
            return outputs
        at, entries = self.codebook.hits(inputs.detach().reshape(-1, inputs.shape[-1]))
        if not len(at):
            return outputs
        flat = outputs.reshape(-1, outputs.shape[-1])
        values = self.codebook.values[entries].to(flat)
        return flat.index_put((at.to(flat.device),), values).reshape(outputs.shape)

    def edit(self, model: EditableModel, turn: Turn) -> Edit:
        """Raises FloatingPointError, the codebook being that of the turn before, where a number is not finite."""
        watch = Stopwatch(*model.devices, self.device)
        at = [one.answer_start - 1 for one in turn.sequences]
        with watch.measure("keys"):
            (loss,) = model.losses([LossTerm(turn.sequences, 1.0)])
            keys = model.keys_at(turn.sequences, at)[self.name].to(self.device)
        with watch.measure("codebook"):
            codebook, done, trained = self._admitted(keys, [one.ids[one.answer_start :] for one in turn.sequences])
        with watch.measure("values"):
            facts = list(trained.values())
            values = self._trained(model, [turn.sequences[fact] for fact in facts], [at[fact] for fact in facts])
        if not (math.isfinite(loss) and bool(torch.isfinite(values).all() & torch.isfinite(keys).all())):
            raise FloatingPointError(
                f"turn {turn.index}: the loss, a key or a value of {self.name} is not finite; set a smaller editor.lr; "
                "the codebook is that of the turn before"
            )
        codebook.values[list(trained)] = values.to(codebook.values)
        self.codebook = codebook
        return Edit(loss, {}, {}, watch.seconds, {"codebook": done})

    def _admitted(
        self,
        keys: Tensor,  # (n, d_k)
        answers: Sequence[tuple[int, ...]],
    ) -> tuple[Codebook, dict[str, int], dict[int, int]]:
        """The codebook with the facts, what became of them, and the fact that each new or changed entry stands for."""
        eps_init, count = self.settings.eps_init, len(self.codebook.keys)
        old, far = self.codebook.nearest(keys)
        among = torch.cdist(keys, keys, compute_mode="donot_use_mm_for_euclid_dist").tolist()
        radii, known = self.codebook.radii.tolist(), list(self.codebook.answers)
        added: list[int] = []  # facts whose keys became entries
        trained: dict[int, int] = {}
        done = Counter(added=0, expanded=0, split=0, replaced=0)
        for fact, answer in enumerate(answers):
            others = [(among[fact][other], count + i) for i, other in enumerate(added)]
            distance, entry = min([(far[fact], old[fact]), *others])
            if distance == math.inf or distance > radii[entry] + eps_init:
                kind, radius = "added", eps_init
            elif known[entry] == answer:
                radii[entry] = max(radii[entry], COVERED * distance)
                done["expanded"] += 1
                continue
            elif distance <= SAME_INPUT * eps_init:
                known[entry], trained[entry] = answer, fact
                done["replaced"] += 1
                continue
            else:
                kind, radius = "split", distance / 2
                radii[entry] = min(radii[entry], radius)
            done[kind] += 1
            trained[count + len(added)] = fact
            added.append(fact)
            radii.append(radius)
            known.append(answer)
        return self.codebook.grown(keys[added], radii, known), dict(done), trained

    def _trained(
        self, model: EditableModel, facts: Sequence[TokenSequence], at: Sequence[int]
    ) -> Tensor:  # (facts, d_v)
        """The value for each fact, put out by the module at that position."""
        if not facts:
            return self.codebook.values[:0]
        values = model.values_at(self.name, facts, at).to(self.device)
        rows = [row.clone() for row in values]  # a tensor each, with moments of its own
        optimizer = torch.optim.Adam(rows, lr=self.settings.lr)
        active = list(range(len(facts)))
        search = model.offset_losses(self.name, facts, at, replace=True)
        for _ in range(self.settings.num_steps):
            offsets = torch.stack([rows[i] for i in active])
            losses, gradients = search(offsets, active)
            for i, loss, gradient in zip(active, losses.tolist(), gradients, strict=True):
                rows[i].grad = None if loss < self.settings.stop_loss else gradient
            active = [i for i in active if rows[i].grad is not None]
            if not active:
                break
            optimizer.step()
        return torch.stack(rows)

    def statistics(self) -> dict[str, dict[str, float | None]]:
        """Entries, and their mean and largest radius."""
        entries = len(self.codebook.radii)
        mean = float(self.codebook.radii.mean()) if entries else None
        return {self.name: {"entries": entries, "radius": mean, "radius_max": self.codebook.largest or None}}

    def state_dict(self) -> dict[str, Tensor]:
        """The answers are padded with -1 to the longest."""
        answers = [torch.tensor(answer, dtype=torch.int64) for answer in self.codebook.answers]
        padded = torch.nn.utils.rnn.pad_sequence(answers, True, -1) if answers else torch.zeros((0, 0)).long()
        book = self.codebook
        return {"keys": book.keys, "values": book.values, "radii": book.radii, "answers": padded}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        keys, values, radii = (state_dict[name].to(self.device) for name in ("keys", "values", "radii"))
        answers = [tuple(token for token in row if token >= 0) for row in state_dict["answers"].tolist()]
        self.codebook = Codebook.of(keys, values, radii, answers)


def _projection(
    keys: Tensor,  # (m, d_k)
) -> Tensor:  # (d_k, r)
    """Orthonormal columns of random directions, always the same; of all where the sketch would be no smaller."""
    d_k = keys.shape[1]
    size = min(d_k, max(SKETCH, d_k // SKETCHED))
    directions = torch.randn((d_k, size), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(directions).Q.to(keys)
