"""The table of methods: what is in a group, what is bold, and each of its four files read back."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.report.__main__ import main
from harness.report.curve_figures import harm_over_edits
from harness.report.drawing import Picture, named_runs
from harness.report.leaderboard import Group, Row, board_of
from harness.report.leaderboard_files import files, latex_text
from harness.report.runs import open_runs
from harness.report.trade_figure import WRECKED, methods_against_harm
from tests.report.test_report import make_run, score, text_of, write_lines

EVERY = 40  # records


def made(
    folder: Path, scores: Mapping[str, Sequence[int]], *overrides: str, editor: str = "plain", **more: Any
) -> Path:
    """A run whose final scores are these: of `ES`, say, 1 for each record that was right; rows count from 0."""
    first = more.pop("first_row", 0)
    numbers = more.pop("numbers", {})
    known = more.pop("known", 0)  # to the base model: the first so many
    run = make_run(folder, overrides=overrides, editor=editor, **more)
    lines = [
        {"stage": stage, "place": row, "index": first + row, "protocol": name}
        | {"correct": right if stage == "final" else int(row < known), "tokens": 1}
        for stage in ("base", "final")
        for name, every in scores.items()
        for row, right in enumerate(every)
    ]
    write_lines(run / "records.jsonl", lines)
    if (run / "results.json").is_file():
        means = {name: score(sum(every) / len(every)) for name, every in scores.items()}
        base = {name: score(known / len(every)) for name, every in scores.items()}
        results = {"base": base, "final": means | numbers}
        cost = {"turns": 6, "edits": 40, "peak_memory": {"peak_bytes": 2**30}}
        (run / "results.json").write_text(json.dumps({**results, "cost": cost}))
    return run


def change(run: Path, section: str, key: str, value: Any) -> None:
    about = json.loads((run / "run.json").read_text())
    part = about["config"][section] if section in about["config"] else about[section]
    part[key] = value
    (run / "run.json").write_text(json.dumps(about))


def right(count: int, every: int = EVERY) -> list[int]:
    return [1] * count + [0] * (every - count)


def only_group(root: Path) -> Group:
    (group,) = board_of(open_runs([root])).groups
    return group


def bold(group: Group, column: str) -> set[str]:
    return {row.method for row in group.rows if column in row.cells and row.cells[column].bold}


def methods(group: Group) -> list[Row]:
    """All but the base model, which has no seeds of its own."""
    return [one for one in group.rows if one.seeds is not None]


def row(group: Group, method: str) -> Row:
    return next(one for one in group.rows if one.method == method)


def test_bold_is_what_the_test_cannot_tell_from_the_best(tmp_path: Path) -> None:
    for name, count in {"best": 36, "near": 35, "far": 10}.items():
        made(tmp_path / name, {"ES": right(count)}, editor=name)
    group = only_group(tmp_path)
    assert [one.method for one in group.rows] == ["base model", "best", "near", "far"]
    assert bold(group, "ES") == {"best", "near"}
    assert row(group, "far").cells["ES"].mean == pytest.approx(0.25)
    assert (group.data, group.model, group.edits) == ("zsre (qa prompts)", "tiny-model", 40)


def test_the_tests_of_a_column_are_corrected_for_each_other(tmp_path: Path) -> None:
    """Seven records of one sign: p = 2 / 2^7 alone, which is below 0.05, and not for one of six such comparisons."""
    made(tmp_path / "best", {"ES": right(20)}, editor="best")
    made(tmp_path / "a", {"ES": right(13)}, editor="a")
    assert bold(only_group(tmp_path), "ES") == {"best"}
    for name in "bcdef":
        made(tmp_path / name, {"ES": right(13)}, editor=name)
    assert bold(only_group(tmp_path), "ES") == {"best", *"abcdef"}


def test_which_is_the_best_is_read_off_the_same_data(tmp_path: Path) -> None:
    """So the p-value, 2/2^7 = 0.016 here, is adjusted for all pairs, also those of equals with the one below."""
    for name, count in (("best", EVERY), ("low", EVERY - 7)):
        made(tmp_path / name, {"ES": right(count)}, editor=name)
    assert bold(only_group(tmp_path), "ES") == {"best"}
    for name in "abc":
        made(tmp_path / name, {"ES": right(EVERY)}, editor=name)
    assert bold(only_group(tmp_path), "ES") == {"best", "low", *"abc"}  # four times that


def test_the_base_model_has_a_row_for_each_choice_of_seeds(tmp_path: Path) -> None:
    """It was asked about the facts of each: a method of one seed is read against that seed's."""
    for seed, known in ((1, 10), (2, 20)):
        made(tmp_path / f"two{seed}", {"ES": right(32)}, f"seed={seed}", editor="two", known=known)
    assert row(only_group(tmp_path), "base model").cells["ES"].by_seed == (10 / EVERY, 20 / EVERY)
    made(tmp_path / "one", {"ES": right(30)}, "seed=2", editor="one", known=20)
    group = only_group(tmp_path)
    assert [one.method for one in group.rows] == ["base model, seed=1,2", "base model, seed=2", "two", "one"]
    assert row(group, "base model, seed=1,2").cells["ES"].mean == pytest.approx(15 / EVERY)
    assert row(group, "base model, seed=2").cells["ES"].mean == pytest.approx(20 / EVERY)
    main([str(tmp_path), "--to", str(tmp_path / "page")])
    averaged = (tmp_path / "page" / "report.html").read_text().partition("averaged over seeds")[2]
    rows = re.findall(r"<td>(base model[^<]*)</td><td>([0-9.]+)", averaged.partition("</table>")[0])
    assert sorted(rows) == [("base model, seed=1,2", "37.5"), ("base model, seed=2", "50.0")]


def test_without_a_seed_in_common_each_run_has_to_be_below_each(tmp_path: Path) -> None:
    """Over all pairs the mean is below, by more than chance, and in one pair it is not: both are bold."""
    made(tmp_path / "best1", {"ES": right(38)}, "seed=1", editor="best")
    made(tmp_path / "best2", {"ES": right(18)}, "seed=2", editor="best")
    made(tmp_path / "other", {"ES": right(20)}, "seed=3", editor="other")
    assert bold(only_group(tmp_path), "ES") == {"best", "other"}
    shutil.rmtree(tmp_path / "other")
    made(tmp_path / "other", {"ES": right(10)}, "seed=3", editor="other")
    assert bold(only_group(tmp_path), "ES") == {"best"}


def test_numbers_of_seeds_stand_in_their_order(tmp_path: Path) -> None:
    """As folders of a sweep are sorted, job 10 comes before job 2."""
    for name in ("plain", "other"):
        for place, seed in ((10, 2), (2, 1)):
            made(tmp_path / name / str(place), {"ES": right(10 * seed)}, f"seed={seed}", editor=name)
    assert row(only_group(tmp_path), "plain").cells["ES"].by_seed == (10 / EVERY, 20 / EVERY)
    main([str(tmp_path), "--to", str(tmp_path / "page")])
    page = (tmp_path / "page" / "report.html").read_text()
    assert page.count("25.0 · 50.0") == 2
    assert "50.0 · 25.0" not in page
    assert "each seed's own mean (seeds 1, 2," in page


def test_of_equals_both_are_bold_and_one_alone_is_not(tmp_path: Path) -> None:
    made(tmp_path / "a", {"ES": right(9), "GS": right(3)}, editor="a")
    assert bold(only_group(tmp_path), "ES") == set()
    made(tmp_path / "b", {"ES": right(9)}, editor="b")
    group = only_group(tmp_path)
    assert bold(group, "ES") == {"a", "b"}
    assert bold(group, "GS") == set(), "nothing to compare it with"


def test_seeds_are_averaged_and_paired_within_a_seed(tmp_path: Path) -> None:
    """Each seed has records of its own; a is ahead by seven on each, which is 14 of one sign together."""
    for seed in (1, 2):
        for name, count in {"a": 20, "b": 13}.items():
            where = {"first_row": 1000 * seed, "numbers": {"perplexity": 10.0 * seed}}
            made(tmp_path / f"{name}{seed}", {"ES": right(count)}, f"seed={seed}", editor=name, **where)
    made(tmp_path / "c1", {"ES": right(15)}, "seed=1", editor="c", first_row=1000)
    group = only_group(tmp_path)
    assert [(one.method, one.seeds) for one in methods(group)] == [("a", 2), ("c", 1), ("b", 2)]
    assert row(group, "a").cells["ES"].mean == pytest.approx(0.5)
    assert row(group, "a").cells["perplexity"].mean == pytest.approx(15.0)
    assert row(group, "a").cells["perplexity"].low is None
    assert bold(group, "ES") == {"a", "c"}


def test_what_cannot_be_compared_is_apart(tmp_path: Path) -> None:
    """Another file of facts, another model, other prompts, another number of edits: each a group of its own."""
    made(tmp_path / "a", {"ES": right(9)}, data="first")
    made(tmp_path / "b", {"ES": right(9)}, data="second")
    change(made(tmp_path / "c", {"ES": right(9)}, data="first"), "model", "name_or_path", "some/other-model")
    change(made(tmp_path / "d", {"ES": right(9)}, data="first"), "evaluation", "prompt", "raw")
    more = made(tmp_path / "e", {"ES": right(9)}, data="first")
    results = json.loads((more / "results.json").read_text())
    results["cost"]["edits"] = 1000
    (more / "results.json").write_text(json.dumps(results))
    titles = [group.title for group in board_of(open_runs([tmp_path])).groups]
    assert titles == [
        "zsre (qa prompts), other-model, 40 edits",
        "zsre (qa prompts), facts first, tiny-model, 40 edits",
        "zsre (qa prompts), facts second, tiny-model, 40 edits",
        "zsre (qa prompts), tiny-model, 1,000 edits",
        "zsre (qa prompts, raw where it writes), tiny-model, 40 edits",
    ]


def test_methods_that_share_a_few_records_are_not_compared(tmp_path: Path) -> None:
    """Five of forty records cannot tell the worst from the best, which is no reason to set it bold."""
    made(tmp_path / "best", {"ES": right(40)}, "seed=1", editor="best")
    made(tmp_path / "near", {"ES": right(39)}, "seed=1", editor="near")
    made(tmp_path / "worst", {"ES": [0] * 40}, "seed=2", editor="worst", first_row=35)
    group = only_group(tmp_path)
    assert bold(group, "ES") == {"best", "near"}
    assert "worst is not compared with best, the best in ES: only 5 records were scored in both." in group.notes


def test_other_records_and_devices_are_noted(tmp_path: Path) -> None:
    made(tmp_path / "a", {"ES": right(9)}, "num_seq=4", editor="a")
    part = made(tmp_path / "b", {"ES": [0] * 21 + [1] * 9}, "num_seq=4", editor="b", first_row=20)
    about = json.loads((part / "run.json").read_text())
    (part / "run.json").write_text(json.dumps(about | {"device": "cuda"}))
    made(tmp_path / "c", {"ES": right(9)}, "num_seq=4", "seed=7", editor="c", first_row=500)
    notes = only_group(tmp_path).notes
    assert notes[0] == "All with num_seq=4."
    assert notes[1] == "Each run was scored on 30 to 40 records."
    both = "only the 20 that both were asked about are compared"
    assert f"ES: a was asked about 40 records and b, the best, about 30; {both}." in notes
    assert (
        "Seeds differ (a 42; b 42; c 7): compared within those that both have; without any, each run with each."
        in notes
    )
    assert "Runs were on different devices (cpu, cuda): their costs do not compare." in notes
    assert "c is not compared with b, the best in ES: no record was scored in both." in notes
    assert bold(only_group(tmp_path), "ES") == {"a", "b"}


def test_unfinished_runs_are_named_and_left_out(tmp_path: Path) -> None:
    made(tmp_path / "done", {"ES": right(9)})
    made(tmp_path / "going", {"ES": right(9)}, status="running")
    made(tmp_path / "broken", {"ES": right(9)}, status="failed", error="FloatingPointError: turn 3")
    scored = made(tmp_path / "scored", {"ES": right(9)})
    results = json.loads((scored / "results.json").read_text())
    (scored / "results.json").write_text(json.dumps(results | {"cost": {"seconds": {}}}))
    old = made(tmp_path / "old", {"ES": right(9)})
    about = json.loads((old / "run.json").read_text())
    del about["config"]["evaluation"]
    (old / "run.json").write_text(json.dumps(about))
    board = board_of(open_runs([tmp_path]))
    assert [len(group.rows) for group in board.groups] == [2]
    assert board.left_out == (
        f"{tmp_path / 'broken'}: left out, failed (FloatingPointError: turn 3)",
        f"{tmp_path / 'going'}: left out, still running, or was killed",
        f"{tmp_path / 'old'}: left out, its run.json has no evaluation.prompt: it does not say how its questions were "
        "put",
        f"{tmp_path / 'scored'}: left out, it has edited nothing",
    )
    for text in files(board, []).values():
        assert ("still running" in text) == ("method,seeds" not in text), "in all but the CSV"


def test_a_method_is_what_was_chosen_by_default_too(tmp_path: Path) -> None:
    """Runs of one command whose defaults changed are not averaged; a key that one code does not know is no change.

    Nor does it make one of two runs that know it, and differ in it.
    """
    runs = [made(tmp_path / name, {"ES": right(9)}, f"seed={seed}") for seed, name in enumerate("abcd")]
    for run, alpha in zip(runs, (10, 10, 1000), strict=False):
        change(run, "editor", "alpha", alpha)
    change(runs[0], "editor", "unknown_to_the_others", 1)
    rows = [(one.method, one.seeds) for one in methods(only_group(tmp_path))]
    assert sorted(rows) == [("plain alpha=10", 2), ("plain alpha=1000", 1), ("plain alpha=?", 1)]
    change(runs[3], "editor", "alpha", 10)
    rows = [(one.method, one.seeds) for one in methods(only_group(tmp_path))]
    assert sorted(rows) == [("plain alpha=10", 3), ("plain alpha=1000", 1)]
    change(runs[2], "editor", "alpha", 10)
    assert [(one.method, one.seeds) for one in methods(only_group(tmp_path))] == [("plain", 4)]


def test_other_trained_networks_make_other_methods(tmp_path: Path) -> None:
    """One that was loaded, another, and that which a run trained itself, whose file is what it learnt from."""
    for seed, network in enumerate(("good", "bad", None)):
        run = made(tmp_path / str(seed), {"ES": right(9)}, f"seed={seed}", editor="malmen")
        change(run, "editor", "load_checkpoint", network and f"nets/{network}")
        change(run, "inputs", "network" if network else "train", network or "questions")
    names = {one.method for one in methods(only_group(tmp_path))}
    assert names == {"malmen network file=good", "malmen network file=bad", "malmen network file=none"}


def test_text_that_the_seed_deals_out_makes_no_other_method(tmp_path: Path) -> None:
    """Unrelated questions are those of the warm-up turns; a text that somebody brought is the same in all seeds."""
    for seed in (1, 2):
        for text in ("unrelated", "corpus"):
            run = made(tmp_path / f"{text}{seed}", {"ES": right(9)}, f"seed={seed}", editor=text)
            change(run, "editor", "preserve_text", text)
            change(run, "inputs", "corpus", f"text {seed}")
    rows = {one.method: one.seeds for one in methods(only_group(tmp_path))}
    assert rows == {"unrelated": 2, "corpus corpus file=text 1": 1, "corpus corpus file=text 2": 1}


def test_a_number_is_one_setting_however_it_is_written(tmp_path: Path) -> None:
    for seed, (step, tokens) in enumerate((("1e-3", 400), ("2e-3", 400), ("1e-3", 900), ("0.001", 900))):
        made(tmp_path / str(seed), {"ES": right(9)}, f"seed={seed}", f"model.lr={step}", f"corpus.tokens={tokens}")
    names = {one.method: one.seeds for one in methods(only_group(tmp_path))}
    assert names == {
        "plain lr=0.001 corpus.tokens=400": 1,
        "plain lr=0.002 corpus.tokens=400": 1,
        "plain lr=0.001 corpus.tokens=900": 2,
    }


@pytest.mark.parametrize(
    ("one", "other"),
    [("model_device=cuda:0", "model_device=cuda:1"), ("num_seq=100", "num_seq=200"), ("editor.alpha=10.0", "keep=3"),
     ("dataset.valid_path=/a/x.json", "dataset.valid_path=/b/y.json")],
)  # fmt: skip
def test_what_decides_nothing_makes_no_other_method(tmp_path: Path, one: str, other: str) -> None:
    """Devices, how long a run goes on, where its data lay, and a default that somebody typed."""
    for seed, override in enumerate((one, other)):
        change(made(tmp_path / str(seed), {"ES": right(9)}, f"seed={seed}", override), "editor", "alpha", 10.0)
    assert [row.seeds for row in methods(only_group(tmp_path))] == [2]


def test_a_seed_run_again_is_told_apart_by_its_code(tmp_path: Path) -> None:
    for name, commit, dirty in (("a", "1" * 40, False), ("b", "2" * 40, True)):
        run = made(tmp_path / name, {"ES": right(9)}, "seed=1")
        about = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(about | {"git": {"commit": commit, "dirty": dirty}}))
    group = only_group(tmp_path)
    assert [one.method for one in methods(group)] == ["plain at 1111111", "plain at 2222222 with changes"]
    assert "Runs are of 2 versions of the code, which the CSV names." in group.notes
    assert "Made with uncommitted changes to the code: plain at 2222222 with changes." in group.notes
    _, last = csv.DictReader(files(board_of(open_runs([tmp_path / "b"])), [])["leaderboard.csv"].splitlines())
    assert last["code"] == "2222222 with changes"


def test_what_one_seed_denies_is_not_below_the_best(tmp_path: Path) -> None:
    """Over both orders b is far below, with p < 0.001; with seed 2 it is ahead, so another order may say so too."""
    for seed, (a, b) in {1: (40, 5), 2: (10, 12)}.items():
        for name, count in (("a", a), ("b", b)):
            made(tmp_path / f"{name}{seed}", {"ES": right(count)}, f"seed={seed}", editor=name, first_row=1000 * seed)
    assert bold(only_group(tmp_path), "ES") == {"a", "b"}
    made(tmp_path / "c1", {"ES": right(5)}, "seed=1", editor="c", first_row=1000)
    made(tmp_path / "c2", {"ES": right(9)}, "seed=2", editor="c", first_row=2000)
    assert bold(only_group(tmp_path), "ES") == {"a", "b"}


def test_more_ls_is_not_better(tmp_path: Path) -> None:
    made(tmp_path / "a", {"LS": right(30)}, editor="a")
    made(tmp_path / "b", {"LS": right(9)}, editor="b")
    assert bold(only_group(tmp_path), "LS") == set()


def test_answers_of_different_lengths_are_not_compared(tmp_path: Path) -> None:
    for name, length in (("a", 8), ("b", 16)):
        run = made(tmp_path / name, {"ES": right(30)}, editor=name, numbers={"ES_gen": score(0.5)})
        change(run, "evaluation", "max_new_tokens", length)
        lines = (run / "records.jsonl").read_text().splitlines()
        write_lines(run / "records.jsonl", [json.loads(line) | {"exact": True, "contains": True} for line in lines])
    group = only_group(tmp_path)
    assert bold(group, "ES") == {"a", "b"}
    assert bold(group, "ES_gen") == set()
    assert (
        "Runs differ in evaluation.max_new_tokens (8: a; 16: b), which leaves no comparison of ES_gen." in group.notes
    )


def test_answers_cut_into_other_tokens_are_not_compared(tmp_path: Path) -> None:
    """With a token that is nearly given more of them are right; whole answers that a model wrote are what they are."""
    for name, tokens in (("a", "joint"), ("b", "separate")):
        run = made(
            tmp_path / name, {"ES": right(30 if name == "a" else 3)}, editor=name, numbers={"ES_gen": score(0.1)}
        )
        change(run, "dataset", "answer_tokens", tokens)
    group = only_group(tmp_path)
    assert bold(group, "ES") == set()
    assert (
        "Runs differ in dataset.answer_tokens (joint: a; separate: b), which leaves no comparison of ES." in group.notes
    )


def test_a_longer_run_stands_as_it_was_after_as_many_edits(tmp_path: Path) -> None:
    """40 edits of a short run beside a run of 80, scored after 20 and 40 on its way; its end has a table of its own."""
    made(tmp_path / "short", {"ES": right(9)}, editor="short")
    long = made(tmp_path / "long", {"ES": right(3)}, editor="long", turns=10)
    results = json.loads((long / "results.json").read_text())
    results["cost"]["edits"] = 80
    (long / "results.json").write_text(json.dumps(results))
    lines = [json.loads(line) for line in (long / "records.jsonl").read_text().splitlines()]
    on_the_way = [
        {"stage": "eval", "place": row, "index": row, "protocol": "ES", "correct": int(row < count), "tokens": 1}
        for rows, count in ((20, 20), (40, 30))
        for row in range(rows)
    ]
    write_lines(long / "records.jsonl", [*on_the_way, *lines])
    evaluations = [
        {"turn": turn, "stage": stage, "scores": {"ES": score(mean)}}
        for turn, stage, mean in ((0, "base", 0.0), (4, "eval", 1.0), (6, "eval", 0.75), (10, "final", 0.1))
    ]
    write_lines(long / "scores.jsonl", evaluations)
    at_40, at_80 = board_of(open_runs([tmp_path])).groups
    assert (at_40.edits, [one.method for one in at_40.rows]) == (40, ["base model", "long", "short"])
    assert row(at_40, "long").cells["ES"].mean == pytest.approx(0.75)
    assert row(at_40, "long").cells["seconds_per_edit"].mean == pytest.approx(0.215)
    assert "peak_bytes" not in row(at_40, "long").cells
    assert bold(at_40, "ES") == {"long"}
    assert "Longer runs, as they stood after as many edits: long." in at_40.notes
    assert [one.method for one in at_80.rows] == ["base model", "long"]
    assert row(at_80, "long").cells["ES"].mean == pytest.approx(3 / 40)
    change(long, "editor", "preheat_mode", "middle")  # behind turns that a shorter run has elsewhere
    board = board_of(open_runs([tmp_path]))
    assert [one.method for one in board.groups[0].rows] == ["base model", "short"]
    where = "its warm-up is where a shorter run has none (editor.preheat_mode=middle)"
    assert board.left_out == (f"{long}: left out where it had 40 edits, {where}",)
    change(long, "editor", "preheat_mode", "start")
    write_lines(long / "records.jsonl", [*on_the_way[:20], *lines])
    board = board_of(open_runs([tmp_path]))
    assert len(board.groups[0].rows) == 2, "a piece is missing: which is which is not known"
    unknown = "its records.jsonl does not say which evaluation a line is of"
    assert board.left_out == (f"{long}: left out where it had 40 edits, {unknown}",)
    one_each = [{**on_the_way[0], "after": 4}, {**on_the_way[59], "after": 6}]
    write_lines(long / "records.jsonl", [*one_each, *lines])
    assert row(board_of(open_runs([tmp_path])).groups[0], "long").cells["ES"].mean == 0


def test_costs(tmp_path: Path) -> None:
    """Four edit turns of 10 facts and 2.15 s each; the two of warm-up do not count. Peaks of two GPUs are added up."""
    run = made(tmp_path / "a", {"ES": right(9)})
    cells = row(only_group(tmp_path), "plain").cells
    assert (cells["seconds_per_edit"].mean, cells["peak_bytes"].mean) == (pytest.approx(0.215), 2**30)
    assert "gpu_peak_bytes" not in cells
    results = json.loads((run / "results.json").read_text())
    results["cost"]["peak_memory"] |= {"cuda0_peak_bytes": 3, "cuda1_peak_bytes": 4}
    (run / "results.json").write_text(json.dumps(results))
    assert row(only_group(tmp_path), "plain").cells["gpu_peak_bytes"].mean == 7


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Two methods, of which one lacks a score and the other has a name that every format must escape."""
    one = {"ES": right(30), "GS": right(8)}
    made(tmp_path / "a", one, "ablation=50%_a&b|<c>{d}#$~^", editor="ft_m", numbers={"LS_kl": score(0.25)})
    made(tmp_path / "b", {"ES": right(10)}, editor="other", numbers={"perplexity": 41.23456789012345})
    made(tmp_path / "c", {"ES": right(10)}, status="failed")
    main(["--leaderboard", str(tmp_path), "--to", str(tmp_path / "out")])
    return tmp_path / "out"


def test_the_csv_reads_back_in_full_precision(written: Path) -> None:
    with (written / "leaderboard.csv").open(newline="") as file:
        base, first, second = csv.DictReader(file)
    assert (base["method"], base["seeds"], base["ES"]) == ("base model", "", "0.0")
    assert first["method"] == "ft_m 50%_a&b|<c>{d}#$~^"
    assert (first["data"], first["model"], first["edits"], first["seeds"]) == (
        "zsre (qa prompts)",
        "tiny-model",
        "40",
        "1",
    )
    assert float(first["ES"]) == 0.75
    assert 0.5 < float(first["ES_low"]) < 0.75 < float(first["ES_high"]) < 0.95
    assert (first["LS_kl"], first["LS_kl_low"]) == ("0.25", repr(0.25 - 0.05))
    assert first["bold"] == "ES"
    assert first["perplexity"] == second["GS"] == second["GS_low"] == second["bold"] == ""
    assert float(second["perplexity"]) == 41.23456789012345
    assert "LS" not in first, "none of the runs has it"


def test_the_markdown_is_one_table_with_bold_and_empty_cells(written: Path) -> None:
    lines = [line for line in (written / "leaderboard.md").read_text().splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    assert len({len(one) for one in cells}) == 1, "escapes hold the table together"
    head, _, _, first, second = ([cell.strip() for cell in one] for one in cells)
    assert first[0] == r"ft_m 50%_a&b\|\<c\>{d}#$~^"
    assert re.fullmatch(r"\*\*75\.0\*\* \[\d\d\.\d, \d\d\.\d\]", first[head.index("ES")])
    assert second[head.index("ES")].startswith("25.0 [")
    assert second[head.index("GS")] == ""
    assert second[head.index("perplexity")] == "41.235"
    text = (written / "leaderboard.md").read_text()
    assert "An empty cell: the runs have no such number." in text
    assert "left out, failed" in text


def test_the_page_needs_nothing_beside_it(written: Path) -> None:
    html = (written / "leaderboard.html").read_text()
    assert not re.search(r"(src|href)=|http|<script", html)
    assert "ft_m 50%_a&amp;b|&lt;c&gt;{d}#$~^" in html
    assert re.findall(r"<b>.*?</b>", html) == ["<b>75.0</b>"]
    assert "Holm" in text_of(written / "leaderboard.html")


def test_runs_scored_on_the_way_are_drawn_inside_the_page_and_beside_the_markdown(tmp_path: Path) -> None:
    for name, status in (("a", "finished"), ("b", "finished"), ("c", "failed")):
        run = made(tmp_path / name, {"ES": right(9)}, editor=name, status=status)
        lines = [
            {"stage": stage, "turn": turn, "scores": {"ES_gen": score(0.1 * turn), "LS_agree": score(0.5)}}
            for turn, stage in ((0, "base"), (4, "eval"), (6, "final"))
        ]
        lines += [{"stage": "retention", "turn": 5, "scores": {f"{one}_age1": score(0.5)}} for one in ("ES", "GS")]
        write_lines(run / "scores.jsonl", lines)
    main(["--leaderboard", str(tmp_path), "--to", str(tmp_path / "out")])
    pictures = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {"written", "harm", "age"}
    html = (tmp_path / "out" / "leaderboard.html").read_text()
    assert html.count('src="data:image/png;base64,') == len(pictures)
    markdown = (tmp_path / "out" / "leaderboard.md").read_text()
    assert set(re.findall(r"!\[.*?\]\((\w+)\.png\)", markdown)) == pictures


def test_curves_are_means_over_seeds_and_a_wrecked_model_ends_beyond_the_edge(tmp_path: Path) -> None:
    """The mean is drawn where both seeds have a score; a shorter run of another method stands in the same picture."""
    for name, seed, turns, perplexity in (
        ("a", 1, (3, 4, 6), 40.0), ("a", 2, (4, 6), 60.0), ("b", 1, (4,), 50.0), ("c", 1, (4, 6), 5e8),
    ):  # fmt: skip
        run = made(tmp_path / f"{name}{seed}", {"ES": right(9)}, f"seed={seed}", f"num_seq={max(turns)}", editor=name)
        scores = [{"turn": turn, "stage": "eval", "scores": {"perplexity": perplexity * turn}} for turn in turns]
        write_lines(run / "scores.jsonl", [{"turn": 0, "stage": "base", "scores": {"perplexity": 30.0}}, *scores])
    runs = named_runs(open_runs([tmp_path]), as_scored=False)
    picture = harm_over_edits(runs)
    assert picture is not None
    (ax,) = picture.figure.axes
    drawn = [np.asarray(line.get_xydata()).tolist() for line in ax.get_lines() if line.get_linestyle() != ":"]
    assert [[20, 200], [40, 300]] in drawn, "the mean of two seeds"
    assert [[10, 120], [20, 160], [40, 240]] in drawn, "one of them, which was scored once more"
    assert ax.get_ylim()[1] == pytest.approx(1000 * 120)
    assert picture.caption.endswith(
        "Beyond the upper edge: c, up to 3e+09. The base model is asked about all facts of a run."
    )
    assert {text.get_text() for text in picture.figure.legends[0].get_texts()} == {"a", "b", "c", "base model"}


def drawn_marks(paths: Sequence[Path]) -> Picture | None:
    runs = open_runs(paths)
    return methods_against_harm(named_runs(runs), {run.folder: run.results["final"] for run in runs})


def test_methods_are_drawn_against_their_harm(tmp_path: Path) -> None:
    """A mark a method that ended there, at the mean over its seeds; who lacks LS_agree is named."""
    for name, seed, moved in (("a", 1, 0.2), ("a", 2, 0.4), ("b", 1, 0.6)):
        harm = {"LS_agree": score(1 - moved), "ES_gen": score(0.5), "perplexity": 30.0}
        made(tmp_path / f"{name}{seed}", {"ES": right(9)}, f"seed={seed}", editor=name, numbers=harm)
    picture = drawn_marks([tmp_path])
    assert picture is not None
    harm_axis, _ = picture.figure.axes
    means = {line.get_label(): np.asarray(line.get_xydata()).tolist() for line in harm_axis.get_lines()}
    assert means["a"] == [[pytest.approx(0.3), 0.5]]
    assert means["b"] == [[pytest.approx(0.6), 0.5]]
    assert "not here" not in picture.caption
    made(tmp_path / "c1", {"ES": right(9)}, "seed=1", editor="c")
    picture = drawn_marks([tmp_path])
    assert picture is not None
    assert picture.caption.endswith(" Not scored so, so not here: c.")
    assert drawn_marks([tmp_path / "a1", tmp_path / "a2"]) is None


def test_methods_are_drawn_as_they_stood_after_as_many_edits(tmp_path: Path) -> None:
    """Of a run that went on not its final scores; the table's group says which."""
    for name in "ab":
        made(tmp_path / name, {"ES": right(9)}, editor=name, numbers={"LS_agree": score(0.1), "ES_gen": score(0.1)})
    runs = open_runs([tmp_path])
    then = {"LS_agree": score(0.75), "ES_gen": score(0.5)}
    picture = methods_against_harm(named_runs(runs), {run.folder: then for run in runs})
    assert picture is not None
    (harm_axis,) = picture.figure.axes
    assert [line.get_xydata().tolist() for line in harm_axis.get_lines() if line.get_label() in "ab"] == [
        [[0.25, 0.5]]
    ] * 2


def test_a_wrecked_model_does_not_push_the_others_together(tmp_path: Path) -> None:
    """It stands at the edge of perplexity, and is named."""
    for name, perplexity in {"a": 30.0, "b": 200.0, "c": 2e10}.items():
        harm = {"LS_agree": score(0.5), "ES_gen": score(0.5), "perplexity": perplexity}
        made(tmp_path / name, {"ES": right(9)}, editor=name, numbers=harm)
    picture = drawn_marks([tmp_path])
    assert picture is not None
    _, text_axis = picture.figure.axes
    assert {line.get_label(): line.get_xdata()[0] for line in text_axis.get_lines()}["c"] == WRECKED * 30.0
    assert picture.caption.endswith(" At the right edge, for its perplexity is larger still: c, 2e+10.")


def test_a_method_with_one_wrecked_seed_stands_at_its_mean_or_the_edge(tmp_path: Path) -> None:
    for name, seed, perplexity in (("a", 1, 30.0), ("b", 1, 50.0), ("b", 2, 1e6), ("c", 1, 50.0), ("c", 2, 850.0)):
        harm = {"LS_agree": score(0.5), "ES_gen": score(0.5), "perplexity": perplexity}
        made(tmp_path / f"{name}{seed}", {"ES": right(9)}, f"seed={seed}", editor=name, numbers=harm)
    picture = drawn_marks([tmp_path])
    assert picture is not None
    _, text_axis = picture.figure.axes
    marks = {line.get_label(): line.get_xdata()[0] for line in text_axis.get_lines()}
    assert (marks["b"], marks["c"]) == (WRECKED * 30.0, 450.0)


def test_warm_up_turns_name_those_alone_that_warm_up(tmp_path: Path) -> None:
    """Asked of one that does not, they are no other method."""
    made(tmp_path / "a1", {"ES": right(9)}, "seed=1", "num_seq_zsre=5", editor="a")
    made(tmp_path / "a2", {"ES": right(9)}, "seed=1", "num_seq_zsre=3", editor="a")
    for seed, asked in ((1, ("num_seq_zsre=5",)), (2, ())):
        run = made(tmp_path / f"b{seed}", {"ES": right(9)}, f"seed={seed}", *asked, editor="b")
        change(run, "editor", "preheat_mode", "none")
        change(run, "dataset", "num_warm_up", len(asked) * 5)
    for place, turns in (("a1", 5), ("a2", 3)):
        change(tmp_path / place, "dataset", "num_warm_up", turns)
    group = only_group(tmp_path)
    assert {(one.method, one.seeds) for one in methods(group)} == {
        ("a num_seq_zsre=5", 1), ("a num_seq_zsre=3", 1), ("b", 2),
    }  # fmt: skip
    shutil.rmtree(tmp_path / "a2")
    group = only_group(tmp_path)
    assert {one.method for one in methods(group)} == {"a", "b"}
    assert "All with num_seq_zsre=5." in group.notes


def test_the_latex_is_whole(written: Path) -> None:
    """No character is left that TeX would take for a command; rows have a cell a column; braces and tables close."""
    text = (written / "leaderboard.tex").read_text()
    scores, costs = re.findall(r"\\begin\{tabular\}.*?\\end\{tabular\}", text, flags=re.S)
    for table in (scores, costs):
        rows = [line for line in table.splitlines() if line.endswith(r"\\")]
        (columns,) = re.findall(r"\\begin\{tabular\}\{([lr]+)\}", table)
        widths = [
            sum(int(width or 1) for width in re.findall(r"(?:^\{\}|(?<!\\)&)(?: ?\\multicolumn\{(\d+)\})?", line))
            for line in rows
        ]
        assert set(widths) == {len(columns)}
        assert all(line.startswith("{}") for line in rows)
    bare = re.sub(r"\\.", "", text)
    assert bare.count("{") == bare.count("}")
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert re.findall(r"(?<!\\)[#~^]", re.sub(r"\\label\{[^}]*\}", "", body)) == []
    assert set(re.findall(r"(?<!\\)\$.*?(?<!\\)\$", body)) == {r"$\uparrow$", r"$\downarrow$"}
    assert {line for line in body.splitlines() if re.search(r"(?<!\\)%", line)} == {
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
    }
    for name in ("table*", "tabular"):
        assert text.count(rf"\begin{{{name}}}") == text.count(rf"\end{{{name}}}") == 2
    assert r"\textbf{75.0}" in scores
    assert len(set(re.findall(r"\\label\{(.*?)\}", text))) == 2
    assert "seconds an edit" in costs


def test_latex_escapes() -> None:
    assert latex_text(r'a\b & 5%_x{y}~^"<') == (
        r"a\textbackslash{}b \& 5\%\_x\{y\}\textasciitilde{}\textasciicircum{}''\textless{}"
    )


def test_where_it_is_written_and_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(tmp_path / "runs" / "a", {"ES": right(9)})
    main(["--leaderboard", str(run)])
    assert capsys.readouterr().out == f"{run / 'leaderboard.html'}\n"
    assert {path.suffix for path in run.glob("leaderboard.*")} == {".html", ".md", ".csv", ".tex"}
    assert not (run / "report.html").exists()
    made(tmp_path / "runs" / "b", {"ES": right(9)})
    main(["--leaderboard", str(tmp_path / "runs")])
    assert (tmp_path / "runs" / "report" / "leaderboard.tex").is_file()
    going = made(tmp_path / "going", {"ES": right(9)}, status="running")
    with pytest.raises(SystemExit) as end:
        main(["--leaderboard", str(going)])
    assert str(end.value.code) == (
        f"error: no run has finished its edits and final scores ({going}: left out, still running, or was killed); "
        "name one that has"
    )
