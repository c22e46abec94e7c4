"""What GRACE's look-up costs beside the forward of the language model, as ratios measured in one run:

    OMP_NUM_THREADS=1 python -m benchmarks.codebook [--entries 20000] [--tokens 256] [--rounds 5] [--device cuda]
        [--half bf16] [--model SmolLM2-135M]

Models have the shapes of SmolLM2-135M and of Llama-3-8B and random weights, which cost as much as trained ones; of the
larger, one of its 32 layers is timed, and counted 32 times; both go without embeddings and head. One input in ten
has a key; the other keys are drawn around the inputs, as far from each other as these are. Radii are, in units of that
distance, a tenth; or also, as expansion leaves them, three tenths for a tenth of the entries; or 0.9 for one of them;
or 0.9 for all. Beside it, the product of all d_k numbers of inputs and keys.

Forward, product and look-ups take turns, and the least time of each counts: whoever else uses the machine then matters
least.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
import transformers
from torch import Tensor

from benchmarks.common import DTYPES, Work, parser_with, race
from editor.grace import Codebook

MODELS = {  # name: (shape, layers that are timed)
    "SmolLM2-135M": ((576, 1536, 30, 9, 3), 30),
    "Llama-3-8B": ((4096, 14336, 32, 32, 8), 1),
}


def build(
    shape: tuple[int, int, int, int, int], layers: int, device: torch.device, dtype: torch.dtype
) -> torch.nn.Module:
    size, mlp, _, heads, kv_heads = shape
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=size, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )  # fmt: skip
    with device:
        return transformers.LlamaModel(config).to(dtype).eval()


RADII = {  # of a part of the entries, in units of the distance between inputs; others have a tenth
    "equal": (0.0, 0.0),
    "a tenth of them three times as large": (0.1, 0.3),
    "one of them 0.9": (1e-9, 0.9),
    "all of them 0.9": (1.0, 0.9),
}


def codebooks_around(
    inputs: Tensor,  # (T, d_k)
    entries: int,
) -> dict[str, Codebook]:
    """The same keys with each of the `RADII`."""
    generator = torch.Generator(inputs.device).manual_seed(0)
    keys = inputs[torch.randint(len(inputs), (entries,), generator=generator, device=inputs.device)]
    keys = keys + inputs.std(0) * torch.randn(keys.shape, generator=generator, device=inputs.device)
    keys[: len(inputs) // 10] = inputs[: len(inputs) // 10]
    apart = float(torch.cdist(inputs[:50], inputs[50:100]).median())
    values = torch.zeros((entries, 8), device=inputs.device)
    book = Codebook.of(keys, values, torch.full((entries,), 0.1 * apart, device=inputs.device), [()] * entries)
    found = {}
    for name, (part, radius) in RADII.items():
        radii = book.radii.clone()
        radii[entries - math.ceil(part * entries) :] = radius * apart
        found[name] = replace(book, radii=radii)
    return found


@torch.inference_mode()
def bench(name: str, entries: int, tokens: int, rounds: int, device: torch.device, dtype: torch.dtype) -> None:
    shape, layers = MODELS[name]
    model = build(shape, layers, device, dtype)
    ids = torch.randint(64, (tokens // 32, 32), device=device)
    seen: list[Tensor] = []
    module = model.get_submodule(f"layers.{layers - 1}.mlp.down_proj")
    with module.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].flatten(0, 1))):
        model(input_ids=ids, use_cache=False)
    inputs = seen[0]
    books = codebooks_around(inputs.float(), entries)
    keys = books["equal"].keys
    contenders: dict[str, Work] = {
        "forward": lambda: model(input_ids=ids, use_cache=False),
        "whole product": lambda: inputs.float() @ keys.T,
        **{f"look-up, radii {mix}": partial(book.hits, inputs) for mix, book in books.items()},
    }
    least = {contender: min(times) for contender, times in race(contenders, device, rounds).items()}
    forward = least.pop("forward") * shape[2] / layers
    print(f"{name}: {entries} entries, {len(inputs)} positions, forward {forward:.3f} s")
    for contender, took in least.items():
        print(f"  {contender}: {took:.4f} s, {took / forward:.2%} of it")


def main() -> None:
    defaults: dict[str, float | str] = {"entries": 20_000, "tokens": 256, "rounds": 5, "device": "cpu", "half": "fp32"}
    options = parser_with(__doc__, **defaults, model="all").parse_args()
    device, dtype = torch.device(options.device), DTYPES[options.half]
    for name in MODELS if options.model == "all" else [options.model]:
        bench(name, options.entries, options.tokens, options.rounds, device, dtype)


if __name__ == "__main__":
    main()
