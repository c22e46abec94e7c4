"""One command: its plan, checked before a weight is read; what it goes on from; its meta-training; `evaluate=`."""

from harness.job.build import build_editor, make_editor, memory_of_run, memory_settings, settings_of
from harness.job.devices import DTYPES
from harness.job.evaluate_only import evaluate_only, evaluated_source
from harness.job.evaluation import base_cache, make_evaluation, make_hidden_states, plan_downstream
from harness.job.loading import load_model
from harness.job.networks import check_rank, network_keeper
from harness.job.other_ranks import make_scoring, new_record, rank_settings, require_alike, silence_other_ranks
from harness.job.outputs import check_export, export_folder, is_saved, missing_outputs, require_writable
from harness.job.plan import Plan, capture_memory, check_modules, make_plan, source_of, wandb_settings
from harness.job.registered import check_registered
from harness.job.resume import (
    LoopState,
    changed_circumstances,
    earlier_run,
    move_into,
    newest_checkpoint,
    require_weights,
)
from harness.job.training import MetaTraining
