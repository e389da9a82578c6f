"""The machine that a training is planned for."""

import os
import platform
from dataclasses import dataclass

from samed_peft.config.fields import AT_LEAST_1, POSITIVE, JsonFields, described, documented


@documented
@dataclass(frozen=True)
class Machine(JsonFields):
    """One device to train on, and the cores that load slices.

    Raises:
        InputError: a value is out of range.
    """

    device: str = described("cpu, cuda or mps")
    name: str = described("of the GPU, or of the processor's architecture")
    memory_gb: float = described("free memory of the device in GB (1e9 bytes)", must=POSITIVE)
    cores: int = described("cores that the process may use", must=AT_LEAST_1)
    processes: int = described("processes that train together, each with a batch of its own", 1, AT_LEAST_1)
    bf16: bool = described("whether it multiplies bfloat16 in hardware", False)


def this_machine(*, processes: int = 1) -> Machine:
    """The device that Accelerate will choose by default, with the memory that is free now.

    Args:
        processes: that train together; on CPUs they share cores and memory.
    """
    import psutil
    import torch

    from samed_peft.training.batches import available_cores

    free_gb, cores = psutil.virtual_memory().available / 1e9, available_cores()
    device, name, bf16 = this_device()
    if device == "cuda":
        free_gb = torch.cuda.mem_get_info()[0] / 1e9
        return Machine(device, name, round(free_gb, 1), cores, processes, bf16)
    return Machine(device, name, round(free_gb / processes, 1), max(1, cores // processes), processes, bf16)


def this_device() -> tuple[str, str, bool]:
    """Kind and name of the device that Accelerate will choose, and whether it multiplies bfloat16 in hardware.

    No memory of a GPU is taken for the answer.
    """
    import torch
    from accelerate.utils import parse_flag_from_env

    is_forced = parse_flag_from_env("ACCELERATE_USE_CPU")
    if torch.cuda.is_available() and not is_forced:
        number = int(os.environ.get("LOCAL_RANK", "0"))
        found = torch.cuda.get_device_properties(number)
        return "cuda", found.name, found.major >= 8
    if torch.backends.mps.is_available() and not is_forced:
        return "mps", platform.machine(), False
    able = torch.cpu.get_capabilities()
    return "cpu", platform.machine(), any(able.get(n, False) for n in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
