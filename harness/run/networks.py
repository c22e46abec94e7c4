"""Trained hypernetworks on disk: kept by one run, taken up by another, and refused where they do not fit.

`<run>/network/turn_<t>/` is a checkpoint (harness/run/checkpoint.py) of the network after t training turns.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from editor.base import State, shape_name
from harness.run.checkpoint import STATE, Checkpoint, Checkpoints, DamagedError, read

log = logging.getLogger(__name__)

NETWORK_FOLDER: Final = "network"  # in the run folder
GROUP: Final = "network"  # of its tensors
MODEL_KEY: Final = "model.fingerprint"


@dataclass(frozen=True)
class TrainedNetwork:
    """A network that a run wants to edit with, verified byte for byte."""

    source: str  # what editor.load_checkpoint says
    checkpoint: Checkpoint

    def require(self, identity: Mapping[str, Any]) -> None:
        """ValueError for the first key of `identity` that it was trained with another value of."""
        trained = self.checkpoint.state["identity"]
        for key, wanted in identity.items():
            if trained[key] != wanted:
                raise ValueError(f"editor.load_checkpoint={self.source}: {_mismatch(key, trained[key], wanted)}")

    def tensors(self) -> dict[str, Tensor]:
        state = self.checkpoint.state
        if state["turns"] < state["of"]:
            log.warning(
                "editor.load_checkpoint=%s: its training stopped after %d of %d turns",
                self.source,
                state["turns"],
                state["of"],
            )
        if state.get("edited"):
            log.warning(
                "editor.load_checkpoint=%s: kept after turn %d of the run that trained it, whose rows its statistics "
                "have seen, too",
                self.source,
                state["edited"],
            )
        return self.checkpoint.tensors()[GROUP]


def _mismatch(key: str, trained: Any, wanted: Any) -> str:
    if key == MODEL_KEY:
        return (
            f"trained on other weights (fingerprint {trained}, now {wanted}); name the model that it was trained on, "
            "or train another network"
        )
    if isinstance(trained, Mapping):
        other = sorted({*trained.items(), *wanted.items()} - ({*trained.items()} & {*wanted.items()}))
        names = ", ".join(dict.fromkeys(f"{name} ({size})" for name, size in other))
        return f"trained for other {key} than these: {names}; set those that it was trained for, or train another"
    return f"trained with {key}={trained}, here it is {wanted}; set {key}={trained}, or train another network"


def identity_of(
    editor: Any,  # config.schema.HyperNetworkConfig
    shapes: Mapping[str, tuple[int, int]],
) -> dict[str, Any]:
    """What a network must share with the run that edits with it, by the keys that users set; the model comes later."""
    return {
        "editor": editor.name,
        "editor.rank": editor.rank,
        "editor.n_blocks": editor.n_blocks,
        "editor.statistics_scope": editor.statistics_scope.name,
        "model.edit_modules": {name: shape_name(shape) for name, shape in shapes.items()},
    }


def open_network(source: str) -> TrainedNetwork:
    """The newest network of a run folder, or the one in the folder itself. ValueError where there is none whole."""
    folder = Path(source).expanduser()
    kept = folder / NETWORK_FOLDER if (folder / NETWORK_FOLDER).is_dir() else folder
    try:
        found = read(folder) if (folder / STATE).is_file() else Checkpoints(kept, "turn", 1).newest()
    except DamagedError as error:
        raise ValueError(f"editor.load_checkpoint={source}: {error}; bring a whole copy, or train another") from error
    if found is None or "identity" not in found.state:
        what = "no such folder" if not folder.is_dir() else "holds no whole network"
        raise ValueError(
            f"editor.load_checkpoint={source}: {what}; name a run that was made with editor.save_checkpoint=true"
        )
    return TrainedNetwork(source, found)


class NetworkKeeper:
    """Keeps the network in the run folder, where the user asked for that, after each pass; the last two stay.

    A network shows whether it is any good only when it edits, so training that fails may leave a bad one as the last.
    """

    def __init__(self, checkpoints: Checkpoints, identity: Mapping[str, Any], wanted: bool) -> None:
        self.checkpoints, self.identity, self.wanted = checkpoints, identity, wanted

    def keep(self, editor: State, turns: int, of: int) -> None:
        """The network after `turns` of the `of` turns of its training."""
        if self.wanted:
            self._save(editor, turns, of, edited=0)

    def keep_late(self, editor: State, turns: int, edited: int) -> None:
        """The network `edited` turns after the end of its training, unless it was kept then.

        Its parameters are the same, but its statistics have seen the edited rows: WARNING says so.
        """
        if not self.wanted:
            return
        kept = self.checkpoints.newest()
        if kept is not None and kept.place == turns:
            return
        self._save(editor, turns, turns, edited)
        log.warning(
            "editor.save_checkpoint=true came after the end of training: the network is kept as it is after turn %d, "
            "whose rows its statistics have seen, too",
            edited,
        )

    def _save(self, editor: State, turns: int, of: int, edited: int) -> None:
        state = {"identity": dict(self.identity), "turns": turns, "of": of, "edited": edited}
        self.checkpoints.save(turns, {GROUP: editor.state_dict()}, state)

    def what_is_left(self) -> str:
        """Which networks there are to go on from, for an error message; nothing where there are none."""
        places = self.checkpoints.places()
        if not places:
            return ""
        which = f"network after turn {places[0]} is" if len(places) == 1 else "networks after turns {} and {} are"
        return f"; the {which.format(*places)} in {self.checkpoints.folder}"
