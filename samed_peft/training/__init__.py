"""Training: optimizer steps, and checkpoints that resume to the bit."""

from samed_peft.training.loop import Step, build_optimizer, train_step, training_steps
from samed_peft.training.state import (
    Progress,
    StopSignal,
    claim_run_folder,
    load_checkpoint,
    run_settings,
    save_checkpoint,
)

__all__ = [
    "Progress",
    "Step",
    "StopSignal",
    "build_optimizer",
    "claim_run_folder",
    "load_checkpoint",
    "run_settings",
    "save_checkpoint",
    "train_step",
    "training_steps",
]
