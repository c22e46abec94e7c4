"""The hypernetwork of a run: its training, the one it takes up, the one it keeps."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path

from config.schema import HyperNetworkConfig, RLEditConfig, RunConfig, UpdateEvery
from data.files import RecordFile
from data.stream import Tokenize
from data.training import TrainingStream
from harness.job.data import trains
from harness.run import MODEL_KEY, NETWORK_FOLDER, Checkpoints, NetworkKeeper, TrainedNetwork, identity_of, open_network

log = logging.getLogger(__name__)


FEW_STEPS = 10  # of the optimiser: less than this, and a network is the fresh one


def plan_training(cfg: RunConfig, files: Mapping[str, RecordFile], as_tokens: Tokenize) -> TrainingStream | None:
    """The turns of meta-training; ValueError where the training file holds too few."""
    if not trains(cfg):
        return None
    assert isinstance(cfg.editor, HyperNetworkConfig)
    training = TrainingStream(
        files["train"],
        n_edits=cfg.dataset.n_edits,
        batch_size=cfg.dataset.batch_size,
        epochs=cfg.editor.n_epochs,
        max_turns=cfg.editor.max_train_turns,
        held_out=cfg.editor.held_out_turns,
        needs_locality=cfg.editor.loc_coef > 0,
        tokenize=as_tokens,
        seed=cfg.seed,
    )
    steps = optimiser_steps(cfg.editor, training)
    if steps < FEW_STEPS:
        log.warning(
            "meta-training: %d turns make %d steps of the optimiser, few to learn anything from; see editor.n_epochs, "
            "and for rledit editor.update_every and editor.trajectory_length",
            len(training),
            steps,
        )
    return training


def optimiser_steps(editor: HyperNetworkConfig, training: TrainingStream) -> int:
    """How often the network changes: after each turn, or at the end of each trajectory."""
    if not isinstance(editor, RLEditConfig) or editor.update_every is UpdateEvery.turn:
        return len(training)
    return training.epochs * math.ceil(
        training.turns_per_epoch / (editor.trajectory_length or training.turns_per_epoch)
    )


def plan_network(cfg: RunConfig, shapes: Mapping[str, tuple[int, int]]) -> TrainedNetwork | None:
    """The network to edit with, where one is named. ValueError where it does not fit, or its rank is too large."""
    editor = cfg.editor
    if cfg.evaluate is not None or not isinstance(editor, HyperNetworkConfig):
        return None
    check_rank(editor, shapes)
    if editor.load_checkpoint is None:
        return None
    network = open_network(editor.load_checkpoint)
    network.require(identity_of(editor, shapes))
    log.info("editor.load_checkpoint: step sizes and ridges are those it learned; settings of training do not count")
    return network


def check_rank(editor: HyperNetworkConfig, shapes: Mapping[str, tuple[int, int]]) -> None:
    """ValueError for a rank beyond what a map of that size has."""
    for d_k, d_v in shapes.values():
        if editor.rank > d_k + d_v:
            raise ValueError(
                f"editor.rank={editor.rank}: more than the {d_k + d_v} inputs of the network of a {d_k}x{d_v} module; "
                f"set {d_k + d_v} or less"
            )


def network_keeper(
    cfg: RunConfig, run_folder: Path, shapes: Mapping[str, tuple[int, int]], fingerprint: str
) -> NetworkKeeper:
    """Keeps the trained network in the run folder, where the user wants that."""
    assert isinstance(cfg.editor, HyperNetworkConfig)
    identity = {**identity_of(cfg.editor, shapes), MODEL_KEY: fingerprint}
    return NetworkKeeper(Checkpoints(run_folder / NETWORK_FOLDER, "turn", 2), identity, cfg.editor.save_checkpoint)
