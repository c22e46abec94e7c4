"""What the editors that locate a fact cost beside the work they cannot do without, as ratios measured in one run:

    python -m benchmarks.locate [--d-k 4096] [--facts 100] [--kept 500] [--steps 5] [--rounds 3] [--device cuda]

Layers: a layer's update for a turn's facts, once C is factored, by MEMIT (whitened keys) and AlphaEdit (projected
keys, half of the directions being null, which is the most that a projection costs, and --kept keys of earlier turns),
against the d_k x d_k system as it stands, d_v = 2 d_k / 7 as in Llama-3.
Targets: the search for target vectors in a Llama of 6 layers with random weights (d 256), 6 contexts a fact, offsets at
layer 2, against the forwards and backwards from that layer up that it needs, over compute batches made beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import transformers
from torch import Tensor

from benchmarks.bare import bare_batch
from benchmarks.common import median_seconds, parser_with
from data.batches import compute_batches
from data.records import FactContexts, TokenSequence
from editor.located import Coordinates, KeptKeys, NullSpace, SecondMomentFactor
from editor.stopwatch import Stopwatch
from editor.target_vectors import TargetSettings, target_vectors
from model import LanguageModel

RIDGE = 10.0
MODULE = "model.layers.2.mlp.down_proj"
CONTEXTS, PREFIX, PROMPT, ANSWER = 6, 10, 12, 3  # of a fact; tokens


def layers(d_k: int, facts: int, kept: int, rounds: int, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(0)
    drawn = partial(torch.randn, generator=generator, device=device)

    scale = torch.logspace(1, -2, d_k, device=device)
    keys, earlier, residual = drawn(facts, d_k) * scale, drawn(kept, d_k) * scale, drawn(facts, 2 * d_k // 7)
    text = drawn(d_k // 8, d_k) * scale
    moments = text.T @ text / len(text) + torch.diag(scale**2)
    ray = torch.nn.functional.normalize(drawn(d_k, 1).double(), dim=0)
    reflection = torch.eye(d_k, d_k // 2, dtype=torch.float64, device=device) - 2 * ray @ ray[: d_k // 2].T
    made: dict[str, tuple[Callable[[], Coordinates], int]] = {
        "MEMIT": (lambda: SecondMomentFactor("m", moments, 1e-6, device), 0),
        "AlphaEdit": (lambda: NullSpace(reflection), kept),
    }
    for name, (make, before) in made.items():
        once = Stopwatch(device)
        with once.measure("C"):
            coordinates = make()
        known = KeptKeys(d_k, torch.float32, device)
        known.add(coordinates.enter(earlier[:before].double()))

        def update(coordinates: Coordinates = coordinates, known: KeptKeys = known) -> Tensor:
            left = known.left_factor(coordinates.enter(keys.double()), RIDGE)
            return coordinates.leave(left).float() @ residual

        layer = median_seconds(update, device, rounds)
        factored = f"; C once a run {once.seconds['C']:.2f} s" if name == "MEMIT" else ""
        print(f"{name}, d_k {d_k}, {before} kept keys: a layer {layer:.3f} s{factored}")

    def naive() -> Tensor:
        rows, before = keys.double(), earlier.double()
        system = RIDGE * moments.double() + before.T @ before + rows.T @ rows
        return torch.linalg.solve(system, rows.T @ residual.double())

    print(f"the d_k x d_k system as it stands: {median_seconds(naive, device, 1):.3f} s a layer")


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
    search = median_seconds(lambda: target_vectors(model, MODULE, made, start, settings), device, rounds)

    def forwards_backwards() -> None:
        for batch in batches:
            bare_batch(model, batch, backward=True)

    bare = median_seconds(forwards_backwards, device, rounds) * steps
    ratio = f"{search / bare:.2f} times"
    print(f"target vectors of {facts} facts, {steps} steps: {search:.2f} s; bare {bare:.2f} s, {ratio}")


def main() -> None:
    options = parser_with(__doc__, d_k=4096, facts=100, kept=500, steps=5, rounds=3, device="cpu").parse_args()
    device = torch.device(options.device)
    targets(options.facts, options.steps, options.rounds, device)
    layers(options.d_k, options.facts, options.kept, options.rounds, device)


if __name__ == "__main__":
    main()
