"""Reports of runs that are over, under way, failed or damaged; the paired test against exact and simulated truth."""

from __future__ import annotations

import base64
import itertools
import json
import math
import re
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file

from data.records import EditRecord, Question, TokenSequence
from harness.evaluation.hidden import HiddenStates
from harness.report import (
    DRAWINGS,
    curve_figures,
    method_figures,
    projection,
    score_figures,
    trade_figure,
    write_report,
)
from harness.report.__main__ import main
from harness.report.averages import adjusted, tables
from harness.report.drawing import MOST_POINTS, STYLE, curve, marker, named_runs, percent_axis
from harness.report.names import configurations, labels, short_module_names
from harness.report.paired import Difference, average, compare, holm, paired_difference, record_scores
from harness.report.runs import columns_by_phase, open_runs
from harness.report.score_figures import retention_by_age, scores_by_age

MODULES = ("model.layers.2.mlp.down_proj", "model.layers.3.mlp.down_proj")
QUANTILES = {"min": 1, "q05": 2, "median": 3, "q95": 4, "max": 5}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the pixels, to save time."""
    monkeypatch.setitem(STYLE, "savefig.dpi", 75)


def turn_line(turn: int, warm_up: int) -> dict[str, Any]:
    edits_total = max(0, turn + 1 - warm_up) * 10
    module = {"update_norm": 2.0, "drift": 0.1 * (turn + 1) ** 0.5, "cosine_previous": 0.01 if turn else None}
    module |= {"cosines": [0.01] * min(turn, 2), "cosine_earlier": 0.0 if turn > 2 else None}
    moments = dict.fromkeys(method_figures.MOMENTS, 1 / (turn + 1) if turn else None)
    spectrum = {f"whitening_{name}": value for name, value in QUANTILES.items()}
    whitened = {"floored_fraction": 0.25, **spectrum} if turn >= warm_up else {"floored_fraction": None}
    return {
        "turn": turn,
        "phase": "edit" if turn >= warm_up else "warm_up",
        "edits": 10,
        "edits_total": edits_total,
        "loss": 3.0,
        "seconds": {"capture": 2.0, "update": 0.1, "apply": 0.05, "total": 2.15},
        "modules": {name: dict(module) for name in MODULES},
        "earlier_turn": 0 if turn > 2 else None,
        "statistics": {"40x24": {"n": 30.0 * (turn + 1), "std_mean": 1e-3, **moments, **whitened}},
        "memory": {"resident_bytes": 2**30, "peak_bytes": 2**30},
    }


def score(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.05, "high": mean + 0.05, "n": 40}


def make_run(
    folder: Path,
    *,
    status: str = "finished",
    error: str | None = None,
    turns: int = 6,
    overrides: Sequence[str] = (),
    editor: str = "stableedit",
    data: str = "abc",
    right: Sequence[int] = (1, 0, 2, 1),
    rows: Sequence[int] | None = None,
    on_the_way: bool = True,
) -> Path:
    """A run folder as the tracker leaves it, of 10 facts a turn after two warm-up turns."""
    folder.mkdir(parents=True)
    seeds = [int(override.removeprefix("seed=")) for override in overrides if override.startswith("seed=")]
    config = {
        "seed": (seeds or [42])[0],
        "editor": {"name": editor, "lr": 1e-3},
        "dataset": {"name": "zsre", "prompt_form": "qa"},
        "evaluation": {"prompt": None},
        "model": {"name_or_path": "some/tiny-model"},
    }
    put_in(config, overrides)
    about = {
        "run_id": "0123456789abcdef", "status": status, "error": error, "started": "2026-01-02T03:04:05+00:00",
        "finished": None, "config": config, "overrides": list(overrides), "inputs": {"eval": data}, "model": {},
        "device": "cpu", "versions": {"torch": "2"}, "git": None,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(about))
    write_lines(folder / "turns.jsonl", [turn_line(turn, 2) for turn in range(turns)])
    stages = [("base", 0), *[("eval", 4)] * on_the_way, *[("final", turns)] * (status == "finished")]
    scores = [
        {"turn": turn, "stage": stage, "scores": {"ES": score(0.1 * turn), "ES_seq": score(0.05 * turn), "LS_kl": 0.3}}
        for stage, turn in stages
    ]
    write_lines(folder / "scores.jsonl", scores)
    records = [
        {"stage": "final", "turn": 2, "place": i, "index": row, "protocol": "ES", "correct": n, "tokens": 2}
        for i, (row, n) in enumerate(zip(rows or range(len(right)), right, strict=True))
    ]
    write_lines(folder / "records.jsonl", records)
    if status == "finished":
        results = {"base": scores[0]["scores"], "final": scores[-1]["scores"], "cost": {"turns": turns, "edits": 40}}
        (folder / "results.json").write_text(json.dumps(results))
    return folder


def put_in(config: dict[str, Any], overrides: Sequence[str]) -> None:
    """What the overrides say, where Hydra would have put it; of a group, its choice."""
    for override in overrides:
        key, _, value = override.partition("=")
        *sections, last = key.split(".")
        if key == "seed" or isinstance(config.get(key), dict):
            continue
        into = config
        for section in sections:
            into = into.setdefault(section, {})
        try:
            into[last] = float(value)
        except ValueError:
            into[last] = value


def write_lines(path: Path, lines: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def text_of(page: Path) -> str:
    """What a reader sees: without pictures, style and tags."""
    html = re.sub(r"<style>.*?</style>", "", page.read_text(), flags=re.S)
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def pictures_of(page: Path) -> list[str]:
    return sorted(path.stem for path in page.parent.glob("*.png"))


# ---------------------------------------------------------------------------------------------------------------------
# Pages


def test_a_report_needs_nothing_beside_it(tmp_path: Path) -> None:
    page = write_report([make_run(tmp_path / "run")])
    assert page == tmp_path / "run" / "report.html"
    html = page.read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', html)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in re.sub(r"base64,[^\"]+", "", html)
    assert "<script" not in html
    inside = [base64.b64decode(code) for code in re.findall(r"base64,([^\"]+)", html)]
    beside = [(page.parent / f"{name}.png").read_bytes() for name in pictures_of(page)]
    assert sorted(inside) == sorted(beside)
    for png in inside:
        assert png.startswith(PNG)
        width, height = struct.unpack(">II", png[16:24])
        assert width > 450
        assert height > 200


def test_a_report_says_what_was_scored_and_draws_what_there_is(tmp_path: Path) -> None:
    page = write_report([make_run(tmp_path / "run")])
    assert pictures_of(page) == ["scores", "statistics", "time", "updates"]
    text = text_of(page)
    assert "ES efficacy 0.0 [-5.0, 5.0] 60.0 [55.0, 65.0] +60.0 40" in text
    assert "LS_kl specificity 0.300 0.300 +0.000" in text
    assert "6 turns" in text
    assert "still running" not in text


def test_examples_are_shown_as_they_were_written(tmp_path: Path) -> None:
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other", overrides=["seed=7"])
    assert "What the model says" not in text_of(write_report([run]))
    one = {"probe": "locality", "question": "<b>Who</b> wrote Faust?", "wanted": "Goethe", "base": " Go&amp;the"}
    (run / "examples.json").write_text(json.dumps([one | {"edited": "<script>Kafka</script>"}]))
    html = write_report([run]).read_text()
    for escaped in ("&lt;b&gt;Who&lt;/b&gt; wrote", ">Go&amp;amp;the<", "&lt;script&gt;Kafka&lt;/script&gt;"):
        assert escaped in html
    assert "unrelated questions" in html
    assert "<summary>" not in html.partition("What the model says")[2].partition("</table>")[0]
    both = write_report([run, other]).read_text()
    assert "<summary>" in both.partition("What the model says")[2].partition("</table>")[0], "folded away"


def test_the_same_run_gives_the_same_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert write_report([run], tmp_path / "a").read_bytes() == write_report([run], tmp_path / "b").read_bytes()


def test_what_later_features_write_is_drawn(tmp_path: Path) -> None:
    """Retention, GLUE, meta-training and hidden states have their pictures when their files are there."""
    run = make_run(tmp_path / "run")
    with (run / "turns.jsonl").open("a") as file:
        for turn in range(5):
            loss = {"rephrase": 2.0 - turn / 5, "locality": 0.1, "total": 2.1 - turn / 5}
            line = {"phase": "meta_train", "turn": turn, "epoch": 0, "meta_loss": loss, "grad_norm": 1.0}
            file.write(json.dumps(line) + "\n" + json.dumps(line | {"phase": "meta_valid"}) + "\n")
    by_age = {"0": score(0.9), "1": score(0.8), "2": score(0.7)}
    kept = {"ES": {"immediate": score(0.9), "final": score(0.6), "forgetting": score(0.3), "by_age": by_age}}
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps(results | {"retention": kept}))
    (run / "glue").mkdir()
    for turn in (0, 6):
        ways = {"likelihood": {"accuracy": score(0.7)}, "generation": {"accuracy": score(0.5), "invalid": 3}}
        (run / "glue" / f"turn_{turn}.json").write_text(json.dumps({"sst2": ways, "rte": ways}))
    states = {f"{moment}/{field}": torch.randn(9, 8) for moment in ("base", "edited") for field in ("edit", "locality")}
    save_file(states, run / "hidden_states.safetensors")
    page = write_report([run])
    expected = {"retention", "glue", "meta_training", "hidden_states", "scores", "statistics", "time", "updates"}
    assert set(pictures_of(page)) == expected
    text = text_of(page)
    assert "stableedit ES 90.0 [85.0, 95.0] 60.0 [55.0, 65.0] 30.0 [25.0, 35.0]" in text
    assert "PCA" in text


def test_retention_of_a_run_under_way_is_pooled_over_its_turns(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", status="running")
    lines = [
        {"turn": turn, "stage": "retention", "scores": {"ES_age0": {"mean": mean, "n": n}}}
        for turn, mean, n in ((3, 1.0, 10), (4, 0.5, 30))
    ]
    write_lines(run / "scores.jsonl", lines)
    assert scores_by_age(open_runs([run])[0]) == {"ES": {0: pytest.approx(0.625)}}


def test_ages_are_drawn_in_their_order(tmp_path: Path) -> None:
    """results.json is sorted by its keys, which has 16 before 2."""
    run = make_run(tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    by_age = {age: score(0.9 - int(age) / 50) for age in ("0", "1", "16", "2", "4", "8")}
    (run / "results.json").write_text(json.dumps(results | {"retention": {"ES": {"by_age": by_age}}}))
    picture = retention_by_age(named_runs(open_runs([run])))
    assert picture is not None
    (line,) = picture.figure.axes[0].get_lines()
    assert list(line.get_xdata()) == [0, 1, 2, 3, 4, 5]
    assert list(line.get_ydata()) == sorted(line.get_ydata(), reverse=True)


# ---------------------------------------------------------------------------------------------------------------------
# Runs that are not over, and mistakes


def test_a_run_under_way_is_drawn_as_far_as_it_came(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", status="running")
    with (run / "turns.jsonl").open("a") as file:
        file.write('{"turn": 6, "phase": "ed')  # the run is writing it
    page = write_report([run])
    text = text_of(page)
    assert "stableedit : still running, or was killed; 6 turns and 2 evaluations are there and are drawn." in text
    assert pictures_of(page) == ["scores", "statistics", "time", "updates"]
    assert "ES efficacy 0.0 [-5.0, 5.0] -" in text


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", status="failed", error="FloatingPointError: turn 6: the loss is nan", turns=1)
    assert "failed (FloatingPointError: turn 6: the loss is nan); 1 turn and 2 evaluations" in text_of(
        write_report([run])
    )


@pytest.mark.parametrize("files", [("turns.jsonl", "scores.jsonl", "records.jsonl"), ("turns.jsonl",)])
def test_a_run_that_has_hardly_begun(tmp_path: Path, files: Sequence[str]) -> None:
    run = make_run(tmp_path / "run", status="running")
    for name in files:
        (run / name).unlink()
    page = write_report([run])
    assert "still running" in text_of(page)
    assert pictures_of(page) == ([] if "scores.jsonl" in files else ["scores"])


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    """Whether or not the run is over: only a last line can be under way."""
    for status in ("running", "finished"):
        run = make_run(tmp_path / status, status=status)
        lines = (run / "turns.jsonl").read_text().splitlines()
        (run / "turns.jsonl").write_text("\n".join([*lines[:2], lines[2][:50], *lines[3:]]) + "\n")
        with pytest.raises(ValueError, match=r"turns\.jsonl, line 3: is no JSON"):
            write_report([run])
        assert not (run / "report.html").exists()


def test_a_finished_run_has_no_line_cut_short(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (run / "scores.jsonl").open("a") as file:
        file.write('{"turn": 6')
    with pytest.raises(ValueError, match=r"scores\.jsonl, line 4: is no JSON"):
        write_report([run])


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "run.json: cannot be read as JSON"), ('{"a": 1}', "run.json: has no status"), ("[]", "has no status")],
)
def test_a_folder_with_another_run_json(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        write_report([tmp_path])


def test_the_command_line_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argument, words in ((tmp_path / "none", "no such folder"), (tmp_path, "holds no run")):
        with pytest.raises(SystemExit) as end:
            main([str(argument)])
        assert str(end.value.code).startswith(f"error: {argument}: {words}")
        assert "\n" not in str(end.value.code)
    make_run(tmp_path / "run", turns=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="file/out: cannot be written"):
        main([str(tmp_path / "run"), "--to", str(tmp_path / "file" / "out")])
    main([str(tmp_path / "run"), "--to", str(tmp_path / "out")])
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'report.html'}\n"
    assert (tmp_path / "out" / "updates.png").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# Several runs


def test_runs_side_by_side(tmp_path: Path) -> None:
    """A sweep's folder stands for its runs; each is compared with the first on the records of both."""
    make_run(tmp_path / "0", overrides=["num_seq=4", "ablation=x"], right=[0] * 20)
    make_run(tmp_path / "1", overrides=["num_seq=4", "ablation=y"], right=[2] * 20)
    make_run(tmp_path / "2", overrides=["num_seq=4", "ablation=z"], right=[2] * 20, data="other")
    make_run(tmp_path / "3", overrides=["num_seq=4"], editor="ultraedit", status="running", right=[])
    page = write_report([tmp_path])
    assert page == tmp_path / "report" / "report.html"
    text = text_of(page)
    assert "Each against stableedit x" in text
    assert "stableedit y +100.0 [+100.0, +100.0] p &lt; 0.001" in text
    assert "stableedit z is not compared: its facts come from another file." in text
    assert "ultraedit is not compared: it has no final scores of single records." in text
    assert "ultraedit : still running" in text
    assert "averaged over seeds" not in text
    assert pictures_of(page) == ["comparison", "scores", "statistics", "time", "updates"]


def sweep(root: Path, configurations: int, seeds: int, **more: Any) -> list[Path]:
    """Runs in the order of a sweep: all configurations with a seed, then with the next."""
    return [
        make_run(root / f"{seed}_{k}", overrides=[f"seed={seed}", f"ablation=a_rather_long_name_{k}"], **more)
        for seed in range(seeds)
        for k in range(configurations)
    ]


def test_runs_that_differ_in_the_seed_share_a_colour_and_no_two_look_alike(tmp_path: Path) -> None:
    named = named_runs(open_runs(sweep(tmp_path, 10, 3)))
    assert [one.label for one in named[:2]] == [f"stableedit a_rather_long_name_0 seed={seed}" for seed in (0, 1)]
    colours: dict[str, set[str]] = {}
    for one in named:
        colours.setdefault(one.configuration, set()).add(one.look["color"])
    assert [len(found) for found in colours.values()] == [1] * 10
    assert len({(one.look["color"], one.look["linestyle"]) for one in named}) == 30
    assert len({(one.look["color"], marker(one.look)) for one in named}) == 30


def test_a_configuration_is_all_but_the_seed(tmp_path: Path) -> None:
    """Another file of facts makes another configuration, and so does a seed that is repeated: it has no partner."""
    told = [
        make_run(tmp_path / "a", overrides=["seed=1"]),
        make_run(tmp_path / "b"),
        make_run(tmp_path / "c", overrides=["seed=1"]),
        make_run(tmp_path / "d", overrides=["seed=1"], data="other"),
        make_run(tmp_path / "e", overrides=["seed=1", "editor.lr=2"]),
    ]
    first, second, repeated, other, lr = configurations(open_runs(told))
    assert first == second == "stableedit #1"
    assert [repeated, other, lr] == ["stableedit #2", "stableedit #3", "stableedit lr=2"]


@pytest.mark.parametrize(
    "settings",
    [
        ("evaluation.prompt=raw", "evaluation.prompt=chat"),
        ("evaluation.max_new_tokens=8", "evaluation.max_new_tokens=16"),
    ],
)
def test_runs_of_which_other_questions_were_asked_are_not_averaged(tmp_path: Path, settings: tuple[str, str]) -> None:
    for seed, setting in enumerate(settings):
        make_run(tmp_path / str(seed), overrides=[f"seed={seed}", setting])
    names = [one.configuration for one in named_runs(open_runs([tmp_path]))]
    assert names == [f"stableedit {setting}" for setting in settings]


def test_runs_of_other_lengths_are_not_averaged(tmp_path: Path) -> None:
    """By what they have edited: of a small file no number of turns says all that 20 turns say."""

    def names(*edits: int) -> list[str]:
        for seed, (length, done) in enumerate(zip(("num_seq=20", "num_seq=null"), edits, strict=True)):
            run = tmp_path / str(done) / str(seed)
            make_run(run, overrides=[f"seed={seed}", length])
            results = json.loads((run / "results.json").read_text())
            (run / "results.json").write_text(json.dumps(results | {"cost": {"turns": 6, "edits": done}}))
        runs = [tmp_path / str(done) / str(seed) for seed, done in enumerate(edits)]
        return [one.configuration for one in named_runs(open_runs(runs))]

    assert len(set(names(2000, 2000))) == 1
    assert names(1000, 3000) == ["stableedit num_seq=20", "stableedit num_seq=null"]


def test_a_run_that_scored_its_base_model_alone_is_drawn_beside_others(tmp_path: Path) -> None:
    """As evaluate= leaves it where it names the base model itself."""
    results = json.loads((make_run(tmp_path / "base") / "results.json").read_text())
    (tmp_path / "base" / "results.json").write_text(json.dumps({"base": results["base"], "cost": {}}))
    make_run(tmp_path / "edited", editor="ultraedit")
    write_report([tmp_path / "base", tmp_path / "edited"], tmp_path / "report")
    assert "ultraedit" in text_of(tmp_path / "report" / "report.html")


def test_all_that_a_turn_spends_is_drawn(tmp_path: Path) -> None:
    """Of whatever parts, of which a turn may lack some."""
    lines = [turn_line(turn, 0) for turn in range(3)]
    for line in lines:
        line["seconds"] = {"targets": 7.0, "apply": 1.0, "own part": 2.0, "total": 10.0}
    del lines[1]["seconds"]["own part"]
    write_lines(make_run(tmp_path / "run") / "turns.jsonl", lines)
    picture = method_figures.time_over_turns(named_runs(open_runs([tmp_path])))
    assert picture is not None
    areas = picture.figure.axes[0].collections
    assert [area.get_label() for area in areas] == ["targets", "apply", "own part"]
    top = max(vertices[1] for vertices in areas[-1].get_paths()[0].vertices)
    assert top == pytest.approx(10.0)
    assert "Of a turn, targets: the search for target vectors; apply: the weights. " in picture.caption


def test_a_caption_promises_the_bands_that_are_drawn() -> None:
    assert score_figures.bands_note(4, 1) == "bands are 95% bootstrap intervals."
    assert (
        score_figures.bands_note(5) == "intervals of more than 4 curves would hide each other, and are in the tables."
    )
    assert "where there are no more than 4 curves" in score_figures.bands_note(5, 1)


@pytest.mark.parametrize(("count", "seeds"), [(1, 1), (3, 1), (6, 2), (10, 2)])
@pytest.mark.parametrize("on_the_way", [False, True])
def test_nothing_in_a_picture_is_covered_or_cut(tmp_path: Path, count: int, seeds: int, on_the_way: bool) -> None:
    """As laid out: each legend inside the figure and clear of all panels, which keep a size that can be read."""
    runs = sweep(tmp_path, count, seeds, on_the_way=on_the_way)
    for run in runs:
        by_age = {str(age): score(0.9 - age / 10) for age in (0, 1, 2)}
        results = json.loads((run / "results.json").read_text())
        results["retention"] = {name: {"by_age": by_age} for name in ("ES", "GS")}
        (run / "results.json").write_text(json.dumps(results))
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [picture for draw in DRAWINGS if (picture := draw(named_runs(open_runs(runs)))) is not None]
        for picture in found:
            picture.figure.draw_without_rendering()
            assert_readable(picture.figure, picture.name)
    assert {"retention", "updates"} <= {picture.name for picture in found}


def assert_readable(figure: Figure, name: str) -> None:
    panels = [ax.get_window_extent() for ax in figure.axes]
    for panel in panels:
        assert min(panel.width, panel.height) > 0.8 * figure.dpi, name
    legends = [*figure.legends, *(legend for ax in figure.axes if (legend := ax.get_legend()))]
    for legend in legends:
        box = legend.get_window_extent()
        assert not any(box.overlaps(panel) for panel in panels), name
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, name
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, name
    for ax in figure.axes:
        low, high = sorted(ax.get_ylim())
        for label in (one for one in ax.get_yticklabels() if low <= one.get_position()[1] <= high):
            assert label.get_window_extent().x0 >= figure.bbox.x0, (name, label.get_text())


def test_what_was_written_against_harm_is_a_curve_over_steps(tmp_path: Path) -> None:
    """Seeds of a step are averaged; configurations that differ in more have a curve each."""
    steps = {"a": [(1e-3, 1, 0.2), (1e-3, 2, 0.4), (2e-3, 1, 0.5)], "b": [(1e-3, 1, 0.6)]}
    for ablation, runs in steps.items():
        for step, seed, said in runs:
            overrides = [f"ablation={ablation}", f"model.lr={step}", f"seed={seed}"]
            folder = make_run(tmp_path / f"{ablation}{step}{seed}", overrides=overrides)
            about = json.loads((folder / "run.json").read_text())
            about["config"]["editor"]["lr"] = step
            (folder / "run.json").write_text(json.dumps(about))
            results = json.loads((folder / "results.json").read_text())
            results["final"] |= {"ES_gen": score(said), "LS_agree": score(0.5 - 100 * step), "perplexity": 40.0}
            (folder / "results.json").write_text(json.dumps(results))
    with matplotlib.rc_context(STYLE):
        picture = trade_figure.written_against_harm(named_runs(open_runs([tmp_path])))
    assert picture is not None
    lines = {line.get_label(): line.get_xydata() for line in picture.figure.axes[0].get_lines()}
    np.testing.assert_allclose(lines["stableedit a"], [[0.6, 0.3], [0.7, 0.5]])
    np.testing.assert_allclose(lines["stableedit b"], [[0.6, 0.6]])
    alone = [named for named in named_runs(open_runs([tmp_path])) if "lr=0.001" in named.label]
    assert trade_figure.written_against_harm(alone) is None, "there is one step of each"


def test_final_scores_are_points_with_intervals_a_run_a_row(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(k), overrides=[f"ablation={k}"], on_the_way=False) for k in range(3)]
    for place, run in enumerate(runs):
        results = json.loads((run / "results.json").read_text())
        results["base"] |= {"ES": score(0.2 + 0.1 * (place == 2)), "ES_gen": 0.0, "perplexity": 20.0}
        results["final"] |= {"ES": score(0.5 + place / 10), "ES_gen": 0.0, "perplexity": 30.0 * 10**place}
        (run / "results.json").write_text(json.dumps(results))
    named = named_runs(open_runs(runs))
    assert score_figures.scores(named) is None  # one point a run at the right edge would say nothing
    with matplotlib.rc_context(STYLE):
        picture = score_figures.comparison(named)
    assert picture is not None
    assert "Left out, being 0 for every run and for the base model: ES_gen." in picture.caption
    panels = {ax.get_title(loc="left"): ax for ax in picture.figure.axes}
    assert list(panels) == ["ES", "ES_seq", score_figures.TITLES["perplexity"], score_figures.TITLES["LS_kl"]]
    ax = panels["ES"]
    assert [label.get_text() for label in ax.get_yticklabels()] == [one.label for one in named]
    intervals = [container.lines[2][0].get_segments()[0] for container in ax.containers]
    np.testing.assert_allclose(intervals, [[[0.45 + k / 10, k], [0.55 + k / 10, k]] for k in range(3)])
    base = next(line for line in ax.get_lines() if line.get_linestyle() == ":")
    steps = [[0.2, -0.5], [0.2, 0.5], [0.2, 0.5], [0.2, 1.5], [0.3, 1.5], [0.3, 2.5]]
    np.testing.assert_allclose(base.get_xydata(), steps)
    assert [panels[title].get_xscale() for title in list(panels)[2:]] == ["log", "linear"]


@pytest.mark.parametrize(("worst", "scale"), [(60.0, "linear"), (4000.0, "log")])
def test_a_wrecked_model_does_not_hide_the_others_perplexity(tmp_path: Path, worst: float, scale: str) -> None:
    runs = [make_run(tmp_path / str(k), overrides=[f"ablation={k}"]) for k in range(2)]
    for run, perplexity in zip(runs, (40.0, worst), strict=True):
        lines = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
        for line in lines:
            line["scores"]["perplexity"] = 35.0 if line["stage"] == "base" else perplexity
        write_lines(run / "scores.jsonl", lines)
    picture = curve_figures.harm_over_edits(named_runs(open_runs(runs)))
    assert picture is not None
    panels = {ax.get_title(loc="left") or ax.get_title(): ax for ax in picture.figure.axes}
    ax = panels[score_figures.TITLES["perplexity"]]
    assert ax.get_yscale() == scale
    assert scale == "log" or ax.get_ylim()[0] == 0


def test_a_run_without_evaluations_on_the_way_is_drawn_before_and_after(tmp_path: Path) -> None:
    picture = score_figures.scores(named_runs(open_runs([make_run(tmp_path / "run", on_the_way=False)])))
    assert picture is not None
    (ax,) = picture.figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["ES  efficacy", "ES_seq  efficacy, all tokens"]
    means = [container.lines[0].get_xdata() for container in ax.containers]
    np.testing.assert_allclose(means, [[0.0, 0.0], [0.6, 0.3]])
    assert "LS_kl" in picture.caption


def test_scores_that_are_all_0_have_an_axis_that_can_be_read() -> None:
    ax = Figure().subplots()
    ax.plot([0, 1], [0.0, 0.0])
    percent_axis(ax)
    assert ax.get_ylim() == pytest.approx((-0.0002, 0.01))


def test_labels_tell_runs_apart(tmp_path: Path) -> None:
    told = [
        make_run(tmp_path / "a", overrides=["num_seq=4", "seed=1", "tracker.wandb=disabled"]),
        make_run(tmp_path / "b", overrides=["num_seq=4", "seed=2", "dataset.train_path=/some/where/x.json"]),
        make_run(tmp_path / "c", overrides=["num_seq=4", "editor=ultraedit"], editor="ultraedit"),
        make_run(tmp_path / "d", overrides=["num_seq=4", "editor=ultraedit"], editor="ultraedit"),
    ]
    names = ["stableedit seed=1", "stableedit train_path=x.json seed=2", "ultraedit #1", "ultraedit #2"]
    assert labels(open_runs(told)) == names
    assert labels(open_runs(told[:1])) == ["stableedit"]


def test_records_are_paired_by_row_and_only_the_final_ones() -> None:
    def lines(rows: dict[int, int], stage: str = "final") -> list[dict[str, Any]]:
        return [
            {"stage": stage, "place": row, "index": row, "protocol": "ES", "correct": n, "tokens": 2}
            | {"exact": n == 2, "contains": n == 2}
            for row, n in rows.items()
        ]

    first = record_scores([*lines({3: 0, 1: 1, 2: 2}), *lines({1: 2}, "eval")], "final")
    second = record_scores(lines({2: 2, 1: 2, 9: 0, 0: 0}), "final")
    differences = compare([(first, second)])
    assert {name: (one.mean, one.n) for name, one in differences.items()} == {
        "ES": (0.25, 2), "ES_seq": (0.5, 2), "ES_gen": (0.5, 2), "ES_contains": (0.5, 2),
    }  # fmt: skip


def difference_of(first: np.ndarray, second: np.ndarray, seed: int = 0) -> Difference:
    return paired_difference(second - first, np.ones(len(first), dtype=int), seed)


def test_sign_flips_agree_with_all_of_them() -> None:
    """Ten pairs: the exact p-value from all 1,024 flips; Monte Carlo error is 3 sigma = 0.015 at most."""
    rng = np.random.default_rng(3)
    for shift in (0.0, 0.2, 0.5):
        first, second = rng.integers(0, 4, 10) / 3, rng.integers(0, 4, 10) / 3 + shift
        difference = second - first
        flips = np.array(list(itertools.product([-1, 1], repeat=10)))
        exact = (np.abs(flips @ difference) >= abs(difference.sum()) - 1e-9).mean()
        assert difference_of(first, second).p == pytest.approx(exact, abs=0.016)


def test_far_from_chance_a_bound_tells_what_flips_cannot() -> None:
    """With 300 records +-1 the exact p is a binomial tail; the bound is above it, and far below 1 / 10,001."""
    difference = np.repeat([1.0, -1.0], [200, 100])
    exact = 2 * sum(math.comb(300, k) for k in range(101)) / 2**300
    p = paired_difference(difference, np.ones(300, dtype=int)).p
    assert p is not None
    assert exact < p < 1e-6


def test_seeds_are_averaged_by_record() -> None:
    """By hand: all numbers of all seeds; a record's numbers stay together, so copies of a seed narrow no interval."""
    rng = np.random.default_rng(0)
    one = {"ES": (np.arange(50), rng.random(50))}
    few = {"ES": (np.arange(40, 60), rng.random(20))}
    both = average([one, few])["ES"]
    assert both.mean == pytest.approx(np.concatenate([one["ES"][1], few["ES"][1]]).mean())
    assert both.n == 60
    alone, copied = average([one])["ES"], average([one] * 4)["ES"]
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high))
    zero = {"ES": (np.arange(50), np.zeros(50))}
    once, often = compare([(zero, one)])["ES"], compare([(zero, one)] * 4)["ES"]
    assert (often.mean, often.low, often.high, often.p, often.n) == pytest.approx(
        (once.mean, once.low, once.high, once.p, 50)
    )


def test_numbers_of_single_runs_stand_beside_their_intervals(tmp_path: Path) -> None:
    html = write_report([make_run(tmp_path / name, overrides=[f"name={name}"]) for name in ("a", "b")]).read_text()
    table = html[html.index("<h2>Scores of each run</h2>") :]
    assert table[: table.index("<tr>")].endswith('<table class="numbers">')  # stacked, an interval is a line of its own
    assert "white-space: nowrap" in html


def test_configurations_are_compared_within_seeds_by_row(tmp_path: Path) -> None:
    """Seed 2 edits other facts in another order. Within a seed, b answers one record in ten more than a; the seeds'
    own levels differ by far more, and places mean nothing."""
    for seed, level, rows in ((1, 0, range(40)), (2, 1, range(79, 39, -1))):
        for name, gain in (("a", 0), ("b", 1)):
            right = [level + gain * (row % 10 == 0) for row in rows]
            order = list(zip(rows, right, strict=True))[:: 1 - 2 * gain]
            overrides = [f"seed={seed}", f"ablation={name}"]
            make_run(
                tmp_path / f"{seed}{name}", overrides=overrides, rows=[i for i, _ in order], right=[n for _, n in order]
            )
    text = text_of(write_report([tmp_path]))
    assert "averaged over seeds" in text
    assert "stableedit a 25.0 [" in text
    assert re.search(r"stableedit b 30\.0 \[[^]]*\] 60\.0 · 60\.0", text)  # the seeds' own, as results.json says
    assert re.search(r"stableedit b \+5\.0 \[\+1\.\d, \+8\.\d\] p = 0\.0", text)
    assert "within each seed" in text


def test_a_seed_that_one_configuration_lacks_is_left_out(tmp_path: Path) -> None:
    gain = [int(row % 10 == 0) for row in range(40)]
    make_run(tmp_path / "0", overrides=["seed=1", "ablation=a"], right=[0] * 40)
    make_run(tmp_path / "1", overrides=["seed=2", "ablation=a"], right=[1] * 40)
    make_run(tmp_path / "2", overrides=["seed=1", "ablation=b"], right=gain)
    difference = tables(named_runs(open_runs([tmp_path]))).differences["stableedit b"]
    assert not isinstance(difference, str)
    assert difference["ES"].mean == pytest.approx(0.05)


def test_p_values_are_adjusted_for_the_comparisons_of_their_score() -> None:
    def of(p: float | None) -> Difference:
        return Difference(0.1, 0.0, 0.2, 9, p)

    tests = {"b": {"ES": of(0.01), "LS_gen": of(None)}, "c": {"ES": of(0.04), "LS_gen": of(0.04)}, "d": "why not"}
    found = adjusted(tests)
    assert found == pytest.approx({("b", "ES"): 0.02, ("c", "ES"): 0.04, ("c", "LS_gen"): 0.04})


def test_a_difference_of_nothing_is_no_difference() -> None:
    same = difference_of(np.array([0.0, 1.0, 0.5]), np.array([0.0, 1.0, 0.5]))
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, None)


def test_intervals_cover_and_false_alarms_are_as_rare_as_said() -> None:
    """400 pairs of runs without a true difference: 95% intervals hold it in 93% to 97%, 5% tests alarm in 3% to 7%.

    Of 400, 95% is 380 with a sigma of 4.4; both bounds are about two of them away, and the seed is fixed.
    """
    rng = np.random.default_rng(0)
    covered = alarms = 0
    for trial in range(400):
        known = rng.random(120) < 0.4  # records that both runs get right, or wrong, more often together
        first, second = (np.where(rng.random(120) < 0.7, known, rng.random(120) < 0.4).astype(float) for _ in range(2))
        one = difference_of(first, second, seed=trial)
        covered += one.low <= 0 <= one.high
        alarms += one.p is not None and one.p < 0.05
    assert 372 <= covered <= 388, covered
    assert 12 <= alarms <= 28, alarms


def test_holm_by_hand() -> None:
    """Smallest times 4, next times 3, ...; never below the one before, never above 1."""
    assert holm([0.01, 0.04, 0.03, 0.6]) == pytest.approx([0.04, 0.09, 0.09, 0.6])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


# ---------------------------------------------------------------------------------------------------------------------
# What curves are drawn from


def test_columns_keep_the_place_of_what_is_missing() -> None:
    lines = [{"phase": "edit", "a": 1}, {"phase": "meta_train", "a": 9}, {"phase": "warm_up", "b": {"c": [2, None]}}]
    turns = columns_by_phase(lines)["turns"]
    np.testing.assert_array_equal(turns["a"], [1, np.nan])
    np.testing.assert_array_equal(turns["b/c/0"], [np.nan, 2])
    np.testing.assert_array_equal(turns["warm_up"], [0, 1])
    assert "b/c/1" not in turns


def test_the_cosine_of_whole_updates_is_that_of_the_dense_ones() -> None:
    rng = np.random.default_rng(1)
    updates = {name: rng.normal(size=(5, 12)) * size for name, size in (("a", 1.0), ("b", 3.0))}  # (turns, entries)
    turn = np.arange(5.0)
    modules = {
        name: {
            "update_norm": np.linalg.norm(one, axis=1),
            "cosines/0": np.array([np.nan, *(_cosine(one[t], one[t - 1]) for t in range(1, 5))]),
        }
        for name, one in updates.items()
    }
    whole = np.concatenate(list(updates.values()), axis=1)
    found = method_figures.whole_cosine(modules, "cosines/0", turn - 1, turn)
    assert np.isnan(found[0])
    np.testing.assert_allclose(found[1:], [_cosine(whole[t], whole[t - 1]) for t in range(1, 5)])


def _cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


def test_orthogonal_updates_drift_as_the_dotted_line_says() -> None:
    start, updates = np.full(50, 2.0), 3.0 * np.eye(50)[:6]
    drift = np.linalg.norm(np.cumsum(updates, axis=0), axis=1) / np.linalg.norm(start)
    columns = {"update_norm": np.full(6, 3.0), "drift": drift}
    np.testing.assert_allclose(method_figures.orthogonal_drift(columns), drift)
    columns["update_norm"][2] = np.nan  # a turn that was passed over
    np.testing.assert_allclose(method_figures.orthogonal_drift(columns)[3:], drift[2:5])


@pytest.mark.parametrize("over_log", [False, True])
def test_a_curve_of_20000_turns_is_drawn_with_few_points(over_log: bool) -> None:
    ax = Figure().subplots()
    x = np.arange(1, 20_001.0)
    curve(ax, x, np.where(x % 7 == 0, np.nan, x), over_log=over_log, color="black")
    (line,) = ax.get_lines()
    middle, median = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    assert MOST_POINTS / 2 < len(middle) <= MOST_POINTS
    assert np.abs(median / middle - 1).max() < 0.05
    assert (middle < 100).sum() == (pytest.approx(75, abs=15) if over_log else 2)  # of a curve, where it begins


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["model.layers.28.mlp.down_proj", "model.layers.29.mlp.down_proj"], ["layers.28", "layers.29"]),
        (["h.1.mlp.up", "h.2.mlp.gate"], ["h.1.mlp.up", "h.2.mlp.gate"]),
        (["model.layers.28.mlp.down_proj"], ["28.mlp.down_proj"]),
        (["a.x", "a.y"], ["a.x", "a.y"]),
        (["x", "y"], ["x", "y"]),
    ],
)
def test_short_names_of_modules(names: list[str], short: list[str]) -> None:
    assert list(short_module_names(names).values()) == short


# ---------------------------------------------------------------------------------------------------------------------
# Hidden states


def test_principal_components_keep_the_distances_of_a_plane(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection.importlib.util, "find_spec", lambda name: None)
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(30, 2)) @ np.linalg.qr(rng.normal(size=(9, 2)))[0].T + 5
    points, how = projection.project(plane)
    assert how.startswith("PCA")

    def distances(x: np.ndarray) -> np.ndarray:
        return np.linalg.norm(x[:, None] - x, axis=-1)

    np.testing.assert_allclose(distances(points), distances(plane), atol=1e-9)


def test_hidden_states_before_and_after_are_of_the_same_records(tmp_path: Path) -> None:
    """The state of a question is here its first token: the base model's stay when a resumed run asks for them again."""
    records = [
        EditRecord(i, Question(str(i), "a"), locality=None if i % 2 else Question(str(100 + i), "b")) for i in range(20)
    ]
    factor = 1.0

    def states(sequences: Sequence[TokenSequence]) -> torch.Tensor:
        return torch.tensor([[factor * sequence.ids[0], 1.0] for sequence in sequences])

    def tokenize(questions: Sequence[Question]) -> list[TokenSequence]:
        return [TokenSequence((int(question.prompt), 0), 1) for question in questions]

    model: Any = SimpleNamespace(hidden_states=states, all_ranks=bool)
    HiddenStates(model, records, tokenize, tmp_path, 8, seed=3).keep("base")
    factor = -1.0
    resumed = HiddenStates(model, records, tokenize, tmp_path, 8, seed=3)
    resumed.keep("base")
    resumed.keep("edited")
    kept = load_file(tmp_path / "hidden_states.safetensors")
    assert set(kept) == {"base/edit", "base/locality", "edited/edit", "edited/locality"}
    assert kept["base/edit"].shape == (8, 2)
    assert (kept["base/edit"][:, 0] > -1).all()
    assert torch.equal(kept["base/edit"][:, 0], -kept["edited/edit"][:, 0])
    assert torch.equal(kept["base/locality"][:, 0], -kept["edited/locality"][:, 0])
    assert set(kept["base/locality"][:, 0].int().tolist()) == {
        100 + int(i) for i in kept["base/edit"][:, 0].tolist() if i % 2 == 0
    }
    assert [path.name for path in tmp_path.iterdir()] == ["hidden_states.safetensors"]


def test_no_hidden_states_where_none_are_wanted(tmp_path: Path) -> None:
    def never(_: Any) -> Any:
        raise AssertionError

    model: Any = SimpleNamespace(hidden_states=never, all_ranks=bool)
    HiddenStates(model, [], never, tmp_path, 0, seed=3).keep("base")
    assert not list(tmp_path.iterdir())
