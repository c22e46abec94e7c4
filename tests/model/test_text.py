"""Generation and the likelihood of labels, against the model asked about one sequence at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from data.records import TokenSequence
from harness.ranks import Ranks, SharedModel
from model import LanguageModel
from tests.conftest import tiny_gpt2, tiny_llama
from tests.model.test_model import FAMILIES, SMALL

PROMPTS = [[7, 8, 9], [3], [40, 41, 42, 43, 44, 45, 46, 47], [7, 8, 9, 10], [9, 9, 9], [200, 100, 50, 25, 12, 6]]
LABELS = [[[1], [2, 3], [4, 5, 6]], [[2, 3]], [[9], [8]], [[5, 5, 5, 5], [1]], [[1], [1]], [[250, 0], [0, 250], [7]]]
HEAD = [int(token) for token in torch.randint(0, 256, (30,), generator=torch.Generator().manual_seed(5))]


def one_by_one(model: Any, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """transformers' own greedy search, its end token taken off."""
    ends = model.generation_config.eos_token_id
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0
        )[0, len(prompt) :].tolist()
        stops = {ends} if isinstance(ends, int) else set(ends or ())
        found.append(out[:-1] if out and out[-1] in stops else out)
    return found


def log_prob(model: Any, prompt: list[int], label: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + label])).logits[0, len(prompt) - 1 : -1]
    return float(logits.double().log_softmax(-1)[range(len(label)), label].sum())


def assert_likelihoods_agree(model: LanguageModel, prompts: list[list[int]], labels: list[list[list[int]]]) -> None:
    found = model.label_log_probs(prompts, labels)
    for prompt, candidates, scores in zip(prompts, labels, found, strict=True):
        assert [count for _, count in scores] == [len(label) for label in candidates]
        expected = [log_prob(model.model, prompt, label) for label in candidates]
        torch.testing.assert_close([total for total, _ in scores], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", [[], HEAD], ids=["nothing shared", "shared beginning"])
def test_families(family: str, head: list[int]) -> None:
    """Batches, padding, what is shared, a sliding window: none of it changes a token or a likelihood."""
    config_class, sizes, *_ = FAMILIES[family]
    torch.manual_seed(0)
    plain = transformers.AutoModelForCausalLM.from_config(config_class(**SMALL, **sizes)).eval()
    plain.generation_config.eos_token_id = None
    model = LanguageModel(plain, None, {}, compute_tokens=24)
    prompts = [head + prompt for prompt in PROMPTS]
    free = one_by_one(plain, prompts, 7)
    assert model.generate(prompts, 7) == free
    plain.generation_config.eos_token_id = [free[0][0], free[2][3]]  # so that some rows leave their batch early
    assert model.generate(prompts, 7) == one_by_one(plain, prompts, 7)
    plain.generation_config.eos_token_id = None
    assert_likelihoods_agree(model, prompts, LABELS)


def test_a_family_without_position_ids_and_without_a_limit() -> None:
    torch.manual_seed(0)
    config = transformers.BloomConfig(vocab_size=260, hidden_size=16, n_layer=3, n_head=2, initializer_range=0.2)
    plain = transformers.BloomForCausalLM(config).eval()
    model = LanguageModel(plain, None, {}, compute_tokens=64)
    assert model.context_length is None
    prompts = [HEAD + prompt for prompt in PROMPTS]
    assert model.generate(prompts, 7) == one_by_one(plain, prompts, 7)
    assert_likelihoods_agree(model, prompts, LABELS)


def test_a_model_without_a_limit_that_takes_position_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LanguageModel, "context_length", None)
    plain = tiny_llama()
    assert LanguageModel(plain, None, {}, compute_tokens=64).generate(PROMPTS, 7) == one_by_one(plain, PROMPTS, 7)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("budget", [1, 16, 512])
def test_the_size_of_a_batch_changes_nothing(make: Any, budget: int) -> None:
    plain = make()
    model = LanguageModel(plain, None, {}, compute_tokens=budget)
    assert model.generate(PROMPTS, 12) == one_by_one(plain, PROMPTS, 12)
    assert_likelihoods_agree(model, PROMPTS, LABELS)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_it_stops_before_each_of_the_models_end_tokens(make: Any) -> None:
    """End tokens are taken from the texts the model would write, so that some end early, one at once, some never."""
    plain = make()
    free = one_by_one(plain, PROMPTS, 10)
    plain.generation_config.eos_token_id = [free[0][0], free[2][4]]
    found = LanguageModel(plain, None, {}, compute_tokens=64).generate(PROMPTS, 10)
    assert found == one_by_one(plain, PROMPTS, 10)
    assert found[0] == []
    assert {len(text) for text in found} >= {0, 10}
    plain.generation_config.eos_token_id = free[2][4]  # one token, not a list
    assert LanguageModel(plain, None, {}, compute_tokens=64).generate(PROMPTS, 10) == one_by_one(plain, PROMPTS, 10)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_of_tokens_that_are_as_likely_the_first_is_taken(make: Any) -> None:
    """Every token has a twin, bit for bit, 130 places on."""
    plain = make()
    head = plain.get_output_embeddings().weight.data
    head[130:] = head[:130]
    found = LanguageModel(plain, None, {}, compute_tokens=64).generate(PROMPTS, 10)
    assert found == one_by_one(plain, PROMPTS, 10)
    assert max(max(text, default=0) for text in found) < 130
    pairs = LanguageModel(plain, None, {}).label_log_probs(PROMPTS, [[[5], [135]]] * len(PROMPTS))
    assert all(first == second for first, second in pairs)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("length", [250, 253, 255, 256])
def test_a_text_ends_where_the_context_is_full(make: Any, length: int) -> None:
    """The last token is written without being read; short prompts beside the long one write on."""
    plain = make()
    plain.generation_config.eos_token_id = None
    long = [int(token) for token in torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(0))]
    found = LanguageModel(plain, None, {}, compute_tokens=4096).generate([[1, 2], long, [3]], 5)
    assert found[1] == one_by_one(plain, [long], min(5, 256 - length + 1))[0]
    assert [found[0], found[2]] == one_by_one(plain, [[1, 2], [3]], 5)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_label_may_fill_the_context_and_no_more(make: Any) -> None:
    plain = make()
    model = LanguageModel(plain, None, {}, compute_tokens=4096)
    long = [int(token) for token in torch.randint(0, 256, (254,), generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([[*long, 4, 5]])).logits[0, -3:].double().log_softmax(-1)
    expected = float(logits[[0, 1, 2], [4, 5, 6]].sum())
    ((total, count),) = model.label_log_probs([long], [[[4, 5, 6]]])[0]
    assert count == 3
    assert total == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="prompt 1 has 257 tokens, more than the model's context of 256"):
        model.label_log_probs([[1], long], [[[1]], [[4, 5, 6, 7]]])
    shared = SharedModel(model, Ranks())
    shared.world_size = 2  # for the second of two processes it would be the first prompt
    with pytest.raises(ValueError, match="prompt 1 has 257 tokens"):
        shared.label_log_probs([[1], long], [[[1]], [[4, 5, 6, 7]]])


def test_likelihoods_are_what_scoring_an_answer_gives() -> None:
    """The same question asked through answer_logits."""
    model = LanguageModel(tiny_llama(), None, {})
    (batch,) = model.batches([TokenSequence((7, 8, 9, 1, 2), 3)])
    chosen = model.answer_logits(batch).log_softmax(-1)[[0, 1], [1, 2]]
    assert model.label_log_probs([[7, 8, 9]], [[[1, 2]]])[0][0][0] == pytest.approx(float(chosen.sum()), abs=1e-5)


def test_what_all_prompts_begin_with_is_read_once() -> None:
    plain = tiny_llama()
    model = LanguageModel(plain, None, {}, compute_tokens=64)
    read: list[tuple[int, ...]] = []
    plain.register_forward_pre_hook(lambda _, __, named: read.append(tuple(named["input_ids"].shape)), with_kwargs=True)
    prompts = [HEAD + prompt for prompt in PROMPTS]
    model.label_log_probs(prompts, LABELS)
    assert read[0] == (1, len(HEAD))
    assert sum(rows * width for rows, width in read) < len(HEAD) * len(PROMPTS)


def test_prompts_that_are_all_the_same() -> None:
    plain = tiny_gpt2()
    prompts = [HEAD, HEAD, HEAD]
    assert LanguageModel(plain, None, {}).generate(prompts, 4) == one_by_one(plain, prompts, 4)


def test_rows_leave_a_cache_of_convolutions_too() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 260, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention", "conv"]}
    plain = transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**sizes, **heads)).eval()
    plain.generation_config.eos_token_id = None
    prompts = [[7, 8, 9], [200, 100, 50], [40, 41, 42], [3, 2, 1]]  # of one length: convolutions see padding
    free = one_by_one(plain, prompts, 8)
    plain.generation_config.eos_token_id = [free[0][0], free[1][2]]
    found = LanguageModel(plain, None, {}, compute_tokens=64).generate(prompts, 8)
    assert found == one_by_one(plain, prompts, 8)
    assert len({len(text) for text in found}) > 1


def test_texts_that_have_ended_are_not_read_on() -> None:
    plain = tiny_llama()
    free = one_by_one(plain, PROMPTS, 10)
    plain.generation_config.eos_token_id = [text[place] for place, text in enumerate(free[:-1])]
    rows: list[int] = []
    plain.register_forward_pre_hook(
        lambda _model, _args, options: rows.append(len(options["input_ids"])), with_kwargs=True
    )
    LanguageModel(plain, None, {}, compute_tokens=10_000).generate(PROMPTS, 10)
    assert rows[0] == len(PROMPTS)
    assert rows[-1] < len(PROMPTS) / 2


@pytest.mark.parametrize("early", [False, True])
def test_a_watcher_is_told_of_every_token_while_they_are_written(early: bool) -> None:
    """Where a text ends early, of those too that will not be written."""
    plain = tiny_llama()
    plain.generation_config.eos_token_id = one_by_one(plain, PROMPTS[:1], 1)[0][0] if early else None
    told: list[int] = []
    LanguageModel(plain, None, {}, compute_tokens=16).generate(PROMPTS, 7, told.append)
    assert sum(told) == 7 * len(PROMPTS)
    assert len(told) > 7  # with each step of each batch, not with each batch


def test_nothing_asked_nothing_answered() -> None:
    model = LanguageModel(tiny_llama(), None, {})
    assert model.generate([], 5) == []
    assert model.label_log_probs([], []) == []
    assert model.label_log_probs([[1]], [[]]) == [[]]


def test_mistakes() -> None:
    model = LanguageModel(tiny_llama(), None, {})
    with pytest.raises(ValueError, match="prompt 1 has no token"):
        model.generate([[1], []], 5)
    with pytest.raises(ValueError, match="prompt 0 has 257 tokens, more than the model's context of 256: shorten it"):
        model.generate([[1] * 257], 5)
    with pytest.raises(ValueError, match="a label has no token"):
        model.label_log_probs([[1]], [[[1], []]])


def test_lower_precision_is_scored_in_float32() -> None:
    """Log-probabilities in bfloat16 would be good to two digits."""
    plain = tiny_llama(dtype=torch.bfloat16)
    found = LanguageModel(plain, None, {}).label_log_probs([[7, 8, 9]], [[[1], [2], [3]]])[0]
    expected = [log_prob(plain, [7, 8, 9], [token]) for token in (1, 2, 3)]
    torch.testing.assert_close([total for total, _ in found], expected, rtol=0, atol=1e-5)
