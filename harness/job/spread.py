"""A language model whose work is shared by the processes of a run; to whoever asks, it is one model.

Every rank holds the same weights and gets the same updates, which is verified, bit for bit, after each of them.
Questions are dealt out by length, so each rank has about as much to do, and answers come back in the order of the
questions. Sums over ranks are taken in the order of the ranks: two runs give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from config.schema import EditPrecision, RunConfig
from data.records import Allocate, LossTerm, LowRankUpdate, TokenSequence, Turn, TurnCapture, WeightChange, first_rows
from harness.job.devices import DTYPES, ask_for_the_same_bits
from harness.job.plan import Plan
from harness.ranks.group import Ranks, laid_out, require_gpu_each
from harness.run import places
from harness.run.folder import versions
from model import LanguageModel
from model_source import ModelSource, locate

P = TypeVar("P")
R = TypeVar("R")


@dataclass
class Held:
    """What a process holds between the tasks it is given."""

    model: LanguageModel | None = None
    source: ModelSource | None = None  # where the leader has found the files; followers look on their own machines
    tokenizer: Any = None  # the leader's; followers never see text

    @property
    def loaded(self) -> LanguageModel:
        assert self.model is not None, "asked before it was told which model to load"
        return self.model


# ---------------------------------------------------------------------------------------------------------------------
# Loading


@dataclass(frozen=True)
class _Wanted:
    """Which weights every rank reads, and how it holds them."""

    name_or_path: str
    class_name: str
    revision: str | None
    trust_remote_code: bool
    edit_modules: tuple[str, ...]
    dtype: torch.dtype
    device: torch.device
    device_map: str | None
    master: bool
    compute_tokens: int | None
    deterministic: bool
    ranks: int


def load_model(cfg: RunConfig, plan: Plan, evaluated: ModelSource | None = None) -> LanguageModel:
    """Read the weights on every rank: those of `model`, with edit modules, or those that `evaluate` names, without.

    ValueError, naming rank and machine, where a rank reads other weights, or computes with other versions.
    """
    ranks = plan.ranks
    wanted = _Wanted(
        name_or_path=cfg.model.name_or_path if evaluated is None else str(cfg.evaluate),
        class_name=cfg.model.class_name,
        revision=cfg.model.revision if evaluated is None else None,
        trust_remote_code=cfg.model.trust_remote_code,
        edit_modules=tuple(plan.outline.shapes) if cfg.evaluate is None else (),
        dtype=DTYPES[cfg.model.half],
        device=plan.device if ranks.size == 1 else torch.device(plan.device.type),  # each its own of that kind
        device_map=cfg.model.device_map and cfg.model.device_map.name,
        master=cfg.model.edit_precision is EditPrecision.master,
        compute_tokens=cfg.model.compute_tokens,
        deterministic=cfg.model.deterministic,
        ranks=ranks.size,
    )
    held = Held(source=evaluated or plan.source, tokenizer=plan.tokenizer)
    loaded = ranks.all(held, _load, wanted)
    if ranks.size == 1:
        return held.loaded
    said = [each for each in loaded if each is not None]
    for rank, (fingerprint, packages) in enumerate(said):
        if fingerprint != said[0][0]:
            raise ValueError(
                f"model.name_or_path={wanted.name_or_path}: rank {rank} reads other weights than rank 0 (fingerprints "
                f"{fingerprint} and {said[0][0]}); give every machine the same files"
            )
        for name in (name for name in packages if packages[name] != said[0][1][name]):
            raise ValueError(
                f"rank {rank} computes with {name} {packages[name]} and rank 0 with {said[0][1][name]}; install the "
                "same versions on every machine"
            )
    return SpreadModel(held, ranks)


def _load(held: Held, wanted: _Wanted) -> tuple[str, dict[str, str | None]] | None:
    """What has to be the same on every rank; None where there is but one."""
    held.model = None  # that of the job before, in a sweep
    if wanted.device.type == "cuda":
        require_gpu_each()
        ask_for_the_same_bits(wanted.deterministic)
    source = held.source or ModelSource(
        locate(wanted.name_or_path, places.CACHE, wanted.revision),
        wanted.class_name,
        wanted.revision,
        wanted.trust_remote_code,
    )
    held.model = LanguageModel.load(
        source,
        held.tokenizer,
        wanted.edit_modules,
        dtype=wanted.dtype,
        device=wanted.device,
        device_map=wanted.device_map,
        master=wanted.master,
        compute_tokens=wanted.compute_tokens,
    )
    return (held.model.fingerprint(), versions()) if wanted.ranks > 1 else None


# ---------------------------------------------------------------------------------------------------------------------
# The model


class SpreadModel(LanguageModel):
    """The leader's model, the others' behind it."""

    def __init__(self, held: Held, ranks: Ranks) -> None:
        vars(self).update(vars(held.loaded))  # the very weights and modules that its own share is computed with
        self._held, self._ranks = held, ranks
        self.hands = ranks.size

    def each(self, work: Callable[[LanguageModel, P], R], parts: Sequence[P]) -> list[R]:
        return self._ranks.each(self._held, _on_model, [(work, part) for part in parts])

    def _gather(
        self, work: Callable[[LanguageModel, P], R], parts: Sequence[P], take: Callable[[int, R], None]
    ) -> None:
        self._ranks.gather(self._held, _on_model, [(work, part) for part in parts], take)

    def _every(self, work: Callable[[LanguageModel, P], R], part: P) -> list[R]:
        return self._ranks.all(self._held, _on_model, (work, part))

    # -- capture

    def capture(self, turn: Turn, every_token: bool = False, allocate: Allocate | None = None) -> TurnCapture:
        shares = self.shares([len(sequence.ids) for sequence in turn.sequences])
        first_row = first_rows(turn.sequences, every_token).tolist()
        captures = self.empty_captures(first_row[-1], allocate)
        losses: list[tuple[float, float]] = []  # and what each counts for
        right = [False] * len(turn.sequences)

        def take(rank: int, found: tuple[TurnCapture | None, float]) -> None:
            part, weight = found
            if part is None:
                return
            rows = torch.cat([torch.arange(first_row[place], first_row[place + 1]) for place in shares[rank]])
            for name, own in part.modules.items():
                into, there = captures[name], rows.to(captures[name].keys.device)
                into.keys[there] = own.keys.to(into.keys.device)
                into.value_grads[there] = own.value_grads.to(into.value_grads.device)
            losses.append((part.loss, weight))
            for place, is_right in zip(shares[rank], part.right, strict=True):
                right[place] = is_right

        self._gather(_capture, [(_share_of_turn(turn, share), every_token) for share in shares], take)
        mean = math.fsum(loss * w for loss, w in losses) / math.fsum(w for _, w in losses)
        return TurnCapture(captures, mean, tuple(right))

    # -- scoring and text

    def hidden_states(self, sequences: Sequence[TokenSequence]) -> Tensor:  # (sequences, d) float32, on the CPU
        costs = [sequence.answer_start for sequence in sequences]
        return torch.stack(self._in_order(_hidden_states, sequences, costs))

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, watch: Callable[[int], object] = lambda _: None
    ) -> list[list[int]]:
        self._check_lengths([len(prompt) for prompt in prompts])  # by their places here, not in a share
        costs = [len(prompt) + max_new_tokens for prompt in prompts]
        texts = self._in_order(partial(_generate, max_new_tokens=max_new_tokens), prompts, costs)
        watch(len(prompts) * max_new_tokens)
        return texts

    def label_log_probs(
        self, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[tuple[float, int]]]:
        self._check_labels(prompts, labels)
        costs = [len(prompt) + sum(map(len, own)) for prompt, own in zip(prompts, labels, strict=True)]
        return self._in_order(_label_log_probs, list(zip(prompts, labels, strict=True)), costs)

    def _in_order(
        self, work: Callable[[LanguageModel, list[P]], Sequence[R]], items: Sequence[P], costs: Sequence[int]
    ) -> list[R]:
        shares = self.shares(costs)
        found = self.each(work, [[items[place] for place in share] for share in shares])
        by_place = dict(zip(chain(*shares), chain(*found), strict=True))
        return [by_place[place] for place in range(len(items))]

    # -- weight gradients

    def reference_logits(self, sequences: Sequence[TokenSequence]) -> Tensor:  # (M, V)
        logits = self._in_order(_reference_logits, sequences, [len(sequence.ids) for sequence in sequences])
        return torch.cat([own.to(self.device) for own in logits])

    def weight_gradients(self, terms: Sequence[LossTerm]) -> tuple[dict[str, Tensor], list[float]]:
        parts = self._shares_of_terms(terms)
        total: dict[str, Tensor] = {}
        found: list[Sequence[float]] = []

        def take(_rank: int, part: tuple[dict[str, Tensor], list[float]]) -> None:
            gradients, losses = part
            for name, gradient in gradients.items():
                total[name] = total[name].add_(gradient) if name in total else gradient
            found.append(losses)

        self._gather(_weight_gradients, parts, take)
        return total, _summed(terms, parts, found)

    def losses(self, terms: Sequence[LossTerm]) -> list[float]:
        parts = self._shares_of_terms(terms)
        return _summed(terms, parts, self.each(_losses, parts))

    def _shares_of_terms(self, terms: Sequence[LossTerm]) -> list[list[tuple[int, LossTerm]]]:
        """For each rank its part of each term, with the term's place; weighed so that the parts sum to the whole."""
        parts: list[list[tuple[int, LossTerm]]] = [[] for _ in range(self.hands)]
        for place, term in enumerate(terms):
            shares = self.shares([len(sequence.ids) for sequence in term.sequences])
            for offset, share in enumerate(shares):
                if share:  # terms of a single sequence go round
                    parts[(place + offset) % self.hands].append((place, _share_of_term(term, share)))
        return parts

    # -- weights

    def apply(self, updates: Mapping[str, LowRankUpdate]) -> dict[str, WeightChange]:
        done = self._every(_apply, {name: _as_sent(update) for name, update in updates.items()})
        self._require_alike([checksums for _, checksums in done])
        return done[0][0]

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        self._require_alike(self._every(_restore, dict(snapshot)))

    def restore_original(self) -> None:
        self._require_alike(self._every(_restore_original, None))

    def set_aside(self) -> None:
        self._every(_set_aside, None)

    def bring_back(self) -> None:
        self._require_alike(self._every(_bring_back, None))

    def _require_alike(self, found: Sequence[Mapping[str, int]]) -> None:
        for rank, checksums in enumerate(found):
            for name in (name for name in checksums if checksums[name] != found[0][name]):
                raise ValueError(
                    f"rank {rank} holds other bits of {name} than rank 0 after the same update: these machines compute "
                    "differently; use machines with the same processors, GPUs and thread counts"
                )


def _on_model(held: Held, task: tuple[Callable[[LanguageModel, Any], Any], Any]) -> Any:
    work, part = task
    return work(held.loaded, part)


# ---------------------------------------------------------------------------------------------------------------------
# What a rank does with its share


def _share_of_turn(turn: Turn, share: Sequence[int]) -> Turn:
    """Some records of a turn; a mini-batch's weights stay what they are in the whole turn."""
    return replace(
        turn,
        records=(),
        sequences=tuple(turn.sequences[place] for place in share),
        loss_weights=tuple(turn.loss_weights[place] for place in share),
    )


def _capture(model: LanguageModel, part: tuple[Turn, bool]) -> tuple[TurnCapture | None, float]:
    """And the share of the turn's mini-batches that its loss is the mean of."""
    turn, every_token = part
    if not turn.sequences:
        return None, 0.0
    weight = sum(w * s.answer_length for w, s in zip(turn.loss_weights, turn.sequences, strict=True))
    return model.capture(turn, every_token), weight


def _hidden_states(model: LanguageModel, sequences: Sequence[TokenSequence]) -> list[Tensor]:
    return list(model.hidden_states(sequences)) if sequences else []


def _generate(model: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    return model.generate(prompts, max_new_tokens)


def _label_log_probs(
    model: LanguageModel, items: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]
) -> list[list[tuple[float, int]]]:
    return model.label_log_probs([prompt for prompt, _ in items], [labels for _, labels in items])


def _reference_logits(model: LanguageModel, sequences: Sequence[TokenSequence]) -> Sequence[Tensor]:
    if not sequences:
        return []
    return model.reference_logits(sequences).split([sequence.answer_length for sequence in sequences])


def _share_of_term(term: LossTerm, share: Sequence[int]) -> LossTerm:
    """Some sequences of a term. Its mean is over their tokens alone, so it weighs as many of the whole's."""
    sequences = tuple(term.sequences[place] for place in share)
    weight = term.weight * _tokens(sequences) / _tokens(term.sequences)
    if term.reference is None:
        return LossTerm(sequences, weight)
    rows = term.reference.split([sequence.answer_length for sequence in term.sequences])
    return LossTerm(sequences, weight, torch.cat([rows[place] for place in share]))


def _summed(
    terms: Sequence[LossTerm], parts: Sequence[Sequence[tuple[int, LossTerm]]], found: Sequence[Sequence[float]]
) -> list[float]:
    """Each term's mean loss from those of its parts."""
    losses = [0.0] * len(terms)
    for part, own in zip(parts, found, strict=True):
        for (place, share), loss in zip(part, own, strict=True):
            losses[place] += loss * _tokens(share.sequences) / _tokens(terms[place].sequences)
    return losses


def _tokens(sequences: Sequence[TokenSequence]) -> int:
    return sum(sequence.answer_length for sequence in sequences)


def _weight_gradients(
    model: LanguageModel, part: Sequence[tuple[int, LossTerm]]
) -> tuple[dict[str, Tensor], list[float]]:
    return model.weight_gradients([term for _, term in part])


def _losses(model: LanguageModel, part: Sequence[tuple[int, LossTerm]]) -> list[float]:
    return model.losses([term for _, term in part])


def _as_sent(update: LowRankUpdate) -> LowRankUpdate:
    """With factors laid out as they arrive elsewhere: products of another layout may round another way."""
    return LowRankUpdate(None if update.left is None else laid_out(update.left), laid_out(update.right))


def _apply(
    model: LanguageModel, updates: Mapping[str, LowRankUpdate]
) -> tuple[dict[str, WeightChange], dict[str, int]]:
    return model.apply(updates), model.checksums()


def _restore(model: LanguageModel, snapshot: Mapping[str, Tensor]) -> dict[str, int]:
    model.restore(snapshot)
    return model.checksums()


def _restore_original(model: LanguageModel, _nothing: None) -> dict[str, int]:
    model.restore_original()
    return model.checksums()


def _set_aside(model: LanguageModel, _nothing: None) -> None:
    model.set_aside()


def _bring_back(model: LanguageModel, _nothing: None) -> dict[str, int]:
    model.bring_back()
    return model.checksums()
