"""From a configuration to a run that can start: data opened, model outlined, turns laid out, every mistake found.

Nothing here reads a weight; what it refuses, it refuses in seconds, with a ValueError of one line.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from config.schema import (
    Half,
    HyperNetworkConfig,
    PreheatMode,
    RLEditConfig,
    RunConfig,
    Token,
    TrackerConfig,
    UpdateEvery,
    settings_without_effect,
)
from data import DATASETS
from data.dataset import Dataset
from data.files import FORMAT, RecordFile, open_records, resolve_file
from data.made import made_file
from data.stream import AnswerTokens, EditStream, check_context, tokenize
from data.training import TrainingStream
from harness import places
from harness.checkpoint import Checkpoints
from harness.evaluate import SCORES_FORMAT, Evaluation, Tokenize, evaluated_counts, protocols_of
from harness.generation import Generation, PromptForm
from harness.networks import FOLDER, MODEL, NetworkKeeper, TrainedNetwork, identity_of, open_network
from harness.perplexity import Passage, read_passage
from harness.ranks import Ranks, require_gpu_each
from harness.run_folder import canonical_json, versions
from harness.spill import CaptureFolder
from harness.tracking import WandbMode, WandbSettings, check_wandb
from model import Allocate, LanguageModel
from model_source import ModelSource, Outline, load_tokenizer, locate, outline

log = logging.getLogger(__name__)

DTYPES = {Half.fp32: torch.float32, Half.bf16: torch.bfloat16}
FEW_STEPS = 10  # of the optimiser: less than this, and a network is the fresh one
PASSAGE = places.ROOT / "data" / "sample" / "passage.txt"


@dataclass(frozen=True)
class Plan:
    """A run that has passed every check that needs no weights."""

    files: dict[str, RecordFile]  # by split: eval and, with warm-up or meta-training, train
    stream: EditStream
    training: TrainingStream | None  # None: this run trains no network
    network: TrainedNetwork | None  # None: it takes up none
    tokenizer: Any
    tokenize: Tokenize
    source: ModelSource
    outline: Outline
    device: torch.device
    editor_device: torch.device
    generation: Generation | None  # None: off
    passage: Passage | None  # None: off
    ranks: Ranks  # the processes that share the work

    @property
    def hardware(self) -> str:
        """What the numbers' last bits depend on."""
        return str(self.device) if self.ranks.size == 1 else f"{self.ranks.size} x {self.device.type}"

    @property
    def tokenizer_hash(self) -> str:
        """SHA-256 of all that says how text becomes tokens."""
        return hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()

    @property
    def inputs(self) -> dict[str, str]:
        """SHA-256 of every file that the run's numbers come from."""
        network = {"network": self.network.digest} if self.network else {}
        passage = {"perplexity": self.passage.sha256} if self.passage else {}
        return {split: file.sha256 for split, file in self.files.items()} | network | passage


def make_plan(cfg: RunConfig, ranks: Ranks) -> Plan:
    """Open the data, read the model's outline, lay out the turns. ValueError, in one line, where something is wrong."""
    for line in settings_without_effect(cfg):
        log.warning("%s", line)
    if cfg.evaluate is not None:
        cfg = replace(cfg, editor=replace(cfg.editor, preheat_mode=PreheatMode.none))  # nothing to warm up
    device, editor_device = devices(cfg, ranks)
    check_wandb(wandb_settings(cfg.tracker).mode)
    files = open_data(cfg)
    source = ModelSource(
        locate(cfg.model.name_or_path, places.CACHE, cfg.model.revision),
        cfg.model.class_name,
        cfg.model.revision,
        cfg.model.trust_remote_code,
    )
    model_outline = outline(source, cfg.model.edit_modules, cfg.model.auto_layers)
    tokenizer = load_tokenizer(source)
    answer_tokens = cast(AnswerTokens, cfg.dataset.answer_tokens.name)
    stream = EditStream(
        files["eval"],
        files.get("train", ()),
        n_edits=cfg.dataset.n_edits,
        batch_size=cfg.dataset.batch_size,
        num_turns=cfg.num_seq,
        num_warm_up=cfg.dataset.num_warm_up if warms_up(cfg) else None,  # without effect, as the user was told
        preheat_mode=cfg.editor.preheat_mode.name,
        tokenizer=tokenizer,
        answer_tokens=answer_tokens,
        seed=cfg.seed,
        shuffle=cfg.dataset.shuffle,
    )
    as_tokens = partial(tokenize, tokenizer=tokenizer, answer_tokens=answer_tokens)
    training = plan_training(cfg, files, as_tokens)
    network = plan_network(cfg, model_outline.shapes)
    generation = plan_generation(cfg, tokenizer)
    if model_outline.context_length is not None:
        trained = training.records() if training else ()
        for split, records in (("eval", stream.edited()), ("train", stream.warmed_up()), ("train", trained)):
            if records:
                check_context(
                    records,
                    tokenizer,
                    model_outline.context_length,
                    answer_tokens=answer_tokens,
                    file=str(files[split].path),
                    most=files[split].most_tokens,
                )
        if generation is not None:
            generation.check(stream.edited(), model_outline.context_length, str(files["eval"].path))
    if cfg.editor.cache_dir is not None and ranks.size > 1:
        log.warning(
            "editor.cache_dir: each of the %d processes holds its share of a turn's captures in memory, and the first "
            "one a second share, until they are in the folder",
            ranks.size,
        )
    with capture_memory(cfg, stream, model_outline.shapes):
        pass  # a folder that cannot hold the captures shows now, not after the base model has been scored
    passage = plan_passage(cfg, tokenizer, model_outline.context_length)
    return Plan(
        files=files,
        stream=stream,
        training=training,
        network=network,
        tokenizer=tokenizer,
        tokenize=as_tokens,
        source=source,
        outline=model_outline,
        device=device,
        editor_device=editor_device,
        generation=generation,
        passage=passage,
        ranks=ranks,
    )


def open_data(cfg: RunConfig) -> dict[str, RecordFile]:
    """The files of a run by split: those to edit and, where something is done with them first, those to train on."""
    dataset = DATASETS[cfg.dataset.name].with_fields(cfg.dataset.field_map())
    paths = {"eval": cfg.dataset.valid_path}
    if warms_up(cfg) or trains(cfg):
        paths["train"] = cfg.dataset.train_path
    return {
        split: open_records(
            data_file(cfg, dataset, split, path), dataset, cache_dir=places.CACHE / "arrow", seed=cfg.seed
        )
        for split, path in paths.items()
    }


def data_file(cfg: RunConfig, dataset: Dataset, split: str, path: str | None) -> Path:
    """The file of a split: the user's, else one of made facts, the full one, or the shipped sample."""
    facts = cfg.dataset.made_facts(split)
    if path is None and facts is not None:
        return made_file(dataset, split, facts, places.CACHE / "made")
    return resolve_file(dataset, split, path, places.ROOT / "data" / "raw", places.ROOT / "data" / "sample")


def warms_up(cfg: RunConfig) -> bool:
    """Whether turns of the training file come before the facts to edit, or among them."""
    return cfg.editor.preheat_mode is not PreheatMode.none


def trains(cfg: RunConfig) -> bool:
    """Whether an editor learns from the training file before it edits."""
    return cfg.evaluate is None and isinstance(cfg.editor, HyperNetworkConfig) and cfg.editor.trains()


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
    """The network to edit with, where one is named. ValueError where it is damaged or does not fit.

    So too where the network that would be made has no place for its rank.
    """
    editor = cfg.editor
    if cfg.evaluate is not None or not isinstance(editor, HyperNetworkConfig):
        return None
    for d_k, d_v in shapes.values():
        if editor.rank > d_k + d_v:
            raise ValueError(
                f"editor.rank={editor.rank}: more than the {d_k + d_v} inputs of the network of a {d_k}x{d_v} module; "
                f"set {d_k + d_v} or less"
            )
    if editor.load_checkpoint is None:
        return None
    network = open_network(editor.load_checkpoint)
    network.require(identity_of(editor, shapes))
    log.info("editor.load_checkpoint: step sizes and ridges are those it learned; settings of training do not count")
    return network


def network_keeper(
    cfg: RunConfig, run_folder: Path, shapes: Mapping[str, tuple[int, int]], fingerprint: str
) -> NetworkKeeper:
    """Keeps the trained network in the run folder, where the user wants that."""
    assert isinstance(cfg.editor, HyperNetworkConfig)
    identity = {**identity_of(cfg.editor, shapes), MODEL: fingerprint}
    return NetworkKeeper(Checkpoints(run_folder / FOLDER, "turn", 2), identity, cfg.editor.save_checkpoint)


def devices(cfg: RunConfig, ranks: Ranks) -> tuple[torch.device, torch.device]:
    """Where the model runs and where the editor does; ValueError for a device this machine or this process lacks."""
    if ranks.size > 1:
        one_each = f"with {ranks.size} processes, each of which holds the whole model on a GPU of its own"
        if cfg.model.device_map is not None:
            raise ValueError(f"model.device_map={cfg.model.device_map.name} {one_each}: start one, without torchrun")
        for key, value in {"model_device": cfg.model_device, "editor_device": cfg.editor_device}.items():
            if ":" in value:
                raise ValueError(f"{key}={value} {one_each}: set {key}=auto")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    model = _with_index(torch.device(found if cfg.model_device == "auto" else cfg.model_device))
    editor = model if cfg.editor_device == "auto" else _with_index(torch.device(cfg.editor_device))
    for key, device in {"model_device": model, "editor_device": editor}.items():
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"{key}={device}: this machine has {torch.cuda.device_count()} GPUs; choose another, or auto"
            )
    if ranks.size > 1 and model.type == "cuda":
        require_gpu_each()
    ask_for_the_same_bits(cfg.model.deterministic and "cuda" in (model.type, editor.type))
    return model, editor


def _with_index(device: torch.device) -> torch.device:
    """`cuda` is the first GPU, also among several processes, of which only the first one makes a plan."""
    return torch.device("cuda:0") if device == torch.device("cuda") else device


def ask_for_the_same_bits(wanted: bool = True) -> None:
    """CUDA's kernels then give the same result each time, where they have a form that does."""
    if wanted == torch.are_deterministic_algorithms_enabled():
        return  # telling torch so once more would import its compiler, which takes seconds
    torch.use_deterministic_algorithms(wanted, warn_only=wanted)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # all is written over


def export_folder(cfg: RunConfig, run_folder: Path) -> Path:
    return Path(cfg.model_cache_dir).expanduser() if cfg.model_cache_dir else run_folder / "model"


def is_saved(cfg: RunConfig, run_folder: Path, saved: str | None) -> bool:
    """Whether the run has its edited model where it is wanted, having been stopped just after it was saved.

    `saved` is the folder outside its own that it has saved it to.
    """
    if cfg.model_cache_dir:
        return saved == cfg.model_cache_dir
    return export_folder(cfg, run_folder).exists()


def check_export(cfg: RunConfig, saved: str | None) -> None:
    """ValueError where the edited model is to be saved over something, or where nothing can be saved.

    Not where the run to go on with has saved it already, as `saved` says.
    """
    if not (cfg.model_cache and cfg.model_cache_dir) or saved == cfg.model_cache_dir:
        return
    target = Path(cfg.model_cache_dir).expanduser()
    if target.exists():
        raise ValueError(f"model_cache_dir={cfg.model_cache_dir}: is there already; name a folder that is not")
    require_writable(target, f"model_cache_dir={cfg.model_cache_dir}", "choose another folder")


def asked_too_late(cfg: RunConfig, run_folder: Path) -> list[str]:
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
    if keeps and not (run_folder / FOLDER).is_dir():
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


@contextlib.contextmanager
def capture_memory(
    cfg: RunConfig,
    stream: EditStream,
    shapes: Mapping[str, tuple[int, int]],
) -> Iterator[Allocate | None]:
    """Where captures are allocated: None = in memory, or a folder that goes with the run."""
    if cfg.editor.cache_dir is None:
        yield None
        return
    with CaptureFolder(Path(cfg.editor.cache_dir)) as folder:
        first = stream.turn(0)
        lengths = (len(s.ids) if cfg.editor.token is Token.all else s.answer_length for s in first.sequences)
        folder.require(shapes, sum(lengths), kept=cfg.diagnostics.previous + 1)
        yield folder.allocate


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def plan_generation(cfg: RunConfig, tokenizer: Any) -> Generation | None:
    """How answers are generated, None where none are."""
    settings = cfg.evaluation
    if not settings.generation:
        return None
    sample = settings.generation if isinstance(settings.generation, int) else None
    return Generation(tokenizer, cast(PromptForm, settings.prompt.name), settings.max_new_tokens, sample)


def plan_passage(cfg: RunConfig, tokenizer: Any, context_length: int | None) -> Passage | None:
    """The text whose perplexity is measured, None for none."""
    named = cfg.evaluation.perplexity
    if named == "off":
        return None
    path = PASSAGE if named == "passage" else Path(named).expanduser()
    window = min(cfg.evaluation.perplexity_window, context_length or cfg.evaluation.perplexity_window)
    return read_passage(path, tokenizer, window, f"evaluation.perplexity={named}")


def make_evaluation(cfg: RunConfig, plan: Plan, model: LanguageModel) -> Evaluation:
    """What scores that model as the configuration says."""
    return Evaluation(
        model,
        plan.stream,
        plan.tokenize,
        protocols=protocols_of(cfg.dataset.eval_mhop),
        sample=cfg.evaluation.sample,
        resamples=cfg.evaluation.resamples,
        seed=cfg.seed,
        every=cfg.evaluation.every,
        generation=plan.generation,
        passage=plan.passage,
        retention=cfg.evaluation.retention,
    )


def base_cache(cfg: RunConfig, plan: Plan, fingerprint: str) -> Path:
    """The folder that keeps the base model's scores: one for each model, data, and setting that can change a score."""
    sample = cfg.evaluation.sample
    on_the_way = None if sample is None else evaluated_counts(plan.stream, cfg.evaluation.every)
    identity = {
        "model": fingerprint,
        "tokenizer": plan.tokenizer_hash,
        "data": plan.files["eval"].sha256,
        "reading": [FORMAT, cfg.dataset.name, cfg.dataset.field_map(), cfg.seed],
        "questions": [cfg.dataset.answer_tokens.name, cfg.dataset.eval_mhop],
        "records": [cfg.dataset.shuffle, len(plan.stream.edited()), sample, on_the_way],
        "generation": plan.generation and plan.generation.identity(),
        "passage": plan.passage and [plan.passage.sha256, plan.passage.window],
        "arithmetic": [plan.hardware, cfg.model.half.name, cfg.model.compute_tokens, cfg.model.deterministic],
        "versions": [SCORES_FORMAT, versions()],
    }
    key = hashlib.sha256(canonical_json(identity, "base scores").encode()).hexdigest()[:16]
    return places.CACHE / "base" / key


def wandb_settings(cfg: TrackerConfig) -> WandbSettings:
    """The tracker's group of the configuration, in words the tracker knows."""
    return WandbSettings(cast(WandbMode, cfg.wandb.name), cfg.project, cfg.entity, cfg.group, tuple(cfg.tags))
