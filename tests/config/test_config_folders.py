"""What Hydra makes of config.yaml in a process of its own: run folders, sweep folders, --help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from omegaconf import OmegaConf

from config.compose import compose_config

ROOT = Path(__file__).resolve().parents[2]

HARNESS = """
import logging, sys
sys.path.insert(0, {root!r})
import hydra
from config.schema import register
register()
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
    logs = sorted((tmp_path / "outputs" / "fever" / "smollm2-135m" / "stableedit").glob("*/main.log"))
    assert len(logs) == 2
    assert all("turned" in log.read_text() for log in logs)


def test_sweeps_have_a_folder_a_job(tmp_path: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text(HARNESS.format(root=str(ROOT), config=str(ROOT / "config")))
    command = [sys.executable, str(script), "-m", "editor=stableedit,ultraedit", "seed=1,2"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert len(list((tmp_path / "outputs" / "sweeps").glob("*/zsre/smollm2-135m/*/*/main.log"))) == 4


def test_help_names_every_key(tmp_path: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text(HARNESS.format(root=str(ROOT), config=str(ROOT / "config")))
    done = subprocess.run(
        [sys.executable, str(script), "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    keys = [key for editor in ("stableedit", "rledit") for key in _names(compose_config([f"editor={editor}"]))]
    assert [key for key in keys if key not in done.stdout] == []


def _names(cfg: object) -> list[str]:
    container = OmegaConf.to_container(cfg, throw_on_missing=False)
    assert isinstance(container, dict)
    names: list[str] = []
    for key, value in container.items():
        inner = [name for name in value if name not in ("name", "num_warm_up")] if isinstance(value, dict) else [key]
        names += map(str, inner)
    return names
