"""Train adapters: `start_run`, `fit` and `finish_run` for a whole run, and the steps they are made of."""

from samed_peft.errors import StopSignal
from samed_peft.training.fit import fit
from samed_peft.training.loop import Step, build_optimizer, train_step, training_steps
from samed_peft.training.runs import Run, claim_run_folder, finish_run, require_replicas, run_settings, start_run
from samed_peft.training.state import Progress, load_checkpoint, save_checkpoint

__all__ = [
    "Progress",
    "Run",
    "Step",
    "StopSignal",
    "build_optimizer",
    "claim_run_folder",
    "finish_run",
    "fit",
    "load_checkpoint",
    "require_replicas",
    "run_settings",
    "save_checkpoint",
    "start_run",
    "train_step",
    "training_steps",
]
