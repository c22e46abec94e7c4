"""Runs of the editors that locate a fact: contexts, second moments, the cache, a stop, export, mistakes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from config.compose import compose_config
from config.schema import LocateConfig, register, settings_without_effect, to_run_config
from data.corpus import TextFiles
from data.prompts import PromptForm
from data.records import EditRecord, Phase, Question, Turn
from data.stream import tokenize
from editor import alphaedit, located
from harness.export.command import main as export
from harness.job import moments
from harness.job.facts import FIRST_WORDS, Contexts, write_prefixes
from harness.job.moments import KeptOfMoments, MomentSums
from harness.ranks import Ranks
from harness.run import places
from harness.watch.diagnostics import TurnDiagnostics
from model import LanguageModel
from tests.commands import MODULES, Commands, Run, save_tiny_model, zsre_row
from tests.conftest import tiny_llama
from tests.data.test_stream import byte_level
from tests.editor.test_method import harness

QUICK = (
    "editor.v_num_grad_steps=3", "editor.prefixes=2", "editor.prefix_tokens=3", "editor.moment_ridge=1e-4",
    "corpus.tokens=3000", "corpus.window=64", "evaluation.every=2", "checkpoint_every=2", "model.compute_tokens=400",
    "corpus.questions=0",
)  # fmt: skip
EARLY_MODULES = ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"]
EARLY = f"model.edit_modules=[{','.join(EARLY_MODULES)}]"
MEMIT_RUN = ("editor=memit", EARLY, "editor.mom2_update_weight=0.5", "editor.v_lr=0.5", *QUICK)
RUNS = {
    "memit": MEMIT_RUN,
    "alphaedit": (
        "editor=alphaedit",
        EARLY,
        *QUICK[:3],
        "editor.nullspace_threshold=0.05",
        "editor.L2=0.01",
        *QUICK[4:],
    ),
    "rome": ("editor=rome", f"model.edit_modules=[{MODULES[0]}]", *QUICK),
}  # fmt: skip


def said(run: Run) -> str:
    return (run.folder / "main.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_writes_facts_goes_on_after_a_stop_and_leaves_the_house(run: Commands, name: str) -> None:
    whole = run(*RUNS[name], run="whole")
    lines = whole.lines("turns.jsonl")
    assert whole.phases() == "e" * 4  # no warm-up
    assert all(line["seconds"].keys() == {"targets", "keys", "solve", "apply", "total"} for line in lines)
    assert all(0 < line["targets"]["steps"] <= 3 for line in lines)
    assert all(change["drift"] > 0 for line in lines for change in line["modules"].values())

    resumed = run.broken_off_and_resumed(*RUNS[name], turn=3, at=(TurnDiagnostics, "line"))
    assert resumed.turns() == whole.turns()
    assert resumed.scores() == whole.scores()

    export([str(whole.folder), "--to", str(run.folder / "model")])
    saved = load_file(run.folder / "model" / "model.safetensors")
    assert not torch.equal(saved[f"{MODULES[0]}.weight"], tiny_llama().get_submodule(MODULES[0]).weight)


def test_alphaedit_remembers_its_keys_and_memit_as_published_does_not(run: Commands) -> None:
    kept = run(*RUNS["alphaedit"], run="alphaedit").lines("turns.jsonl")[-1]["statistics"][MODULES[0]]
    assert kept["kept_keys"] == 12
    assert 0 < kept["null_space"] < 40
    published, sequential = (
        run(*MEMIT_RUN, f"editor.keep_keys={keep}", run=keep).lines("turns.jsonl")[-1]["statistics"][MODULES[0]]
        for keep in ("false", "true")
    )
    assert (published["kept_keys"], sequential["kept_keys"]) == (0, 12)


def test_a_null_space_is_found_once(run: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """What took long is read by the next run, with the same bits; another threshold or a damaged file needs it anew."""
    monkeypatch.setattr(moments, "WORTH_KEEPING", 1e9)
    first = run(*RUNS["alphaedit"], run="first")
    assert not kept_null_spaces()
    monkeypatch.setattr(moments, "WORTH_KEEPING", 0.0)
    run(*RUNS["alphaedit"], run="second")
    assert len(kept_null_spaces()) == len(EARLY_MODULES)
    found = located.null_space
    monkeypatch.setattr(alphaedit, "null_space", lambda *_: pytest.fail("it is found again"))
    third = run(*RUNS["alphaedit"], run="third")
    assert third.turns() == first.turns()
    assert third.scores() == first.scores()

    asked: list[str] = []
    monkeypatch.setattr(alphaedit, "null_space", lambda *given: (asked.append(given[0]), found(*given))[1])
    kept_null_spaces()[0].write_bytes(b"damaged")
    assert run(*RUNS["alphaedit"], run="fourth").turns() == first.turns()
    assert len(asked) == 1
    run(*RUNS["alphaedit"], "editor.nullspace_threshold=0.04", run="fifth")
    assert len(asked) == 1 + len(EARLY_MODULES)


def kept_null_spaces() -> list[Path]:
    files = sorted((places.CACHE / "moments").glob("*.safetensors"))
    return [file for file in files if file.read_bytes() == b"damaged" or "basis" in load_file(file)]


def test_facts_are_written_from_python_with_their_subjects(run: Commands) -> None:
    from harness.ask import edit

    facts = [{"prompt": f"the number of box {i} is", "answer": str(i), "subject": f"box {i}"} for i in range(2)]
    settings = ["model.lr=1", *MEMIT_RUN[1:7], "corpus.tokens=500"]
    edited = edit(str(run.model), facts, editor="memit", settings=settings)
    assert edited is not None
    with pytest.raises(ValueError, match=r"row 0: has no subject; set editor.fact_token=last"):
        edit(str(run.model), [{"prompt": "a", "answer": "b"}], editor="memit", settings=settings)


# ---------------------------------------------------------------------------------------------------------------------
# Second moments


def language_model(**options: Any) -> LanguageModel:
    model = tiny_llama(dtype=torch.float64)
    return LanguageModel(model, None, {name: model.get_submodule(name) for name in MODULES}, **options)


def windows(count: int = 80) -> list[Any]:
    from data.records import TokenSequence

    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 30, (count,), generator=draw).tolist()
    return [TokenSequence((*torch.randint(0, 256, (n,), generator=draw).tolist(), 0), n) for n in lengths]


def test_second_moments_are_the_mean_of_k_k_over_all_tokens(tmp_path: Path) -> None:
    model = language_model(compute_tokens=50)
    sums = MomentSums(model, MODULES, tmp_path / "part")
    sums.add_up(windows(), None)
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in MODULES}
    for name in MODULES:
        model.edited[name].module.register_forward_hook(lambda _m, args, _o, name=name: inputs[name].append(args[0][0]))
    with torch.no_grad():
        for window in windows():
            model.model(input_ids=torch.tensor([window.ids[:-1]]))
    for name in MODULES:
        keys = torch.cat(inputs[name])
        assert sums.tokens == len(keys)
        torch.testing.assert_close(sums.moments(name), (keys.T @ keys / len(keys)).float())


def test_a_model_that_is_refused_is_refused_before_its_text_is_read(
    run: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("the text was read")

    monkeypatch.setattr("harness.job.build.second_moments", never)
    monkeypatch.setattr(LanguageModel, "adds_to_stream", lambda *_: False)
    assert "norms what model.layers.1.mlp.down_proj puts out" in run.refused(*MEMIT_RUN)


def test_text_is_read_in_windows_that_the_model_can_read(run: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another window is then the same, for the cache too."""
    taken: list[int] = []
    whole = TextFiles.windows

    def count(self: TextFiles, tokenizer: Any, window: int, tokens: int) -> Any:
        taken.append(window)
        return whole(self, tokenizer, window, tokens)

    monkeypatch.setattr(TextFiles, "windows", count)
    for name, window in (("long", 100_000), ("longer", 200_000)):
        run(*MEMIT_RUN, f"corpus.window={window}", run=name)
    assert len(taken) == 1
    assert taken[0] < 100_000


def test_the_first_process_of_each_machine_writes_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [Ranks(rank, 4).writes_cache for rank in range(4)] == [True, False, False, False]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert [Ranks(rank, 4).writes_cache for rank in range(4)] == [True, False, True, False]


def test_a_stop_costs_nothing_and_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model()
    whole = MomentSums(model, MODULES, tmp_path / "whole")
    whole.add_up(windows(), None)

    def until_stopped() -> Iterator[Any]:
        yield from windows()[:64]
        raise KeyboardInterrupt

    broken = MomentSums(model, MODULES, tmp_path / "part")
    with pytest.raises(KeyboardInterrupt):
        broken.add_up(until_stopped(), None)
    resumed = MomentSums(model, MODULES, tmp_path / "part")
    assert resumed.windows == 64
    added: list[int] = []
    monkeypatch.setattr(resumed, "_add", lambda some, add=resumed._add: added.append(len(some)) or add(some))
    resumed.add_up(windows(), None)
    assert added == [16]
    assert resumed.tokens == whole.tokens
    for name in MODULES:
        assert torch.equal(resumed.sums[name], whole.sums[name])


def test_they_are_made_once(run: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(*MEMIT_RUN, run="first")
    files = sorted((run.folder / "cache" / "moments").iterdir())
    assert len(files) == 2
    assert all(load_file(file)["moments"].shape == (40, 40) for file in files)
    with monkeypatch.context() as patch:
        patch.setattr(MomentSums, "add_up", None)
        again = run(*MEMIT_RUN, run="again")
    assert again.turns() == first.turns()
    files[0].write_bytes(files[0].read_bytes()[:100])
    mended = run(*MEMIT_RUN, run="mended")
    assert f"{files[0]}: damaged" in said(mended)
    assert mended.turns() == first.turns()


def test_only_those_of_a_missing_module_are_made(run: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(*MEMIT_RUN, run="first")
    files = sorted((run.folder / "cache" / "moments").iterdir())
    was = files[0].read_bytes()
    files[0].unlink()
    made: list[list[str]] = []
    init = MomentSums.__init__

    def noted(self: MomentSums, model: LanguageModel, names: Any, *more: Any, **options: Any) -> None:
        made.append(list(names))
        init(self, model, names, *more, **options)

    monkeypatch.setattr(MomentSums, "__init__", noted)
    assert run(*MEMIT_RUN, run="again").turns() == first.turns()
    assert [len(names) for names in made] == [1]
    assert files[0].read_bytes() == was


def test_another_model_has_moments_of_its_own(run: Commands, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    """Also where modules and their sizes are the same."""
    run(*MEMIT_RUN, run="first")
    run.model = save_tiny_model(run.folder / "other", byte_tokenizer, seed=1)
    run(*MEMIT_RUN, run="second")
    files = list((run.folder / "cache" / "moments").iterdir())
    assert len(files) == 4
    assert len({file.read_bytes() for file in files}) == 4


def test_moments_that_are_not_finite_are_never_kept(run: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    def overflow(*_: Any) -> Iterator[dict[str, torch.Tensor]]:
        keys = torch.ones((3, 40))
        yield {EARLY_MODULES[0]: keys, EARLY_MODULES[1]: 1e25 * keys}

    folder = run.folder / "cache" / "moments"
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "token_keys", overflow)
        message = run.refused(*MEMIT_RUN)
        assert f"the second moments of the keys of {EARLY_MODULES[1]} are not finite" in message
        assert not folder.exists()
    first = run(*MEMIT_RUN, run="first")
    file = min(folder.iterdir())
    save_file({"moments": load_file(file)["moments"] * float("nan")}, file, {"tokens": "3000"})
    mended = run(*MEMIT_RUN, run="mended")
    assert f"{file}: holds numbers that are not finite; it is made again" in said(mended)
    assert mended.turns() == first.turns()


def test_sums_that_are_not_finite_are_no_place_to_go_on_from(tmp_path: Path) -> None:
    sums = MomentSums(language_model(), MODULES, tmp_path / "part")

    def until_stopped() -> Iterator[Any]:
        yield from windows()[:64]
        sums.sums[MODULES[0]][0, 0] = float("nan")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # a signal stays one
        sums.add_up(until_stopped(), None)
    assert not (tmp_path / "part").exists()


def test_a_null_space_that_one_process_lacks_is_found_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "WORTH_KEEPING", 0.0)
    monkeypatch.setattr(places, "CACHE", tmp_path)
    asked: list[int] = []

    def make(_: Any) -> dict[str, torch.Tensor]:
        asked.append(1)
        return {"basis": torch.eye(2)}

    for all_have_it, made in ((False, 1), (True, 1), (False, 2)):
        kept = KeptOfMoments(torch.device("cpu"), True, lambda _, answer=all_have_it: answer)  # type: ignore[misc]
        assert torch.equal(kept("some", torch.ones(2, 2), make)["basis"], torch.eye(2))
        assert len(asked) == made


REMEDY = "bring more text, `python -m data.prepare corpus` says how"


def test_the_shipped_text_is_warned_of_however_long(run: Commands) -> None:
    found = said(run(*MEMIT_RUN, run="shipped"))
    shipped = "this is the shipped text, enough for a trial; 100,000 documents were published"
    line = f"corpus.path=null: second moments over 3,000 tokens, for keys of size 40; {shipped}: {REMEDY}"
    assert found.count(line) == 1
    few = said(run(*MEMIT_RUN, "corpus.tokens=79", run="few"))
    assert f"{shipped}, and fewer than twice as many (80) leave directions that they say nothing of: {REMEDY}" in few
    idle = {"no text": ("editor=stableedit", "corpus.tokens=9"), "questions": (*MEMIT_RUN, "corpus.questions=1")}
    for name, settings in idle.items():
        assert "the shipped text" not in said(run(*settings, "num_seq=1", run=name))


def test_little_text_is_warned_of_with_numbers(run: Commands) -> None:
    """Each for itself: questions do not make up for text."""
    (run.folder / "text.txt").write_text("the quick brown fox jumps over it")
    found = said(run(*MEMIT_RUN, "corpus.path=text.txt", "corpus.questions=0.5"))
    few = "fewer than twice as many (80) leave directions that they say nothing of"
    assert f"corpus.path=text.txt: second moments over 33 tokens, for keys of size 40; {few}: {REMEDY}" in found
    assert "corpus.questions: second moments" not in found
    assert "the shipped text" not in found


QUESTIONS = ("dataset.prompt_form=qa", "dataset.answer_end=eos", "corpus.tokens=1000", "corpus.window=64")


def test_training_questions_have_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    text, asked = torch.full((2, 2), 1.0), torch.full((2, 2), 5.0)
    read, put = (SimpleNamespace(name=name, is_shipped=False) for name in ("text", "asked"))
    found = {"text": ({"a": text}, 100), "asked": ({"a": asked}, 7)}
    monkeypatch.setattr(moments, "_moments_over", lambda corpus, *_: found[corpus.name])
    cfg: Any = SimpleNamespace(corpus=SimpleNamespace(questions=0.25))
    plan: Any = SimpleNamespace(corpora={"corpus": read, "questions": put})
    model: Any = SimpleNamespace(shapes={"a": (2, 2)})
    assert torch.equal(moments.second_moments(cfg, plan, model, "")["a"], torch.full((2, 2), 2.0))


def test_training_questions_are_read_as_facts_are_put(run: Commands) -> None:
    """Alone they are a text of theirs; beside such a text they change nothing; no fact to edit is among them."""
    rows = json.loads((run.folder / "train.json").read_text())
    lines = [
        json.dumps({"text": f"Q: {question}\nA: {answer}"})
        for row in rows
        for question, answer in (
            (row["src"], row["ans"]),
            (row["rephrase"], row["ans"]),
            (f"{row['loc']}?", row["loc_ans"]),
        )
    ]
    (run.folder / "text.jsonl").write_text("\n".join(lines))
    settings = (*MEMIT_RUN, *QUESTIONS)
    read = run(*settings, "corpus.path=text.jsonl", run="read")
    assert "corpus.questions=0: second moments say nothing of the form" in said(read)
    alone = run(*settings, "corpus.path=nowhere.txt", "corpus.questions=1", run="alone")
    assert "say nothing of the form" not in said(alone)
    assert alone.turns() == read.turns()
    both = run(*settings, "corpus.path=text.jsonl", "corpus.questions=0.25", run="both")
    assert both.turns() == read.turns()
    mixed = run(*settings, "corpus.questions=0.25", run="mixed")
    assert mixed.turns() != read.turns()
    assert {"corpus", "questions", "train"} <= mixed.json("run.json")["inputs"].keys()


def test_without_a_training_file_the_shipped_questions_are_read(run: Commands) -> None:
    own = ("dataset=jsonl", "dataset.fields.prompt=src", "dataset.fields.answer=ans", "dataset.fields.subject=subject")
    found = run(*MEMIT_RUN, *QUESTIONS, *own, "dataset.train_path=null", "corpus.questions=1", "num_seq=1")
    assert "train" not in found.json("run.json")["inputs"]
    assert "corpus.questions=1.5: must lie in [0, 1]" in run.refused(*MEMIT_RUN, "corpus.questions=1.5")


# ---------------------------------------------------------------------------------------------------------------------
# Contexts


def contexts(**editor: Any) -> Contexts:
    register()
    most = editor.pop("most", None)
    prefixes = editor.pop("prefixes", ["Once. ", "In a far away land it rained. "])
    form = editor.pop("form", PromptForm())
    overrides = [f"editor.{key}={value}" for key, value in editor.items()]
    cfg = to_run_config(compose_config(["editor=memit", *overrides]))
    return Contexts(cfg, byte_level(), form, prefixes, most)


def fact(prompt: str, subject: str | None, answer: str = "Rome") -> Turn:
    return Turn(0, Phase.EDIT, (EditRecord(0, Question(prompt, answer), subject=subject),), (), (1.0,))


def text(ids: Any) -> str:
    return byte_level().decode(list(ids), skip_special_tokens=True)


@pytest.mark.parametrize("form", [PromptForm(), PromptForm("Q: ", "\nA:")])
def test_contexts_of_a_fact(form: PromptForm) -> None:
    [found] = contexts(form=form)(fact("the capital of Italy is", "Italy"))
    assert len(found.sequences) == 3
    asked = [Question("the capital of Italy is", "Rome")]
    assert [found.sequences[0]] == tokenize(asked, byte_level(), "joint", form, as_target=True)
    for prefix, sequence, at in zip(("", "Once. ", "In a far away land it rained. "), found.sequences, found.positions,
                                    strict=True):  # fmt: skip
        assert text(sequence.ids) == f"{form.before}{prefix}the capital of Italy is{form.after} Rome"
        assert text(sequence.ids[: at + 1]).endswith("of Italy")
    assert found.kl_prompt is not None
    assert text(found.kl_prompt.ids[:-1]) == "Italy is a"
    assert found.kl_prompt.answer_start == len(found.kl_prompt.ids) - 1
    assert text(found.kl_prompt.ids[: found.kl_position + 1]) == "Italy"


def test_an_answer_has_its_space_and_its_end_as_in_the_turns_of_edits() -> None:
    form = PromptForm("Q: ", "\nA:", end=1)
    turn = fact("the number of Italy is", "Italy", "39")
    [found] = contexts(form=form)(turn)
    [taught] = tokenize([turn.records[0].edit], byte_level(), "joint", form, as_target=True)
    assert found.sequences[0] == taught
    assert text(taught.ids[taught.answer_start :]) == " 39"
    assert taught.ids[-1] == 1
    for sequence in found.sequences:
        assert sequence.ids[sequence.answer_start :] == taught.ids[taught.answer_start :]


def test_prefixes_are_what_the_model_writes_after_its_first_words(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = save_tiny_model(tmp_path / "model", byte_tokenizer)
    model = harness(tiny_llama, EARLY_MODULES)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    found = write_prefixes(model, byte_tokenizer, 3, 7)
    assert len(found) == 3
    for word, prefix in zip(FIRST_WORDS, found, strict=False):
        ids = byte_tokenizer(word, return_tensors="pt")["input_ids"]
        written = plain.generate(ids, max_new_tokens=7, do_sample=False)[0]
        assert prefix == " ".join(byte_tokenizer.decode(written, skip_special_tokens=True).split()) + ". "


def test_the_last_token_of_the_prompt() -> None:
    [found] = contexts(fact_token="last")(fact("the capital of Italy is", None))
    assert all(text(s.ids[: at + 1]).endswith("is") for s, at in zip(found.sequences, found.positions, strict=True))
    assert found.kl_prompt is None
    [found] = contexts(fact_token="last")(fact("the capital of Italy is", "Italy"))
    assert found.kl_prompt is not None
    assert text(found.kl_prompt.ids[: found.kl_position + 1]) == "Italy is a"


def test_a_context_too_long_for_the_model_is_left_out() -> None:
    [found] = contexts(most=40)(fact("the capital of Italy is", "Italy"))
    assert [len(sequence.ids) <= 40 for sequence in found.sequences] == [True, True]
    [alone] = contexts(most=3)(fact("the capital of Italy is", "Italy"))
    assert len(alone.sequences) == 1


def test_there_is_a_first_word_for_each_prefix() -> None:
    assert len(set(FIRST_WORDS)) == len(FIRST_WORDS) == LocateConfig.MOST_PREFIXES


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes, before a weight is read


@pytest.fixture
def nothing_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import main

    def never(*_: Any) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(main.job, "load_model", never)


MISTAKES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "modules": (("editor=rome",), ("model.edit_modules: 2 modules, and editor=rome edits one", "name it")),
    "no hidden state": (
        ("editor=memit", "model.edit_modules=[model.layers.2.mlp.up_proj]"),
        ("'model.layers.2.mlp.up_proj' puts out 40 numbers", "have 24", "down_proj or its kin"),
    ),
    "last layer": (
        ("editor=memit", "editor.fact_token=subject_last"),
        (f"model.edit_modules: '{MODULES[1]}' lies in the last of 4 layers", "name modules of earlier ones"),
    ),
    "no corpus": (("editor=memit", EARLY, "corpus.path=nowhere.txt"), ("corpus.path=nowhere.txt: no such file",)),
    "empty corpus": (("editor=memit", EARLY, "corpus.path=empty.txt"), ("corpus.path=empty.txt: holds no text",)),
    "broken corpus": (
        ("editor=memit", EARLY, "corpus.path=broken.jsonl"),
        ("broken.jsonl, line 2: not an object",),
    ),
    "other rows": (
        ("editor=memit", EARLY, "corpus.path=rows.jsonl"),
        ("line 1: no text in a field 'text'",),
    ),
    "bytes": (("editor=memit", EARLY, "corpus.path=bytes.txt"), ("corpus.path=bytes.txt: no UTF-8",)),
    "ranges": (
        ("editor=memit", "editor.prefixes=21", "editor.v_lr=0", "corpus.tokens=0", "editor.v_num_grad_steps=0"),
        (
            "editor.prefixes=21",
            "20",
            "editor.v_lr=0",
            "corpus.tokens=0: must be 1 or more",
            "editor.v_num_grad_steps=0",
        ),
    ),
    "alphaedit": (
        ("editor=alphaedit", "editor.L2=0", "editor.nullspace_threshold=-1"),
        ("editor.L2=0", "editor.nullspace_threshold=-1"),
    ),
}


@pytest.mark.usefixtures("nothing_read")
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_in_a_line(run: Commands, name: str) -> None:
    (run.folder / "empty.txt").write_text(" \n")
    (run.folder / "broken.jsonl").write_text('{"text": ""}\n{"text": \n')
    (run.folder / "rows.jsonl").write_text('{"body": "a"}\n')
    (run.folder / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    overrides, said = MISTAKES[name]
    message = run.refused(*overrides)
    assert all(part in message for part in said), message


@pytest.mark.usefixtures("nothing_read")
def test_facts_without_subjects(run: Commands) -> None:
    rows = [zsre_row(i) for i in range(12)]
    path = run.write("eval", [*rows[:4], {key: value for key, value in rows[4].items() if key != "subject"}, *rows[5:]])
    message = run.refused("editor=memit", EARLY)
    assert f"editor.fact_token=subject_last: file {path}, row 4: has no subject; set editor.fact_token=last" in message
    run.write("eval", [*rows[:7], {**rows[7], "subject": "cup 7"}, *rows[8:]])
    assert "row 7: its prompt lacks the subject 'cup 7'" in run.refused("editor=memit", EARLY)
    with pytest.raises(AssertionError, match="weights were read"):  # nothing else is wrong with them
        run("editor=memit", "editor.fact_token=last")


def test_settings_without_effect_are_told() -> None:
    register()

    def told(*overrides: str) -> str:
        return " ".join(settings_without_effect(to_run_config(compose_config(overrides))))

    assert "effect" not in told("editor=memit") + told("editor=rome") + told("editor=alphaedit", "corpus.tokens=9")
    assert "effect" not in told("editor=memit", "editor.prefixes=0") + told(
        "editor=rome", "editor.prefixes=2", "editor.prefix_tokens=3"
    )
    idle = told("editor=rome", "editor.prefixes=0", "editor.prefix_tokens=3")
    assert "editor.prefix_tokens=3 has no effect with editor.prefixes=0" in idle
    assert "editor.lr=3.0 has no effect with editor=memit" in told("editor=memit", "editor.lr=3")
    assert "editor.token=all has no effect with editor=rome" in told("editor=rome", "editor.token=all")
    assert "corpus.* has no effect with editor=stableedit" in told("editor=stableedit", "corpus.tokens=7")
