"""Second moments of keys over text, C = E[k k^T] of each edit module: streamed once, kept in the user's cache."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from config.schema import RunConfig
from data.corpus import Corpus
from data.disk import sync, whole_or_absent
from data.progress import duration, progress_bar
from data.records import TokenSequence
from editor.base import OfMoments
from harness.job.devices import kind_of
from harness.job.plan import Plan
from harness.run import digest_of, places, postponed, versions, write_safetensors
from model import LanguageModel, sha256_of_tensor

log = logging.getLogger(__name__)

FORMAT: Final = 3  # to be raised when the same text gives other moments
TOGETHER: Final = 32  # windows between two looks at the clock and at signals
SAVE_SECONDS: Final = 300.0
WORTH_KEEPING: Final = 5.0  # seconds that it took to make


def second_moments(cfg: RunConfig, plan: Plan, model: LanguageModel, fingerprint: str) -> dict[str, Tensor]:
    """C (d_k, d_k) float32 of each edit module, on the CPU; `model` has its weights as they were loaded.

    Of text and of questions each has its share (`corpus.questions`).
    """
    found = {name: _moments_over(corpus, cfg, plan, model, fingerprint) for name, corpus in plan.corpora.items()}
    _warn(model.shapes, {name: tokens for name, (_, tokens) in found.items()}, plan.corpora)
    if len(found) == 1:
        ((moments, _),) = found.values()
        return moments
    (text, _), (questions, _), share = found["corpus"], found["questions"], cfg.corpus.questions
    return {name: torch.lerp(text[name], questions[name], share) for name in model.shapes}


def _moments_over(
    corpus: Corpus, cfg: RunConfig, plan: Plan, model: LanguageModel, fingerprint: str
) -> tuple[dict[str, Tensor], int]:
    """By module, and their tokens.

    Those of modules that the cache of a process lacks are computed; broken off, that goes on where it was. Each of
    several processes computes all of it, in the same order, so that all have the same bits. FloatingPointError, naming
    the module and with nothing written, where a number is not finite.
    """
    folder = places.CACHE / "moments"
    files = {name: folder / f"{_key(cfg, plan, corpus, fingerprint, [name])}.safetensors" for name in model.shapes}
    kept = {name: _read(file) for name, file in files.items()}
    missing = [name for name in files if not model.all_ranks(kept[name] is not None)]
    if missing:
        part = folder / f"{_key(cfg, plan, corpus, fingerprint, list(files))}.part.safetensors"
        sums = MomentSums(model, missing, part, plan.ranks.writes_cache, plan.ranks.is_first)
        windows = corpus.windows(plan.tokenizer, _window(cfg, plan), cfg.corpus.tokens)
        sums.add_up(windows, corpus.total(cfg.corpus.tokens))
        made = {name: sums.moments(name) for name in missing}
        _require_finite(made)
        kept |= {name: (moments, sums.tokens) for name, moments in made.items()}
        if plan.ranks.writes_cache:
            for name, moments in made.items():
                _write(files[name], {"moments": moments}, tokens=sums.tokens)
            part.unlink(missing_ok=True)
    found = {name: one for name, one in kept.items() if one is not None}
    return {name: moments for name, (moments, _) in found.items()}, min(tokens for _, tokens in found.values())


class KeptOfMoments:
    """What an editor makes of second moments and takes long to make, beside them in the cache."""

    def __init__(self, device: torch.device, writes: bool, all_ranks: Callable[[bool], bool]) -> None:
        """`device`: where it is made. It is read only where all ranks can read it, so that all have the same bits."""
        self.device, self.writes, self.all_ranks = device, writes, all_ranks

    def __call__(self, what: str, moments: Tensor, make: OfMoments) -> Mapping[str, Tensor]:
        """`what` says all that decides it beside C and the device."""
        identity = {
            "what": what,
            "C": sha256_of_tensor(moments),
            "device": kind_of(self.device),
            "versions": versions(),
        }
        file = places.CACHE / "moments" / f"{digest_of(identity, what)[:16]}.safetensors"
        kept = _open(file)
        if self.all_ranks(kept is not None):
            assert kept is not None
            return kept[0]
        began = time.monotonic()
        made = make(moments)
        seconds = time.monotonic() - began
        if self.writes and seconds >= WORTH_KEEPING:
            _write(file, made, milliseconds=round(1000 * seconds))
            log.info("%s: found in %s, kept in %s", what, duration(seconds), file)
        return made


class MomentSums:
    """Sums of k k^T over windows of text, kept on disk from time to time and where a signal ends the process."""

    def __init__(
        self, model: LanguageModel, names: Sequence[str], path: Path, writes: bool = True, takes_signals: bool = True
    ) -> None:
        """Of the keys of the edit modules `names`."""
        self.model, self.path, self.writes, self.takes_signals = model, path, writes, takes_signals
        self.windows, self.tokens = 0, 0
        self.sums = {
            name: torch.zeros((d_k, d_k), dtype=torch.float64, device=model.device)
            for name, (d_k, _) in model.shapes.items()
            if name in names
        }
        self._restore()

    def moments(self, name: str) -> Tensor:  # (d_k, d_k)
        return (self.sums[name] / self.tokens).float().cpu()

    def add_up(self, windows: Iterable[TokenSequence], total: int | None) -> None:
        """All windows behind those that are in the sums."""
        left, saved = iter(windows), time.monotonic()
        for _ in islice(left, self.windows):
            pass
        with progress_bar("second moments of keys", total, "tokens", done=self.tokens) as bar:
            try:
                while some := list(islice(left, TOGETHER)):
                    with self._whole():
                        tokens = self._add(some)
                    bar.advance(tokens)
                    if time.monotonic() - saved > SAVE_SECONDS:
                        _require_finite(self.sums)
                        self._save()
                        saved = time.monotonic()
                bar.finish()
            except (KeyboardInterrupt, SystemExit):
                if _not_finite(self.sums) is None:
                    self._save()
                raise

    def _whole(self) -> contextlib.AbstractContextManager[None]:
        """A signal waits until all sums have the same windows."""
        return postponed() if self.takes_signals else contextlib.nullcontext()

    def _add(self, windows: list[TokenSequence]) -> int:
        for keys in self.model.token_keys(windows, list(self.sums)):
            for name, rows in keys.items():
                self.sums[name] += rows.T @ rows  # in the keys' precision; batches add up in float64
            del keys, rows  # before the next batch is computed
        tokens = sum(window.answer_start for window in windows)
        self.windows, self.tokens = self.windows + len(windows), self.tokens + tokens
        return tokens

    def _save(self) -> None:
        if self.writes and self.windows:
            _write(self.path, self.sums, windows=self.windows, tokens=self.tokens)

    def _restore(self) -> None:
        found = _open(self.path)
        if found is not None and self.sums.keys() <= found[0].keys():
            tensors, numbers = found
            self.windows, self.tokens = numbers["windows"], numbers["tokens"]
            self.sums = {name: tensors[name].to(self.model.device) for name in self.sums}


def _not_finite(found: Mapping[str, Tensor]) -> str | None:
    """The first module whose moments are not."""
    return next((name for name, moments in found.items() if not bool(torch.isfinite(moments).all())), None)


def _require_finite(found: Mapping[str, Tensor]) -> None:
    name = _not_finite(found)
    if name is not None:
        raise FloatingPointError(
            f"the second moments of the keys of {name} are not finite: for some of the text the model has nan inside, "
            "or numbers too large to be squared; choose another model.half or corpus.path"
        )


def _key(cfg: RunConfig, plan: Plan, corpus: Corpus, fingerprint: str, modules: list[str]) -> str:
    identity = {
        "model": fingerprint,
        "tokenizer": plan.tokenizer_hash,
        "corpus": corpus.sha256,
        "modules": modules,
        "tokens": [cfg.corpus.tokens, _window(cfg, plan)],
        "arithmetic": [kind_of(plan.device), cfg.model.half.name, cfg.model.compute_tokens],
        "versions": [FORMAT, versions()],
    }
    return digest_of(identity, "second moments")[:16]


def _window(cfg: RunConfig, plan: Plan) -> int:
    """Tokens that are read together: no more than the model can."""
    return min(cfg.corpus.window, plan.outline.context_length or cfg.corpus.window)


def _read(file: Path) -> tuple[Tensor, int] | None:
    """Moments and their tokens; None where there are none."""
    found = _open(file)
    return found and (found[0]["moments"], found[1]["tokens"])


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, int]] | None:
    """Tensors and numbers of a file; None where there is none, or none that can be used, which is said."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            numbers = {name: int(value) for name, value in file.metadata().items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
    except SafetensorError:
        log.warning("%s: damaged, not what was written; it is made again", path)
        return None
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):  # as they once were written
        log.warning("%s: holds numbers that are not finite; it is made again", path)
        return None
    return tensors, numbers


def _write(path: Path, tensors: Mapping[str, Tensor], **numbers: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_or_absent(path) as part:
        write_safetensors(part, tensors, {name: str(value) for name, value in numbers.items()})
    sync(path.parent)


def _warn(shapes: Mapping[str, tuple[int, int]], tokens: Mapping[str, int], corpora: Mapping[str, Corpus]) -> None:
    """Of each text that is the shipped one, or has fewer tokens than say something of every direction, twice over."""
    d_k = max(d_k for d_k, _ in shapes.values())
    for name, corpus in corpora.items():
        says = []
        if corpus.is_shipped:
            says.append("this is the shipped text, enough for a trial; 100,000 documents were published")
        if tokens[name] < 2 * d_k:
            says.append(f"fewer than twice as many ({2 * d_k:,}) leave directions that they say nothing of")
        if says:
            log.warning(
                "%s: second moments over %s tokens, for keys of size %s; %s: %s",
                corpus.name,
                f"{tokens[name]:,}",
                f"{d_k:,}",
                ", and ".join(says),
                corpus.remedy,
            )
