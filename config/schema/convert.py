"""Turns what Hydra composed into checked dataclasses; registers the schemas."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    InterpolationToMissingValueError,
    InterpolationValidationError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from config.schema.checks import ConfigError
from config.schema.dataset import DatasetConfig, JsonlConfig, SyntheticConfig, WikiBigEditConfig
from config.schema.editor import (
    AlphaEditConfig,
    ClosedFormConfig,
    EditorConfig,
    FineTuningConfig,
    GraceConfig,
    HyperNetworkConfig,
    MemitConfig,
    RidgeNetworkConfig,
    RLEditConfig,
    RomeConfig,
    WiseConfig,
)
from config.schema.model import ModelConfig
from config.schema.run import RunConfig, root_mistakes

OF_UNSET = (MissingMandatoryValue, InterpolationToMissingValueError, InterpolationValidationError)
"""How a section speaks of a key without a value, or of one that points at it."""


def to_run_config(cfg: DictConfig) -> RunConfig:
    """The composed configuration as plain, checked dataclasses.

    Raises ConfigError with every mistake of value in one line. Checks that look at two sections are made once all
    sections are right by themselves.
    """
    mistakes = [f"{key}: there is no such key; leave it out" for key in unknown_keys(cfg, RunConfig)]
    unset = unset_keys(cfg)
    mistakes += [f"{key} is not set: give it a value, {key}=..." for key in unset]
    values: dict[str, Any] = {}
    for entry in fields(RunConfig):
        try:
            node = cfg[entry.name]
            values[entry.name] = OmegaConf.to_object(node) if OmegaConf.is_config(node) else node
        except ConfigError as error:
            mistakes.extend(error.mistakes)
        except OmegaConfBaseException as error:
            if unset and isinstance(error, OF_UNSET):
                continue
            mistakes.append(f"{error.full_key}: {str(error.msg).splitlines()[0]}")
    if not mistakes:
        return RunConfig(**values)
    scalars = {entry.name: values.get(entry.name, entry.default) for entry in fields(RunConfig)}
    raise ConfigError([*mistakes, *root_mistakes(scalars)])


def unset_keys(cfg: DictConfig) -> list[str]:
    """Keys that are still ???, and a model's step that is not known where an editor takes it over.

    Those that point at one of them are not counted again.
    """
    present = [key for key in map(str, cfg) if not OmegaConf.is_missing(cfg, key)]
    sections = [(f"{key}.", cfg[key]) for key in present if OmegaConf.is_dict(cfg[key])]
    missing = [
        f"{prefix}{key}"
        for prefix, node in [("", cfg), *sections]
        for key in map(str, node)
        if OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key)
    ]
    taken_over = OmegaConf.is_interpolation(cfg.editor, "lr")
    return [*missing, *(["model.lr"] if taken_over and OmegaConf.select(cfg, "model.lr") is None else [])]


def unknown_keys(node: DictConfig, schema: type, prefix: str = "") -> list[str]:
    """Keys that the schema has no field for: Hydra lets `+key=value` through."""
    known = {entry.name for entry in fields(schema)}
    unknown = [f"{prefix}{key}" for key in map(str, node) if key not in known]
    for key in known & set(map(str, node)):
        unopened = OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key)
        child = None if unopened else node[key]
        child_schema = OmegaConf.get_type(child) if isinstance(child, DictConfig) else None
        if isinstance(child, DictConfig) and is_dataclass(child_schema):
            unknown += unknown_keys(child, child_schema, f"{prefix}{key}.")
    return sorted(unknown)


def register() -> None:
    """Put the schemas into Hydra's ConfigStore, where the YAML files name them in their defaults lists."""
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    store.store(group="schema", name="dataset", node=DatasetConfig)
    store.store(group="schema", name="wikibigedit", node=WikiBigEditConfig)
    store.store(group="schema", name="synthetic", node=SyntheticConfig)
    store.store(group="schema", name="jsonl", node=JsonlConfig)
    store.store(group="schema", name="model", node=ModelConfig)
    store.store(group="schema", name="editor", node=EditorConfig)
    store.store(group="schema", name="closed_form", node=ClosedFormConfig)
    store.store(group="schema", name="hypernetwork", node=HyperNetworkConfig)
    store.store(group="schema", name="ridge_network", node=RidgeNetworkConfig)
    store.store(group="schema", name="rledit", node=RLEditConfig)
    store.store(group="schema", name="fine_tuning", node=FineTuningConfig)
    store.store(group="schema", name="grace", node=GraceConfig)
    store.store(group="schema", name="wise", node=WiseConfig)
    store.store(group="schema", name="rome", node=RomeConfig)
    store.store(group="schema", name="memit", node=MemitConfig)
    store.store(group="schema", name="alphaedit", node=AlphaEditConfig)
