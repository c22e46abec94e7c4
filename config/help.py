"""What --help lists: the choices of a group, as they lie in its folder."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

WIDTH = 100
INDENT = " " * 15  # of the second column


def register_help() -> None:
    """Let config.yaml say ${choices:GROUP}; the files of a --config-dir count."""
    OmegaConf.register_new_resolver("choices", _choices, replace=True)


def _choices(group: str) -> str:
    options = GlobalHydra.instance().config_loader().get_group_options
    names = ", ".join(compact(options(group), options("dataset")))
    return textwrap.fill(names, WIDTH, subsequent_indent=INDENT, break_on_hyphens=False, break_long_words=False)


def compact(names: Sequence[str], datasets: Sequence[str]) -> list[str]:
    """The names, those that differ only in their ends as one, `mistral-7b_{fever,zsre}`: ends begin with a data set."""
    ends: dict[str, list[str]] = {}
    for name in names:
        cuts = [at for at in (name.find(f"_{dataset}") for dataset in datasets) if at > 0]
        border = min(cuts, default=len(name)) + 1
        ends.setdefault(name[:border], []).append(name[border:])
    return [start + (f"{{{','.join(found)}}}" if len(found) > 1 else found[0]) for start, found in ends.items()]
