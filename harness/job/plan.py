"""From a configuration to a run that can start: data opened, model outlined, turns laid out, every mistake found.

Nothing here reads a weight; what it refuses, it refuses in seconds, with a ValueError of one line.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch

from config.schema import AnswerEnd, PreheatMode, RunConfig, Token, TrackerConfig, settings_without_effect
from data.corpus import Corpus, Questions, open_corpus
from data.files import RecordFile
from data.prompts import FormName, PromptForm, prompt_form
from data.records import Allocate
from data.repeats import find_repeats, shown_rows
from data.stream import AnswerTokens, EditStream, Tokenize, check_context, tokenize
from data.training import TrainingStream
from harness.evaluation import Examples, Generation, Passage, read_passage
from harness.job.data import SAMPLES, open_data, training_questions, unrelated_questions
from harness.job.devices import devices, kind_of
from harness.job.facts import check_located
from harness.job.networks import plan_network, plan_training
from harness.job.registered import check_registered, keys_of_rules_without_effect
from harness.ranks import Ranks
from harness.run import CaptureFolder, TrainedNetwork, places
from harness.watch import WandbMode, WandbSettings, check_wandb
from model.source import ModelSource, Outline, end_tokens, load_tokenizer, locate, outline

log = logging.getLogger(__name__)


PASSAGE = SAMPLES / "passage.txt"


@dataclass(frozen=True)
class Plan:
    """A run that has passed every check that needs no weights."""

    files: dict[str, RecordFile]  # by split: eval and, with warm-up or meta-training, train
    stream: EditStream
    training: TrainingStream | None  # None: this run trains no network
    network: TrainedNetwork | None  # None: it takes up none
    tokenizer: Any
    tokenize: Tokenize
    form: PromptForm  # of the facts
    source: ModelSource
    outline: Outline
    device: torch.device
    editor_device: torch.device
    generation: Generation | None  # None: off
    examples: Examples | None  # None: none are kept
    passage: Passage | None  # None: off
    corpora: Mapping[str, Corpus]  # what second moments are taken over, by name among `inputs`
    ranks: Ranks  # the processes that share the work

    @property
    def hardware(self) -> str:
        """What the numbers' last bits depend on."""
        several = f"{self.ranks.size} x " * (self.ranks.size > 1)
        return f"{several}{kind_of(self.device)}"

    @property
    def tokenizer_hash(self) -> str:
        """SHA-256 of all that says how text becomes tokens."""
        return hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()

    @property
    def inputs(self) -> dict[str, str]:
        """SHA-256 of every file that the run's numbers come from."""
        network = {"network": self.network.checkpoint.digest} if self.network else {}
        passage = {"perplexity": self.passage.sha256} if self.passage else {}
        corpora = {name: corpus.sha256 for name, corpus in self.corpora.items()}
        return {split: file.sha256 for split, file in self.files.items()} | network | passage | corpora


def make_plan(cfg: RunConfig, ranks: Ranks, typed: Collection[str] = ()) -> Plan:
    """Open the data, read the model's outline, lay out the turns. ValueError, in one line, where something is wrong.

    `typed`: the keys that the user wrote down, of which a warning names those without effect.
    """
    for line in settings_without_effect(cfg, typed):
        log.warning("%s", line)
    if cfg.evaluate is not None:
        cfg = replace(cfg, editor=replace(cfg.editor, preheat_mode=PreheatMode.none))  # nothing to warm up
    check_registered(cfg)
    for line in keys_of_rules_without_effect(cfg, typed):
        log.warning("%s", line)
    device, editor_device = devices(cfg, ranks)
    check_wandb(wandb_settings(cfg.tracker).mode)
    source = source_of(cfg)
    model_outline = outline(source, cfg.model.edit_modules, cfg.model.auto_layers)
    check_modules(cfg, list(model_outline.shapes))
    tokenizer = load_tokenizer(source)
    form = plan_form(cfg, tokenizer, source)
    passage = plan_passage(cfg, tokenizer, model_outline.context_length)
    network = plan_network(cfg, model_outline.shapes)
    text = open_text(cfg)
    files = open_data(cfg)  # minutes, the first time that a large file is read
    stream = plan_stream(cfg, files, tokenizer, form)
    answer_tokens = cast(AnswerTokens, cfg.dataset.answer_tokens.name)
    as_tokens = partial(tokenize, tokenizer=tokenizer, answer_tokens=answer_tokens, form=form)
    training = plan_training(cfg, files, partial(as_tokens, as_target=True))
    if cfg.evaluate is None:
        warn_of_repeats(stream, training, files)
    generation = plan_generation(cfg, tokenizer, cfg.evaluation.generation)
    asked = plan_generation(cfg, tokenizer, cfg.evaluation.examples)
    examples = Examples(stream.edited(), asked, cfg.seed) if asked else None
    if model_outline.context_length is not None:
        check = partial(check_context, tokenizer=tokenizer, answer_tokens=answer_tokens, form=form)
        check_lengths(model_outline.context_length, files, stream, training, check, generation, examples)
    check_captures(cfg, ranks, stream, model_outline.shapes)
    check_located(cfg, stream.edited(), str(files["eval"].path), model_outline)
    corpora = plan_corpora(cfg, text, files, stream, form)
    return Plan(
        files=files,
        stream=stream,
        training=training,
        network=network,
        tokenizer=tokenizer,
        tokenize=as_tokens,
        form=form,
        source=source,
        outline=model_outline,
        device=device,
        editor_device=editor_device,
        generation=generation,
        examples=examples,
        passage=passage,
        corpora=corpora,
        ranks=ranks,
    )


def source_of(cfg: RunConfig) -> ModelSource:
    model = cfg.model
    path = locate(model.name_or_path, places.CACHE, model.revision)
    return ModelSource(path, model.class_name, model.revision, model.trust_remote_code)


def check_modules(cfg: RunConfig, modules: Sequence[str]) -> None:
    """ValueError for several edit modules where the editor has one."""
    if cfg.evaluate is None and cfg.editor.has_one_module() and len(modules) > 1:
        raise ValueError(
            f"model.edit_modules: {len(modules)} modules, and editor={cfg.editor.name} edits one; name it, as in "
            f"model.edit_modules=[{modules[-1]}]"
        )


def plan_stream(cfg: RunConfig, files: Mapping[str, RecordFile], tokenizer: Any, form: PromptForm) -> EditStream:
    """The turns; ValueError where the files hold too few."""
    stream = EditStream(
        files["eval"],
        files.get("train", ()),
        n_edits=cfg.dataset.n_edits,
        batch_size=cfg.dataset.batch_size,
        num_turns=cfg.num_seq,
        num_warm_up=cfg.dataset.num_warm_up if cfg.warms_up() else 0,
        preheat_mode=cfg.editor.preheat_mode.name,
        tokenizer=tokenizer,
        answer_tokens=cast(AnswerTokens, cfg.dataset.answer_tokens.name),
        seed=cfg.seed,
        shuffle=cfg.dataset.shuffle,
        form=form,
        replay=cfg.editor.replay,
    )
    left = len(files["eval"]) % cfg.dataset.n_edits
    if left and cfg.num_seq is None:
        log.warning(
            "file %s: %d of its %s rows fill no turn of dataset.n_edits=%d and are not %s; set a number that divides "
            "the rows",
            files["eval"].path,
            left,
            f"{len(files['eval']):,}",
            cfg.dataset.n_edits,
            "edited" if cfg.evaluate is None else "asked about",
        )
    return stream


def open_text(cfg: RunConfig) -> Corpus | None:
    """The text that second moments of keys are taken over; None where no text, or that of questions alone, is read."""
    asks = cfg.evaluate is None and cfg.editor.asks_for_text() and not cfg.editor.preserves_unrelated()
    return open_corpus(cfg.corpus.path, SAMPLES, cfg.corpus.tokens) if asks and cfg.corpus.questions < 1 else None


def plan_corpora(
    cfg: RunConfig,
    text: Corpus | None,
    files: Mapping[str, RecordFile],
    stream: EditStream,
    form: PromptForm,
) -> dict[str, Corpus]:
    """What second moments of keys are taken over, by name: `text`, questions, or nothing."""
    if cfg.evaluate is not None or not cfg.editor.asks_for_text():
        return {}
    answer_tokens = cast(AnswerTokens, cfg.dataset.answer_tokens.name)
    if cfg.editor.preserves_unrelated():
        asked = unrelated_questions(cfg, stream)
        name, remedy = "editor.preserve_text=unrelated", "warm up with more turns"
        return {"corpus": Questions(lambda: asked, form, answer_tokens, name, remedy)}
    found: dict[str, Corpus] = {} if text is None else {"corpus": text}
    if cfg.moments_of_questions():
        name, remedy = "corpus.questions", "bring a larger dataset.train_path"
        found["questions"] = Questions(partial(training_questions, cfg, files), form, answer_tokens, name, remedy)
    elif (form_name := cfg.dataset.prompt_form.name) != "raw":
        log.warning(
            "corpus.questions=0: second moments say nothing of the form that facts are put in "
            "(dataset.prompt_form=%s), so that edits harm it; corpus.questions=0.5 gives such questions half a share",
            form_name,
        )
    return found


def check_lengths(
    context_length: int,
    files: Mapping[str, RecordFile],
    stream: EditStream,
    training: TrainingStream | None,
    check: Callable[..., None],  # of questions with their answers
    generation: Generation | None,
    examples: Examples | None,
) -> None:
    """ValueError, naming file and row, for the first question that the model cannot read whole."""
    trained = training.records() if training else ()
    for split, records in (("eval", stream.edited()), ("train", stream.warmed_up()), ("train", trained)):
        if records:
            file = files[split]
            check(records, context_length=context_length, file=str(file.path), most=file.most_tokens)
    if generation is not None:
        generation.check(stream.edited(), context_length, str(files["eval"].path))
    if examples is not None:
        examples.generation.check(examples.records, context_length, str(files["eval"].path))


def check_captures(cfg: RunConfig, ranks: Ranks, stream: EditStream, shapes: Mapping[str, tuple[int, int]]) -> None:
    """ValueError where a folder for captures cannot hold them: now, not after the base model has been scored."""
    if cfg.editor.cache_dir is not None and ranks.size > 1:
        log.warning(
            "editor.cache_dir: each of the %d processes keeps the captures of a turn in a folder of its own there, and "
            "two shares of them in memory until they are written",
            ranks.size,
        )
    with capture_memory(cfg, stream, shapes):
        pass


def warn_of_repeats(stream: EditStream, training: TrainingStream | None, files: Mapping[str, RecordFile]) -> None:
    """Say which facts to edit say the same, contradict each other, or are known from before the first edit."""
    facts, file = stream.edited(), files["eval"].path
    found = find_repeats(facts, chain(stream.warmed_up(), training.records() if training else ()))
    if found.repeats or found.contradictions:
        harm = ", and of two that contradict each other only one can hold" if found.contradictions else ""
        log.warning(
            "file %s: of the %s facts to edit, %s; each counts in the scores%s: take one of them out",
            file,
            f"{len(facts):,}",
            found,
            harm,
        )
    if found.trained_on:
        log.warning(
            "file %s: of the %s facts to edit, %s are asked in %s too, which warms up or trains (there and here, %s); "
            "their scores are no scores of editing alone: choose another dataset.train_path, or "
            "editor.preheat_mode=none",
            file,
            f"{len(facts):,}",
            f"{found.trained_on:,}",
            files["train"].path,
            shown_rows(found.trained, found.trained_on),
        )


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
    with CaptureFolder(Path(cfg.editor.cache_dir).expanduser()) as folder:
        last = stream.turn(len(stream) - 1).with_replay()
        lengths = (len(s.ids) if cfg.editor.token is Token.all else s.answer_length for s in last.sequences)
        folder.require(shapes, sum(lengths), kept=cfg.diagnostics.previous + 1)
        yield folder.allocate


def wandb_settings(cfg: TrackerConfig) -> WandbSettings:
    return WandbSettings(cast(WandbMode, cfg.wandb.name), cfg.project, cfg.entity, cfg.group, tuple(cfg.tags))


def plan_form(cfg: RunConfig, tokenizer: Any, source: ModelSource) -> PromptForm:
    """How facts are put to the model. ValueError where the model has no end to teach."""
    ends = end_tokens(source) if cfg.dataset.answer_end is AnswerEnd.eos else []
    if cfg.dataset.answer_end is AnswerEnd.eos and not ends:
        raise ValueError(
            "dataset.answer_end=eos: the model has no token at which it ends a text (no eos_token_id in its "
            "generation_config.json or config.json); set dataset.answer_end=none"
        )
    return prompt_form(tokenizer, cast(FormName, cfg.dataset.prompt_form.name), ends, "dataset.prompt_form")


def plan_generation(cfg: RunConfig, tokenizer: Any, asked: int | str) -> Generation | None:
    """How the model answers `asked` records by itself, all that are scored where that is no number; None for 0."""
    if not asked:
        return None
    settings = cfg.evaluation
    option = "dataset.prompt_form" if settings.prompt is None else "evaluation.prompt"
    form = prompt_form(tokenizer, cast(FormName, cfg.asked_form().name), option=option)
    return Generation(tokenizer, form, settings.max_new_tokens, asked if isinstance(asked, int) else None)


def plan_passage(cfg: RunConfig, tokenizer: Any, context_length: int | None) -> Passage | None:
    """The text whose perplexity is measured, None for none."""
    named = cfg.evaluation.perplexity
    if named == "off":
        return None
    path = PASSAGE if named == "passage" else Path(named).expanduser()
    window = min(cfg.evaluation.perplexity_window, context_length or cfg.evaluation.perplexity_window)
    return read_passage(path, tokenizer, window, f"evaluation.perplexity={named}")
