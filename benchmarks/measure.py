"""Clocks, memory and processes that the benchmarks share.

Imports neither this package nor Transformers, so that a process which measures other code holds only that.
"""

import ctypes
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch

Action = Callable[[], Any]
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    """Wait for a GPU, if there is one."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def reset_peak() -> None:
    """Start counting peak memory anew (Linux)."""
    release_memory()
    Path("/proc/self/clear_refs").write_text("5")
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def release_memory() -> None:
    """Give back what PyTorch and the C library keep of freed memory: gigabytes, of processes that wait for a turn."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def peak_resident_gb() -> float:
    """Most memory this process held since `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9


def peak_gpu_gb() -> float | None:
    """Most GPU memory since `reset_peak`; None without a GPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else None


def gemm_gflops(dtype: torch.dtype) -> float:
    """Rate of a large matrix product, the fastest of three: what this machine can do at this moment."""
    size = 8192 if DEVICE.type == "cuda" else 2048
    one, other = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    seconds = [seconds_of(lambda: torch.mm(one, other))[0] for _ in range(3)]
    return 2 * size**3 / min(seconds) / 1e9


def seconds_of(action: Action) -> tuple[float, Any]:
    """Seconds of a call, and its result."""
    synchronize()
    started = time.perf_counter()
    value = action()
    synchronize()
    return time.perf_counter() - started, value


def timed(action: Action, times: int, gemm: torch.dtype | None) -> dict[str, Any]:
    """Call an action several times; its seconds and results, peak memory, and the rate of GEMM right around it."""
    before = gemm and gemm_gflops(gemm)
    seconds, values = zip(*(seconds_of(action) for _ in range(times)), strict=True)
    peaks = {"peak_resident_gb": peak_resident_gb(), "peak_gpu_gb": peak_gpu_gb()}
    rate = (before + gemm_gflops(gemm)) / 2 if gemm else None
    return {"seconds": list(seconds), "values": list(values), "gemm_gflops": rate, **peaks}


class Worker:
    """A process of its own that stays alive and does what it is told, so that several can take turns.

    Args:
        make: called in the process; returns its actions by name.
        options: its arguments; `threads` and `mixed_precision` of them are heeded here.
        forked: see `processes`.
    """

    def __init__(self, make: Callable[[Any], Mapping[str, Action]], options: Any, *, forked: bool = False) -> None:
        context = processes(forked)
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, options))
        self._process.start()
        theirs.close()

    def run(
        self, action: str, times: int = 1, *, settle: str | None = None, fresh: bool = False, gemm: bool = False
    ) -> dict[str, Any]:
        """What `timed` returns.

        Args:
            action: what to do.
            times: how often.
            settle: what to do once beforehand, untimed: caches are cold and memory was given back.
            fresh: start counting peak memory anew.
            gemm: measure matrix products too.
        """
        try:
            self._pipe.send((action, times, settle, fresh, gemm))
            return self._pipe.recv()
        except (EOFError, BrokenPipeError) as error:
            self._process.join()
            raise SystemExit(f"a measured process ended with {self._process.exitcode}; its message is above") from error

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()


def _serve(pipe: Any, make: Callable[[Any], Mapping[str, Action]], options: Any) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    actions = make(options)
    while True:
        try:
            action, times, settle, fresh, gemm = pipe.recv()
        except EOFError:
            return
        if fresh:
            reset_peak()
        if settle:
            actions[settle]()
        pipe.send(timed(actions[action], times, DTYPES[options.mixed_precision] if gemm else None))
        release_memory()


def processes(forked: bool, preload: Sequence[str] = ()) -> BaseContext:
    """How processes are started: anew, or forked from one that has imported `preload`.

    Forks start at once, but share memory with each other, which makes their peaks smaller than they are: for tests.
    """
    context = multiprocessing.get_context("forkserver" if forked else "spawn")
    if forked and preload:
        context.set_forkserver_preload([*preload])
    return context


def in_own_process(function: Callable[[Any], Any], options: Any, *, forked: bool = False) -> Any:
    """The result of `function(options)`, computed in a process that ends with it."""
    with ProcessPoolExecutor(1, mp_context=processes(forked)) as pool:
        return pool.submit(function, options).result()


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """What figures depend on besides the code that is measured."""
    cpu = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": cpu[0] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if DEVICE.type == "cuda" else None,
        "load_before": round(os.getloadavg()[0], 2),
        "commit": commit(Path(__file__).parent),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit(directory: Path) -> str | None:
    """The checkout's commit, with "+changes" if files differ from it; None outside of one."""
    described = subprocess.run(
        ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+changes"],
        cwd=directory, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    return described.stdout.strip() or None


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {
        name: float(f"{of(values):.4g}") for name, of in (("median", statistics.median), ("min", min), ("max", max))
    }


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
