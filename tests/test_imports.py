"""The house (DESIGN section 3): what each room may import, and that behaviour hangs on no name."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from fnmatch import fnmatch

import pytest

from config.compose import CONFIG_DIR
from data import DATASETS
from editor.registry import EDITORS
from tests.conftest import ROOT

ROOMS = ("benchmarks", "config", "data", "editor", "glue_eval", "harness", "model", "tests")
MAY_IMPORT = {
    # room: what it may import beside the standard library; `name.*` = the modules below it too. The first row counts.
    "config/schema/editor/*.py": "omegaconf config.schema.checks config.schema.editor.*",
    "config/schema/*.py": "hydra.* omegaconf.* config.schema.*",
    "config/compose.py": "hydra.* omegaconf.* yaml config.help config.schema",
    "config/help.py": "hydra.* omegaconf",
    "data/records.py": "torch",
    "data/disk.py": "",
    "data/intervals.py": "numpy",
    "data/json_stream.py": "ijson",
    "data/progress.py": "tqdm.*",
    "data/prompts.py": "",
    "data/dataset.py": "data.records",
    "data/made.py": "data.dataset data.disk",
    "data/batches.py": "numpy torch data.records",
    "data/corpus.py": "data.batches data.disk data.prompts data.records data.stream",
    "data/stream.py": "numpy data.*",
    "data/training.py": "numpy data.*",
    "data/repeats.py": "numpy data.records",
    "data/files.py": "datasets.* ijson pyarrow.* data.*",
    "data/catalogue.py": "",
    "data/download.py": "httpx data.*",
    "data/prepare.py": "ijson pyarrow.* rich.* data.*",
    "data/sample/*.py": "data.sample.*",
    "data/__init__.py": "data.*",
    "data/*.py": "data.records data.dataset",  # data/<dataset>.py
    "model/source.py": "torch.* transformers.* tokenizers huggingface_hub safetensors data.disk",
    "model/*.py": "torch.* safetensors data.records data.batches data.disk model.*",
    "editor/linalg.py": "torch",
    "nets.py": "torch editor.linalg",
    "editor/base.py": "torch data.records",
    "editor/__init__.py": "",
    "editor/registry.py": "torch editor.*",
    "editor/stopwatch.py": "torch",
    "editor/updates.py": "torch editor.linalg data.records",
    "editor/capture.py": "torch editor.base editor.stopwatch editor.updates data.records",
    "editor/target_vectors.py": "torch editor.base data.records",
    "editor/located.py": (
        "torch editor.linalg editor.base editor.stopwatch editor.target_vectors editor.updates data.records"
    ),
    "editor/meta_train.py": (
        "torch editor.linalg editor.base editor.capture editor.hypernetwork editor.stopwatch data.records"
    ),
    # an editor: a file of its own; hypernetwork is what the trained ones share, located what ROME and its kin do
    "editor/*.py": (
        "torch nets editor.linalg editor.base editor.hypernetwork editor.located editor.stopwatch "
        "editor.target_vectors editor.updates data.records"
    ),
    # the rooms of the harness, from the ground up: each opens onto those below it
    "harness/run/checkpoint.py": "torch safetensors.* xxhash data.disk",
    "harness/run/command.py": "transformers.* harness.run.terminal",
    "harness/run/folder.py": "data.disk data.records harness.run.lock",
    "harness/run/form.py": "",
    "harness/run/networks.py": "torch editor.base harness.run.checkpoint",
    "harness/run/places.py": "platformdirs",
    "harness/run/same_bits.py": "torch",
    "harness/run/spill.py": "torch",
    "harness/run/interrupt.py": "",
    "harness/run/launching.py": "",
    "harness/run/lock.py": "",
    "harness/run/__init__.py": "harness.run.*",
    "harness/watch/console.py": "rich.* data.progress data.records harness.run.*",
    "harness/watch/diagnostics.py": "torch editor.linalg editor.base model data.records harness.watch.peaks",
    "harness/watch/peaks.py": "psutil torch",
    "harness/watch/tracking.py": "wandb.* data.records harness.run.*",
    "harness/watch/__init__.py": "harness.watch.*",
    "harness/ranks/group.py": "torch harness.run.*",
    "harness/ranks/*.py": "torch data.records harness.ranks.* model",
    "harness/evaluation/downstream.py": "data.disk data.progress glue_eval.* harness.run.* harness.watch.* model",
    "harness/evaluation/evaluate.py": "numpy torch.* model data data.* harness.evaluation.*",
    "harness/evaluation/examples.py": "model data.* harness.evaluation.*",
    "harness/evaluation/generation.py": "model data.*",
    "harness/evaluation/hidden.py": "model safetensors.* data.* harness.evaluation.* harness.run.*",
    "harness/evaluation/locality.py": "torch safetensors.*",
    "harness/evaluation/perplexity.py": "model data.records",
    "harness/evaluation/retention.py": "data.stream",
    "harness/evaluation/scoring.py": "data.progress data.records harness.evaluation.* harness.run.* harness.watch.*",
    "harness/evaluation/__init__.py": "harness.evaluation.*",
    "harness/job/moments.py": "torch safetensors config.schema data.* editor.base harness.* model",
    "harness/job/*.py": "torch config.schema data.* editor.* glue_eval.* harness.* model.*",
    "harness/export/delta.py": "torch safetensors.* data.disk harness.run.* model",
    "harness/export/*.py": "torch transformers.* config.schema harness.* model.*",
    "harness/ask/*.py": "torch transformers.* rich.* config.* data.progress data.prompts harness.* model.*",
    "harness/memory/*.py": (
        "torch.* psutil rich.* transformers config.* data.stream editor.grace editor.registry harness.* model.*"
    ),
    "harness/__init__.py": "",
    "harness/report/*.py": "matplotlib.* numpy safetensors.* umap data.* harness.*",
    "glue_eval/__main__.py": "torch transformers.* rich.* data.* glue_eval.* harness.run harness.run.places model.*",
    "glue_eval/*.py": "numpy datasets data.* glue_eval.* model",
    "startup.py": "torch transformers.*",
    "main.py": "*",
    "benchmarks/gpu/*.py": "torch.* transformers psutil benchmarks.* data.* editor.* harness.* model.*",
    "benchmarks/*.py": "torch.* transformers safetensors.* benchmarks.* data.* editor.* harness.* model.* nets",
}
NEVER = {
    # what these rooms must not reach through anything they import, either
    "data/*": ("hydra", "omegaconf", "transformers", "wandb", "model", "nets", "editor", "harness", "config", "main"),
    "nets.py": ("hydra", "omegaconf", "transformers", "wandb", "model", "harness", "config", "main"),
    "editor/*": ("hydra", "omegaconf", "transformers", "wandb", "model", "harness", "config", "main"),
    "model/*": ("hydra", "omegaconf", "wandb", "editor", "nets", "harness", "config", "main"),
    "config/*": ("torch", "transformers", "wandb", "data", "model", "nets", "editor", "harness", "main"),
}
PAST_A_FACE = {
    # files of the harness that other rooms import themselves, and what would come with a face that named their content
    "harness.run.places": "platformdirs, which a machine with a GPU may lack",
    "harness.run.command": "transformers, which takes a second that reports need not wait",
}
KNOWN_TO = {
    # outside packages that have one door
    "wandb": ("harness/watch/tracking.py",),
    # command lines set its logging up
    "transformers": ("model/source.py", "startup.py", "main.py", "glue_eval/__main__.py", "harness/*/command.py"),
    "hydra": ("config/*", "main.py"),
    "omegaconf": ("config/*", "main.py"),
    "datasets": ("data/files.py", "glue_eval/*"),
    "tqdm": ("data/progress.py",),
    "matplotlib": ("harness/report/*",),
    "umap": ("harness/report/projection.py",),
}


def project_files() -> list[str]:
    files = [*ROOT.glob("*.py"), *(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))]
    return sorted(file.relative_to(ROOT).as_posix() for file in files)


def of_the_house() -> list[str]:
    return [file for file in project_files() if not file.startswith("tests/")]


def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"), file)


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imports(file: str) -> set[str]:
    """Modules that `file` imports anywhere in it; `from data import stream` is data.stream."""
    found: set[str] = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are written from the top"
            assert node.module is not None
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in members if is_module(name)}
            found |= modules | ({node.module} if modules != members else set())
    return found


def allowed(name: str, patterns: str) -> bool:
    return any(fnmatch(name, one) or name == one.removesuffix(".*") for one in patterns.split())


def room_of(file: str) -> str:
    rooms = [pattern for pattern in MAY_IMPORT if fnmatch(file, pattern) and file.count("/") == pattern.count("/")]
    assert rooms, f"{file} stands in no room of the table: give it a row"
    return rooms[0]


@pytest.mark.parametrize("file", of_the_house())
def test_a_room_imports_what_the_table_allows(file: str) -> None:
    outside = {name for name in imports(file) if name.split(".")[0] not in sys.stdlib_module_names}
    assert {name for name in outside if not allowed(name, MAY_IMPORT[room_of(file)])} == set()


def test_the_table_has_no_room_that_opens_onto_another_rooms_secrets() -> None:
    """What is never to be reached is reached over no detour: followed through the project's own files."""
    reached = {file: closure(file) for file in of_the_house()}
    for pattern, never in NEVER.items():
        for file in (file for file in reached if fnmatch(file, pattern)):
            assert {name.split(".")[0] for name in reached[file]} & set(never) == set(), file


def closure(file: str) -> set[str]:
    seen: set[str] = set()
    todo = [file]
    while todo:
        new = imports(todo.pop()) - seen
        seen |= new
        todo += [path for name in new for path in files_of(name)]
    return seen


def files_of(name: str) -> list[str]:
    """The file of a module of the project; none for others. A package's own file is left out: the names that it
    gathers are not what a file wants that imports one of its modules."""
    path = f"{name.replace('.', '/')}.py"
    return [path] if (ROOT / path).is_file() else []


@pytest.mark.parametrize("file", of_the_house())
def test_another_room_of_the_harness_is_entered_by_its_face(file: str) -> None:
    own = file.rpartition("/")[0].replace("/", ".")
    files = {name for name in imports(file) if name.startswith("harness.") and name.count(".") > 1}
    assert {name for name in files if name.rpartition(".")[0] != own} <= PAST_A_FACE.keys()


@pytest.mark.parametrize("package", KNOWN_TO)
def test_a_package_with_one_door_is_imported_nowhere_else(package: str) -> None:
    knowing = [file for file in of_the_house() if package in {name.split(".")[0] for name in imports(file)}]
    strangers = [file for file in knowing if not any(fnmatch(file, door) for door in KNOWN_TO[package])]
    assert [file for file in strangers if not file.startswith("benchmarks/")] == []


def test_only_tests_and_benchmarks_import_main() -> None:
    importers = {file.split("/")[0] for file in project_files() if "main" in imports(file)}
    assert importers <= {"tests", "benchmarks"}


def test_no_editor_imports_another_editor() -> None:
    methods = {type_.__module__ for type_ in EDITORS.values()}
    for method in methods:
        assert imports(f"{method.replace('.', '/')}.py") & methods == set()


# ---------------------------------------------------------------------------------------------------------------------
# No `if name == "..."`


def names_of_choices() -> set[str]:
    """Words that users choose data sets, models and editors by; `none`, `start`... are words of settings, not names."""
    groups = ("dataset", "model", "editor", "experiment", "ablation")
    files = {file.stem for group in groups for file in (CONFIG_DIR / group).glob("*.yaml")}
    return files | set(DATASETS) | set(EDITORS)


def comparisons(module: ast.Module, names: set[str]) -> Iterator[tuple[int, str]]:
    """Comparisons with, and match cases of, one of the names; also inside a tuple, list or set (`in (...)`)."""
    for node in ast.walk(module):
        parts: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        if isinstance(node, ast.MatchValue):
            parts = [node.value]
        for part in parts:
            for leaf in getattr(part, "elts", [part]):
                if isinstance(leaf, ast.Constant) and leaf.value in names:
                    yield leaf.lineno, leaf.value


@pytest.mark.parametrize("file", of_the_house())
def test_nothing_is_decided_by_the_name_of_a_data_set_a_model_or_an_editor(file: str) -> None:
    assert list(comparisons(tree(file), names_of_choices())) == []


@pytest.mark.parametrize(
    "line", ['if name == "zsre": ...', 'x = "mend" != kind', 'y = n in ("fever", "z")', "match n:\n case 'gpt-j': ..."]
)
def test_such_a_decision_would_be_seen(line: str) -> None:
    assert len(list(comparisons(ast.parse(line), names_of_choices()))) == 1


def test_data_nets_and_editors_neither_print_nor_open_what_is_not_theirs() -> None:
    """No editor opens a file or logs, and library code does not print."""
    for file in of_the_house():
        nodes = [node.func for node in ast.walk(tree(file)) if isinstance(node, ast.Call)]
        calls = {node.id for node in nodes if isinstance(node, ast.Name)}
        if not file.startswith("benchmarks/"):
            assert "print" not in calls, file
        if file.startswith("editor/") or file == "nets.py":
            assert "open" not in calls, file
            assert imports(file) & {"logging", "pathlib", "os", "io"} == set(), file


def test_the_rooms_are_all_there_is() -> None:
    """A new folder of Python is a new room: it needs a row in the table."""
    folders = {path.parent.relative_to(ROOT).parts[0] for path in ROOT.glob("*/*.py")}
    assert folders - {".venv"} <= set(ROOMS)


def test_rows_name_something() -> None:
    """A row for a file that is gone would hide that its rules went with it."""
    assert [row for row in MAY_IMPORT if not any(fnmatch(file, row) for file in of_the_house())] == []
