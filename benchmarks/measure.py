"""Clocks, memory, processes and result files that the benchmarks share.

Imports neither this package nor Transformers at the top, so that a process that measures other code loads only that.
"""

import argparse
import ctypes
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import date
from functools import partial
from importlib.metadata import distributions
from multiprocessing.context import BaseContext
from operator import methodcaller
from pathlib import Path
from typing import Any

import torch

Action = Callable[[], Any]
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "scipy", "medpy", "samed_peft")


def options_parser(description: str | None, results: str = "results") -> argparse.ArgumentParser:
    """Build a parser whose help is a script's docstring, with the option that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = Path(__file__).parent / results
    parser.add_argument("--results_dir", type=Path, default=folder, help=f"default: benchmarks/{results}")
    return parser


def reset_peak() -> None:
    """Start counting peak memory anew (Linux)."""
    release_memory()
    Path("/proc/self/clear_refs").write_text("5")
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def release_memory() -> None:
    """Return freed memory that PyTorch and the C library cache; waiting processes would keep gigabytes."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def peak_resident_gb() -> float:
    """Peak resident memory of this process since `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9


def peak_gpu_gb() -> float | None:
    """Peak GPU memory since `reset_peak`; None without a GPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else None


def gemm_gflops(dtype: torch.dtype) -> float:
    """Rate of a large matrix product, the fastest of three: this machine's peak at this moment."""
    size = 8192 if DEVICE.type == "cuda" else 2048
    one, other = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    seconds = [seconds_of(lambda: torch.mm(one, other))[0] for _ in range(3)]
    return 2 * size**3 / min(seconds) / 1e9


def seconds_of(action: Action) -> tuple[float, Any]:
    """Seconds of a call, until a GPU has finished too, and its result."""
    synchronize = torch.cuda.synchronize if DEVICE.type == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    value = action()
    synchronize()
    return time.perf_counter() - started, value


class Worker:
    """A process that stays alive and runs the actions of one subject on request, so that several can take turns.

    The process calls `make(options)`; methods of the object it returns are the actions. `options.threads` and
    `options.mixed_precision` are also used here; for `forked` see `processes`.
    """

    def __init__(self, make: Callable[[Any], Any], options: Any, *, forked: bool = False) -> None:
        self._pool = ProcessPoolExecutor(1, processes(forked), initializer=_start, initargs=(make, options))

    def run(
        self, action: str, times: int = 1, *, settle: str | None = None, fresh: bool = False, gemm: bool = False
    ) -> dict[str, Any]:
        """Run an action, the name of a method, several times; returns its seconds and values, and peak memory.

        `settle` is run once beforehand, untimed, because caches are cold and memory was returned; with `fresh`, peak
        memory is counted anew; with `gemm`, the rate of matrix products right before and after is measured too.
        """
        try:
            return self._pool.submit(_act, action, times, settle=settle, fresh=fresh, gemm=gemm).result()
        except BrokenProcessPool as error:
            raise SystemExit("a measured process ended unexpectedly; its message is above") from error

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


_in_worker: dict[str, Any] = {}


def _start(make: Callable[[Any], Any], options: Any) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    _in_worker.update(subject=make(options), dtype=DTYPES[options.mixed_precision])


def _act(action: str, times: int, *, settle: str | None, fresh: bool, gemm: bool) -> dict[str, Any]:
    subject, dtype = _in_worker["subject"], _in_worker["dtype"]
    if fresh:
        reset_peak()
    if settle:
        methodcaller(settle)(subject)
    before = gemm_gflops(dtype) if gemm else 0.0
    seconds, values = zip(*(seconds_of(partial(methodcaller(action), subject)) for _ in range(times)), strict=True)
    peaks = {"peak_resident_gb": peak_resident_gb(), "peak_gpu_gb": peak_gpu_gb()}
    rate = (before + gemm_gflops(dtype)) / 2 if gemm else None
    release_memory()
    return {"seconds": list(seconds), "values": list(values), "gemm_gflops": rate, **peaks}


def processes(forked: bool, preload: Sequence[str] = ()) -> BaseContext:
    """Start processes anew, or fork them from one that has imported `preload`.

    Forks start at once but share memory, so their peaks come out too small: for tests.
    """
    context = multiprocessing.get_context("forkserver" if forked else "spawn")
    if forked and preload:
        context.set_forkserver_preload([*preload])
    return context


def in_own_process(function: Callable[[Any], Any], options: Any, *, forked: bool = False) -> Any:
    """Return `function(options)`, computed in a process that ends with it."""
    with ProcessPoolExecutor(1, mp_context=processes(forked)) as pool:
        return pool.submit(function, options).result()


def facts() -> dict[str, Any]:
    """Date and machine of a result: everything that figures depend on besides the code that is measured."""
    file = Path("/proc/cpuinfo")
    cpuinfo = file.read_text().splitlines() if file.is_file() else []
    cpu = next((line.split(":", 1)[1].strip() for line in cpuinfo if "model name" in line), platform.machine())
    describe = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+changes"]
    described = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, encoding="utf-8", check=False)
    installed = {package.name.lower(): package.version for package in distributions()}
    machine = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if DEVICE.type == "cuda" else None,
        "load_before": round(os.getloadavg()[0], 2),
        # With "+changes" if files differ from the commit; None outside of a checkout.
        "commit": described.stdout.strip() or None,
        "versions": {"python": platform.python_version()} | {name: installed.get(name) for name in PACKAGES},
    }
    return {"date": str(date.today()), "machine": machine}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest, to four digits."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def with_range(found: dict[str, float], digits: int, *, scale: float = 1) -> str:
    """Format the result of `spread` as median (smallest-largest)."""
    median, low, high = (f"{scale * found[name]:.{digits}f}" for name in ("median", "min", "max"))
    return f"{median} ({low}-{high})"
