"""Which file serves, and how its rows become records without the file becoming memory."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data import DATASETS, files
from data.files import RecordFile, open_records, resolve_file
from data.records import EditRecord, Question

ROOT = Path(__file__).resolve().parents[2]
REAL_DATA = ROOT.parent / "shared" / "data"
ZSRE = DATASETS["zsre"]
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def row(i: int) -> dict[str, Any]:
    return {"src": f"Where is {i}?", "rephrase": f"{i}: where?", "ans": "Ö", "loc": "who", "loc_ans": "D", "junk": 1.5}


def rows(count: int) -> list[dict[str, Any]]:
    return [row(i) for i in range(count)]


def expected(count: int) -> list[EditRecord]:
    return [ZSRE.to_record(row(i), i, 0) for i in range(count)]


def as_array(values: list[Any]) -> str:
    return json.dumps(values, ensure_ascii=False, indent=1)


def as_lines(values: list[Any]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def opened(
    folder: Path, content: str | bytes, name: str = "facts.json", dataset: Any = ZSRE, seed: int = 0
) -> RecordFile:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_records(path, dataset, cache_dir=folder / "cache", seed=seed)


def copies(folder: Path) -> list[Path]:
    return list((folder / "cache").glob("*.arrow"))


class TestRecords:
    @pytest.mark.parametrize("count", [1, 3, files.BATCH_ROWS, 2 * files.BATCH_ROWS + 5])
    @pytest.mark.parametrize("form", [as_array, as_lines])
    def test_array_and_lines_hold_the_same(self, tmp_path: Path, form: Any, count: int) -> None:
        records = opened(tmp_path, form(rows(count)))
        assert len(records) == count
        assert list(records) == expected(count)
        assert [records[i] for i in range(count)] == expected(count)
        assert records[-1] == expected(count)[-1]
        assert records[1:9:2] == expected(count)[1:9:2]
        with pytest.raises(IndexError):
            records[count]

    @pytest.mark.parametrize("content", [b"\xef\xbb\xbf" + as_array(rows(3)).encode(), "\n \t" + as_array(rows(3))])
    def test_byte_order_mark_and_leading_space(self, tmp_path: Path, content: str | bytes) -> None:
        assert list(opened(tmp_path, content)) == expected(3)

    def test_lines_without_a_final_line_break_and_with_blank_ones(self, tmp_path: Path) -> None:
        assert list(opened(tmp_path, as_lines(rows(3)).replace("\n", "\n\n").rstrip())) == expected(3)

    def test_hash_is_the_files(self, tmp_path: Path) -> None:
        one = opened(tmp_path, as_array(rows(3)))
        same = opened(tmp_path, as_array(rows(3)), "copy.json")
        other = opened(tmp_path, as_array(rows(4)))
        assert one.sha256 == same.sha256 != other.sha256
        assert re.fullmatch("[0-9a-f]{64}", one.sha256)
        assert same.path == tmp_path / "copy.json"


class TestCopy:
    def test_is_made_once_and_holds_only_the_readers_fields(self, tmp_path: Path, monkeypatch: Any) -> None:
        opened(tmp_path, as_array(rows(5)))
        (copy,) = copies(tmp_path)
        assert b"junk" not in copy.read_bytes()
        monkeypatch.setattr(files, "_convert", lambda *_: pytest.fail("converted again"))
        assert list(opened(tmp_path, as_array(rows(5)))) == expected(5)

    def test_follows_content_not_name_or_time(self, tmp_path: Path) -> None:
        opened(tmp_path, as_array(rows(5)))
        assert list(opened(tmp_path, as_array(rows(2)))) == expected(2)

    def test_is_shared_by_seeds_though_choices_are_not(self, tmp_path: Path) -> None:
        claim = {"prompt": "A is B.", "alt": "yes", "unrel_prompt": "C is D.", "unrel_ans": "no"}
        content = as_array([claim | {"equiv_prompt": [f"{i}" for i in range(9)]}] * 20)
        one, two = (opened(tmp_path, content, dataset=DATASETS["fever"], seed=seed) for seed in (1, 2))
        assert list(one) != list(two)
        assert len(copies(tmp_path)) == 1

    def test_of_another_reader_is_another(self, tmp_path: Path) -> None:
        content = as_lines([{"q": "Where?", "a": "There"}] * 3)
        straight, swapped = (
            opened(tmp_path, content, dataset=DATASETS["jsonl"].with_fields({"prompt": p, "answer": a}))
            for p, a in (("q", "a"), ("a", "q"))
        )
        assert straight[0].edit == Question("Where?", "There")
        assert swapped[0].edit == Question("There", "Where?")
        assert len(copies(tmp_path)) == 2

    def test_of_a_bad_file_is_not_left_behind(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="row 2000"):
            opened(tmp_path, as_array([*rows(2000), 5]))
        assert list((tmp_path / "cache").iterdir()) == []

    def test_without_a_place_to_keep_it(self, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("a file where the folder should be")
        with pytest.raises(ValueError, match=r"^cannot keep a converted copy of .*facts.json in .*cache: .*make the"):
            opened(tmp_path, as_array(rows(3)))


class TestMistakes:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", r"facts.json: is empty$"),
            ("  \n", r"facts.json: is empty$"),
            ("[]", r"facts.json: holds no rows$"),
            ("src,ans\nA,B\n", r"facts.json: neither a JSON array nor JSON Lines; it begins with b'src,ans"),
            (
                "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
                r"facts.json: a Git LFS pointer, .*data.prepare",
            ),
            (as_array(rows(9))[:-40], r"facts.json, row 8: the file ends in the middle of the JSON, as if cut off"),
            (as_lines(rows(9))[:-40], r"facts.json, row 8: the file ends in the middle of the JSON, as if cut off"),
            (
                as_lines(rows(9)) + '{"src": "King \\udc00"}',
                r"facts.json, row 9: a text that is no Unicode",
            ),
            (
                as_array(rows(9)).replace("Where is 7?", r"\ud83d"),
                r"facts.json: \\ud83d at byte \d+ is half a character",
            ),
            (as_array(rows(9)) + "]", r"facts.json, row 9: broken JSON \(.*trailing garbage"),
            (
                as_array(rows(9)).replace('"Where is 7?"', "NaN"),
                r"row 7: broken JSON .*NaN and Infinity are no JSON: write null",
            ),
            (as_array(rows(2)).replace("Ö", "\xff").encode("latin-1"), r"facts.json, row 0: broken JSON .*UTF8"),
            (as_array([*rows(4), ["x"]]), r"facts.json, row 4: a list, not an object"),
            (as_lines([*rows(4), None]), r"facts.json, row 4: null, not an object"),
            (as_array([*rows(4), "x"]), r"facts.json, row 4: a text, not an object"),
            (as_array([*rows(4), 3.5]), r"facts.json, row 4: a number, not an object"),
            (as_array([*rows(1500), row(1) | {"ans": " "}]), r"facts.json, row 1500: field 'ans' is empty$"),
            (as_array([*rows(3), {"src": "Where?"}]), r"facts.json, row 3: no field"),
            ('{"data": []}', r"facts.json, row 0: no field 'loc'; it has data$"),
        ],
    )
    def test_names_file_and_row_in_one_line(self, tmp_path: Path, content: str | bytes, message: str) -> None:
        with pytest.raises(ValueError, match=message) as error:
            opened(tmp_path, content)
        assert "\n" not in str(error.value)

    def test_no_such_file(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"file .*none.json: no such file"):
            open_records(tmp_path / "none.json", ZSRE, cache_dir=tmp_path, seed=0)


class TestWhichFile:
    def resolve(self, folder: Path, split: str = "eval", path: Any = None, dataset: Any = ZSRE) -> Path:
        return resolve_file(dataset, split, path, folder / "raw", ROOT / "data" / "sample")

    def put(self, folder: Path, name: str) -> Path:
        path = folder / "raw" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[]")
        return path

    def test_the_one_asked_for(self, tmp_path: Path) -> None:
        self.put(tmp_path, "zsre/zsre_eval_20k.json")
        mine = self.put(tmp_path, "mine.json")
        assert self.resolve(tmp_path, path=str(mine)) == mine

    def test_one_in_the_users_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        mine = self.put(tmp_path, "mine.json")
        monkeypatch.setenv("HOME", str(mine.parent))
        assert self.resolve(tmp_path, path="~/mine.json") == mine

    @pytest.mark.parametrize(("split", "key"), [("eval", "dataset.valid_path"), ("train", "dataset.train_path")])
    def test_one_asked_for_that_is_not_there(self, tmp_path: Path, split: str, key: str) -> None:
        for path, looked_for in (("gone.json", rf" \({Path.cwd()}/gone.json\)"), (f"{tmp_path}/gone.json", "")):
            with pytest.raises(ValueError, match=f"^{key}={path}: no such file{looked_for}; set it to"):
                self.resolve(tmp_path, split, path)

    def test_the_full_one_and_the_preferred_of_two(self, tmp_path: Path, caplog: Any) -> None:
        larger = self.put(tmp_path, "zsre/zsre_eval_100k.json")
        assert self.resolve(tmp_path) == larger
        preferred = self.put(tmp_path, "zsre/zsre_eval_20k.json")
        assert self.resolve(tmp_path) == preferred
        assert not caplog.records

    @pytest.mark.parametrize("dataset", [d for d in DATASETS.values() if d.sample_files])
    def test_the_sample_is_there_and_said_to_serve(self, tmp_path: Path, caplog: Any, dataset: Any) -> None:
        for split in dataset.sample_files:
            caplog.clear()
            path = self.resolve(tmp_path, split, dataset=dataset)
            (warning,) = caplog.records
            assert warning.levelno == logging.WARNING
            remedy = f"python -m data.prepare {dataset.name}" if dataset.fetchable else "bring the full file as"
            assert remedy in warning.getMessage()
            assert len(open_records(path, dataset, cache_dir=tmp_path, seed=0)) >= 200

    def test_an_own_file_has_no_sample(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"^dataset.train_path=null: dataset=jsonl ships no train file; set"):
            self.resolve(tmp_path, "train", dataset=DATASETS["jsonl"])


MEASURE = """
import json, sys
from pathlib import Path
from data import DATASETS
from data.files import open_records

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))

def convert(file):
    return open_records(file, DATASETS["zsre"], cache_dir=folder / "cache", seed=0)

folder = Path(sys.argv[1])
list(convert(folder / "small.json"))
peak, held = status("VmHWM"), status("RssAnon")
records = convert(folder / "large.json")
peak_growth = status("VmHWM") - peak
answers = sum(len(record.edit.answer) for record in records)
print(json.dumps([len(records), peak_growth, status("RssAnon") - held]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    line = json.dumps(row(1) | {"rephrase": "x" * 150, "loc": "y" * 150, "junk": "z" * 150})
    (tmp_path / "small.json").write_text(f"[{line}]")
    count = 100_000
    (tmp_path / "large.json").write_text("[" + ",".join([line] * count) + "]")  # 55 MB
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    length, peak_growth, held_growth = json.loads(result.stdout)
    assert length == count
    assert peak_growth < 25  # MiB at the peak of the conversion: the file as text alone would be 52
    assert held_growth < 15  # MiB of our own after every row was read; mapped pages are the system's to take back


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no real data beside the project")
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("zsre/zsre_eval.json", 1037),
        ("zsre/zsre_train_alt.json", 998),
        ("fever/fever_eval.json", 300),
        ("wikibigedit/wikibigedit_eval.json", 500),
        ("counterfact/counterfact_zsre_fields.json", 10_000),
        ("ultraeditbench/counterfact_ultraeditbench_fields.json", 10_000),
    ],
)
def test_real_files(tmp_path: Path, name: str, count: int) -> None:
    dataset = DATASETS[name.split("/")[0]]
    records = list(open_records(REAL_DATA / name, dataset, cache_dir=tmp_path, seed=0))
    assert [record.index for record in records] == list(range(count))
    if dataset.name == "wikibigedit":
        assert sum(record.multi_hop is not None for record in records) == 16
