"""A run on its machine: folder and lock, checkpoints and kept networks, how its model is asked, signals, launchers.

Asked for by file: `harness.run.places`, where caches lie (platformdirs), and `harness.run.command`, what command lines
share (transformers).
"""

from harness.run.checkpoint import Checkpoint, Checkpoints, DamagedError, Groups, write_safetensors
from harness.run.folder import (
    EXAMPLES_FILE,
    LINES,
    NOT_IN_RUN_ID,
    TRAINING_PHASES,
    NoRecord,
    RunFolder,
    Stage,
    canonical_json,
    digest_of,
    exit_code,
    git_state,
    leave_out,
    leaves,
    one_line,
    read_examples,
    read_run,
    run_id,
    versions,
)
from harness.run.form import PROMPT_FORMS, form_note, form_of_folder, form_of_run, stated_form
from harness.run.interrupt import Interrupted, Interruption, end_if_asked, end_on, ignore_signals, postponed
from harness.run.launching import check_launcher, last_lines, launcher_errors, requeued_after_checkpoint, share_terminal
from harness.run.networks import MODEL_KEY, NETWORK_FOLDER, NetworkKeeper, TrainedNetwork, identity_of, open_network
from harness.run.same_bits import prepare_libraries, use_deterministic_algorithms
from harness.run.spill import CaptureFolder
from harness.run.terminal import show_any_text
