"""Every file of config/ composes and resolves, and published rows say what was published."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import yaml

from config.compose import CONFIG_DIR, compose_config
from config.schema import (
    AnswerEnd,
    AnswerLoss,
    AnswerTokens,
    ClosedFormConfig,
    EditPrecision,
    FactToken,
    HyperNetworkConfig,
    LocateConfig,
    Order,
    PreheatMode,
    PromptForm,
    RLEditConfig,
    RunConfig,
    StatisticsScope,
    UpdateEvery,
    WhiteningFloorMode,
    settings_without_effect,
    to_run_config,
)

# What a file cannot know and its user must say.
NEEDED = {
    "jsonl": ["dataset.valid_path=a", "dataset.train_path=b", "dataset.fields.prompt=p", "dataset.fields.answer=a"],
    "huggingface": ["model.name_or_path=folder", "model.lr=1e-5"],
}
LAYERS = {"mistral-7b": 32, "llama-3-instruct": 32, "gpt-j": 28, "qwen2.5-7b": 28, "phi-4": 40, "gemma-3-27b": 62}
"""Numbers of layers, from the models' own configurations."""


def files(group: str) -> list[str]:
    return sorted(path.name.removesuffix(".yaml") for path in (CONFIG_DIR / group).glob("*.yaml"))


@cache
def run_config(*overrides: str) -> RunConfig:
    return to_run_config(compose_config(overrides))


@pytest.mark.parametrize(
    "choice", [f"{group}={name}" for group in ("dataset", "model", "ablation") for name in files(group)]
)
def test_every_choice_composes(choice: str) -> None:
    run_config(choice, *NEEDED.get(choice.partition("=")[2], []))


@pytest.mark.parametrize("name", files("editor"))
def test_every_editor_composes(name: str) -> None:
    cfg = compose_config([f"editor={name}"])
    assert cfg.editor.name == name
    assert to_run_config(cfg).editor.name == name


@pytest.mark.parametrize("choice", ["model=mistral-7b", "experiment=mistral-7b_zsre", "experiment=qwen2.5-7b_fever"])
def test_hypernetworks_have_their_published_sizes(choice: str) -> None:
    """Also on a published row, whose arithmetic of StableEdit is none of theirs."""
    rledit = run_config(choice, "editor=rledit").editor
    assert isinstance(rledit, RLEditConfig)
    assert (rledit.rank, rledit.n_blocks, rledit.meta_lr, rledit.loc_coef) == (1024, 4, 1e-5, 0.6)
    assert (rledit.time_decay, rledit.back_depth, rledit.reg_coef) == (0.95, 10, 1e-4)
    assert rledit.update_every is UpdateEvery.trajectory
    mend = run_config(choice, "editor=mend").editor
    assert isinstance(mend, HyperNetworkConfig)
    assert (mend.rank, mend.n_blocks) == (1920, 2)


def tuned(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIG_DIR / "tuned" / f"{name}.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", [name for name in files("tuned") if "rank" in tuned(name)])
def test_what_suits_an_editor_on_a_model_is_taken_with_them_and_only_with_them(name: str) -> None:
    editor, _, model = name.partition("_")
    values = tuned(name)
    chosen = vars(run_config(f"editor={editor}", f"model={model}").editor)
    assert {key: chosen[key] for key in values if key != "update_every"} == {
        key: float(value) if "lr" in key else value for key, value in values.items() if key != "update_every"
    }
    assert vars(run_config(f"editor={editor}", "model=mistral-7b").editor)["rank"] > chosen["rank"]
    assert run_config(f"editor={editor}", f"model={model}", "editor.rank=3").editor.rank == 3  # type: ignore[attr-defined]


def test_passes_suit_the_embedded_model_and_give_way_to_whoever_says_otherwise() -> None:
    for editor in ("stableedit", "ultraedit"):
        assert run_config(f"editor={editor}").editor.passes > 1
        assert run_config(f"editor={editor}", "model=tiny").editor.passes == 1
        assert run_config(f"editor={editor}", "arithmetic=released").editor.passes == 1
    assert run_config("model.lr=2e-3").editor.lr == 2e-3


@pytest.mark.parametrize("model", LAYERS)
@pytest.mark.parametrize("editor", ["stableedit", "stableedit_plus"])
def test_a_wide_model_has_a_covariance_whose_root_can_be_followed(editor: str, model: str) -> None:
    """Unless its user or the released arithmetic says otherwise; the embedded model's is decomposed."""

    def floor_mode(*more: str) -> WhiteningFloorMode:
        chosen = run_config(f"editor={editor}", *more).editor
        assert isinstance(chosen, ClosedFormConfig)
        return chosen.whitening_floor_mode

    assert floor_mode(f"model={model}") is WhiteningFloorMode.shift
    assert floor_mode(f"model={model}", "editor.whitening_floor_mode=relative") is WhiteningFloorMode.relative
    assert floor_mode(f"model={model}", "arithmetic=released") is WhiteningFloorMode.absolute
    assert floor_mode("model=smollm2-135m") is WhiteningFloorMode.relative


@pytest.mark.parametrize("model", ["smollm2-135m", "tiny", "mistral-7b"])
def test_what_goes_beyond_the_paper_is_the_paper_again_with_the_released_arithmetic(model: str) -> None:
    plus, paper = (run_config(f"editor={name}", f"model={model}") for name in ("stableedit_plus", "stableedit"))
    assert isinstance(plus.editor, ClosedFormConfig)
    assert (plus.editor.passes, plus.editor.replay, plus.editor.preserves_unrelated()) == (5, 100, True)
    beyond = {"name", "passes", "pass_loss", "replay", "preserve", "preserve_text"}
    differ = {key for key, value in vars(plus.editor).items() if value != vars(paper.editor)[key]}
    assert differ == (beyond - {"passes"} if model == "smollm2-135m" else beyond)
    released = [
        run_config(f"editor={name}", f"model={model}", "arithmetic=released")
        for name in ("stableedit_plus", "stableedit")
    ]
    assert vars(released[0].editor) == vars(released[1].editor)


@pytest.mark.parametrize("name", [name for name in files("tuned") if "edit_modules" in tuned(name).get("model", {})])
def test_an_editor_of_certain_modules_has_its_own_on_each_model(name: str) -> None:
    editor, _, model = name.rpartition("_")
    chosen = run_config(f"editor={editor}", f"model={model}").model.edit_modules
    assert chosen == tuned(name)["model"]["edit_modules"]
    layers = [int(part) for module in chosen for part in module.split(".") if part.isdigit()]
    assert layers == list(range(layers[0], layers[0] + len(chosen)))
    assert layers[-1] < LAYERS.get(model, {"smollm2-135m": 30, "tiny": 2}.get(model, 0))
    if editor not in ("memit", "alphaedit"):
        assert len(layers) == 1
    assert run_config(f"editor={editor}", f"model={model}", "model.edit_modules=[a]").model.edit_modules == ["a"]
    assert run_config("editor=stableedit", f"model={model}").model.edit_modules != chosen


@pytest.mark.parametrize("model", ["gpt-j", "llama-3-instruct", "mistral-7b", "qwen2.5-7b"])
def test_editors_that_locate_have_their_published_numbers(model: str) -> None:
    rome, memit, alphaedit = (run_config(f"editor={name}", f"model={model}") for name in ("rome", "memit", "alphaedit"))
    for run in (rome, memit, alphaedit):
        assert isinstance(run.editor, LocateConfig)
        assert run.editor.fact_token is FactToken.subject_last
        assert (run.editor.v_weight_decay, run.editor.kl_factor) == (0.5, 0.0625)
        assert not run.warms_up()
    assert (rome.editor.v_num_grad_steps, rome.editor.clamp_norm_factor) == (20, 4)  # type: ignore[attr-defined]
    for run in (memit, alphaedit):
        assert isinstance(run.editor, LocateConfig)
        assert (run.editor.v_num_grad_steps, run.editor.clamp_norm_factor) == (25, 0.75)
        assert run.editor.v_lr == (0.5 if model == "gpt-j" else 0.1)
        assert len(run.model.edit_modules) == (6 if model == "gpt-j" else 5)
    assert (memit.editor.mom2_update_weight, memit.editor.keep_keys) == (15_000, False)  # type: ignore[attr-defined]
    numbers = vars(alphaedit.editor)
    assert (numbers["nullspace_threshold"], numbers["L2"], numbers["keep_keys"]) == (0.02, 10, True)


FINE_TUNING = {"lr": 5e-4, "num_steps": 25, "answer_loss": AnswerLoss.tokens}
NUMBERS = {
    "ft_l": FINE_TUNING | {"facts_per_step": 1, "order": Order.depth, "norm_constraint": 5e-5},
    "ft_m": FINE_TUNING | {"facts_per_step": 1, "order": Order.depth, "norm_constraint": None},
    "locft_bf": FINE_TUNING | {"facts_per_step": 8, "order": Order.breadth, "norm_constraint": None},
    "grace": {"lr": 1, "num_steps": 100, "eps_init": 1, "stop_loss": 0},
    "wise": {
        "lr": 1, "num_steps": 70, "facts_per_step": 1, "alpha": 5, "beta": 20, "gamma": 10, "shards": 2,
        "mask_ratio": 0.2, "merge_density": 0.53, "merge_weight": 1, "route_ratio": 1, "stop_loss": 0,
    },
}  # fmt: skip
"""Of DESIGN section 1, the same for every model; the routing ratio is the paper's."""
LAYER = {
    "gpt-j": {"ft_l": 21, "ft_m": 21, "locft_bf": 21, "grace": 25, "wise": 21},
    "llama-3-instruct": {"ft_l": 21, "ft_m": 21, "locft_bf": 21, "grace": 27, "wise": 29},
    "mistral-7b": {"ft_l": 21, "ft_m": 21, "locft_bf": 21, "grace": 27, "wise": 29},
    "qwen2.5-7b": {"ft_l": 21, "ft_m": 21, "locft_bf": 21, "grace": 18, "wise": 23},
}


@pytest.mark.parametrize("model", LAYER)
@pytest.mark.parametrize("editor", NUMBERS)
def test_editors_that_fine_tune_or_remember_have_their_numbers(editor: str, model: str) -> None:
    run = run_config(f"editor={editor}", f"model={model}")
    chosen = vars(run.editor)
    assert {key: chosen[key] for key in NUMBERS[editor]} == NUMBERS[editor]
    module = "transformer.h.{}.mlp.fc_out" if model == "gpt-j" else "model.layers.{}.mlp.down_proj"
    assert run.model.edit_modules == [module.format(LAYER[model][editor])]
    assert run.warms_up() == (editor == "wise")


@pytest.mark.parametrize("model", LAYER)
@pytest.mark.parametrize("editor", NUMBERS)
def test_where_their_layer_comes_from_is_said(editor: str, model: str) -> None:
    """Mistral's are Llama's."""
    text = (CONFIG_DIR / "tuned" / f"{editor}_{model}.yaml").read_text(encoding="utf-8")
    comment = " ".join(line for line in text.splitlines()[1:] if line.startswith("#"))
    carried = f"layer of {editor}_llama-3-instruct.yaml" in comment
    assert carried or "source is not on record" in comment
    assert carried == ("carried over, not published" in comment)
    assert not carried or LAYER[model][editor] == LAYER["llama-3-instruct"][editor]


def test_the_released_arithmetic_can_be_asked_for_with_any_model() -> None:
    run = run_config("arithmetic=released")
    assert (run.dataset.answer_tokens, run.model.edit_precision) == (AnswerTokens.separate, EditPrecision.in_place)
    assert (run.dataset.prompt_form, run.dataset.answer_end) == (PromptForm.raw, AnswerEnd.none)
    assert isinstance(run.editor, ClosedFormConfig)
    assert run.editor.whitening_floor == 1e-6


IN_THE_FORM_OF_QUESTIONS = ("zsre", "fever", "wikibigedit", "ultraeditbench", "jsonl")
"""The other data sets' prompts are sentences to go on with."""


@pytest.mark.parametrize("name", files("dataset"))
def test_how_each_data_set_is_asked(name: str) -> None:
    dataset = run_config(f"dataset={name}", *NEEDED.get(name, [])).dataset
    assert dataset.answer_end is (AnswerEnd.none if name == "synthetic" else AnswerEnd.eos)
    assert dataset.answer_tokens is AnswerTokens.joint
    assert dataset.prompt_form is (PromptForm.qa if name in IN_THE_FORM_OF_QUESTIONS else PromptForm.raw)


PUBLISHED = [name for name in files("experiment") if name != "stress"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_experiment_is_the_published_arithmetic(name: str) -> None:
    run = run_config(f"experiment={name}")
    ultraedit = name.startswith("ultraedit_")
    model, _, dataset = name.removeprefix("ultraedit_").partition("_")
    assert run.dataset.name == dataset.partition("_")[0]
    assert run.model.name_or_path == run_config(f"model={model}").model.name_or_path
    assert isinstance(run.editor, ClosedFormConfig)
    assert run.editor.name == ("ultraedit" if ultraedit else "stableedit")
    assert run.editor.alpha == (1 if ultraedit else 10)
    assert run.editor.preheat_mode is (PreheatMode.none if ultraedit else PreheatMode.start)
    assert run.editor.whitening_floor == 1e-6
    assert run.editor.whitening_floor_mode is WhiteningFloorMode.absolute
    assert (run.dataset.prompt_form, run.dataset.answer_end) == (PromptForm.raw, AnswerEnd.none)
    assert run.editor.statistics_scope is StatisticsScope.shape
    assert run.editor.lr == (2e-6 if model in ("gpt-j", "qwen2.5-7b") else 1e-6)
    assert run.dataset.answer_tokens is AnswerTokens.separate
    assert run.model.edit_precision is EditPrecision.in_place
    assert settings_without_effect(run) == []
    assert (run.dataset.n_edits, run.dataset.batch_size) == (100, 10)
    turns = {"wikibigedit": 170, "wikibigedit_500k": 5000, "ultraeditbench_2m": 20000}.get(dataset, 200)
    warm_up = {"wikibigedit_500k": 170, "ultraeditbench_2m": 200}.get(dataset, 20)
    assert (run.num_seq, run.dataset.num_warm_up) == (turns, None if ultraedit else warm_up)
    assert run.evaluation.sample == (20_000 if dataset.endswith(("_2m", "_500k")) else None)
    layers = [int(part) for module in run.model.edit_modules for part in module.split(".") if part.isdigit()]
    assert len(layers) == len(run.model.edit_modules)
    assert max(layers) < LAYERS[model]


@pytest.mark.parametrize("name", ["mistral-7b_ultraeditbench_2m", "gpt-j_wikibigedit_500k", "mistral-7b_zsre"])
def test_whoever_sets_the_sample_decides_on_a_published_row_too(name: str) -> None:
    assert run_config("evaluation.sample=7", f"experiment={name}").evaluation.sample == 7
    assert run_config("evaluation.sample=null", f"experiment={name}").evaluation.sample is None


def modules(name: str) -> list[str]:
    return list(run_config(f"experiment={name}").model.edit_modules)


def test_published_edit_modules() -> None:
    """Spot checks, one of each naming scheme, against DESIGN section 2."""
    assert modules("mistral-7b_zsre") == [f"model.layers.{n}.mlp.down_proj" for n in range(28, 32)]
    assert modules("mistral-7b_fever") == [f"model.layers.{n}.mlp.down_proj" for n in range(28, 31)]
    assert modules("gpt-j_zsre") == [f"transformer.h.{n}.mlp.fc_out" for n in [*range(7, 16), *range(18, 26)]]
    assert modules("gpt-j_ultraeditbench_2m") == [f"transformer.h.{n}.mlp.fc_out" for n in [*range(8, 16), 22, 23, 24]]
    assert modules("qwen2.5-7b_fever") == [f"model.layers.{n}.mlp.down_proj" for n in [*range(9, 16), *range(22, 27)]]
    assert modules("llama-3-instruct_zsre") == [f"model.layers.{n}.mlp.down_proj" for n in [11, 12, 22, 23, 28, 29, 30]]
    assert modules("ultraedit_llama-3-instruct_zsre") == [
        *(f"model.layers.{n}.mlp.gate_proj" for n in range(11, 16)),
        *(f"model.layers.{n}.mlp.up_proj" for n in range(18, 25)),
    ]
    assert modules("ultraedit_gemma-3-27b_zsre") == [
        f"model.language_model.layers.{n}.mlp.{kind}_proj" for kind in ("gate", "up") for n in range(52, 61)
    ]


@pytest.mark.parametrize("ablation", files("ablation"))
def test_an_ablation_changes_a_published_row_and_nothing_but_its_editor_or_warm_up(ablation: str) -> None:
    row, changed = (run_config("experiment=mistral-7b_fever", *more) for more in ([], [f"ablation={ablation}"]))
    assert (row.model, row.num_seq) == (changed.model, changed.num_seq)
    assert (row.editor == changed.editor) == (ablation in ("full_method", "warm_up_start"))


def test_an_editor_on_a_published_row_keeps_its_own_method() -> None:
    editor = run_config("experiment=mistral-7b_zsre", "editor=ultraedit").editor
    assert isinstance(editor, ClosedFormConfig)
    assert (editor.name, editor.alpha, editor.preheat_mode) == ("ultraedit", 1.0, PreheatMode.none)


def test_every_yaml_file_belongs_to_a_group_the_tests_compose() -> None:
    known = {"dataset", "model", "editor", "experiment", "ablation", "released", "arithmetic", "tuned"}
    assert {path.parent.name for path in CONFIG_DIR.glob("*/*.yaml")} == known
    used = "".join(path.read_text() for path in CONFIG_DIR.glob("*/*.yaml"))
    unused = [path.stem for path in (CONFIG_DIR / "released").glob("*.yaml") if f"- {path.stem}\n" not in used]
    assert [name for name in unused if f"- /released/{name}\n" not in used] == []
