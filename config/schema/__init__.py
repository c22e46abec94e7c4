"""Types and checks of a run: what each key may be, and what it means.

The dataclasses are the schemas of Hydra's ConfigStore, so that a key that does not exist or a value of the wrong type
is refused while the command line is read. `to_run_config` then turns the composed configuration into these plain
dataclasses, once, at the door, and reports every remaining mistake together. Members of the Enums are the words that
users type, and fields carry the names that users type.
"""

from config.schema.checks import ConfigError, quoted
from config.schema.convert import register, to_run_config
from config.schema.dataset import AnswerEnd, AnswerTokens, PromptForm, SyntheticConfig
from config.schema.editor import (
    CAPTURE_KEYS,
    AlphaEditConfig,
    AnswerLoss,
    ClosedFormConfig,
    EditorConfig,
    FactToken,
    FineTuningConfig,
    GraceConfig,
    HyperNetworkConfig,
    LocateConfig,
    MemitConfig,
    Order,
    PreheatMode,
    PreserveText,
    RLEditConfig,
    RunningMeanStdMode,
    StatisticsScope,
    Token,
    UpdateEvery,
    WhiteningFloorMode,
    WiseConfig,
)
from config.schema.idle import keys_without_effect, settings_without_effect
from config.schema.model import Dtype, EditPrecision
from config.schema.run import RunConfig
from config.schema.tracker import DiagnosticsConfig, TrackerConfig, Wandb
