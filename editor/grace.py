"""GRACE (arXiv 2211.11031): a codebook beside one edit module, which puts a learned value out for inputs near a key.

Letters: m entries, n facts of a turn, T positions, d_k key size, d_v value size, r size of a sketch, c some of the
entries.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from data.records import LossTerm, TokenSequence, Turn
from editor import linalg
from editor.base import Edit, EditableModel, finite_loss
from editor.stopwatch import Stopwatch

SKETCH = 128  # dimensions of a sketch at least, and ...
SKETCHED = 16  # ... at least d_k divided by this
ROUNDING = 1e-4  # error of a squared distance that a product gives, in ||x||^2 + ||k||^2, an upper bound
SAME_INPUT = 0.01  # keys nearer than this part of eps_init are of the same input
COVERED = 1.001  # an expanded radius is so many times the distance to the key that it then holds, at least
AT_ONCE = 1 << 24  # numbers in the largest intermediate result
IN_CACHE = 16  # part of that for what is compared one by one: a CPU then takes 6 us a pair of 1,536 numbers, not 26


@dataclass(frozen=True)
class GRACESettings:
    """The keys of the same names in the configuration."""

    lr: float
    num_steps: int
    eps_init: float
    stop_loss: float


@dataclass
class Entry:
    """What is known of an entry beside its key and value."""

    radius: float
    answer: tuple[int, ...]  # token ids, that its value was trained for
    prompt: tuple[int, ...]  # token ids, whose input its key is


@dataclass(frozen=True)
class Codebook:
    """Entries: keys, what is put out near them, how near, and the answer that each stands for.

    The look-up is exact: the nearest key decides, with its own radius. Products of matrices bound the distances, and
    d_k numbers are compared one by one for those pairs alone that the bounds leave open, mostly one an input:

        1. sketches, r/d_k of a whole product: ||Q^T (x - k)|| <= ||x - k|| for Q with orthonormal columns
        2. inputs and entries that some radius may then join: the least distance to a key whose radius holds the input
        3. those inputs, and all entries whose sketches are no farther than that: the nearest

    2 is half a whole product at most, for it is left out where it would be more, and 3 a whole one, whatever the radii.
    No intermediate result has more than `AT_ONCE` numbers, or than the inputs.
    """

    keys: Tensor  # (m, d_k)
    values: Tensor  # (m, d_v)
    radii: Tensor  # (m,)
    answers: tuple[tuple[int, ...], ...]  # token ids, m of them
    prompts: tuple[tuple[int, ...], ...]  # whose inputs the keys are; () in checkpoints from before they were kept
    projection: Tensor  # (d_k, r)
    sketches: Tensor  # (m, r)
    squares: Tensor  # (m,) ||k||^2
    sketch_squares: Tensor  # (m,)

    @classmethod
    def of(
        cls,
        keys: Tensor,
        values: Tensor,
        radii: Tensor,
        answers: Sequence[tuple[int, ...]],
        prompts: Sequence[tuple[int, ...]] | None = None,
    ) -> Codebook:
        projection, known = _projection(keys), prompts or [()] * len(keys)
        return cls(keys, values, radii, tuple(answers), tuple(known), projection, *_sketched(keys, projection))

    def entries(self) -> list[Entry]:
        known = zip(self.radii.tolist(), self.answers, self.prompts, strict=True)
        return [Entry(radius, answer, prompt) for radius, answer, prompt in known]

    def grown(
        self,
        keys: Tensor,  # (new, d_k)
        entries: Sequence[Entry],  # all of them, these last
    ) -> Codebook:
        """With more keys, whose values are still 0."""
        projection = self.projection.to(keys)
        parts = ("keys", "values", "sketches", "squares", "sketch_squares")
        values = keys.new_zeros((len(keys), self.values.shape[1]))
        sketches, *squares = _sketched(keys, projection)
        new = zip(parts, (keys, values, sketches, *squares), strict=True)
        joined = {name: torch.cat([getattr(self, name), each]) for name, each in new}
        return Codebook(
            **joined,
            radii=keys.new_tensor([entry.radius for entry in entries]),
            answers=tuple(entry.answer for entry in entries),
            prompts=tuple(entry.prompt for entry in entries),
            projection=projection,
        )

    def hits(
        self,
        inputs: Tensor,  # (T, d_k)
    ) -> tuple[Tensor, Tensor]:  # (hits,) int64 each
        """The positions whose nearest key is nearer than its radius, in order, and its entry."""
        inputs = inputs.to(self.keys)
        found = [(rows.start, *self._hits(inputs[rows])) for rows in self._chunks(len(inputs))]
        return torch.cat([at + start for start, at, _ in found]), torch.cat([entries for _, _, entries in found])

    def nearest(
        self,
        keys: Tensor,  # (n, d_k)
    ) -> tuple[list[int], list[float]]:
        """The nearest entry of each, and its distance, however far; entry -1 where there are none."""
        if not len(self.keys):
            return [-1] * len(keys), [math.inf] * len(keys)
        every = torch.arange(len(self.keys), device=keys.device)
        found = [self._nearest(keys[rows], every) for rows in self._chunks(len(keys))]
        entries, distances = (torch.cat(parts).tolist() for parts in zip(*found, strict=True))
        return entries, distances

    def _chunks(self, inputs: int) -> list[slice]:
        return list(linalg.row_chunks(inputs, max(1, AT_ONCE // len(self.keys))))

    def _hits(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        sketches = inputs @ self.projection
        apart = _least_squared(sketches, self.sketches, _squares(sketches), self.sketch_squares)
        within = apart <= self.radii.square()
        at = within.any(1).nonzero()[:, 0]
        rivals = within[at].any(0).nonzero()[:, 0]
        if 2 * len(rivals) <= len(self.keys):
            farthest = self._farthest(inputs[at], rivals)
            held = farthest < math.inf
            at, farthest = at[held], farthest[held]
            rivals = (apart[at] <= farthest[:, None]).any(0).nonzero()[:, 0]
        if 2 * len(rivals) > len(self.keys):  # all of them, which lie side by side
            rivals = torch.arange(len(self.keys), device=at.device)
        if not len(at):
            return at, at
        nearest, distances = self._nearest(inputs[at], rivals)
        hit = distances < self.radii[nearest]
        return at[hit], nearest[hit]

    def _farthest(self, inputs: Tensor, entries: Tensor) -> Tensor:  # (T,) squared; infinity where there is none
        """No nearest key lies beyond: the least distance, at most, to those of the entries that may hold the input."""
        least, most = self._bounds(inputs, entries)
        outside = least > self.radii[entries].square()
        return torch.cat([most.masked_fill_(outside, math.inf), most.new_full((len(most), 1), math.inf)], 1).amin(1)

    def _bounds(self, inputs: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:  # (T, c) each
        """Squared distances at least, and at most, from all d_k numbers."""
        least = inputs.new_empty((len(inputs), len(entries)))
        own, theirs = _squares(inputs), self.squares[entries]
        every = len(entries) == len(self.keys)
        for some in linalg.row_chunks(len(entries), max(1, AT_ONCE // self.keys.shape[1])):
            keys = self.keys[some] if every else self.keys[entries[some]]
            least[:, some] = _least_squared(inputs, keys, own, theirs[some])
        return least, least + 2 * ROUNDING * (own[:, None] + theirs)

    def _nearest(
        self,
        inputs: Tensor,  # (T, d_k)
        entries: Tensor,  # (c,) int64, in order
    ) -> tuple[Tensor, Tensor]:  # (T,) int64, (T,)
        """The nearest of these entries, the first where several are, and its distance."""
        least, most = self._bounds(inputs, entries)
        at, rivals = (~(least > most.amin(1, keepdim=True))).nonzero(as_tuple=True)  # also what is not a number
        distances = self._distances(inputs, at, entries[rivals])
        nearest_first = distances.argsort(stable=True)
        nearest_first = nearest_first[at[nearest_first].argsort(stable=True)]
        at = at[nearest_first]
        first = torch.ones_like(at, dtype=torch.bool)
        first[1:] = at[1:] != at[:-1]
        nearest_first = nearest_first[first]
        return entries[rivals[nearest_first]], distances[nearest_first]

    def _distances(self, inputs: Tensor, at: Tensor, entries: Tensor) -> Tensor:
        """||x - k|| of each pair."""
        chunks = linalg.row_chunks(len(at), max(1, AT_ONCE // IN_CACHE // self.keys.shape[1]))
        parts = [(inputs[at[some]] - self.keys[entries[some]]).norm(dim=1) for some in chunks]
        return torch.cat(parts) if parts else inputs.new_empty(0)


class GRACE:
    """An input nearer to a key than that key's radius puts out its value; any other, what the module puts out.

    Each position is judged by itself, so padding and cached generation change nothing. The key of a fact is the
    module's input at the prompt's last token. Its value starts as the module's own output there, and Adam trains it on
    -log p(answer | prompt) until that is below `stop_loss` a token. With d the distance to the nearest key, of radius
    eps:

        d > eps + eps_init    an entry of radius eps_init is added
        the same answer       eps expands to hold the key
        another answer        the old radius becomes d/2, where it was larger, and the new entry's is d/2
        another answer, d = 0 (which the paper leaves open)    the value is trained anew

    What shares its compute batch moves the input of a prompt (`input_noise`), in bf16 by more than many a radius: d is
    0 also where the entry's prompt is the fact's own, and an expanded radius has room for it.
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
        """Raises FloatingPointError, the codebook being that of the turn before, where a number is not finite.

        `details`: what became of the facts, and `loss_after`, their loss with all of the turn's entries in force.
        """
        watch = Stopwatch(*model.devices, self.device)
        at, facts = [one.answer_start - 1 for one in turn.sequences], LossTerm(turn.sequences, 1.0)
        with watch.measure("keys"):
            (loss,) = model.losses([facts])
            keys = model.keys_at(turn.sequences, at)[self.name].to(self.device)
        with watch.measure("codebook"):
            codebook, done, trained = self._admitted(keys, turn.sequences, model.input_noise)
        with watch.measure("values"):
            chosen = list(trained.values())
            values = self._trained(model, [turn.sequences[fact] for fact in chosen], [at[fact] for fact in chosen])
        before = self.codebook
        try:
            if not (math.isfinite(loss) and bool(torch.isfinite(values).all() & torch.isfinite(keys).all())):
                raise FloatingPointError(
                    f"the loss, a key or a value of {self.name} is not finite; set a smaller editor.lr"
                )
            codebook.values[list(trained)] = values.to(codebook.values)
            self.codebook = codebook
            with watch.measure("loss"):
                loss_after = finite_loss(model, facts)
        except FloatingPointError as error:
            self.codebook = before
            message = f"turn {turn.index}: {error}; the codebook is that of the turn before"
            raise FloatingPointError(message) from error
        return Edit(loss, {}, {}, watch.seconds, {"loss_after": loss_after, "codebook": done})

    def _admitted(
        self,
        keys: Tensor,  # (n, d_k)
        facts: Sequence[TokenSequence],
        noise: float,  # of keys, relative to their norms
    ) -> tuple[Codebook, dict[str, int], dict[int, int]]:
        """The codebook with the facts, what became of them, and the fact that each new or changed entry stands for."""
        entries, before = self.codebook.entries(), len(self.codebook.keys)
        old, far = self.codebook.nearest(keys)
        among = torch.cdist(keys, keys, compute_mode="donot_use_mm_for_euclid_dist").tolist()
        moved = (noise * keys.norm(dim=1)).tolist()
        added: list[int] = []  # facts whose keys became entries
        trained: dict[int, int] = {}
        done = Counter(added=0, expanded=0, split=0, replaced=0)
        for fact, one in enumerate(facts):
            prompt, answer = one.ids[: one.answer_start], one.ids[one.answer_start :]
            others = [(among[fact][other], before + i) for i, other in enumerate(added)]
            distance, nearest = min([(far[fact], old[fact]), *others])
            entry = entries[nearest] if nearest >= 0 else None
            kind = self._what_becomes(distance, entry, prompt, answer)
            done[kind] += 1
            if entry is None or kind == "added":
                radius = self.settings.eps_init
            elif kind == "expanded":
                entry.radius = max(entry.radius, COVERED * distance, distance + moved[fact])
                continue
            elif kind == "replaced":
                entry.answer, trained[nearest] = answer, fact
                continue
            else:
                radius = distance / 2
                entry.radius = min(entry.radius, radius)
            trained[len(entries)] = fact
            added.append(fact)
            entries.append(Entry(radius, answer, prompt))
        return self.codebook.grown(keys[added], entries), dict(done), trained

    def _what_becomes(
        self, distance: float, entry: Entry | None, prompt: tuple[int, ...], answer: tuple[int, ...]
    ) -> Literal["added", "expanded", "replaced", "split"]:
        """Of a fact at that distance from the nearest entry, if there is one."""
        again = entry is not None and entry.prompt == prompt
        if entry is None or distance == math.inf or (distance > entry.radius + self.settings.eps_init and not again):
            return "added"
        if entry.answer == answer:
            return "expanded"
        return "replaced" if again or distance <= SAME_INPUT * self.settings.eps_init else "split"

    def _trained(
        self, model: EditableModel, facts: Sequence[TokenSequence], at: Sequence[int]
    ) -> Tensor:  # (facts, d_v)
        """The value for each fact, put out by the module at that position."""
        if not facts:
            return self.codebook.values[:0]
        with model.unedited():
            values = model.values_at(self.name, facts, at).to(self.device)
        rows = [row.clone() for row in values]  # a tensor each, with moments of its own
        optimizer = torch.optim.Adam(rows, lr=self.settings.lr)
        active = list(range(len(facts)))
        search = model.offset_losses(self.name, facts, at, replace=True)
        for step in range(1, self.settings.num_steps + 1):
            offsets = torch.stack([rows[i] for i in active])
            losses, gradients = search(offsets, active)
            for i, loss, gradient in zip(active, losses.tolist(), gradients, strict=True):
                rows[i].grad = None if loss < self.settings.stop_loss else gradient
            active = [i for i in active if rows[i].grad is not None]
            if not active:
                break
            optimizer.step()
            model.tell(step / self.settings.num_steps)
        return torch.stack(rows)

    def statistics(self) -> dict[str, dict[str, float | None]]:
        """Entries, and their mean and largest radius."""
        entries = len(self.codebook.radii)
        mean, largest = (float(of(self.codebook.radii)) if entries else None for of in (torch.mean, torch.max))
        return {self.name: {"entries": entries, "radius": mean, "radius_max": largest}}

    def state_dict(self) -> dict[str, Tensor]:
        """Answers and prompts are padded with -1 to the longest."""
        book = self.codebook
        texts = {"answers": _padded(book.answers), "prompts": _padded(book.prompts)}
        return {"keys": book.keys, "values": book.values, "radii": book.radii, **texts}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        keys, values, radii = (state_dict[name].to(self.device) for name in ("keys", "values", "radii"))
        answers = _texts(state_dict["answers"])
        prompts = _texts(state_dict["prompts"]) if "prompts" in state_dict else None
        self.codebook = Codebook.of(keys, values, radii, answers, prompts)


def _padded(texts: Sequence[tuple[int, ...]]) -> Tensor:  # (texts, tokens) int64
    rows = [torch.tensor(text, dtype=torch.int64) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(rows, True, -1) if rows else torch.zeros((0, 0)).long()


def _texts(padded: Tensor) -> list[tuple[int, ...]]:
    return [tuple(token for token in row if token >= 0) for row in padded.tolist()]


def _projection(
    keys: Tensor,  # (m, d_k)
) -> Tensor:  # (d_k, r)
    """Orthonormal columns of random directions, always the same; of all where the sketch would be no smaller."""
    d_k = keys.shape[1]
    size = min(d_k, max(SKETCH, d_k // SKETCHED))
    directions = torch.randn((d_k, size), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(directions).Q.to(keys)


def _sketched(keys: Tensor, projection: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(m, r) sketches, and the squared norms (m,) of keys and of sketches."""
    sketches = keys @ projection
    return sketches, _squares(keys), _squares(sketches)


def _squares(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1).square()


def _least_squared(
    inputs: Tensor,  # (T, d)
    keys: Tensor,  # (c, d)
    own: Tensor,  # (T,) ||x||^2
    theirs: Tensor,  # (c,) ||k||^2
) -> Tensor:  # (T, c)
    """||x - k||^2 as ||x||^2 + ||k||^2 - 2 x k, less what rounding may have put on."""
    found = torch.addmm((1 - ROUNDING) * theirs, inputs, keys.T, alpha=-2)
    return found.add_((1 - ROUNDING) * own[:, None])
