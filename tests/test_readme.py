"""What the README and the pages of docs/ show must work as shown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from config.compose import check_command_line
from data import DATASETS
from data.files import open_records
from data.records import Capture, Phase
from editor import linalg
from editor.registry import EDITORS
from tests.commands import MODULES, Commands
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
EDITOR = (ROOT / "docs" / "editors.md").read_text(encoding="utf-8").partition("## Your own editor")[2]


def test_links_lead_somewhere() -> None:
    """To a file, and within one to a heading."""
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            if not link.startswith("https://"):
                path, _, heading = link.partition("#")
                file = page.parent / path
                assert file.is_file(), f"{page.name}: {link}"
                assert not heading or heading in headings(file), f"{page.name}: {link}"


def headings(page: Path) -> set[str]:
    """As links name them."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in found}


def shown_editor(block: int = 0) -> dict[str, Any]:
    """The names in a file that docs/editors.md shows."""
    code = re.findall(r"```python\n(.*?)```", EDITOR, flags=re.S)[block]
    room: dict[str, Any] = {}
    exec(compile(code, "editors.md", "exec"), room)
    return room


@pytest.fixture
def shown_preset(tmp_path: Path) -> str:
    """A folder for --config-dir that has the YAML beside it."""
    yaml = re.findall(r"```yaml\n(.*?)```", EDITOR, flags=re.S)[0]
    path = tmp_path / "presets" / "editor" / "plain.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml, encoding="utf-8")
    return str(path.parent.parent)


def test_the_shown_editor_steps_down_the_gradient() -> None:
    room = shown_editor()
    keys, grads = torch.randn(5, 4), torch.randn(5, 3)
    editor = room["Plain"]({"m": (4, 3)}, room["PlainSettings"](lr=0.1), torch.device("cpu"))
    update = editor.update({"m": Capture(keys, grads)}, Phase.EDIT)["m"]
    torch.testing.assert_close(linalg.dense((update.left, update.right)), -0.1 * keys.T @ grads)


def test_the_shown_editor_edits_with_main(run: Commands, shown_preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its class in the table, its YAML in a folder of the user's."""
    monkeypatch.setitem(EDITORS, "plain", shown_editor()["Plain"])
    done = run(f"--config-dir={shown_preset}", "editor=plain", "num_seq=2")
    assert done.phases() == "ee"
    norms = [module["update_norm"] for line in done.turns() for module in line["modules"].values()]
    assert len(norms) == 2 * len(MODULES)
    assert min(norms) > 0
    assert done.scores()["final"]["ES"]["n"] == 6


def test_the_shown_editor_that_edits_itself_lowers_the_loss(
    run: Commands, shown_preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registered like the other; its turns take the time that they take, and what it ignores is told."""
    monkeypatch.setitem(EDITORS, "plain", shown_editor(2)["Steps"])
    line = (f"--config-dir={shown_preset}", "editor=plain", "editor.lr=0.1", "num_seq=2", "editor.passes=4")
    done = run(*line)
    assert done.phases() == "ee"
    for turn in done.lines("turns.jsonl"):
        assert all(module["update_norm"] > 0 for module in turn["modules"].values())
        assert turn["seconds"]["total"] > 0
    found = done.scores()
    assert found["final"]["ES"]["n"] == 6
    told = (done.folder / "main.log").read_text()
    assert "editor.passes=4 has no effect with editor=plain, which has an edit() of its own" in told
    assert "editor.lr" not in told


def test_the_table_of_editors_is_the_one_shown() -> None:
    """The second block of that section is two lines to add to editor/registry.py, in its own form."""
    shown = re.findall(r"```python\n(.*?)```", EDITOR, flags=re.S)[1].strip().splitlines()
    assert shown == ["from editor.plain import Plain", "", '    "plain": Plain,']
    theirs = (ROOT / "editor" / "registry.py").read_text(encoding="utf-8").splitlines()
    assert {"from editor.mend import MEND", '    "mend": MEND,'} <= set(theirs)


def test_an_edited_model_opens_from_python(run: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    """The lines of the README, with the folder of a run put in."""
    done = run("num_seq=1", "num_seq_zsre=1")
    capsys.readouterr()
    code = re.findall(r"```python\n(.*?)```", README.partition("## From Python")[2], flags=re.S)[0]
    assert code.count('"RUN"') == 1
    exec(compile(code.replace('"RUN"', repr(str(done.folder))), "README.md", "exec"), {})
    out = capsys.readouterr().out
    for said in ("What is the capital of France? | ", "Who wrote Faust? | ", "The capital of France is"):
        assert said in out


def test_the_facts_of_the_readme_are_edited(run: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    """The lines of the README, on the tiny model."""
    code = re.findall(r"```python\n(.*?)```", README.partition("## From Python")[2], flags=re.S)[1]
    assert code.count('edit("smollm2-135m", facts)') == 1
    modules = f"model.edit_modules=[{','.join(MODULES)}]"
    tiny = ["model.lr=0.1", "model.half=fp32", modules, "corpus.tokens=2000"]
    here = code.replace('"smollm2-135m", facts', f"{str(run.model)!r}, facts, settings={tiny}")
    exec(compile(here, "README.md", "exec"), {})
    assert "question='Who is the mayor of Nordhaven?', base=" in capsys.readouterr().out


def test_the_file_of_the_readme_has_the_fields_that_its_command_names(tmp_path: Path) -> None:
    shown = re.search(r"python main.py dataset=jsonl (.+)", README.replace("\\\n", " "))
    assert shown
    settings = dict(word.split("=") for word in shown[1].split())
    field = "dataset.fields."
    names = {key.removeprefix(field): theirs for key, theirs in settings.items() if key.startswith(field)}
    dataset = DATASETS["jsonl"].with_fields(names)
    records = list(open_records(ROOT / settings["dataset.valid_path"], dataset, cache_dir=tmp_path, seed=0))
    assert len(records) == int(settings["dataset.n_edits"]) == 10
    assert all(record.rephrase and record.locality for record in records)


def test_a_new_editor_composes(shown_preset: str) -> None:
    check_command_line(["--config-dir", shown_preset, "editor=plain"])
