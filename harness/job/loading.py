"""The language model of a run, and that all its processes have the same one."""

from __future__ import annotations

import gc

from config.schema import EditPrecision, RunConfig
from harness.job.devices import DTYPES
from harness.job.plan import Plan
from harness.ranks import SharedModel
from model import LanguageModel
from model.source import ModelSource


def load_model(cfg: RunConfig, plan: Plan, evaluated: ModelSource | None = None) -> LanguageModel:
    """Read the weights: those of `model`, with edit modules, or those that `evaluate` names, without.

    ValueError, naming the rank, where a process of the run reads other weights.
    """
    gc.collect()  # a model of before is in cycles (accelerate's hooks, what is wrapped), and a GPU would not ask for it
    model = LanguageModel.load(
        evaluated or plan.source,
        plan.tokenizer,
        plan.outline.shapes if cfg.evaluate is None else (),
        dtype=DTYPES[cfg.model.half],
        device=plan.device,
        device_map=cfg.model.device_map and cfg.model.device_map.name,
        master=cfg.model.edit_precision is EditPrecision.master,
        compute_tokens=cfg.model.compute_tokens,
    )
    if plan.ranks.size == 1:
        return model
    found = plan.ranks.all_gather(model.fingerprint)
    for rank, fingerprint in enumerate(found):
        if fingerprint != found[0]:
            name = cfg.model.name_or_path if evaluated is None else cfg.evaluate
            raise ValueError(
                f"model.name_or_path={name}: rank {rank} reads other weights than rank 0 (fingerprints {fingerprint} "
                f"and {found[0]}); give every machine the same files"
            )
    return SharedModel(model, plan.ranks)
