"""Check how Accelerate was set up: precision and number of processes."""

import os
import warnings

from accelerate import Accelerator

from samed_peft.errors import InputError


def check_launch(accelerator: Accelerator) -> None:
    """Refuse a precision that the device does not have, and warn if fewer processes were started than asked for.

    Raises:
        InputError: as `require_precision`.
    """
    require_precision(accelerator)
    warn_of_one_process(accelerator)


def warn_of_one_process(accelerator: Accelerator) -> None:
    """Warn if `accelerate launch` was told to start several processes and started one."""
    if _is_alone_of_several(accelerator):
        warnings.warn(
            "accelerate launch was told to start several processes, but without GPUs it starts one, which does all the "
            "work; for two, use ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 in its place",
            stacklevel=3,
        )


def require_precision(accelerator: Accelerator) -> None:
    """Refuse fp16 on a CPU, for which Accelerate has no autocast and no scaling of gradients.

    Raises:
        InputError: naming where the setting may come from.
    """
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError(
            "expected a GPU for fp16, found none; choose --mixed_precision no or bf16, which replaces the fp16 of "
            "--preset samed_h, of ACCELERATE_MIXED_PRECISION or of Accelerate's configuration (samed predict: --dtype)"
        )


def _is_alone_of_several(accelerator: Accelerator) -> bool:
    """Whether `accelerate launch` was given a number of processes that it did not start.

    Its launcher of single processes sets the address of a main process only if more than one was asked for.
    """
    launched = {"ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    return launched and "WORLD_SIZE" not in os.environ and accelerator.num_processes == 1
