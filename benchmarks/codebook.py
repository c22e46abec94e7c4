"""What GRACE's look-up costs beside the forward of the language model, as ratios measured in one run:

    python -m benchmarks.codebook [--entries 20000] [--tokens 256] [--rounds 5] [--device cuda] [--half bf16]

Models have the shapes of SmolLM2-135M and of Llama-3-8B and random weights, which cost as much as trained ones; of the
larger, one of its 32 layers is timed, and counted 32 times; both go without embeddings and head. One input in ten
has a key; the other keys are drawn around the inputs, as far from each other as these are, and radii are a tenth of it.
Beside it, the product of all d_k numbers of inputs and keys, which the look-up does without.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from torch import Tensor

from editor.grace import Codebook

MODELS = {  # name: (shape, layers that are timed)
    "SmolLM2-135M": ((576, 1536, 30, 9, 3), 30),
    "Llama-3-8B": ((4096, 14336, 32, 32, 8), 1),
}


def build(shape: tuple[int, int, int, int, int], layers: int, device: str, dtype: torch.dtype) -> torch.nn.Module:
    size, mlp, _, heads, kv_heads = shape
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=size, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )  # fmt: skip
    with torch.device(device):
        return transformers.LlamaModel(config).to(dtype).eval()


def codebook_around(
    inputs: Tensor,  # (T, d_k)
    entries: int,
) -> Codebook:
    generator = torch.Generator(inputs.device).manual_seed(0)
    keys = inputs[torch.randint(len(inputs), (entries,), generator=generator, device=inputs.device)]
    keys = keys + inputs.std(0) * torch.randn(keys.shape, generator=generator, device=inputs.device)
    keys[: len(inputs) // 10] = inputs[: len(inputs) // 10]
    apart = torch.cdist(inputs[:50], inputs[50:100]).median()
    values = torch.zeros((entries, 8), device=inputs.device)
    return Codebook.of(keys, values, torch.full((entries,), 0.1 * float(apart), device=inputs.device), [()] * entries)


def seconds(work: Callable[[], object], device: str, rounds: int) -> float:
    """The median over the rounds, after one that does not count."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


@torch.inference_mode()
def bench(name: str, entries: int, tokens: int, rounds: int, device: str, dtype: torch.dtype) -> None:
    shape, layers = MODELS[name]
    model = build(shape, layers, device, dtype)
    ids = torch.randint(64, (tokens // 32, 32), device=device)
    seen: list[Tensor] = []
    module = model.get_submodule(f"layers.{layers - 1}.mlp.down_proj")
    handle = module.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].flatten(0, 1)))
    model(input_ids=ids, use_cache=False)
    handle.remove()
    book = codebook_around(seen[0].float(), entries)
    forward = seconds(lambda: model(input_ids=ids, use_cache=False), device, rounds) * shape[2] / layers
    look_up = seconds(lambda: book.hits(seen[0]), device, rounds)
    product = seconds(lambda: seen[0].float() @ book.keys.T, device, rounds)
    print(
        f"{name}: {entries} entries, {len(seen[0])} positions, {len(book.hits(seen[0])[0])} hits: forward "
        f"{forward:.3f} s, look-up {look_up:.4f} s, {look_up / forward:.2%} of it; whole product {product:.4f} s, "
        f"{product / forward:.2%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=20_000)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--half", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args()
    dtype = torch.float32 if options.half == "fp32" else torch.bfloat16
    for name in MODELS:
        bench(name, options.entries, options.tokens, options.rounds, options.device, dtype)


if __name__ == "__main__":
    main()
