"""The command line, read once before Hydra starts, so that a mistake ends in one line instead of a trace.

`check_command_line` composes what Hydra is about to compose. Hydra's own flags keep their meaning; where they only
show something (--help, --info, ...) nothing is checked.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import itertools
import math
import shlex
import shutil
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from config.help import register_help
from config.schema import ConfigError, quoted, register, to_run_config

CONFIG_DIR = Path(__file__).resolve().parent
CONFIG_NAME = "config"
VERSION_BASE = "1.3"
MAX_JOBS = 24
"""Jobs of a sweep that are checked in every combination; of a larger one, each value is checked once."""

MOST_LISTED = 16
"""Choices that fit into an error message."""

NOT_FOR_USERS = ("schema", "released")
"""Groups that only other files of config/ name."""

NULL_CHOICE = "${oc.decode:null}"
ESCAPED_NULL = r"$\{oc.decode\:null\}"
"""null as one of several choices, of which Hydra takes none that is null; and what it makes of that in a job."""

LAUNCHERS = {name: name for name in ("joblib", "submitit_local", "submitit_slurm")} | {"slurm": "submitit_slurm"}
"""Launchers of packages that not everybody installs, each with the choice that shows that its package is there."""

HydraMistake = (HydraException, OmegaConfBaseException, YAMLError)


def check_command_line(argv: Sequence[str]) -> None:
    """Refuse a command line that cannot become a run; `argv` is without the program's name.

    Raises ConfigError, whose one line names each key, its value and the remedy. With --cfg, which only prints, values
    out of range pass: whoever looks for a mistake may look at it.
    """
    register()
    register_help()
    flags = _flags(argv)
    if flags is None:
        return
    with _hydra(flags) as hydra:
        overrides = _parsed(flags.overrides, hydra.config_loader)
        mistakes = [] if _is_multirun(flags, overrides) else _several_values(overrides)
        assert isinstance(hydra.config_loader, ConfigLoaderImpl)
        options = cache(hydra.config_loader.repository.get_group_options)  # the loader's own copies every schema first
        jobs = _jobs(overrides) if not mistakes else []
        mistakes += _shared_folder(overrides) if len(jobs) > 1 else []
        for job in jobs:
            mistakes += _Job(hydra, options, flags.config_name or CONFIG_NAME, job).mistakes(values=flags.cfg is None)
    if mistakes:
        raise ConfigError(dict.fromkeys(mistakes))


def waiting_for_choices(argv: Sequence[str]) -> list[str]:
    """The same command line, in a form that Hydra takes where a sweep chooses among groups.

    Before its jobs Hydra composes the sweep once, with all that is not swept and the default choice of what is. A key
    that only the swept choices have (`-m editor=malmen,mend editor.rank=8`) would be refused there. Written as a
    choice of one value it waits for its job.
    """
    flags = _flags(argv)
    if flags is None:
        return list(argv)
    with _hydra(flags) as hydra:
        overrides = _parsed(flags.overrides, hydra.config_loader)
        swept = {override.key_or_group for override in overrides if override.is_sweep_override()}
        waits = {
            str(override.input_line)
            for override in overrides
            if _is_multirun(flags, overrides) and not override.is_sweep_override() and not override.is_delete()
            if override.key_or_group.partition(".")[0] in swept
        }
    return [_as_choice(word) if word in waits else word for word in argv]


def _as_choice(line: str) -> str:
    key, _, value = line.partition("=")
    return f"{key}=choice({NULL_CHOICE if value.strip().lower() == 'null' else value})"


def as_typed(overrides: Sequence[str]) -> list[str]:
    """A job's overrides, as Hydra hands them over, without what `waiting_for_choices` made of them."""
    return [line.replace(ESCAPED_NULL, "null") for line in overrides]


def typed_keys(overrides: Sequence[str]) -> set[str]:
    """The keys that a job's overrides give a value."""
    return {line.lstrip("+~").partition("=")[0] for line in overrides}


def compose_config(overrides: Sequence[str] = ()) -> DictConfig:
    """What `main` gets for these overrides; for tests and tools. Hydra's own errors pass through."""
    register()
    with _hydra(argparse.Namespace(config_dir=None, config_path=None)) as hydra:
        return _without_hydra(_compose(hydra, CONFIG_NAME, overrides))


def choices_of(group: str) -> list[str]:
    """The choices of a group of config/."""
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


# ---------------------------------------------------------------------------------------------------------------------
# Flags


def _flags(argv: Sequence[str]) -> argparse.Namespace | None:
    """Hydra's flags and overrides; None where Hydra only shows something."""
    if "--version" in argv:
        return None
    parser = get_args_parser()
    parser.error = _flag_error  # type: ignore[method-assign]
    flags = parser.parse_args(list(argv))
    shows = flags.help or flags.hydra_help or flags.info or flags.shell_completion or flags.experimental_rerun
    if not shows and flags.config_dir is not None and not Path(flags.config_dir).is_dir():
        raise ConfigError([f"--config-dir {flags.config_dir}: there is no such folder"])
    return None if shows else flags


def _flag_error(message: str) -> NoReturn:
    words = message.removeprefix("unrecognized arguments: ").split()
    if words == message.split():
        raise ConfigError([f"{message}; --help lists flags and keys"])
    dashed = [word for word in words if word.startswith("-")]
    if dashed:
        bare = dashed[0].lstrip("-")
        example = bare if "=" in bare else f"{bare}=..."
        raise ConfigError([f"{dashed[0]}: not a flag; settings are written without dashes, {example}"])
    raise ConfigError([f"{words[0]}: put all settings together, and flags before or after them"])


@contextmanager
def _hydra(flags: argparse.Namespace) -> Iterator[Hydra]:
    """A Hydra with the search path that `main` would get, leaving no trace in the process."""
    version.setbase(VERSION_BASE)
    path = create_config_search_path(
        str(CONFIG_DIR.parent / flags.config_path) if flags.config_path else str(CONFIG_DIR)
    )
    if flags.config_dir is not None:
        folder = f"file://{Path(flags.config_dir).resolve()}"
        path.prepend("command-line", folder, anchor=SearchPathQuery(provider="schema"))
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield Hydra.create_main_hydra2(task_name="main", config_search_path=path)
    finally:
        GlobalHydra.instance().clear()
        if before is not None:
            GlobalHydra.instance().initialize(before)


def _compose(hydra: Hydra, config_name: str, overrides: Sequence[str]) -> DictConfig:
    return hydra.compose_config(
        config_name=config_name, overrides=list(overrides), run_mode=RunMode.RUN, with_log_configuration=False
    )


def _without_hydra(cfg: DictConfig) -> DictConfig:
    with open_dict(cfg):
        cfg.pop("hydra", None)
    return cfg


# ---------------------------------------------------------------------------------------------------------------------
# Overrides and sweeps


def _parsed(lines: Sequence[str], loader: ConfigLoader) -> list[Override]:
    parser = OverridesParser.create(config_loader=loader)
    overrides: list[Override] = []
    mistakes: list[str] = []
    for line in lines:
        try:
            overrides += parser.parse_overrides([line])
        except OverrideParseException:
            mistakes.append(_unreadable(line))
        except HydraException as error:
            mistakes.append(f"{line}: {_one_line(error)}")
    if mistakes:
        raise ConfigError(mistakes)
    return overrides


def _unreadable(line: str) -> str:
    if "=" not in line:
        return f"{line}: settings are written key=value"
    key, value = line.split("=", 1)
    text = value.strip("'\"")
    twice = shlex.quote(f"{key}={quoted(text)}")  # for the shell and for Hydra
    return f"{line}: the value cannot be read; if it is text, quote it twice: {twice}"


def _is_multirun(flags: argparse.Namespace, overrides: Sequence[Override]) -> bool:
    mode = [str(override.value()) for override in overrides if override.key_or_group == "hydra.mode"]
    return bool(flags.multirun) or mode[-1:] == ["MULTIRUN"]


def _several_values(overrides: Sequence[Override]) -> list[str]:
    return [
        f"{override.input_line}: several values need the flag -m; a list is written {override.key_or_group}=[a,b]"
        for override in overrides
        if override.is_sweep_override()
    ]


def _shared_folder(overrides: Sequence[Override]) -> list[str]:
    """Where several jobs would each save their model in one folder, which is the first one's alone."""
    return [
        f"{override.input_line}: the jobs of a sweep cannot all save their model there; leave it out, and each run "
        "keeps its own in model/"
        for override in overrides
        if override.key_or_group == "model_cache_dir" and override.value() and "${" not in str(override.value())
        if not override.is_sweep_override()
    ]


def _jobs(overrides: Sequence[Override]) -> list[list[str]]:
    """Override lines of the jobs of a sweep to check: every combination, or at least every value."""
    choices = [_values(override) for override in overrides]
    if math.prod(map(len, choices)) <= MAX_JOBS:
        return [list(job) for job in itertools.product(*choices)]
    first = [values[0] for values in choices]
    others = [(i, value) for i, values in enumerate(choices) for value in values[1:]]
    return [first, *([*first[:i], value, *first[i + 1 :]] for i, value in others)]


def _values(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if not override.is_discrete_sweep():
        raise ConfigError([f"{override.input_line}: this sweep has no list of values; write key=a,b,c or range(a,b)"])
    lines = [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
    if not lines:
        raise ConfigError([f"{override.input_line}: matches nothing"])
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# One job


class _Job:
    """The overrides of one run, checked from the outside in: group choices, keys, types, then values."""

    def __init__(
        self, hydra: Hydra, options: Callable[[str], list[str]], config_name: str, lines: Sequence[str]
    ) -> None:
        self.hydra = hydra
        self.options = options  # of a group
        self.config_name = config_name
        self.lines = list(lines)
        self.overrides = OverridesParser.create(config_loader=hydra.config_loader).parse_overrides(self.lines)

    def mistakes(self, values: bool) -> list[str]:
        """One line a mistake; `values` also checks ranges and what keys mean together."""
        try:
            return self._choice_mistakes() or self._checked(values)
        except ConfigError as error:
            return list(error.mistakes)
        except HydraMistake as error:
            return [_one_line(error)]

    def _is_group(self, override: Override) -> bool:
        return bool(self._options(override)) and not isinstance(override.value(), dict)

    def _options(self, override: Override) -> list[str]:
        group = override.key_or_group
        if group in NOT_FOR_USERS or "." in group:  # a key within a group
            return []
        return sorted(option for option in self.options(group) if option != CONFIG_NAME)

    def _choice_mistakes(self) -> list[str]:
        """Choices that their group does not offer."""
        groups = [override for override in self.overrides if self._is_group(override) and not override.is_delete()]
        return [
            line
            for override in groups
            for line in _not_installed(override, self._options(override))
            or _bad_choices(override, self._options(override), self.options)
        ]

    def _checked(self, values: bool) -> list[str]:
        """Keys and types, given the groups chosen; then, on the values as Hydra would set them, ranges."""
        outer = [override for override in self.overrides if self._is_group(override) or _is_hydras(override)]
        inner = [override for override in self.overrides if override not in outer]
        full = _compose(self.hydra, self.config_name, [str(override.input_line) for override in outer])
        choices = {str(key): value for key, value in full.hydra.runtime.choices.items()}
        cfg = _without_hydra(copy.deepcopy(full))
        mistakes = [line for override in inner if (line := _applied(override, cfg, choices))]
        if values and not mistakes:
            with _hydra_resolver(full):
                resume = to_run_config(cfg).resume
            mistakes = _launcher_mistakes(full.hydra.launcher, resume)
        return mistakes


@contextmanager
def _hydra_resolver(cfg: DictConfig) -> Iterator[None]:
    """Let ${hydra:...} resolve as it will in the run."""
    with open_dict(cfg):
        cfg.hydra.runtime.output_dir = "."  # known only once the run starts
    HydraConfig.instance().set_config(cfg)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = None


def _not_installed(override: Override, options: list[str]) -> list[str]:
    needed = LAUNCHERS.get(str(override.value())) if override.key_or_group == "hydra/launcher" else None
    if needed is None or needed in options:
        return []
    packages = ".venv/bin/python -m pip install -r requirements-launchers.txt"
    return [f"{override.input_line}: the launcher is not installed; install it with {packages}"]


def _launcher_mistakes(launcher: DictConfig, resume: str | None) -> list[str]:
    if "partition" in launcher and shutil.which("sbatch") is None:
        return ["hydra/launcher: SLURM is not on this machine (no sbatch); start on a login node, or choose joblib"]
    if launcher.get("max_num_timeout") and resume is None:
        return ["resume=null: a job that goes back into SLURM's queue could not go on from there; set resume=auto"]
    return []


def _bad_choices(override: Override, options: list[str], of_group: Callable[[str], list[str]]) -> list[str]:
    group, value, line = override.key_or_group, override.value(), str(override.input_line)
    if override.is_force_add() or (override.is_add() and "/" not in group):
        return [f"{line}: write {line.lstrip('+')}"]
    if value is None:
        return [f"{group}=null: {_choose('', options, group)}; to take {group} out, write ~{group}"]
    asked = [str(one) for one in (value if isinstance(value, list) else [value])]
    return [
        f"{group}={one}: {_choose(one, options, group)}{_as_a_name(group, one)}"
        for one in asked
        if one not in options and not _lies_deeper(group, one, of_group)
    ]


def _lies_deeper(group: str, choice: str, of_group: Callable[[str], list[str]]) -> bool:
    """Whether it is a file in a folder of the group."""
    folder, _, name = choice.rpartition("/")
    return bool(folder) and name in of_group(f"{group}/{folder}")


def _as_a_name(group: str, choice: str) -> str:
    if group != "model" or "/" not in choice:
        return ""
    return f"; a model of Hugging Face, or a folder, is model=huggingface model.name_or_path={choice} with a model.lr"


def _is_hydras(override: Override) -> bool:
    return override.key_or_group.startswith(("hydra.", "hydra/"))


def _applied(override: Override, cfg: DictConfig, choices: dict[str, Any]) -> str | None:
    """Set a key in `cfg` as Hydra would; the line that says why not, or None."""
    key, line = override.key_or_group, str(override.input_line)
    parent, name = _parent(cfg, key)
    if parent is None:
        return f"{line}: {_no_such_key(key, cfg, choices)}"
    if override.package is not None:
        return f"{line}: @{override.package} belongs to groups; write {key}={override.get_value_string()}"
    if override.is_delete():
        return f"{line}: keys cannot be taken away; set {key} to another value"
    if override.is_add() and not override.is_force_add():
        return f"{line}: {key} exists already; write {line[1:]}"
    hint = _hint(parent, name)
    try:
        OmegaConf.update(cfg, key, override.value(), merge=True)
    except OmegaConfBaseException:
        return f"{key}={override.get_value_string()}: {_wanted(hint, override.value())}"
    value = override.value()
    if hint is bool and not isinstance(value, bool | str) and value not in (0, 1):
        return f"{key}={value}: {_wanted(hint, value)}"
    return None


def _parent(cfg: DictConfig, key: str) -> tuple[DictConfig | ListConfig | None, str]:
    """The node that holds `key`, None where there is no such key; and the key's last part."""
    *path, name = key.split(".")
    node: Any = cfg
    for part in path:
        node = node[part] if isinstance(node, DictConfig) and part in node else None
    held = isinstance(node, DictConfig) and name in list(node.keys())  # `in` denies keys that are ???
    listed = isinstance(node, ListConfig) and name.isdigit() and int(name) < len(node)
    return (node if held or listed else None), name


# ---------------------------------------------------------------------------------------------------------------------
# Remedies


def _choose(choice: object, options: Sequence[str], folder: str = "") -> str:
    near = difflib.get_close_matches(str(choice), options, n=1, cutoff=0.6)
    listed = ", ".join(options) if len(options) <= MOST_LISTED else f"the files of config/{folder}"
    return f"did you mean {near[0]}? choose from {listed}" if near else f"choose from {listed}"


def _no_such_key(key: str, cfg: DictConfig, choices: dict[str, Any]) -> str:
    section = key.split(".")[0]
    place = f" with {section}={choices[section]}" if choices.get(section) else ""
    near = _near(key, list(_leaves(cfg)))
    remedy = f"did you mean {' or '.join(near)}?" if near else "python main.py --help lists all keys"
    return f"there is no key {key}{place}; {remedy}"


def _near(key: str, keys: list[str]) -> list[str]:
    """The key spelled most alike, else those of other sections with the same last word."""
    scores = {known: _likeness(key, known) for known in keys}
    best = max(keys, key=lambda known: scores[known])
    name = key.rpartition(".")[2].lower()
    return [best] if scores[best] > 0 else [known for known in keys if known.rpartition(".")[2].lower() == name]


def _likeness(key: str, known: str) -> float:
    """How alike two keys are, 0 where either their sections or their last words differ too much."""
    parts = zip(key.lower().rpartition(".")[::2], known.lower().rpartition(".")[::2], strict=True)
    section, name = (difflib.SequenceMatcher(None, *pair).ratio() for pair in parts)
    return section * name if section > 0.7 and name > 0.6 else 0.0


def _leaves(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in map(str, cfg):
        opaque = OmegaConf.is_missing(cfg, key) or OmegaConf.is_interpolation(cfg, key)
        if not opaque and isinstance(cfg[key], DictConfig):
            yield from _leaves(cfg[key], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _hint(parent: DictConfig | ListConfig, name: str) -> Any:
    """Type of a key, without its Optional."""
    schema = OmegaConf.get_type(parent)
    hint = get_type_hints(schema).get(name, Any) if isinstance(schema, type) and is_dataclass(schema) else Any
    if get_origin(hint) in (Union, types.UnionType):
        options = [one for one in get_args(hint) if one is not type(None)]
        return options[0] if len(options) == 1 else Union[tuple(options)]  # noqa: UP007  built from a tuple
    return hint


def _wanted(hint: Any, value: object) -> str:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _choose(value, [member.name for member in hint])
    if isinstance(hint, type) and is_dataclass(hint):
        return "this is a group of keys; set them one by one, " + ", ".join(get_type_hints(hint))
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list[str]: "a list, [a,b]"}
    return f"must be {words.get(hint, 'a number or a word')}" + (", not null" if value is None else "")


_NOISE = ("full_key:", "object_type=", "reference_type=", "See https", "To append to your", "Config search path")


def _one_line(error: BaseException) -> str:
    """Hydra's words in one line, with the cause it wraps."""
    chain = [error] + ([error.__cause__] if error.__cause__ is not None else [])
    lines = [line.strip() for one in chain for line in str(one).splitlines()]
    kept = [line.rstrip(".;:") for line in lines if line and not line.startswith(_NOISE)]
    return "; ".join(dict.fromkeys(kept[:3])) or type(error).__name__
