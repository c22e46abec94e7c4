"""What Hydra makes of config.yaml in a process of its own: run folders, sweep folders, --help."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from config.compose import compose_config
from config.help import compact

ROOT = Path(__file__).resolve().parents[2]

HARNESS = """
import logging, sys
sys.path.insert(0, {root!r})
import hydra
from config.help import register_help
from config.schema import register
register()
register_help()
@hydra.main(version_base="1.3", config_path={config!r}, config_name="config")
def main(cfg):
    logging.getLogger("test").info("turned")
main()
"""


def test_runs_of_one_second_have_folders_of_their_own(tmp_path: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text(HARNESS.format(root=str(ROOT), config=str(ROOT / "config")))
    command = [sys.executable, str(script), "dataset=fever"]
    jobs = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for job in jobs:
        out, _ = job.communicate(timeout=60)
        assert job.returncode == 0
        assert "turned" in out
    logs = sorted((tmp_path / "outputs" / "fever" / "smollm2-135m" / "stableedit_plus").glob("*/main.log"))
    assert len(logs) == 2
    assert all("turned" in log.read_text() for log in logs)


def test_sweeps_have_a_folder_a_job(tmp_path: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text(HARNESS.format(root=str(ROOT), config=str(ROOT / "config")))
    command = [sys.executable, str(script), "-m", "editor=stableedit,ultraedit", "seed=1,2"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert len(list((tmp_path / "outputs" / "sweeps").glob("*/zsre/smollm2-135m/*/*/main.log"))) == 4


def help_text(folder: Path, *flags: str) -> str:
    script = folder / "main.py"
    script.write_text(HARNESS.format(root=str(ROOT), config=str(ROOT / "config")))
    command = [sys.executable, str(script), "--help", *flags]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    return done.stdout


def test_help_names_every_key(tmp_path: Path) -> None:
    shown = help_text(tmp_path)
    keys = [key for editor in ("stableedit", "rledit") for key in _names(compose_config([f"editor={editor}"]))]
    assert [key for key in keys if not re.search(rf"{re.escape(key)}\b", shown)] == []


def test_help_names_every_experiment_and_ablation(tmp_path: Path) -> None:
    """And those of the user's own --config-dir."""
    own = tmp_path / "own" / "ablation" / "my_own.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# @package _global_\n")
    shown = help_text(tmp_path, "--config-dir", "own")
    assert max(map(len, shown.partition("\nPowered by")[0].splitlines())) <= 120
    for group, extra in (("experiment", set()), ("ablation", {"my_own"})):
        text = re.split(rf"^  {group} +", shown, flags=re.MULTILINE)[1]
        words = re.split(r",\s+|\s+", re.split(r"^  \w", text, flags=re.MULTILINE)[0])
        named = {name for word in words for name in expanded(word)}
        files = {file.stem for file in (ROOT / "config" / group).glob("*.yaml")} | extra
        assert files <= named


def expanded(word: str) -> list[str]:
    """The names that `start_{end,end}` stands for, as a shell reads it."""
    start, brace, rest = word.partition("{")
    return [start + end for end in rest.removesuffix("}").split(",")] if brace else [word]


@given(st.sets(st.lists(st.sampled_from(["a", "b-c", "zsre", "fever"]), min_size=1, max_size=3).map("_".join)))
def test_what_is_written_as_one_name_stands_for_the_same_names(names: set[str]) -> None:
    words = compact(sorted(names), ["zsre", "fever"])
    assert sorted(name for word in words for name in expanded(word)) == sorted(names)


def _names(cfg: object) -> list[str]:
    container = OmegaConf.to_container(cfg, throw_on_missing=False)
    assert isinstance(container, dict)
    names: list[str] = []
    for key, value in container.items():
        inner = (
            [f".{name}" for name in value if name not in ("name", "num_warm_up")] if isinstance(value, dict) else [key]
        )
        names += map(str, inner)
    return names
