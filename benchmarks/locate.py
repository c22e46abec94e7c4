"""What the editors that locate a fact cost beside the work they cannot do without, as ratios measured in one run:

    python -m benchmarks.locate [--d-k 4096] [--facts 100] [--kept 500] [--steps 5] [--rounds 3] [--device cuda]

Layers: a layer's update for a turn's facts, once C is factored, by MEMIT (whitened keys) and AlphaEdit (projected
keys, half of the directions being null), against the d_k x d_k system as it stands, d_v = 2 d_k / 7 as in Llama-3.
Targets: the search for target vectors in a Llama of 6 layers with random weights (d 256), 6 contexts a fact, offsets at
layer 2, against the forwards and backwards from that layer up that it needs, over compute batches made beforehand.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from data.batches import compute_batches
from data.records import FactContexts, TokenBatch, TokenSequence
from editor.located import Coordinates, KeptKeys, NullSpace, Whitening
from editor.target_vectors import TargetSettings, target_vectors
from model import LanguageModel

RIDGE = 10.0
MODULE = "model.layers.2.mlp.down_proj"
CONTEXTS, PREFIX, PROMPT, ANSWER = 6, 10, 12, 3  # of a fact; tokens


def seconds(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    """The median over the rounds, after one that does not count."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def layers(d_k: int, facts: int, kept: int, rounds: int, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    scale = torch.logspace(1, -2, d_k, device=device)
    text = drawn(2 * d_k, d_k) * scale
    moments = text.T @ text / len(text)
    keys, earlier, residual = drawn(facts, d_k) * scale, drawn(kept, d_k) * scale, drawn(facts, 2 * d_k // 7)
    threshold = float(torch.linalg.eigvalsh(moments.double())[d_k // 2])
    made: dict[str, Callable[[], Coordinates]] = {
        "MEMIT": lambda: Whitening("m", moments, 1e-6, device),
        "AlphaEdit": lambda: NullSpace("m", moments, threshold, device),
    }
    for name, make in made.items():
        start = time.perf_counter()
        coordinates = make()
        once = time.perf_counter() - start
        known = KeptKeys(d_k, torch.float32, device)
        known.add(coordinates.enter(earlier.double()))

        def update(coordinates: Coordinates = coordinates, known: KeptKeys = known) -> Tensor:
            spread = known.spread(coordinates.enter(keys.double()), RIDGE)
            return coordinates.leave(spread).float() @ residual

        print(f"{name}, d_k {d_k}: C once a run {once:.2f} s; a layer {seconds(update, device, rounds):.3f} s")

    def naive() -> Tensor:
        rows, before = keys.double(), earlier.double()
        system = RIDGE * moments.double() + before.T @ before + rows.T @ rows
        return torch.linalg.solve(system, rows.T @ residual.double())

    print(f"the d_k x d_k system as it stands: {seconds(naive, device, 1):.3f} s a layer")


def made_facts(count: int) -> list[FactContexts]:
    generator = torch.Generator().manual_seed(0)
    facts = []
    for _ in range(count):
        own = torch.randint(0, 2000, (PROMPT + ANSWER,), generator=generator).tolist()
        lengths = [0, *[PREFIX] * (CONTEXTS - 1)]
        heads = [torch.randint(0, 2000, (length,), generator=generator).tolist() for length in lengths]
        sequences = tuple(TokenSequence((*head, *own), len(head) + PROMPT) for head in heads)
        facts.append(FactContexts(sequences, tuple(s.answer_start - 4 for s in sequences)))
    return facts


def targets(facts: int, steps: int, rounds: int, device: torch.device) -> None:
    config = transformers.LlamaConfig(
        vocab_size=2000, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4
    )
    plain = transformers.LlamaForCausalLM(config).to(device)
    model = LanguageModel(plain, None, {MODULE: plain.get_submodule(MODULE)})
    made = made_facts(facts)
    sequences = [sequence for fact in made for sequence in fact.sequences]
    batches = list(compute_batches(sequences, model.compute_tokens))
    settings = TargetSettings(steps, 0.1, 0.5, 0.0, 4.0, 0.0)
    start = torch.ones((facts, 256), device=device)
    search = seconds(lambda: target_vectors(model, MODULE, made, start, settings), device, rounds)

    def forwards_backwards() -> None:
        for batch in batches:
            forward_backward(model, batch)

    bare = seconds(forwards_backwards, device, rounds) * steps
    ratio = f"{search / bare:.2f} times"
    print(f"target vectors of {facts} facts, {steps} steps: {search:.2f} s; bare {bare:.2f} s, {ratio}")


def forward_backward(model: LanguageModel, batch: TokenBatch) -> None:
    """Down to the module, logits at answer positions only."""
    leaf: list[Tensor] = []

    def begin(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        leaf.append(output.detach().requires_grad_(True))
        return leaf[0]

    handle = model.edited[MODULE].module.register_forward_hook(begin)
    logits = model._logits(batch)
    handle.remove()
    torch.autograd.grad(functional.cross_entropy(logits, batch.targets.to(logits.device)), leaf)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-k", type=int, default=4096)
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--kept", type=int, default=500)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    targets(options.facts, options.steps, options.rounds, device)
    layers(options.d_k, options.facts, options.kept, options.rounds, device)


if __name__ == "__main__":
    main()
