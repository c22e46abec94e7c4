"""An editor or a data set of somebody's own, of which a line is missing somewhere: said before the model is read."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from config.compose import compose_config
from config.schema import RunConfig, to_run_config
from editor.registry import EDITORS
from harness.job.registered import check_registered


@dataclass(frozen=True)
class WithMomentum:
    lr: float
    seed: int
    momentum: float


class Mine:
    Settings = WithMomentum


def of_my_own(**sections: str) -> RunConfig:
    cfg = to_run_config(compose_config(["editor=ultraedit"]))
    return replace(cfg, **{name: replace(getattr(cfg, name), name=own) for name, own in sections.items()})


def test_what_is_shipped_is_registered() -> None:
    for name in EDITORS:
        check_registered(to_run_config(compose_config([f"editor={name}"])))


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"dataset": "mine"}, "dataset=mine: no line for it in DATASETS; add one to data/__init__.py"),
        ({"editor": "mine"}, "editor=mine: no line for it in EDITORS; add one, with its class, to editor/registry.py"),
    ],
)
def test_a_line_that_is_missing(sections: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}"):
        check_registered(of_my_own(**sections))


def test_a_setting_that_no_key_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EDITORS, "mine", Mine)
    with pytest.raises(ValueError, match=r"^editor=mine: .*WithMomentum has a 'momentum', and the keys of ClosedForm"):
        check_registered(of_my_own(editor="mine"))
