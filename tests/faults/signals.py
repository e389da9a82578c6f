"""Signals at random times, in every phase, and readers beside a writer that replaces what they read."""

import contextlib
import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree

from .commands import COMMANDS, TRAINING
from .outcomes import Failure, Result, Workshop, generator, last_line, litter, remove
from .zygote import Ended, Zygote


@dataclass(frozen=True)
class Program:
    """A program to be signalled: its call, how many processes run it, and the code it ends with."""

    call: tuple[str | int, ...]
    processes: int = 1
    resumable: bool = False

    def code(self, number: int) -> int:
        """The documented exit code."""
        return 75 if self.resumable else 128 + number


PROGRAMS = {
    "train": Program(("recipe", "synapse.py", *TRAINING, "--num_workers", "0"), resumable=True),
    "train, 2 workers": Program(("recipe", "synapse.py", *TRAINING, "--num_workers", "2"), resumable=True),
    "train, 2 processes": Program(("recipe", "synapse.py", *TRAINING, "--num_workers", "0"), 2, resumable=True),
    "prepare, 2 workers": Program(COMMANDS["prepare-rows"].call),
    "predict": Program(COMMANDS["predict"].call),
    "evaluate": Program(COMMANDS["evaluate"].call),
}


def stopped(workshop: Workshop, *, trials: int, seed: int, names: tuple[str, ...] = tuple(PROGRAMS)) -> Result:
    """Send SIGINT or SIGTERM to a process or its group: one line, the documented code, no orphans."""

    def measure(zygote: Zygote, root: Path, name: str) -> tuple[str, float]:
        _begin(workshop, root)
        pids = _start(zygote, root, PROGRAMS[name])
        _wait_until_caught(pids)
        begun = time.monotonic()
        for pid in pids:
            ended = zygote.wait(pid)
            assert ended.code == 0, ended.err
        return name, time.monotonic() - begun

    temporary: list[str] = []
    durations = dict(workshop.map(measure, names))

    def trial(zygote: Zygote, root: Path, index: int) -> Failure | str | None:
        name = names[index % len(names)]
        random = generator(seed, "signal", name, index)
        after, number = random.uniform(0, durations[name]), random.choice((signal.SIGINT, signal.SIGTERM))
        group, everyone = random.random() < 0.5, random.random() < 0.5
        _begin(workshop, root)
        program = PROGRAMS[name]
        pids = _start(zygote, root, program)
        _wait_until_caught(pids)
        time.sleep(after)
        for pid in pids if everyone else pids[:1]:
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if group else os.kill)(pid, number)
        ended = _wait_for_all(zygote, pids)
        repeat = f"{name}: {number.name} to the {'group' if group else 'process'} after {after:.2f} s, trial {index}"
        if program.processes > 1:
            repeat += ", both processes" if everyone else ", one process"
        if left := litter(root):  # no failure: the next run removes it
            temporary.append(f"{repeat}: {', '.join(left)}")
        if ended[0].code == 0:
            return "too late"
        failures = (_check(one, program.code(number), repeat) for one in ended)
        return next((failure for failure in failures if failure), _one_message(ended, repeat))

    found = workshop.map(trial, range(trials))
    result = Result(
        "signals", notes={"ended before the signal": found.count("too late"), "temporary files left": temporary}
    )
    return result.add(one for one in found if one != "too late")


def _begin(workshop: Workshop, root: Path) -> None:
    remove(root)
    root.mkdir()
    for item in ("data", "adapter", "scans", "predictions", "references"):
        copytree(workshop.inputs / item, root / item)


def _start(zygote: Zygote, root: Path, program: Program) -> list[int]:
    """Start a program; several processes find each other as torchrun's do."""
    if program.processes == 1:
        return [zygote.start(*program.call, root=root)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    sizes = {"WORLD_SIZE": str(program.processes), "LOCAL_WORLD_SIZE": str(program.processes)}
    return [
        zygote.start(*program.call, root=root, RANK=str(rank), LOCAL_RANK=str(rank), **together, **sizes)
        for rank in range(program.processes)
    ]


def _wait_until_caught(pids: list[int]) -> None:
    """Until the processes handle SIGTERM; before that, Python itself is still starting."""
    for pid in pids:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError):
                status = Path(f"/proc/{pid}/status").read_text()
                if (
                    int(status.split("SigCgt:")[1].split()[0], 16) & 1 << (signal.SIGTERM - 1)
                    or "\nState:\tZ" in status
                ):
                    break
            time.sleep(0.001)


def _wait_for_all(zygote: Zygote, pids: list[int]) -> list[Ended]:
    """Wait; when one has failed, the others get SIGTERM as from torchrun."""
    ended = [zygote.wait(pids[0])]
    for pid in pids[1:]:
        time.sleep(0.2)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        ended.append(zygote.wait(pid))
    return ended


def _check(ended: Ended, code: int, repeat: str) -> Failure | None:
    found = f"code {ended.code}: {last_line(ended.err)}"
    if ended.code is None:
        return Failure("hang", found, repeat)
    if "Traceback" in ended.err:
        return Failure("traceback", found, repeat)
    if ended.orphans:
        return Failure("orphans", ", ".join(ended.orphans), repeat)
    if ended.code != code:
        return Failure("wrong code", f"{code} expected, {found}", repeat)
    return None


def _one_message(ended: list[Ended], repeat: str) -> Failure | None:
    """One line; of several processes the first says it, and those that lose the connection to one that ended."""
    counts = [sum(line.startswith("error: ") for line in one.err.replace("\r", "\n").splitlines()) for one in ended]
    if max(counts) > 1 or not any(counts):
        return Failure(
            "not one message", "; ".join(f"{n}: {last_line(o.err)}" for n, o in zip(counts, ended, strict=True)), repeat
        )
    return None


def readers(workshop: Workshop, *, trials: int, seed: int, every: int = 10) -> Result:
    """Read an adapter while another process replaces it: always the old one or the new one, whole.

    One read in `every` is `load_adapter`, the others `adapter_info`; 0 for none.
    """
    share = 250

    def batch(zygote: Zygote, root: Path, first: int) -> list[Failure | None]:
        root.mkdir()
        count = min(share, trials - first)
        ended = zygote.run("read_beside_writer", count, seed + first, every, root=root, timeout_s=30 + count)
        lines = (root / "found.txt").read_text().splitlines() if (root / "found.txt").exists() else []
        found = [Failure(*line.split("\t"), f"reads {first} to {first + count}") for line in lines]
        if ended.code != 0:
            found.append(Failure("ended", f"code {ended.code}: {last_line(ended.err)}", f"reads from {first}"))
        return [*found, *[None] * (count - len(found))]

    result = Result("readers beside a writer")
    for found in workshop.map(batch, range(0, trials, share)):
        result.add(found)
    return result
