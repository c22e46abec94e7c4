"""A checkpoint is read as it was written or not at all, whatever happens to the process, the disk or the bytes."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from harness.run import checkpoint
from harness.run.checkpoint import DTYPES, FORMAT, Checkpoints, DamagedError, read, write_safetensors


def tensors(seed: int = 0) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(5, 3, generator=generator)
    return {
        "model": {"a.weight": rows.to(torch.bfloat16), "b.weight": rows.T},
        "editor": {"count": torch.tensor(7.0, dtype=torch.float64), "none/yet": torch.empty(0, 4)},
    }


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", "turn", keep=2)


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def same(one: dict[str, dict[str, Tensor]], other: dict[str, dict[str, Tensor]]) -> bool:
    flat = [{(g, n): t for g, own in groups.items() for n, t in own.items()} for groups in (one, other)]
    return flat[0].keys() == flat[1].keys() and all(
        t.dtype == flat[1][key].dtype and t.shape == flat[1][key].shape and torch.equal(t, flat[1][key])
        for key, t in flat[0].items()
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is written


def test_what_is_saved_comes_back(checkpoints: Checkpoints) -> None:
    state = {"seconds": 0.1 + 0.2, "deep": {"list": [1, None, "ü"]}}
    checkpoints.save(4, tensors(), state)
    found = Checkpoints(checkpoints.folder, "turn", 2).newest()
    assert found is not None
    assert (found.place, found.state) == (4, state)
    assert same(found.tensors(), tensors())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_format_is_what_safetensors_reads(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = torch.arange(-6, 6).reshape(3, 4).to(dtype)
    written = {"w": whole, "odd": whole[0, :3], "a": torch.tensor(True)}
    write_safetensors(tmp_path / "file", written)
    loaded = load_file(tmp_path / "file")
    assert same({"": loaded}, {"": written})
    assert loaded["w"].data_ptr() % dtype.itemsize == 0


def test_tensors_that_are_read_are_aligned_like_new_ones(checkpoints: Checkpoints) -> None:
    """The last bits of a matrix product hang on it."""
    checkpoints.save(1, {"m": {str(n): torch.ones(n) for n in range(1, 40)}}, {})
    found = checkpoints.newest()
    assert found is not None
    assert all(tensor.data_ptr() % 64 == 0 for tensor in found.tensors()["m"].values())


def test_the_last_stay_and_the_order_is_that_of_numbers(checkpoints: Checkpoints) -> None:
    for place in (8, 9, 10, 11):
        checkpoints.save(place, tensors(place), {})
        found = checkpoints.newest()
        assert found is not None
        assert found.place == place
    assert names(checkpoints) == ["turn_10", "turn_11"]


def test_kinds_do_not_see_each_other(checkpoints: Checkpoints) -> None:
    other = Checkpoints(checkpoints.folder, "meta", keep=1)
    for place in (1, 2, 3):
        other.save(place, tensors(), {})
        checkpoints.save(place, tensors(), {})
    assert names(checkpoints) == ["meta_3", "turn_2", "turn_3"]


def test_nothing_is_nothing(checkpoints: Checkpoints) -> None:
    assert checkpoints.newest() is None
    assert not checkpoints.folder.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def test_cut_anywhere_or_with_a_byte_flipped_anywhere_it_is_not_loaded(checkpoints: Checkpoints) -> None:
    checkpoints.save(3, tensors(), {"done": 3, "seconds": 1.5})
    path = checkpoints.folder / "turn_3"
    state = read(path).state
    for name in (checkpoint.TENSORS, checkpoint.STATE):
        file = path / name
        whole = file.read_bytes()
        for place in range(len(whole)):
            file.write_bytes(whole[:place])
            with pytest.raises(DamagedError, match=name):
                read(path)
        for place in range(len(whole)):
            for flip in (0x01, 0x80):
                file.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
                with pytest.raises(DamagedError, match=name):
                    read(path)
        file.write_bytes(whole)
    assert read(path).state == state


@pytest.mark.parametrize("missing", [checkpoint.TENSORS, checkpoint.STATE])
def test_a_damaged_one_is_passed_over_and_written_anew(
    checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture, missing: str
) -> None:
    for place in (2, 4):
        checkpoints.save(place, tensors(place), {})
    (checkpoints.folder / "turn_4" / missing).unlink()
    again = Checkpoints(checkpoints.folder, "turn", 2)
    found = again.newest()
    assert found is not None
    assert found.place == 2
    (warning,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert "turn_4" in warning.message
    assert "damaged" in warning.message
    again.save(3, tensors(3), {})
    assert names(checkpoints) == ["turn_2", "turn_3"], "what stood after turn 2 is not to be found again"


def test_one_that_was_passed_over_is_replaced(checkpoints: Checkpoints) -> None:
    checkpoints.save(2, tensors(2), {})
    checkpoints.save(4, tensors(4), {})
    (checkpoints.folder / "turn_4" / checkpoint.TENSORS).write_bytes(b"")
    again = Checkpoints(checkpoints.folder, "turn", 2)
    again.newest()
    again.save(4, tensors(5), {})
    found = Checkpoints(checkpoints.folder, "turn", 2).newest()
    assert found is not None
    assert same(found.tensors(), tensors(5))
    assert names(checkpoints) == ["turn_2", "turn_4"]


def test_a_newer_format_is_refused(checkpoints: Checkpoints) -> None:
    checkpoints.save(2, tensors(), {})
    checkpoints.save(3, tensors(), {})
    file = checkpoints.folder / "turn_3" / checkpoint.STATE
    about = json.loads(file.read_text())
    about |= {"format": FORMAT + 1, "new": "words"}
    del about["sha256"]
    checkpoint._write_state(file, about)
    with pytest.raises(ValueError, match=f"turn_3: a checkpoint of format {FORMAT + 1}, which a newer") as caught:
        checkpoints.newest()
    assert not isinstance(caught.value, DamagedError)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Killed, and out of space


class KilledError(BaseException):
    """What a process meets that is killed: nothing of it is run after."""


STEPS: list[tuple[Any, str]] = [(os, "fsync"), (Path, "rename"), (Path, "mkdir"), (shutil, "rmtree"), (Path, "open")]


def killing(monkeypatch: pytest.MonkeyPatch, at: int) -> Callable[[], int]:
    """Die before step `at` of what reaches the disk; gives how many steps there were."""
    count = 0
    for owner, name in STEPS:
        original = getattr(owner, name)

        def step(*args: Any, original: Callable[..., Any] = original, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count > at:
                raise KilledError
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, step)
    return lambda: count


def test_killed_at_any_step_one_whole_checkpoint_is_found(tmp_path: Path) -> None:
    """With keep=1, so that the old one goes as soon as it may."""
    for at in range(100):
        folder = tmp_path / str(at)
        checkpoints = Checkpoints(folder, "turn", keep=1)
        checkpoints.save(1, tensors(1), {})
        with pytest.MonkeyPatch.context() as patch:
            steps = killing(patch, at)
            with contextlib.suppress(KilledError):
                checkpoints.save(2, tensors(2), {})
            survived = steps() <= at
        again = Checkpoints(folder, "turn", keep=1)
        found = again.newest()
        assert found is not None
        assert same(found.tensors(), tensors(found.place))
        again.save(3, tensors(3), {})
        assert names(again) == ["turn_3"], "nothing of the killed process is left"
        if survived:
            assert at > 8, "the steps were not seen"
            return
    pytest.fail("never came to its end")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("earlier", [True, False])
def test_a_disk_that_refuses_leaves_the_one_before_whole_and_says_so(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, number: int, earlier: bool
) -> None:
    if earlier:
        checkpoints.save(50, tensors(50), {})

    def full(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ValueError, match=os.strerror(number)) as caught:
            checkpoints.save(100, tensors(100), {})
    message = str(caught.value)
    assert "\n" not in message
    assert "turn_100" in message
    assert ("that of turn 50 is whole" if earlier else "there is none before it") in message
    assert f"resume={checkpoints.folder.parent}" in message
    assert names(checkpoints) == (["turn_50"] if earlier else [])
    found = checkpoints.newest()
    assert (found is not None) == earlier
    checkpoints.save(100, tensors(100), {})
    assert names(checkpoints)[0] == "turn_100"
