"""Tokenising, mini-batch weights, compute batches, the order of turns, the context check."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from data.batches import compute_batches, pack, unpack
from data.prompts import PromptForm
from data.records import EditRecord, Phase, Question, TokenSequence
from data.stream import EditStream, check_context, mini_batch_weights, prompt_ids, subject_ends, tokenize

BOS, EOS = "<s>", "</s>"


def wrap(tokenizer: Tokenizer, single: str, *others: Any) -> PreTrainedTokenizerFast:
    special = [(token, tokenizer.token_to_id(token)) for token in (BOS, EOS)]
    template = processors.TemplateProcessing(single=single, special_tokens=special)
    tokenizer.post_processor = processors.Sequence([*others, template])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def byte_level(single: str = f"{BOS} $A", trim_offsets: bool = True) -> PreTrainedTokenizerFast:
    """GPT-2's scheme over the 256 bytes; the merges are those of ' Rome', and 'in' for a word of one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "R"), ("o", "m"), ("ĠR", "om"), ("ĠRom", "e"), ("i", "n")]
    tokens = [BOS, EOS, *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return wrap(tokenizer, single, processors.ByteLevel(trim_offsets=trim_offsets))


def sentence_piece(pieces: tuple[str, ...] = ("▁Rome", "▁city", "▁is"), prepend: str = "always") -> Any:
    """Llama's and Mistral's scheme: a space in front of every text, whether or not it has one already."""
    letters = [chr(c) for c in range(33, 127)]
    vocabulary = [(BOS, 0.0), (EOS, 0.0), ("<unk>", -20.0), ("▁", -2.0)]
    vocabulary += [(letter, -5.0) for letter in letters] + [(piece, -1.0) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    if prepend == "legacy":  # what converted Llama tokenizers carry: the space is prepended even to a space
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    return wrap(tokenizer, f"{BOS} $A")


def split_tokens(tokenizer: Any, prompt: str, answer: str, how: Any = "joint") -> tuple[list[str], list[str]]:
    sequence = tokenize([Question(prompt, answer)], tokenizer, how)[0]
    tokens = tokenizer.convert_ids_to_tokens(list(sequence.ids))
    return tokens[: sequence.answer_start], tokens[sequence.answer_start :]


TOKENIZERS = {
    "byte_level": byte_level(),
    "byte_level_untrimmed": byte_level(trim_offsets=False),
    "byte_level_eos": byte_level(f"{BOS} $A {EOS}"),
    "sentence_piece": sentence_piece(),
    "sentence_piece_legacy": sentence_piece(prepend="legacy"),
}
VISIBLE = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12)
WORDS = st.lists(VISIBLE, min_size=1, max_size=4).map(" ".join)
ANY_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12).map(lambda t: f"x{t}x")


QA = PromptForm("Q: ", "\nA:")
CHAT = PromptForm("<user>", "<a>", brings_special_tokens=True)
FORMS = pytest.mark.parametrize("form", [PromptForm(), QA, CHAT], ids=["raw", "qa", "chat"])
BOTH = pytest.mark.parametrize("answer_tokens", ["joint", "separate"])


class TestSubjects:
    @pytest.mark.parametrize("name", sorted(TOKENIZERS))
    @FORMS
    @BOTH
    @settings(max_examples=25, deadline=None)
    @given(before=WORDS, subject=WORDS, after=WORDS)
    def test_the_token_with_the_subjects_last_character(
        self, name: str, form: PromptForm, answer_tokens: Any, before: str, subject: str, after: str
    ) -> None:
        """Up to it there is as much text as up to the subject's end, and before it less."""
        tokenizer, question = TOKENIZERS[name], Question(f"{before} {subject} {after}", "Rome")
        [place] = subject_ends([question], [subject], tokenizer, answer_tokens, form)
        [sequence] = tokenize([question], tokenizer, answer_tokens, form)
        last = question.prompt.rindex(subject) + len(subject)
        text = (form.before + question.prompt[:last]).replace(" ", "").replace("\n", "")

        def characters(upto: int) -> int:
            first = 0 if form.brings_special_tokens else 1
            tokens = tokenizer.convert_ids_to_tokens(list(sequence.ids[first:upto]))
            return sum(len(token.strip("▁ĠĊ").replace("<unk>", "")) for token in tokens)

        assert characters(place) < len(text) <= characters(place + 1)
        assert place < sequence.answer_start

    @BOTH
    def test_a_template_brings_its_special_tokens_itself(self, answer_tokens: Any) -> None:
        """What is asked begins as what is taught does, and nothing is put before it."""
        tokenizer = byte_level()
        (sequence,) = tokenize([Question("in", "Rome")], tokenizer, answer_tokens, CHAT)
        (asked,) = prompt_ids(["in"], tokenizer, CHAT)
        assert list(sequence.ids[: len(asked)]) == asked
        assert tokenizer.bos_token_id not in sequence.ids
        assert tokenizer.decode(asked) == "<user>in<a>"

    def test_several_questions_and_none(self) -> None:
        questions = [Question("Rome is in", "it"), Question("in Rome", "x")]
        assert subject_ends(questions, ["Rome", "Rome"], byte_level(), "joint") == [3, 2]
        assert subject_ends([], [], byte_level(), "joint") == []

    def test_where_it_is_named_last(self) -> None:
        assert subject_ends([Question("a in b in c", "x")], ["in"], byte_level(), "joint") == [7]

    def test_a_subject_that_is_not_there(self) -> None:
        with pytest.raises(ValueError, match="the subject 'Oslo' does not occur in the prompt 'Rome is in'"):
            subject_ends([Question("Rome is in", "it")], ["Oslo"], byte_level(), "joint")


class TestJoint:
    @pytest.mark.parametrize("name", ["byte_level", "byte_level_untrimmed", "byte_level_eos"])
    @pytest.mark.parametrize("prompt", ["city is", "city is "])
    def test_a_leading_space_inside_a_token_is_the_answers(self, name: str, prompt: str) -> None:
        head, tail = split_tokens(TOKENIZERS[name], prompt, "Rome")
        assert head == [BOS, *"city", "Ġ", "i", "s"]
        assert tail == ["ĠRome"]

    @pytest.mark.parametrize("name", ["sentence_piece", "sentence_piece_legacy"])
    def test_sentence_piece_has_no_phantom_space(self, name: str) -> None:
        assert split_tokens(TOKENIZERS[name], "city is", "Rome") == ([BOS, "▁city", "▁is"], ["▁Rome"])

    @pytest.mark.parametrize(("name", "space"), [("byte_level", "Ġ"), ("sentence_piece", "▁")])
    def test_a_token_of_only_the_space_is_the_prompts(self, name: str, space: str) -> None:
        head, tail = split_tokens(TOKENIZERS[name], "in", "1998")
        assert head[-1] == space
        assert tail == list("1998")

    @pytest.mark.parametrize(("name", "space"), [("byte_level", "Ġ"), ("sentence_piece", "▁")])
    def test_who_is_taught_to_say_a_number_is_taught_the_space_before_it(self, name: str, space: str) -> None:
        tokenizer = TOKENIZERS[name]

        def tail(prompt: str, answer: str, form: PromptForm, as_target: bool = True) -> list[str]:
            (sequence,) = tokenize([Question(prompt, answer)], tokenizer, "joint", form, as_target)
            return tokenizer.convert_ids_to_tokens(list(sequence.without_end().ids[sequence.answer_start :]))

        ends, plain = PromptForm(end=0), PromptForm()
        assert tail("in", "1998", ends) == [space, *"1998"]
        assert tail("in", "1998", ends, as_target=False) == tail("in", "1998", plain) == list("1998")
        assert tail("in ", "1998", ends) == list("1998")
        assert tail("city is", "Rome", ends) == [f"{space}Rome"]

    def test_a_token_across_the_border_is_the_answers(self) -> None:
        head, tail = split_tokens(sentence_piece(pieces=("s▁Ro",)), "is", "Rome")
        assert head == [BOS, "▁", "i"]
        assert tail == ["s▁Ro", "m", "e"]

    def test_a_line_break_before_the_answer_stays(self) -> None:
        head, tail = split_tokens(byte_level(), "A:\n", "in")
        assert head == [BOS, "A", ":", "Ċ"]
        assert tail == ["in"]

    @pytest.mark.parametrize("name", sorted(TOKENIZERS))
    @settings(max_examples=60, deadline=None)
    @given(prompt=WORDS, answer=WORDS)
    def test_is_the_natural_text_cut_in_two(self, name: str, prompt: str, answer: str) -> None:
        tokenizer = TOKENIZERS[name]
        sequence = tokenize([Question(prompt, answer)], tokenizer, "joint")[0]
        whole = tokenizer(f"{prompt} {answer}", add_special_tokens=False)["input_ids"]
        assert sequence.ids == (tokenizer.bos_token_id, *whole)
        assert sequence.answer_start > 0
        if "byte_level" in name:
            assert tokenizer.decode(sequence.ids[sequence.answer_start :]).lstrip(" ") == answer

    @settings(max_examples=60, deadline=None)
    @given(prompt=ANY_TEXT, answer=ANY_TEXT)
    def test_characters_of_several_bytes(self, prompt: str, answer: str) -> None:
        tokenizer = TOKENIZERS["byte_level"]
        sequence = tokenize([Question(prompt, answer)], tokenizer, "joint")[0]
        assert tokenizer.decode(sequence.ids[sequence.answer_start :]).lstrip(" ") == answer

    def test_one_call_gives_what_single_calls_give(self) -> None:
        questions = [Question("city is", "Rome"), Question("in the year", "1998"), Question("é", "ü ö")]
        for name, tokenizer in TOKENIZERS.items():
            for how in ("joint", "separate"):
                alone = [tokenize([q], tokenizer, how)[0] for q in questions]  # type: ignore[arg-type]
                assert tokenize(questions, tokenizer, how) == alone, name  # type: ignore[arg-type]

    def test_a_tokenizer_without_offsets_is_refused(self) -> None:
        class Slow:
            is_fast = False

        with pytest.raises(ValueError, match=r"^dataset.answer_tokens=joint .*set dataset.answer_tokens=separate$"):
            tokenize([Question("a", "b")], Slow(), "joint")  # type: ignore[arg-type]

    def test_a_question_without_tokens_is_refused(self) -> None:
        unheard = byte_level()
        unheard.backend_tokenizer.normalizer = normalizers.Replace(Regex("Rome"), "")
        with pytest.raises(ValueError, match="no token of the answer in prompt 'city is', answer 'Rome'"):
            tokenize([Question("city is", "Rome")], unheard, "joint")

    def test_a_first_token_that_nothing_predicts_is_refused(self) -> None:
        merged = sentence_piece(pieces=("▁is▁Rome",))
        merged.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
        with pytest.raises(ValueError, match="no token of the prompt"):
            tokenize([Question("is", "Rome")], merged, "joint")


class TestSeparate:
    def test_sentence_piece_gets_its_phantom_space(self) -> None:
        assert split_tokens(TOKENIZERS["sentence_piece_legacy"], "city is", "Rome", "separate") == (
            [BOS, "▁city", "▁is"],
            ["▁", "▁Rome"],
        )

    @pytest.mark.parametrize("name", sorted(TOKENIZERS))
    @settings(max_examples=40, deadline=None)
    @given(prompt=WORDS, answer=WORDS)
    def test_is_two_texts_put_together(self, name: str, prompt: str, answer: str) -> None:
        tokenizer = TOKENIZERS[name]
        sequence = tokenize([Question(prompt, answer)], tokenizer, "separate")[0]
        head = (tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"])
        tail = tuple(tokenizer(" " + answer, add_special_tokens=False)["input_ids"])
        assert (sequence.ids, sequence.answer_start) == (head + tail, len(head))


@st.composite
def token_sequences(draw: Any, max_count: int = 30) -> list[TokenSequence]:
    sizes = draw(st.lists(st.integers(2, 20), max_size=max_count))
    starts = [draw(st.integers(1, size - 1)) for size in sizes]
    ids = iter(range(1, 10_000))  # every token of the list differs, so a misplaced one shows
    return [TokenSequence(tuple(next(ids) for _ in range(n)), s) for n, s in zip(sizes, starts, strict=True)]


class TestMiniBatchWeights:
    @given(sequences=token_sequences(), batch_size=st.integers(1, 12))
    def test_each_mini_batch_weighs_one(self, sequences: list[TokenSequence], batch_size: int) -> None:
        weights = mini_batch_weights(sequences, batch_size)
        total = sum(w * s.answer_length for w, s in zip(weights, sequences, strict=True))
        assert total == pytest.approx(-(-len(sequences) // batch_size))  # the partial last one counts

    def test_longest_first_and_ties_in_the_datas_order(self) -> None:
        lengths_and_starts = [(4, 3), (9, 1), (4, 1), (6, 4), (4, 2)]  # answers of 1, 8, 3, 2, 2 tokens
        sequences = [TokenSequence(tuple(range(n)), start) for n, start in lengths_and_starts]
        # mini-batches by index: [1, 3], [0, 2], [4]
        assert mini_batch_weights(sequences, 2) == (1 / 4, 1 / 10, 1 / 4, 1 / 10, 1 / 2)


class TestComputeBatches:
    @given(sequences=token_sequences(), budget=st.integers(1, 100))
    def test_every_sequence_once_within_the_budget(self, sequences: list[TokenSequence], budget: int) -> None:
        batches = list(compute_batches(sequences, budget))
        members = [m for batch in batches for m in batch.members.tolist()]
        assert sorted(members) == list(range(len(sequences)))
        for batch in batches:
            assert batch.input_ids.numel() <= budget or len(batch.members) == 1
            assert batch.input_ids.shape == (len(batch.members), int(batch.lengths.max()))

    @given(sequences=token_sequences(max_count=9), overhead=st.integers(0, 20))
    def test_with_an_overhead_no_other_cut_is_cheaper(self, sequences: list[TokenSequence], overhead: int) -> None:
        """Against all cuts of the sequences, longest first, whose batches keep the budget."""
        budget = 40
        batches = list(compute_batches(sequences, budget, overhead))
        assert [m for batch in batches for m in batch.members.tolist()] == [
            m for batch in compute_batches(sequences, budget) for m in batch.members.tolist()
        ]
        lengths = sorted((len(sequence.ids) - 1 for sequence in sequences), reverse=True)
        costs = []
        for cuts in product((False, True), repeat=max(len(lengths) - 1, 0)):
            ends = [*(i + 1 for i, cut in enumerate(cuts) if cut), len(lengths)]
            sizes = [(end - start, lengths[start]) for start, end in pairwise([0, *ends]) if end > start]
            if all(rows * longest <= budget or rows == 1 for rows, longest in sizes):
                costs.append(sum(rows * longest + overhead for rows, longest in sizes))
        assert sum(batch.input_ids.numel() + overhead for batch in batches) == min(costs)

    @given(sequences=token_sequences(), budget=st.integers(1, 100))
    def test_a_batch_holds_its_sequences(self, sequences: list[TokenSequence], budget: int) -> None:
        for batch in compute_batches(sequences, budget):
            answers = []
            for row, member in enumerate(batch.members.tolist()):
                ids, start = sequences[member].ids, sequences[member].answer_start
                length = int(batch.lengths[row])
                assert tuple(batch.input_ids[row, :length].tolist()) == ids[:-1]
                assert not batch.input_ids[row, length:].any()
                answers += [(row, t - 1, ids[t]) for t in range(start, len(ids))]
            columns = (batch.rows.tolist(), batch.positions.tolist(), batch.targets.tolist())
            assert list(zip(*columns, strict=True)) == answers

    @given(sequences=token_sequences())
    def test_batches_are_alike_in_length_and_fill_the_budget(self, sequences: list[TokenSequence]) -> None:
        batches = list(compute_batches(sequences, 40))
        lengths = [n for batch in batches for n in batch.lengths.tolist()]
        assert lengths == sorted(lengths, reverse=True)
        assert all(b.input_ids.numel() + b.input_ids.shape[1] > 40 for b in batches[:-1])

    @given(sequences=token_sequences())
    def test_packed_tensors_come_back_bit_for_bit(self, sequences: list[TokenSequence]) -> None:
        """Those of a batch, and others of 8-byte numbers that go with it, of any size."""
        tensors = [torch.zeros(0, dtype=torch.int64), torch.tensor([[0.1, float("inf")], [-0.0, 1e-320]]).double()]
        for batch in compute_batches(sequences, 40):
            tensors += [batch.input_ids, batch.targets, torch.rand(len(batch.rows), dtype=torch.float64)]
        for found, expected in zip(unpack(pack(tensors), tensors), tensors, strict=True):
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert torch.equal(found.view(torch.int64), expected.view(torch.int64))

    def test_every_tensor_is_int64(self) -> None:
        batch = next(compute_batches([TokenSequence((5, 6, 7), 1)], 8))
        names = ("input_ids", "lengths", "members", "rows", "positions", "targets")
        assert {getattr(batch, name).dtype for name in names} == {torch.int64}


def records(count: int, word: str = "edit") -> list[EditRecord]:
    return [EditRecord(i, Question(f"{word} {i} is", "Rome" if i % 3 else "in Rome")) for i in range(count)]


def stream(edits: int = 40, warm_up: int = 20, **changes: Any) -> EditStream:
    settings: dict[str, Any] = {
        "n_edits": 5,
        "batch_size": 2,
        "num_turns": None,
        "num_warm_up": None,
        "preheat_mode": "start",
        "tokenizer": TOKENIZERS["byte_level"],
        "answer_tokens": "joint",
        "seed": 42,
        "shuffle": False,
    }
    return EditStream(records(edits), records(warm_up, "warm"), **(settings | changes))


def phases(turns: EditStream) -> str:
    return "".join("w" if turn.phase is Phase.WARM_UP else "." for turn in turns.from_turn(0))


class TestStream:
    @pytest.mark.parametrize(
        ("mode", "layout"),
        [
            ("start", "ww......."),
            ("q1", ".ww......"),
            ("middle", "...ww...."),
            ("q3", ".....ww.."),
            ("end", "......ww."),
        ],
    )
    def test_where_warm_up_stands(self, mode: str, layout: str) -> None:
        assert phases(stream(num_turns=7, num_warm_up=2, preheat_mode=mode)) == layout

    @pytest.mark.parametrize("mode", ["start", "q1", "middle", "q3", "end"])
    def test_a_stream_of_one_turn_warms_up_before_it(self, mode: str) -> None:
        assert phases(stream(num_turns=1, num_warm_up=1, preheat_mode=mode)) == "w."

    def test_no_warm_up(self) -> None:
        assert phases(stream(preheat_mode="none")) == "." * 8
        assert phases(stream(num_warm_up=0)) == "." * 8

    @pytest.mark.parametrize(("rows", "turns"), [(105, 20), (100, 20), (24, 4), (5, 1)])
    def test_null_warm_up_is_twenty_turns_or_all_there_are(self, rows: int, turns: int) -> None:
        assert stream(warm_up=rows).num_warm_up == turns

    @pytest.mark.parametrize("shuffle", [False, True])
    def test_replay_is_drawn_from_the_facts_of_earlier_turns(self, shuffle: bool) -> None:
        turns = stream(num_warm_up=2, preheat_mode="middle", replay=7, shuffle=shuffle)
        written: list[EditRecord] = []
        for turn in turns.from_turn(0):
            if turn.phase is Phase.WARM_UP or not written:
                assert turn.replay is None
            else:
                assert turn.replay is not None
                asked = turn.replay.records
                assert len(set(asked)) == len(asked) == min(7, len(written))
                assert [record for record in written if record in asked] == list(asked)  # in the order of writing
                assert turn.replay.sequences == tuple(
                    tokenize([record.edit for record in asked], TOKENIZERS["byte_level"], "joint")
                )
                assert turn.replay.loss_weights == mini_batch_weights(turn.replay.sequences, 2)
                joined = turn.with_replay()
                assert joined.records == turn.records + asked
                assert joined.sequences == turn.sequences + turn.replay.sequences
            written += turn.records if turn.phase is Phase.EDIT else ()

    def test_replay_is_a_function_of_seed_and_turn(self) -> None:
        turns = stream(replay=7)
        assert turns.turn(6) == turns.turn(6)
        drawn = [stream(replay=7, seed=seed).turn(index).replay for seed in (1, 2) for index in (6, 7)]
        assert len({each.records for each in drawn if each is not None}) == 4
        without = stream()
        assert [replace(turn, replay=None) for turn in turns.from_turn(0)] == list(without.from_turn(0))

    @settings(max_examples=30, deadline=None)
    @given(
        num_turns=st.integers(1, 8),
        num_warm_up=st.integers(0, 4),
        mode=st.sampled_from(["start", "q1", "middle", "q3", "end"]),
        shuffle=st.booleans(),
        first=st.integers(0, 12),
    )
    def test_every_row_once_and_turns_by_index(
        self, num_turns: int, num_warm_up: int, mode: str, shuffle: bool, first: int
    ) -> None:
        def build() -> EditStream:
            return stream(num_turns=num_turns, num_warm_up=num_warm_up, preheat_mode=mode, shuffle=shuffle)

        turns = list(build().from_turn(0))
        edited = [r for turn in turns if turn.phase is Phase.EDIT for r in turn.records]
        warmed = [r for turn in turns if turn.phase is Phase.WARM_UP for r in turn.records]
        assert warmed == records(num_warm_up * 5, "warm") == list(build().warmed_up())
        assert len({r.index for r in edited}) == len(edited) == num_turns * 5
        assert shuffle or edited == records(num_turns * 5)
        assert list(build().edited()) == edited
        writers = [turn.index for turn in turns if turn.phase is Phase.EDIT for _ in turn.records]
        assert [build().turn_of(place) for place in range(len(edited))] == writers
        assert list(build().from_turn(first)) == turns[first:]
        before = [r for turn in turns[:first] if turn.phase is Phase.EDIT for r in turn.records]
        assert list(build().edited(min(first, len(turns)))) == before

    def test_sequences_and_weights_belong_to_the_records(self) -> None:
        turn = stream().turn(5)
        assert list(turn.sequences) == tokenize([r.edit for r in turn.records], TOKENIZERS["byte_level"], "joint")
        assert turn.loss_weights == mini_batch_weights(turn.sequences, 2)

    def test_shuffle_follows_the_seed(self) -> None:
        order = [r.index for r in stream(shuffle=True, seed=1).edited()]
        torch.manual_seed(9)
        assert [r.index for r in stream(shuffle=True, seed=1).edited()] == order
        assert [r.index for r in stream(shuffle=True, seed=2).edited()] != order
        assert sorted(order) == list(range(40)) != order

    def test_a_shuffled_prefix_comes_from_the_whole_file(self) -> None:
        assert max(r.index for r in stream(shuffle=True, num_turns=2).edited()) >= 10

    def test_outside_the_stream(self) -> None:
        assert list(stream().from_turn(12)) == []
        with pytest.raises(IndexError, match="turn 12 of a stream of 12 turns"):
            stream().turn(12)

    def test_slices_are_lazy(self) -> None:
        class Untouched(list[EditRecord]):
            def __getitem__(self, place: Any) -> Any:
                raise AssertionError("read before it was asked for")

            def __iter__(self) -> Iterator[EditRecord]:
                raise AssertionError("read before it was asked for")

        turns = stream()
        lazy = EditStream(
            Untouched(records(40)), Untouched(), n_edits=5, batch_size=2, num_turns=None, num_warm_up=None,
            preheat_mode="none", tokenizer=TOKENIZERS["byte_level"], answer_tokens="joint", seed=0,
        )  # fmt: skip
        assert len(lazy.edited(3)[2:]) == 13
        assert turns.edited()[7] == records(40)[7]

    @pytest.mark.parametrize(
        ("sizes", "changes", "message"),
        [
            ((4, 20), {}, r"dataset.n_edits=5: .* 4 rows, .*set dataset.n_edits to 4 or less"),
            ((40, 20), {"num_turns": 9}, r"num_seq=9: .* 40 rows, 8 full turns .*set num_seq to 8 or less"),
            ((40, 20), {"num_warm_up": 5}, r"num_seq_zsre .*=5: .* 20 rows, 4 full turns .*set it to 4 or less"),
            ((40, 4), {}, r"=null: .* 4 rows, 0 full turns .*set editor.preheat_mode=none"),
            ((40, 20), {"preheat_mode": "begin"}, r"editor.preheat_mode=begin: set one of start, q1, .* none"),
            ((40, 20), {"preheat_mode": "none", "num_warm_up": 2}, r"dataset.num_warm_up=2 has no effect"),
        ],
    )
    def test_mistakes(self, sizes: tuple[int, int], changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message) as error:
            stream(*sizes, **changes)
        assert "\n" not in str(error.value)


class TestContext:
    @settings(max_examples=40, deadline=None)
    @given(prompt=ANY_TEXT, answer=ANY_TEXT, limit=st.integers(6, 60), how=st.sampled_from(["joint", "separate"]))
    def test_exact(self, prompt: str, answer: str, limit: int, how: Any) -> None:
        question, tokenizer = Question(prompt, answer), TOKENIZERS["byte_level"]
        record = EditRecord(7, Question("a", "b"), multi_hop=question)
        tokens = max(len(s.ids) for s in tokenize([record.edit, question], tokenizer, how))
        if tokens <= limit:
            check_context([record], tokenizer, limit, answer_tokens=how, file="facts.json")
        else:
            with pytest.raises(ValueError, match=rf"file facts.json, row 7: .* {tokens} tokens .* context is {limit};"):
                check_context([record], tokenizer, limit, answer_tokens=how, file="facts.json")

    def test_normalisation_may_lengthen_a_text(self) -> None:
        tokenizer = byte_level()
        tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
        record = EditRecord(3, Question("\ufdfa" * 4, "x"))  # 12 bytes, 132 once normalised
        with pytest.raises(ValueError, match="row 3: edit is 135 tokens long"):
            check_context([record], tokenizer, 100, answer_tokens="joint", file="f")

    def test_short_questions_are_never_tokenised(self) -> None:
        class Counting:
            def num_special_tokens_to_add(self) -> int:
                return 1

        check_context(records(50), Counting(), 64, answer_tokens="joint", file="f")  # type: ignore[arg-type]
