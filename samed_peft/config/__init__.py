"""What an adapter is (`SamedConfig`) and how it is trained (`TrainingConfig`)."""

from samed_peft.config.adapter import (
    CT_WINDOW_HU,
    SYNAPSE_CLASSES,
    SYNAPSE_NAME,
    TINY_SAM,
    TINY_SAM_NOTE,
    SamedConfig,
    is_hub_id,
)
from samed_peft.config.methods import METHOD_FIELDS, METHODS, Method, Storage, methods_with
from samed_peft.config.options import add_options, add_run_options, from_options, option_values, parse_run_options
from samed_peft.config.presets import DEMO, PRESETS
from samed_peft.config.training import TrainingConfig

__all__ = [
    "CT_WINDOW_HU",
    "DEMO",
    "METHODS",
    "METHOD_FIELDS",
    "PRESETS",
    "SYNAPSE_CLASSES",
    "SYNAPSE_NAME",
    "TINY_SAM",
    "TINY_SAM_NOTE",
    "Method",
    "SamedConfig",
    "Storage",
    "TrainingConfig",
    "add_options",
    "add_run_options",
    "from_options",
    "is_hub_id",
    "methods_with",
    "option_values",
    "parse_run_options",
]
