"""Two million edits: facts that are made, a model that is made, and memory that stays where it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from config.compose import compose_config
from config.schema import HyperNetworkConfig, SyntheticConfig, to_run_config
from data import DATASETS, synthetic
from data.disk import sha256_of
from data.files import RecordFile, open_records
from data.made import made_file
from data.stream import EditStream, most_tokens, questions_of
from editor.registry import EDITORS
from harness.job.networks import plan_network
from model.source import ModelSource, load_tokenizer, locate, outline
from tests.conftest import ROOT

SYNTHETIC = DATASETS["synthetic"]
LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")


def flip(path: Path) -> None:
    """One bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGE = [flip, cut, lambda path: path.write_bytes(b"")]


def opened(folder: Path, count: int, split: str = "eval") -> RecordFile:
    file = made_file(SYNTHETIC, split, count, folder / "made")
    return open_records(file, SYNTHETIC, cache_dir=folder / "arrow", seed=0)


# ---------------------------------------------------------------------------------------------------------------------
# Facts


def test_facts_are_the_same_every_time(tmp_path: Path) -> None:
    one, two = (made_file(SYNTHETIC, "eval", 3000, tmp_path / name) for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert made_file(SYNTHETIC, "eval", 50, tmp_path).read_text() == "".join(one.read_text().splitlines(True)[:50])
    # whoever changes the facts gives the file another name, and this test the new one
    assert one.name == "synthetic_eval_3000_71f91222.jsonl"


def test_no_two_facts_have_the_same_prompt_and_localities_ask_about_nobody_who_is_edited() -> None:
    rows = [row for split in ("eval", "train") for row in synthetic.make_rows(split, 50_000)]
    for field in ("prompt", "rephrase", "locality"):
        assert len({row[field] for row in rows}) == len(rows)
    edited, asked = ({row[field].split()[0] for row in rows} for field in ("prompt", "locality"))
    assert len(edited) == len(rows)
    assert not edited & asked


def test_every_name_is_given_once() -> None:
    """i -> i * STRIDE modulo NAMES takes each once, if and only if they share no factor."""
    assert all(synthetic.STRIDE % factor for factor in range(2, 100) if synthetic.NAMES % factor == 0)
    assert synthetic.name(5) == synthetic.name(5 + synthetic.NAMES) != synthetic.name(6)
    assert len({synthetic.name(place) for place in range(0, synthetic.NAMES, 1009)}) == -(-synthetic.NAMES // 1009)
    assert SyntheticConfig.MOST + max(synthetic.FIRST.values()) <= synthetic.NAMES // 2


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_facts_are_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object]
) -> None:
    file = made_file(SYNTHETIC, "eval", 500, tmp_path)
    content = file.read_bytes()
    damage(file)
    caplog.clear()
    assert made_file(SYNTHETIC, "eval", 500, tmp_path).read_bytes() == content
    (warning,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert str(file) in warning.getMessage()
    caplog.clear()
    made_file(SYNTHETIC, "eval", 500, tmp_path)
    assert not caplog.records


def test_facts_that_cannot_be_kept(tmp_path: Path) -> None:
    (tmp_path / "made").write_text("a file where the folder should be")
    with pytest.raises(ValueError, match=r"^cannot keep the facts of dataset=synthetic in .*made: .*dataset.facts$"):
        made_file(SYNTHETIC, "eval", 5, tmp_path / "made")


# ---------------------------------------------------------------------------------------------------------------------
# The Arrow copy


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_copy_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object]
) -> None:
    records = list(opened(tmp_path, 2000))
    (copy,) = (tmp_path / "arrow").glob("*.arrow")
    for file in (copy, copy.with_suffix(".json")):
        damage(file)
        caplog.clear()
        assert list(opened(tmp_path, 2000)) == records
        assert [record.levelname for record in caplog.records] == ["WARNING"]
    caplog.clear()
    assert list(opened(tmp_path, 2000)) == records
    assert not caplog.records


@pytest.mark.parametrize("dataset", [d for d in DATASETS.values() if d.sample_files])
def test_no_question_of_a_sample_has_more_tokens_than_its_copy_says(tmp_path: Path, dataset: object) -> None:
    for name in dataset.sample_files.values():
        for seed in (1, 2, 3):  # fever chooses among texts by it
            records = open_records(ROOT / "data" / "sample" / name, dataset, cache_dir=tmp_path, seed=seed)
            longest = max(most_tokens(question) for record in records for question in questions_of(record).values())
            assert longest <= records.most_tokens < 20 * longest


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> RecordFile:
    return opened(tmp_path_factory.mktemp("many"), 60_000)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_turn_costs_the_same_wherever_it_stands(many: RecordFile, tmp_path: Path, shuffle: bool) -> None:
    tokenizer = load_tokenizer(ModelSource(locate("random:llama", tmp_path)))
    stream = EditStream(
        many, (), n_edits=100, batch_size=10, num_turns=None, num_warm_up=None, preheat_mode="none",
        tokenizer=tokenizer, answer_tokens="joint", seed=1, shuffle=shuffle,
    )  # fmt: skip

    def seconds(turn: int) -> float:
        start = time.perf_counter()
        stream.turn(turn)
        return time.perf_counter() - start

    first, last = (min(seconds(turn) for _ in range(30)) for turn in (0, len(stream) - 1))
    assert max(first, last) < 3 * min(first, last)


READING = """
import sys
from pathlib import Path
from data.files import open_records
from data.synthetic import DATASET

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))

records = open_records(sys.argv[1], DATASET, cache_dir=Path(sys.argv[2]), seed=0)
count, grown = len(records), []
if sys.argv[3] == "in order":
    reads = (slice(start, start + 100) for start in range(0, count, 100))
else:
    reads = (i * 7919 % count for i in range(count // 10))
for place, read in enumerate(reads):
    records[read]
    if place == 5:
        before = resident()
    if place > 5 and place % 50 == 0:
        grown.append(resident() - before)
print(max(grown))
"""


@LINUX
@pytest.mark.parametrize("order", ["in order", "anyhow"])
def test_pages_that_were_read_do_not_stay(many: RecordFile, order: str) -> None:
    """Of a file of 8 MB; resident memory counts pages of mapped files as well."""
    command = [sys.executable, "-c", READING, str(many.path), str(many.path.parent.parent / "arrow"), order]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 3


# ---------------------------------------------------------------------------------------------------------------------
# The model


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in folder.iterdir()}


def test_the_random_model_is_the_same_every_time(tmp_path: Path) -> None:
    torch.manual_seed(1)
    one = locate("random:llama", tmp_path / "one")
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == drawn  # nobody else's randomness is touched
    assert digests(Path(one)) == digests(Path(locate("random:llama", tmp_path / "two")))


@pytest.mark.parametrize("name", EDITORS)
def test_every_editor_has_a_place_on_the_model_to_try_commands_with(tmp_path: Path, name: str) -> None:
    """The rank of its network fits, and its training is over in seconds."""
    cfg = to_run_config(compose_config([f"editor={name}", "model=tiny"]))
    shapes = outline(
        ModelSource(locate("random:llama", tmp_path)), cfg.model.edit_modules, cfg.model.auto_layers
    ).shapes
    plan_network(cfg, shapes)
    if isinstance(cfg.editor, HyperNetworkConfig):
        assert cfg.editor.n_epochs * (cfg.editor.max_train_turns or 1000) <= 10


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "sha256.json"])
def test_a_damaged_model_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], object]
) -> None:
    folder = Path(locate("random:llama", tmp_path))
    whole = digests(folder)
    damage(folder / name)
    caplog.clear()
    assert digests(Path(locate("random:llama", tmp_path))) == whole
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_random_model_that_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^model.name_or_path=random:gpt: .*random:llama$"):
        locate("random:gpt", tmp_path)


def test_its_tokenizer_has_a_token_for_each_syllable(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ModelSource(locate("random:llama", tmp_path)))
    assert len(tokenizer("Dewehiku sells")["input_ids"]) == 4 + 4  # De we hi ku, _se l l s
    text = "Ünïcode, and a\nline: Kazoo!"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


# ---------------------------------------------------------------------------------------------------------------------
# The preset


def test_the_preset_writes_two_million_facts() -> None:
    run = to_run_config(compose_config(["experiment=stress"]))
    assert isinstance(run.dataset, SyntheticConfig)
    assert run.num_seq is not None
    assert run.num_seq * run.dataset.n_edits == run.dataset.facts == 2_000_000
    assert (run.editor.name, run.checkpoint_every, run.tracker.wandb.name) == ("stableedit", 50, "offline")


def test_more_turns_than_there_are_facts() -> None:
    with pytest.raises(ValueError, match=r"^num_seq=7: takes 700 facts, dataset.facts=600 are made; set dataset.facts"):
        to_run_config(compose_config(["experiment=stress", "dataset.facts=600", "num_seq=7"]))
    to_run_config(compose_config(["experiment=stress", "dataset.facts=600", "num_seq=6"]))
    to_run_config(
        compose_config(["dataset=synthetic", "dataset.facts=600", "num_seq=7", "dataset.valid_path=mine.json"])
    )


@pytest.mark.parametrize("facts", [0, -5, 16_000_001])
def test_facts_that_there_cannot_be(facts: int) -> None:
    with pytest.raises(ValueError, match=f"dataset.facts={facts}: "):
        to_run_config(compose_config(["dataset=synthetic", f"dataset.facts={facts}"]))


def lines_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "turns.jsonl").read_text().splitlines()]


@LINUX
@pytest.mark.slow
def test_memory_stays_where_it_is(tmp_path: Path) -> None:
    """400 of the preset's turns, as a user starts them, retention and evaluations on the way included."""
    command = [
        *(sys.executable, "main.py", "experiment=stress", "dataset.facts=40000", "num_seq=400"),
        *("evaluation.sample=200", "evaluation.every=100", "evaluation.retention=2", "diagnostics.report=false"),
        f"hydra.run.dir={tmp_path / 'run'}",
    ]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    resident = {line["turn"]: line["memory"]["resident_bytes"] for line in lines_of(tmp_path / "run")}
    assert len(resident) == 420
    assert (
        max(resident[turn] for turn in range(320, 420)) - resident[100] < 10e6
    )  # caches of the first turns aside, nothing grows
