"""The three published variants of SAMed: options and scores."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from samed_peft.config.adapter import SYNAPSE_NAME, TINY_SAM
from samed_peft.config.training import TrainingConfig


@dataclass(frozen=True)
class Preset:
    """A published variant on Synapse (arXiv 2304.13785 and the tables of its code)."""

    base: str  # the SAM it adapts
    dice: Mapping[str, float]  # in %, by organ where published, and "mean"; `samed` convention
    hd95: float  # mean, in voxels
    decoder: str = "full"  # `SamedConfig.decoder`
    training: TrainingConfig = field(default_factory=TrainingConfig)  # with the batches of two GPUs in one
    mixed_precision: str | None = None  # Accelerate's name; None for Accelerate's default
    dataset: str = SYNAPSE_NAME  # of the scores, as reports and model cards call it

    @property
    def options(self) -> dict[str, Any]:
        """Defaults of a recipe's command line."""
        chosen = {"base": self.base, "decoder": self.decoder, "mixed_precision": self.mixed_precision}
        return {**self.training.to_dict(), **chosen}


def _dice(mean: float, *organs: float) -> Mapping[str, float]:
    names = ("aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach")
    return MappingProxyType({"mean": mean, **dict(zip(names, organs, strict=bool(organs)))})


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "samed": Preset(
            base="facebook/sam-vit-base",
            dice=_dice(81.88, 87.77, 69.11, 80.45, 79.95, 94.80, 72.17, 88.72, 82.06),
            hd95=20.64,
        ),
        "samed_s": Preset(base="facebook/sam-vit-base", decoder="lora", dice=_dice(77.78), hd95=31.72),
        "samed_h": Preset(
            base="facebook/sam-vit-huge",
            training=TrainingConfig(epochs=400, stop_epoch=300, decay_power=7.0),
            mixed_precision="fp16",
            dice=_dice(84.30, 87.81, 74.72, 85.76, 81.52, 95.76, 70.63, 90.46, 87.77),
            hd95=16.02,
        ),
    }
)
"""Preset by name."""

DEMO: Mapping[str, Any] = MappingProxyType(
    {
        "base": TINY_SAM, "image_size": 128, "batch_size": 16, "epochs": 20, "stop_epoch": 18, "warmup_steps": 20,
        "learning_rate": 0.004, "augment": False, "num_workers": 0,
        "train_cases": [5, 6, 7, 9, 10, 21, 23, 24], "test_cases": [1, 2, 3, 4],
    }
)  # fmt: skip
"""Options of a run on phantoms with the tiny SAM, minutes on two cores."""
