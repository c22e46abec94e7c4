"""What GRACE's look-up costs beside the forward of the language model, as ratios measured in one run:

    python -m benchmarks.codebook [--entries 20000] [--tokens 256] [--rounds 5] [--device cuda] [--half bf16]

Models have the shapes of SmolLM2-135M and of Llama-3-8B and random weights, which cost as much as trained ones; of the
larger, one of its 32 layers is timed, and counted 32 times; both go without embeddings and head. One input in ten
has a key; the other keys are drawn around the inputs, as far from each other as these are, and radii are a tenth of it.
Beside it, the product of all d_k numbers of inputs and keys, which the look-up does without.
"""

from __future__ import annotations

import torch
import transformers
from torch import Tensor

from benchmarks.common import DTYPES, median_seconds, parser_with
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


@torch.inference_mode()
def bench(name: str, entries: int, tokens: int, rounds: int, device: torch.device, dtype: torch.dtype) -> None:
    shape, layers = MODELS[name]
    model = build(shape, layers, device, dtype)
    ids = torch.randint(64, (tokens // 32, 32), device=device)
    seen: list[Tensor] = []
    module = model.get_submodule(f"layers.{layers - 1}.mlp.down_proj")
    with module.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].flatten(0, 1))):
        model(input_ids=ids, use_cache=False)
    book = codebook_around(seen[0].float(), entries)
    forward = median_seconds(lambda: model(input_ids=ids, use_cache=False), device, rounds) * shape[2] / layers
    look_up = median_seconds(lambda: book.hits(seen[0]), device, rounds)
    product = median_seconds(lambda: seen[0].float() @ book.keys.T, device, rounds)
    print(
        f"{name}: {entries} entries, {len(seen[0])} positions, {len(book.hits(seen[0])[0])} hits: forward "
        f"{forward:.3f} s, look-up {look_up:.4f} s, {look_up / forward:.2%} of it; whole product {product:.4f} s, "
        f"{product / forward:.2%}"
    )


def main() -> None:
    options = parser_with(__doc__, entries=20_000, tokens=256, rounds=5, device="cpu", half="fp32").parse_args()
    device, dtype = torch.device(options.device), DTYPES[options.half]
    for name in MODELS:
        bench(name, options.entries, options.tokens, options.rounds, device, dtype)


if __name__ == "__main__":
    main()
