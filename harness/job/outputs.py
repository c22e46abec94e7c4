"""Where an edited model goes, and whether it can."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path

from config.schema import HyperNetworkConfig, RunConfig
from harness.job.data import trains
from harness.run import NETWORK_FOLDER


def export_folder(cfg: RunConfig, run_folder: Path) -> Path:
    return Path(cfg.model_cache_dir).expanduser() if cfg.model_cache_dir else run_folder / "model"


def is_saved(cfg: RunConfig, run_folder: Path, saved: str | None) -> bool:
    """Whether a run that goes on has saved its edited model already; `saved`: to which folder outside its own."""
    if cfg.model_cache_dir:
        return saved == cfg.model_cache_dir
    return export_folder(cfg, run_folder).exists()


def check_export(cfg: RunConfig, saved: str | None) -> None:
    """ValueError where model_cache_dir exists, unless the run has `saved` its model there, or cannot be written."""
    if not (cfg.model_cache and cfg.model_cache_dir) or saved == cfg.model_cache_dir:
        return
    target = Path(cfg.model_cache_dir).expanduser()
    if target.exists():
        raise ValueError(f"model_cache_dir={cfg.model_cache_dir}: is there already; name a folder that is not")
    require_writable(target, f"model_cache_dir={cfg.model_cache_dir}", "choose another folder")


def missing_outputs(cfg: RunConfig, run_folder: Path) -> list[str]:
    """What the settings ask to be kept of a run that has ended without keeping it, and how to have it, a line each."""
    if cfg.evaluate is not None:
        return []
    lines = []
    if cfg.model_cache and not export_folder(cfg, run_folder).exists():
        lines.append(
            "model_cache=true: the run had ended, and nothing is saved now; where it has kept a checkpoint, "
            f"`python -m harness.export {shlex.quote(str(run_folder))} --to FOLDER` does"
        )
    keeps = isinstance(cfg.editor, HyperNetworkConfig) and trains(cfg) and cfg.editor.save_checkpoint
    if keeps and not (run_folder / NETWORK_FOLDER).is_dir():
        lines.append(
            "editor.save_checkpoint=true: the run ended without keeping its network; without resume, it is trained "
            "once more, and kept"
        )
    return lines


def require_writable(target: Path, option: str, remedy: str) -> None:
    """ValueError, naming the option, where nothing can be written beside `target`; the folder it is in is made."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise ValueError(f"{option}: cannot be written ({error.strerror}); {remedy}") from error
