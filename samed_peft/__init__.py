"""samed_peft: parameter-efficient finetuning of the Segment Anything Model on medical scans.

The names below are loaded when they are first used, so that `import samed_peft` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from samed_peft import datasets, metrics
    from samed_peft.adapters import add_lora, load_adapter, save_adapter
    from samed_peft.config import SamedConfig, TrainingConfig
    from samed_peft.errors import InputError
    from samed_peft.evaluation import Report, evaluate_cases
    from samed_peft.hub import push_to_hub
    from samed_peft.inference import predict_volume
    from samed_peft.io import Volume, read_volume, write_mask
    from samed_peft.losses import dice_ce_loss
    from samed_peft.modeling import load_sam

__version__ = "0.1.0"

_MODULE_OF = {
    "InputError": "errors",
    "Report": "evaluation",
    "SamedConfig": "config",
    "TrainingConfig": "config",
    "Volume": "io",
    "add_lora": "adapters",
    "dice_ce_loss": "losses",
    "evaluate_cases": "evaluation",
    "load_adapter": "adapters",
    "load_sam": "modeling",
    "predict_volume": "inference",
    "push_to_hub": "hub",
    "read_volume": "io",
    "save_adapter": "adapters",
    "write_mask": "io",
}

_SUBMODULES = ("datasets", "metrics")

__all__ = [
    "InputError",
    "Report",
    "SamedConfig",
    "TrainingConfig",
    "Volume",
    "add_lora",
    "datasets",
    "dice_ce_loss",
    "evaluate_cases",
    "load_adapter",
    "load_sam",
    "metrics",
    "predict_volume",
    "push_to_hub",
    "read_volume",
    "save_adapter",
    "write_mask",
]


if not TYPE_CHECKING:  # so that type checkers refuse names that do not exist

    def __getattr__(name: str) -> object:
        if name in _SUBMODULES:
            return importlib.import_module(f"samed_peft.{name}")
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'samed_peft' has no attribute {name!r}")
        value = vars(importlib.import_module(f"samed_peft.{_MODULE_OF[name]}"))[name]
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
