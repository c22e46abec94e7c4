"""An edited model is asked beside its base model, from whatever a run has left of it."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unicodedata import category

import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

from harness.ask import Answers, open_edited
from harness.ask.command import main
from harness.export.command import main as export
from harness.run.folder import read_run
from model import LanguageModel
from tests.commands import MODULES, Commands, save_tiny_model, zsre_row

LOOP = ("num_seq=3", "num_seq_zsre=1", "checkpoint_every=2", "keep=2")
QUESTIONS = ["What is the number of box 1?", "Who wrote Faust?"]
FEW = 12  # tokens


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerFast) -> Commands:
    folder = tmp_path_factory.mktemp("ask")
    made = Commands(folder, save_tiny_model(folder / "base", byte_tokenizer))
    made.write("eval", [zsre_row(i) for i in range(12)])
    made.write("train", [zsre_row(i) for i in range(50, 59)])
    return made


@pytest.fixture(scope="module")
def done(commands: Commands) -> Path:
    """A run with checkpoints of turn 2 and turn 4, its end; beside it, both as folders, and its end as a delta."""
    folder = commands(*LOOP, run="run").folder
    export([str(folder), "--to", str(commands.folder / "whole")])
    export([str(folder), "--turn", "2", "--to", str(commands.folder / "half way")])
    export([str(folder), "--delta", "--to", str(commands.folder / "delta.safetensors")])
    return folder


def written(folder: Path, questions: Sequence[str] = QUESTIONS) -> list[str]:
    """What transformers generates, one prompt at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = []
    for question in questions:
        ids = torch.tensor([tokenizer(question)["input_ids"]])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=FEW, do_sample=False, pad_token_id=256)
        texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return texts


def expected(base: Path | None, edited: Path, questions: Sequence[str] = QUESTIONS) -> list[Answers]:
    before = [None] * len(questions) if base is None else written(base, questions)
    return [Answers(*texts) for texts in zip(questions, before, written(edited, questions), strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# From Python


def test_every_way_to_name_it_gives_the_words_of_both_models(commands: Commands, done: Path) -> None:
    whole = expected(commands.model, commands.folder / "whole")
    assert all(one.base != one.edited for one in whole)
    asked = [
        open_edited(done, max_new_tokens=FEW),
        open_edited(str(done), turn=4, max_new_tokens=FEW),
        open_edited(done / "checkpoints" / "turn_4", max_new_tokens=FEW),
        open_edited(commands.folder / "delta.safetensors", max_new_tokens=FEW),
        open_edited(commands.folder / "whole", model=str(commands.model), max_new_tokens=FEW),
    ]
    for one in asked:
        assert one.ask(QUESTIONS) == whole, one.about
    assert {one.about for one in asked[:3]} == {f"the edited model, after turn 4 of 4 of the run in {done}"}
    assert asked[3].about == f"the edited model, after turn 4 of run {read_run(done)['run_id']}"


def test_a_turn_on_the_way(commands: Commands, done: Path) -> None:
    half_way = expected(commands.model, commands.folder / "half way")
    assert half_way != expected(commands.model, commands.folder / "whole")
    for one in (
        open_edited(done, turn=2, max_new_tokens=FEW),
        open_edited(done / "checkpoints" / "turn_2", max_new_tokens=FEW),
    ):
        assert one.ask(QUESTIONS) == half_way


def test_an_exported_model_is_asked_alone(commands: Commands, done: Path) -> None:
    opened = open_edited(commands.folder / "whole", max_new_tokens=FEW)
    assert opened.base is None
    assert opened.ask(QUESTIONS) == expected(None, commands.folder / "whole")


def test_an_exported_model_is_read_as_it_was_stored(commands: Commands, tmp_path: Path) -> None:
    folder = commands("num_seq=1", "num_seq_zsre=1", "model.half=bf16", "model_cache=true", run="bf16").folder
    opened = open_edited(folder / "model", model=str(commands.model))
    assert opened.base is not None
    assert opened.model.dtype is opened.base.model.dtype is torch.bfloat16


@pytest.mark.parametrize(("editor", "step"), [("grace", 1.0), ("wise", 10.0)])
def test_a_memory_beside_the_weights_is_asked_with_its_editor(commands: Commands, editor: str, step: float) -> None:
    """The answers of the run's own end, at its end and on the way; export still refuses it."""
    one = f"model.edit_modules=[{MODULES[0]}]"
    short = (f"editor.lr={step}", "editor.num_steps=60", "dataset.prompt_form=qa", "dataset.answer_end=eos")
    run = commands(*LOOP, f"editor={editor}", one, *short, "evaluation.examples=4", run=editor)
    told = json.loads((run.folder / "examples.json").read_text())
    questions = [example["question"] for example in told]
    opened = open_edited(run.folder, max_new_tokens=16)
    assert opened.language_model.is_wrapped
    expected = [(example["base"].strip(), example["edited"].strip()) for example in told]
    assert [(one.base, one.edited) for one in opened.ask(questions)] == expected
    early, late = (open_edited(run.folder, turn=turn, max_new_tokens=FEW).ask(questions) for turn in (2, None))
    assert [one.base for one in early] == [one.base for one in late]
    assert [one.edited for one in early] != [one.edited for one in late]
    assert any(one.base != one.edited for one in late)
    with pytest.raises(SystemExit, match="beside the weights"):
        export([str(run.folder), "--to", str(commands.folder / f"{editor} exported")])


def test_one_model_is_in_memory_and_keeps_its_edits(commands: Commands, done: Path) -> None:
    """Asking puts the base model's weights in its place only for as long as that takes."""
    opened = open_edited(done, max_new_tokens=FEW)
    assert opened.base is opened.language_model
    before = opened.language_model.fingerprint()
    assert opened.ask(QUESTIONS) == opened.ask(QUESTIONS)
    assert opened.language_model.fingerprint() == before
    exported = transformers.AutoModelForCausalLM.from_pretrained(commands.folder / "whole")
    for name in MODULES:
        assert torch.equal(opened.model.get_submodule(name).weight, exported.get_submodule(name).weight)
    assert opened.tokenizer.get_vocab()


def test_no_questions_and_wrong_ones(done: Path) -> None:
    opened = open_edited(done)
    assert opened.ask([]) == []
    with pytest.raises(ValueError, match="question 2 is blank: give it a text"):
        opened.ask(["Who?", " "])
    with pytest.raises(ValueError, match="question 2 is no UTF-8: write it in that encoding"):
        opened.ask(["Who?", b"K\xf6ln?".decode(errors="surrogateescape")])
    with pytest.raises(ValueError, match=r"ask takes a list of questions: ask\(\[question\]\)"):
        opened.ask("Who?")


# ---------------------------------------------------------------------------------------------------------------------
# The form of a question


def test_questions_are_put_as_the_run_puts_them(commands: Commands, done: Path, tmp_path: Path) -> None:
    """`evaluation.prompt` where the run has one, else `dataset.prompt_form`; --prompt has the last word."""
    as_put = expected(commands.model, commands.folder / "whole", [f"Q: {q}\nA:" for q in QUESTIONS])
    answers = [(one.base, one.edited) for one in as_put]
    copy = tmp_path / "run"
    shutil.copytree(done, copy)
    run = read_run(copy)
    assert run["config"]["evaluation"]["prompt"] is None
    assert open_edited(copy).form == run["config"]["dataset"]["prompt_form"] == "raw"
    run["config"]["dataset"]["prompt_form"] = "qa"
    (copy / "run.json").write_text(json.dumps(run))
    for opened in (
        open_edited(copy, max_new_tokens=FEW),
        open_edited(commands.folder / "delta.safetensors", prompt="qa", max_new_tokens=FEW),
    ):
        assert opened.form == "qa"
        asked = opened.ask(QUESTIONS)
        assert [one.question for one in asked] == QUESTIONS
        assert [(one.base, one.edited) for one in asked] == answers
    assert open_edited(copy, prompt="raw").form == "raw"


def test_what_is_exported_knows_how_it_is_asked(commands: Commands, tmp_path: Path) -> None:
    run = commands("dataset.prompt_form=qa", "num_seq=1", "num_seq_zsre=1", "model_cache=true", run="qa").folder
    delta = tmp_path / "edits.safetensors"
    export([str(run), "--to", str(tmp_path / "whole")])
    export([str(run), "--delta", "--to", str(delta)])
    export(["--apply", str(delta), "--to", str(tmp_path / "applied")])
    export(["--undo", str(delta), "--from", str(tmp_path / "whole"), "--to", str(tmp_path / "undone")])
    edited = [run / "model", tmp_path / "whole", delta, tmp_path / "applied"]
    assert [open_edited(path).form for path in edited] == ["qa"] * 4
    assert open_edited(tmp_path / "undone").form == "raw"
    for text in ("{", "[]", '{"form": "qa"}'):
        (tmp_path / "whole" / "edit.json").write_text(text)
        with pytest.raises(ValueError, match=r"whole/edit\.json: does not say a prompt_form; repair it, or take it"):
            open_edited(tmp_path / "whole")
    (tmp_path / "whole" / "edit.json").write_text('{"prompt_form": "verse"}')
    with pytest.raises(ValueError, match="prompt_form='verse' must be one of raw, chat, qa"):
        open_edited(tmp_path / "whole")


def test_a_chat_is_had_in_the_models_template(commands: Commands, tmp_path: Path) -> None:
    model = tmp_path / "chat"
    shutil.copytree(commands.model, model)
    template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(model)
    settings = (f"model.name_or_path={model}", "evaluation.prompt=chat", "num_seq=1", "num_seq_zsre=1")
    opened = open_edited(commands(*settings, run="chat").folder, max_new_tokens=FEW)
    assert opened.form == "chat"
    assert [one.base for one in opened.ask(QUESTIONS)] == written(model, [f"<{q}>!" for q in QUESTIONS])


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def said(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    main([str(word) for word in words])
    return capsys.readouterr().out


def refused(*words: object) -> str:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    message = end.value.code
    assert isinstance(message, str), message
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


def objects(lines: str) -> list[Answers]:
    return [Answers(**json.loads(line)) for line in lines.splitlines()]


def test_json_is_an_object_a_line(commands: Commands, done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, done, *QUESTIONS, "--json", "--max-new-tokens", FEW)
    assert objects(out) == expected(commands.model, commands.folder / "whole")
    out = said(capsys, commands.folder / "whole", *QUESTIONS, "--json", "--max-new-tokens", FEW)
    assert objects(out) == expected(None, commands.folder / "whole")


def test_the_table_has_a_column_a_model(
    commands: Commands, done: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    out = said(capsys, done, *QUESTIONS)
    assert all(heading in out for heading in ("question", "base model", "edited model"))
    assert "the number of" in out
    assert "Faust?" in out
    assert not [c for c in out if category(c) == "Cc" and c != "\n"], "a model may write what a terminal obeys"
    caplog.set_level("INFO")
    out = said(capsys, commands.folder / "whole", *QUESTIONS)
    assert "base model" not in out
    assert "edited model" in out
    assert "the base model is not known here: --model BASE puts its answers beside these" in caplog.messages


def test_options_stand_anywhere_behind_the_run(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = QUESTIONS[:2]
    out = said(capsys, done, "--json", first, "--max-new-tokens", FEW, second)
    assert [one.question for one in objects(out)] == [first, second]


def test_questions_from_a_pipe(
    done: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One a line, without empty ones; one that is too long is said, and the next one answered."""
    lines = [QUESTIONS[0], "long " * 60, "", " ", *QUESTIONS[1:]]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    out = said(capsys, done, "--json", "--max-new-tokens", FEW)
    assert [one.question for one in objects(out)] == QUESTIONS
    assert [r.message for r in caplog.records if r.levelname == "ERROR"] == [
        "prompt 0 has 299 tokens, more than the model's context of 256: shorten it"
    ]
    raw = b"\xef\xbb\xbf" + "\n".join(QUESTIONS).encode() + b"\nK\xf6ln?\n" + QUESTIONS[0].encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))
    out = said(capsys, done, "--json", "--max-new-tokens", FEW)
    assert [one.question for one in objects(out)] == [*QUESTIONS, QUESTIONS[0]]
    assert caplog.messages[-1] == "question 1 is no UTF-8: write it in that encoding"
    monkeypatch.setattr("sys.stdin", io.StringIO(QUESTIONS[0]))
    assert "the number of" in said(capsys, done, "--max-new-tokens", FEW)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_questions_at_a_prompt(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter([QUESTIONS[1]])
    prompts, out = [], Terminal()

    def answer(prompt: str) -> str:
        prompts.append(prompt)
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None  # Ctrl-D

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("builtins.input", answer)
    main([str(done), "--max-new-tokens", str(FEW)])
    assert prompts == ["> ", "> "]
    assert "Faust" in out.getvalue()
    assert out.getvalue().endswith("\n")


# ---------------------------------------------------------------------------------------------------------------------
# What there is not


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LanguageModel, "load", lambda *_, **__: pytest.fail("the model was loaded first"))


@pytest.mark.usefixtures("never_loaded")
def test_what_is_refused_before_weights_are_read(commands: Commands, done: Path, tmp_path: Path) -> None:
    gone, whole, delta = tmp_path / "gone", commands.folder / "whole", commands.folder / "delta.safetensors"
    remedy = "name the folder of a run, of one of its checkpoints, of an exported model, or a delta (*.safetensors)"
    assert refused(gone) == f"error: {gone}: no such folder; {remedy}"
    neither = f"{tmp_path}: holds neither a run (run.json) nor a model (config.json); {remedy}"
    assert refused(tmp_path) == f"error: {neither}"
    assert f"{gone}.safetensors: no such file; name a file that" in refused(f"{gone}.safetensors")
    assert "no checkpoint of turn 3; those there are: 2, 4" in refused(done, "--turn", 3)
    assert "no checkpoint of turn 7; those there are: 2, 4" in refused(done / "checkpoints" / "turn_7")
    half = done / "checkpoints" / "turn_2"
    assert f"--turn 4 has no effect with {half}, which is of one turn" in refused(half, "--turn", 4)
    for path in (whole, delta):
        assert f"{path}: no run, and --turn 2 is one of a run" in refused(path, "--turn", 2)
    assert "--trust-remote-code has no effect with a run" in refused(done, "--trust-remote-code")
    assert "--prompt chat: the model's tokenizer has no chat template; set --prompt raw" in refused(
        done, "--prompt", "chat"
    )
    assert "argument --prompt: invalid choice: 'loud'" in refused(done, "--prompt", "loud")
    assert "--max-new-tokens 0: must be 1 or more" in refused(done, "--max-new-tokens", 0)
    assert "--device cuda:97: this machine has cpu" in refused(done, "--device", "cuda:97")
    assert "a question is blank: give it a text" in refused(done, "Who?", " ")
    assert "--model /gone: no such folder" in refused(done, "--model", "/gone")
    assert "--model /gone: no such folder" in refused(whole, "--model", "/gone")
    with pytest.raises(ValueError, match="--prompt loud: must be one of raw, chat, qa"):
        open_edited(done, prompt="loud")


def test_a_run_that_has_nothing_to_load(commands: Commands, done: Path) -> None:
    short = ("num_seq=1", "num_seq_zsre=1", "checkpoint_every=0")
    bare = commands(*short, run="bare").folder
    assert refused(bare) == (
        f"error: {bare}: holds no checkpoint of a turn; a run with checkpoint_every=N writes one every N turns, and "
        "one at its end"
    )
    scored = commands(f"evaluate={commands.folder / 'whole'}", "num_seq=1", run="scored").folder
    assert f"{scored}: has edited nothing, it scored evaluate={commands.folder / 'whole'}" in refused(scored)


def test_another_base_model(commands: Commands, done: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    other: Any = save_tiny_model(commands.folder / "other", byte_tokenizer, seed=1)
    assert "not the model that the run began with" in refused(done, "Who?", "--model", other)
    delta = commands.folder / "delta.safetensors"
    assert f"not the base model of {delta}" in refused(delta, "Who?", "--model", other)
    strange = commands.folder / "strange"
    shutil.copytree(other, strange)
    tokenizer = transformers.AutoTokenizer.from_pretrained(strange)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(strange)
    whole = commands.folder / "whole"
    assert f"--model {strange}: not the base model of {whole}, its tokenizer is another one" in refused(
        whole, "Who?", "--model", strange
    )
