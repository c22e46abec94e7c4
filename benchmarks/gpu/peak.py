"""What a forward computes, and what a card could have computed in that time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from data.records import TokenSequence
from model import LanguageModel

# bf16 products with sums in float32, flops a second, from NVIDIA's datasheets: dense, half of what those say that count
# on structured sparsity. A device is the first whose words all stand in its name, unless it is less than a whole one.
PEAKS = {
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A40": 150e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
LESS = {"Laptop", "D", "MIG"}


def forward_flops(model: LanguageModel, sequences: Sequence[TokenSequence]) -> float:
    """Of a forward over the sequences' tokens, padding not counted, with logits at answer positions only.

    2 flops a weight and token that meets it, norms counted with the maps; attention's products, of each position with
    those up to it, 2 L^2 d a layer for both.
    """
    head = model.model.get_output_embeddings().weight.numel()
    embedding = model.model.get_input_embeddings().weight.numel()
    config = model.model.config
    lengths = [len(sequence.ids) - 1 for sequence in sequences]
    answers = sum(sequence.answer_length for sequence in sequences)
    body = sum(weight.numel() for weight in model.model.parameters()) - head - embedding
    attention = 2.0 * sum(length**2 for length in lengths) * config.hidden_size * config.num_hidden_layers
    return 2.0 * body * sum(lengths) + 2.0 * head * answers + attention


def card_of(name: str) -> str | None:
    """The card in the table, by the name that its driver gives it; None for one that is not there."""
    words = set(name.replace("-", " ").split())
    return None if words & LESS else next((card for card in PEAKS if set(card.split()) <= words), None)


def share_of_peak(flops: float, seconds: float, device: torch.device, dtype: torch.dtype) -> tuple[float | None, str]:
    """The share, and what it is a share of, or why there is none."""
    if device.type != "cuda":
        return None, "the table has GPUs only"
    if dtype != torch.bfloat16:
        return None, "the table has peaks in bf16 only"
    name = torch.cuda.get_device_name(device)
    card = card_of(name)
    if card is None:
        return None, f"the table does not have {name}"
    return flops / seconds / PEAKS[card], f"of {PEAKS[card] / 1e12:.0f} Tflop/s, {name}"
