"""Edited models leave the house whole or as a delta, bit for bit, and nothing is written over."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from data.records import LowRankUpdate
from editor.registry import EDITORS
from harness.export import command as export
from harness.export import delta as deltas
from harness.export.delta import Difference, Origin, added, difference, read_delta, removed, write_delta
from harness.run.checkpoint import TENSORS, DamagedError
from model import EditModule
from tests.commands import MODULES, Commands, save_tiny_model, short_run
from tests.conftest import tiny_gpt2, tiny_llama

LOOP = ("num_seq=4", "num_seq_zsre=2", "checkpoint_every=2", "keep=2")


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and one[name].shape == other[name].shape and bits(one[name]) == bits(t)
        for name, t in other.items()
    )


# ---------------------------------------------------------------------------------------------------------------------
# Differences


def of_bits(numbers: Any, dtype: torch.dtype) -> Tensor:
    """Finite weights from any bits: ones in the exponent alone would be infinity or no number."""
    weight = torch.from_numpy(numbers).view(dtype).clone()
    return torch.where(torch.isfinite(weight), weight, torch.zeros_like(weight))


def weights(dtype: torch.dtype) -> st.SearchStrategy[Tensor]:
    kind = {2: "int16", 4: "int32"}[dtype.itemsize]
    return arrays(kind, (3, 5)).map(lambda numbers: of_bits(numbers, dtype))


def there_and_back(original: Tensor, master: Tensor) -> Difference:
    edit = difference(original, master)
    weight = master.to(original.dtype)
    assert bits(added(original, edit)) == bits(master)
    assert bits(removed(weight, edit)) == bits(original), "from the model's weight"
    assert bits(removed(master, edit)) == bits(original), "from the stored master"
    return edit


@pytest.mark.parametrize(
    ("dtype", "precise"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=["float32", "bfloat16 master", "bfloat16 in place"],
)
class TestDifference:
    @given(data=st.data())
    def test_any_two_weights(self, dtype: torch.dtype, precise: torch.dtype, data: st.DataObject) -> None:
        """Any bits: zeros of either sign, subnormal numbers, ratios up to 1e76."""
        there_and_back(data.draw(weights(dtype)), data.draw(weights(precise)))

    def test_hard_pairs(self, dtype: torch.dtype, precise: torch.dtype) -> None:
        tiny, huge = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
        hard = torch.tensor(
            [0.0, -0.0, tiny, -tiny, tiny / 2, tiny / 128, 1, -1, 1 + 2**-7, 1e-30, -1e-30, huge, -huge]
        )
        places = torch.cartesian_prod(torch.arange(len(hard)), torch.arange(len(hard)))
        there_and_back(hard.to(dtype)[places[:, 0]], hard.to(precise)[places[:, 1]])

    def test_edits_of_the_usual_size_leave_few_entries_over(self, dtype: torch.dtype, precise: torch.dtype) -> None:
        """The change of almost every entry is smaller than the entry: adding and taking off are then exact."""
        generator = torch.Generator().manual_seed(0)
        original = torch.randn(200, 300, generator=generator).to(dtype)
        master = (original.to(precise) + 1e-2 * torch.randn(200, 300, generator=generator)).to(precise)
        edit = there_and_back(original, master)
        torch.testing.assert_close(edit.change, master.float() - original.float(), rtol=0, atol=0)
        assert len(edit.added.at) + len(edit.removed.at) < 0.02 * original.numel()


SHAPES = {"Linear": (tiny_llama, "model.layers.1.mlp.up_proj"), "Conv1D": (tiny_gpt2, "transformer.h.1.mlp.c_fc")}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("master", [True, False], ids=["master", "in place"])
def test_a_thousand_edits_are_taken_off_again(kind: str, dtype: torch.dtype, master: bool) -> None:
    """Ten turns of a hundred edits, by the model's own arithmetic, in the module's own layout."""
    make, name = SHAPES[kind]
    edited = EditModule(make(dtype=dtype).requires_grad_(False).get_submodule(name), master)
    before = bits(edited.weight)
    d_k, d_v = edited.shape
    generator = torch.Generator().manual_seed(3)
    for _ in range(10):
        left, right = torch.randn(d_k, 100, generator=generator), torch.randn(100, d_v, generator=generator)
        edited.add(LowRankUpdate(left, 3e-3 * right))
    after = bits(edited.weight)
    assert before != after
    edit = there_and_back(edited.original, edited.master)
    assert edit.change.shape == edited.weight.shape
    edited.restore(removed(edited.master, edit))
    assert bits(edited.weight) == before
    edited.restore(added(edited.original, edit))
    assert bits(edited.weight) == after


# ---------------------------------------------------------------------------------------------------------------------
# The file

ORIGIN = Origin(
    "some/base", None, "AutoModelForCausalLM", "0" * 16, "1" * 16, "ab", 7, {"a": (3, 2)}, "bfloat16", "float32"
)


def a_difference() -> Difference:
    original = torch.tensor([[1, -0.0, 3e-5], [-1, 2, 0]], dtype=torch.bfloat16)
    return difference(original, torch.tensor([[1.001, 0.25, 0.5], [-1, 2.1, -0.0]]))


@pytest.fixture
def delta_file(tmp_path: Path) -> Path:
    path = tmp_path / "delta.safetensors"
    write_delta(path, ORIGIN, {"a": a_difference()})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    return path


def test_a_delta_is_read_as_it_was_written(delta_file: Path) -> None:
    read, written = read_delta(delta_file), a_difference()
    assert read.origin == ORIGIN
    found = read.difference("a")
    assert bits(found.change) == bits(written.change)
    for one, other in ((found.added, written.added), (found.removed, written.removed)):
        assert (one.at.tolist(), bits(one.values)) == (other.at.tolist(), bits(other.values))
    assert len(found.added.at) > 0 < len(found.removed.at)


def test_anyone_can_add_it(delta_file: Path) -> None:
    """Under the names of the model's own weights."""
    assert load_file(delta_file)["a.weight"].tolist() == a_difference().change.tolist()


def test_a_byte_flipped_or_cut_off_anywhere_is_noticed(delta_file: Path) -> None:
    whole = delta_file.read_bytes()
    said = r"delta\.safetensors: (damaged|a safetensors file, but no delta|a delta of)"
    for place in range(len(whole)):
        flipped = bytes([whole[place] ^ 1 << place % 8])
        for content in (whole[:place] + flipped + whole[place + 1 :], whole[:place]):
            delta_file.write_bytes(content)
            with pytest.raises(ValueError, match=said):
                read_delta(delta_file)
    delta_file.write_bytes(whole)
    assert read_delta(delta_file).origin == ORIGIN


def test_a_newer_format_is_refused(delta_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delta_file.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(deltas, "FORMAT", 2)
        write_delta(delta_file, ORIGIN, {"a": a_difference()})
    with pytest.raises(ValueError, match="a delta of format 2, which a newer version") as caught:
        read_delta(delta_file)
    assert not isinstance(caught.value, DamagedError)


# ---------------------------------------------------------------------------------------------------------------------
# Whole commands


def command(*words: object) -> None:
    export.main([str(word) for word in words])


def refused(*words: object) -> str:
    """The message that ends the command."""
    with pytest.raises(SystemExit) as end:
        command(*words)
    message = end.value.code
    assert isinstance(message, str), message
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("make", "modules", "half", "precision"),
    [
        (tiny_llama, MODULES, "fp32", "master"),
        (tiny_llama, MODULES, "bf16", "master"),
        (tiny_llama, MODULES, "bf16", "in_place"),
        (tiny_gpt2, ("transformer.h.2.mlp.c_proj",), "bf16", "master"),  # Conv1D, and a head that is the embedding
    ],
)
def test_whole_delta_apply_and_undo(
    run: Commands,
    byte_tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
    make: Callable[..., Any],
    modules: tuple[str, ...],
    half: str,
    precision: str,
) -> None:
    model, whole, delta = run.folder / "base", run.folder / "whole", run.folder / "delta.safetensors"
    make().save_pretrained(model)
    byte_tokenizer.save_pretrained(model)
    keys = (f"model.name_or_path={model}", f"model.half={half}", f"model.edit_precision={precision}")
    keys = (*keys, f"model.edit_modules=[{','.join(modules)}]")
    done = run(*LOOP, *keys, "model_cache=true")
    capsys.readouterr()
    command(done.folder, "--to", whole)
    assert capsys.readouterr().out == f"{whole}: the edited model, after turn 6 of 6 of the run in {done.folder}\n"
    assert content(whole) == content(done.folder / "model"), "as model_cache=true writes it"
    assert {path.stat().st_mode & 0o777 for path in whole.iterdir()} == {0o644}
    command(done.folder, "--delta", "--to", delta)
    command("--apply", delta, "--to", run.folder / "applied")
    assert content(run.folder / "applied") == content(whole)

    command("--undo", delta, "--from", whole, "--to", run.folder / "undone")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[half]
    base = {name: weight.to(dtype) for name, weight in stored(model).items()}
    assert same(stored(run.folder / "undone"), base)
    changed = {name for name, weight in stored(whole).items() if bits(weight) != bits(base[name])}
    assert changed == {f"{name}.weight" for name in modules}
    read, last = read_delta(delta), load_file(done.folder / "checkpoints" / "turn_6" / TENSORS)
    for name in modules:
        original = removed(last[f"model/{name}"], read.difference(name))
        assert bits(original) == bits(base[f"{name}.weight"]), "through the stored masters"

    assert {"generation_config.json", "config.json", "tokenizer.json"} <= {path.name for path in whole.iterdir()}
    again = transformers.AutoModelForCausalLM.from_pretrained(whole)
    assert same({n: w for n, w in again.state_dict().items() if n in base}, stored(whole))
    scored = run(*keys, f"evaluate={whole}", run="scored").json("results.json")
    assert scored["final"] == done.json("results.json")["final"]


BESIDE_WEIGHTS = ("grace", "wise")


@pytest.mark.parametrize("name", EDITORS)
def test_the_edits_of_every_editor_leave_the_house_or_are_refused(run: Commands, name: str) -> None:
    keys = short_run(name)
    if name in BESIDE_WEIGHTS:
        run.no_model_to_save(*keys)
        return
    done = run(*keys, "checkpoint_every=1").folder
    whole, delta = run.folder / "whole", run.folder / "delta.safetensors"
    command(done, "--to", whole)
    command(done, "--delta", "--to", delta)
    command("--apply", delta, "--to", run.folder / "applied")
    assert content(run.folder / "applied") == content(whole)
    base, edited = stored(run.model), stored(whole)
    assert {key for key in base if bits(base[key]) != bits(edited[key])} == {f"{MODULES[0]}.weight"}
    master = load_file(done / "checkpoints" / find_newest(done) / TENSORS)[f"model/{MODULES[0]}"]
    assert bits(master) == bits(edited[f"{MODULES[0]}.weight"])


def find_newest(run: Path) -> str:
    """The name of the checkpoint of the run's end."""
    return max((path.name for path in (run / "checkpoints").iterdir()), key=lambda name: int(name.split("_")[1]))


def test_what_a_delta_says_of_itself(run: Commands) -> None:
    done = run(*LOOP, "model.half=bf16")
    delta = run.folder / "new folder" / "delta.safetensors"
    command(done.folder, "--delta", "--turn", 4, "--to", delta)
    about = done.json("run.json")
    origin = read_delta(delta).origin
    assert (origin.base, origin.revision, origin.class_name) == (str(run.model), None, "AutoModelForCausalLM")
    assert (origin.run_id, origin.turn) == (about["run_id"], 4)
    assert origin.base_fingerprint == about["model"]["fingerprint"] != origin.edited_fingerprint
    assert origin.modules == dict.fromkeys(MODULES, (40, 24))
    assert (origin.dtype, origin.master_dtype) == ("bfloat16", "float32")


def test_a_checkpoint_on_the_way_and_a_run_that_is_not_finished(
    run: Commands, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    done = run(*LOOP)
    command(done.folder, "--turn", 4, "--to", run.folder / "four")
    assert "after turn 4 of 6" in capsys.readouterr().out
    half = run.folder / "half"
    shutil.copytree(done.folder, half)
    shutil.rmtree(half / "checkpoints" / "turn_6")
    assert refused(half, "--to", run.folder / "six") == (
        f"error: {half}/checkpoints: holds no whole checkpoint of the run's end, turn 6; --turn 4 takes the newest "
        "there is"
    )
    (half / "run.json").write_text(json.dumps({**done.json("run.json"), "status": "interrupted"}))
    assert not caplog.records
    command(half, "--to", run.folder / "newest")
    (warning,) = caplog.messages
    assert warning == f"the run in {half} is not finished (interrupted): this is not its end"
    assert content(run.folder / "newest") == content(run.folder / "four")
    assert not same(stored(run.folder / "newest"), stored(run.model))

    for name in ("turn_4", "turn_6"):
        file = done.folder / "checkpoints" / name / TENSORS
        damaged = bytearray(file.read_bytes())
        damaged[-1] ^= 1
        file.write_bytes(damaged)
        assert "damaged" in refused(done.folder, "--turn", name.removeprefix("turn_"), "--to", run.folder / "none")
    assert refused(done.folder, "--to", run.folder / "none").endswith(
        "every checkpoint in it is damaged; begin the run anew"
    )
    assert not (run.folder / "none").exists()


def test_runs_without_checkpoints(run: Commands, tmp_path: Path) -> None:
    bare = run("num_seq=1", "num_seq_zsre=1", "checkpoint_every=0", run="bare").folder
    assert refused(bare, "--to", tmp_path / "x") == (
        f"error: {bare}: holds no checkpoint of a turn; a run with checkpoint_every=N writes one every N turns, and "
        "one at its end"
    )
    saved = run("num_seq=1", "num_seq_zsre=1", "checkpoint_every=0", "model_cache=true", run="saved").folder
    assert refused(saved, "--to", tmp_path / "x") == (
        f"error: {saved}: holds no checkpoint (checkpoint_every=0); its edited model is whole in {saved}/model"
    )
    scored = run(f"evaluate={saved}/model", "num_seq=1", run="scored").folder
    assert f"{scored}: has edited nothing, it scored evaluate={saved}/model" in refused(scored, "--to", tmp_path / "x")
    assert refused(tmp_path, "--to", tmp_path / "x").endswith("holds no run (no run.json); name the folder of a run")
    assert not (tmp_path / "x").exists()


def test_what_is_refused(run: Commands, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    """One line each, and nothing that stood there is changed."""
    done, folder = run(*LOOP).folder, run.folder
    whole, delta, new = folder / "whole", folder / "delta.safetensors", folder / "new"
    command(done, "--to", whole)
    command(done, "--delta", "--to", delta)
    before = content(folder)
    empty = folder / "empty"
    empty.mkdir()

    # the words
    assert "the following arguments are required: --to" in refused(done)
    assert "name one of RUN, --apply DELTA, --undo DELTA" in refused("--to", new)
    assert "RUN and --apply given: name one of" in refused(done, "--apply", delta, "--to", new)
    assert "--turn has no effect with --apply: leave it out" in refused("--apply", delta, "--turn", 4, "--to", new)
    assert "--delta has no effect with --undo" in refused("--undo", delta, "--from", whole, "--delta", "--to", new)
    assert "--model has no effect with --undo" in refused("--undo", delta, "--from", whole, "--model", "x", "--to", new)
    assert "--from has no effect with RUN" in refused(done, "--from", whole, "--to", new)
    assert "--undo needs --from FOLDER" in refused("--undo", delta, "--to", new)
    assert "argument --turn: invalid int value: 'x'" in refused(done, "--turn", "x", "--to", new)
    assert "no checkpoint of turn 3; those there are: 4, 6" in refused(done, "--turn", 3, "--to", new)

    # the place
    for target in (whole, delta, done):
        assert f"--to {target}: is there already" in refused(done, "--to", target)
    assert f"--to {new}: a delta is one file; give it a name that ends" in refused(done, "--delta", "--to", new)
    as_file = folder / "edits.safetensors"
    assert f"--to {as_file}: a whole model is a folder; add --delta for one file" in refused(done, "--to", as_file)
    assert f"--to {delta}: is there already" in refused(done, "--delta", "--to", delta)
    assert "cannot be written (File exists)" in refused(done, "--to", delta / "below")

    # the model
    assert "--model /gone: no such folder" in refused(done, "--model", "/gone", "--to", new)
    assert "--model /gone: no such folder" in refused("--apply", delta, "--model", "/gone", "--to", new)
    assert "--from /gone: no such folder" in refused("--undo", delta, "--from", "/gone", "--to", new)
    other = save_tiny_model(folder / "other", byte_tokenizer, seed=1)
    large = folder / "large"
    config = transformers.LlamaConfig(**{**tiny_llama().config.to_dict(), "intermediate_size": 44})
    transformers.LlamaForCausalLM(config).save_pretrained(large)
    gpt2 = folder / "gpt2"
    tiny_gpt2().save_pretrained(gpt2)
    before |= {f"{path.relative_to(folder)}": path.read_bytes() for m in (other, large, gpt2) for path in m.iterdir()}
    assert "not the model that the run began with: its weights have the fingerprint" in refused(
        done, "--model", other, "--to", new
    )
    assert f"--model {other}: not the base model of {delta}: its weights" in refused(
        "--apply", delta, "--model", other, "--to", new
    )
    assert f"not the base model of {delta}: its weights" in refused("--apply", delta, "--model", whole, "--to", new)
    assert f"in which {MODULES[0]} is 40 x 24, not 44 x 24" in refused("--apply", delta, "--model", large, "--to", new)
    assert "matches no module" in refused("--apply", delta, "--model", gpt2, "--to", new)
    assert f"--from {run.model}: not the edited model of {delta}: its weights" in refused(
        "--undo", delta, "--from", run.model, "--to", new
    )

    # the delta
    assert "no such file; name a file that `--delta` wrote" in refused("--apply", folder / "gone", "--to", new)
    assert "but no delta" in refused("--apply", whole / "model.safetensors", "--to", new)
    assert "damaged, or no safetensors file" in refused("--apply", whole / "config.json", "--to", new)
    assert content(folder) == before
    assert not new.exists()
    command("--apply", delta, "--to", empty)
    assert content(empty) == content(whole)


def test_a_base_model_that_has_moved(run: Commands, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(run.model, tmp_path / "here")
    done = run(*LOOP, f"model.name_or_path={tmp_path / 'here'}")
    (tmp_path / "here").rename(moved)
    assert f"--model {tmp_path}/here: no such folder" in refused(done.folder, "--to", tmp_path / "whole")
    command(done.folder, "--model", moved, "--to", tmp_path / "whole")
    command(done.folder, "--model", moved, "--delta", "--to", tmp_path / "d.safetensors")
    command("--apply", tmp_path / "d.safetensors", "--model", moved, "--to", tmp_path / "applied")
    assert content(tmp_path / "applied") == content(tmp_path / "whole")


def full(path: Path) -> OSError:
    path.write_bytes(b"half")
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # a write names no file


def full_of_delta(path: Path, *_: Any) -> None:
    raise full(path)


def full_of_model(_: Any, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"half")
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def full_of_config(_: Any, folder: Path) -> None:
    raise full(folder / "config.json")


def full_of_tokenizer(_: Any, folder: Path, **_more: Any) -> None:
    """As the package `tokenizers` does."""
    (folder / "tokenizer.json").write_bytes(b"half")
    raise Exception("No space left on device (os error 28)")


@pytest.mark.parametrize("one", ["whole", "delta.safetensors"])
def test_a_full_disk_leaves_nothing(run: Commands, monkeypatch: pytest.MonkeyPatch, one: str) -> None:
    done = run(*LOOP).folder
    command(done, "--delta", "--to", run.folder / "there.safetensors")
    before = content(run.folder)
    target = run.folder / one
    base, tokenizer = transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase
    writers: list[tuple[Any, str, Any]] = [(deltas, "write_safetensors", full_of_delta)]
    ways: list[list[object]] = [[done, "--delta"]]
    if one == "whole":
        writers = [(base, "save_pretrained", full_of_model), (base, "save_pretrained", full_of_config)]
        writers.append((tokenizer, "save_pretrained", full_of_tokenizer))
        ways = [[done], ["--apply", run.folder / "there.safetensors"]]
    what = "model" if one == "whole" else "delta"
    for writer in writers:
        for way in ways:
            with monkeypatch.context() as patch:
                patch.setattr(*writer)
                message = refused(*way, "--to", target)
            assert message.startswith(f"error: {target}: the {what} could not be written ("), message
            assert "No space left on device" in message
            assert "; make room, or choose another " in message
            assert "\n" not in message
            assert content(run.folder) == before
            assert not list(run.folder.glob(".*"))


def test_what_is_no_fault_of_the_disk_is_not_said_to_be_one(run: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(*LOOP).folder

    def ours(*_: Any) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", ours)
    with pytest.raises(RuntimeError, match="ours"):
        command(done, "--to", run.folder / "whole")
