"""The keys of editors: what all share, then a file a family."""

from config.schema.editor.base import CAPTURE_KEYS, EditorConfig, PreheatMode, StatisticsScope, Token
from config.schema.editor.closed_form import (
    OF_PRESETS,
    ClosedFormConfig,
    PreserveText,
    RunningMeanStdMode,
    WhiteningFloorMode,
    WhiteningSolver,
)
from config.schema.editor.located import AlphaEditConfig, FactToken, LocateConfig, MemitConfig, RomeConfig
from config.schema.editor.networks import HyperNetworkConfig, RidgeNetworkConfig, RLEditConfig, UpdateEvery
from config.schema.editor.stepping import (
    AnswerLoss,
    FineTuningConfig,
    GraceConfig,
    MemoryConfig,
    Order,
    SteppingConfig,
    WiseConfig,
)
