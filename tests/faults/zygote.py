"""Processes forked from one that has imported everything, since a new Python with PyTorch takes seconds.

Run as a script, it is that process: it reads requests from its standard input, one JSON a line, and answers each with
one. `Zygote` is the other end.
"""

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIBRARY = Path(__file__).with_name("fault.c")
CONTENT, NAME, REMOVAL = 1, 2, 4
KILL, HALF_THEN_KILL, FAIL = 1, 2, 3


def build_library(folder: Path) -> Path:
    """Compile the library that counts and disturbs file operations."""
    built = folder / "fault.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(built), str(LIBRARY), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return built


@dataclass(frozen=True)
class Fault:
    """What happens at the file operation number `at`, counted from 1 over `kinds`; 0 only counts."""

    at: int = 0
    kinds: int = CONTENT | NAME | REMOVAL
    action: int = 0
    error: int = 0
    sticky: bool = False


@dataclass(frozen=True)
class Ended:
    """How a forked process ended.

    Attributes:
        code: exit code, or minus the signal that ended it; None for a hang, after which it was killed.
        orphans: names of processes of its session that outlived it.
        operations: file operations seen, by kind.
        hit: the operation that was disturbed; empty if it was never reached.
    """

    code: int | None
    out: str
    err: str
    orphans: list[str]
    operations: dict[int, int]
    hit: str
    seconds: float


class Zygote:
    """A process to fork from; use it from one thread at a time."""

    def __init__(self, library: Path | None, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        alone = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "TZ": "UTC"}
        preload = {} if library is None else {"LD_PRELOAD": str(library)}
        command = [sys.executable, __file__, str(library or "")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
        self._process: Any = subprocess.Popen(command, env=os.environ | alone | preload, **pipes)  # type: ignore[call-overload]
        self._started: dict[int, tuple[Path, float]] = {}

    def start(self, call: str, *arguments: Any, root: Path, fault: Fault | None = None, **environment: str) -> int:
        """Fork a process that calls a function of `subjects` in `root`; returns its number."""
        files = self._folder / f"trial-{len(self._started)}-{time.monotonic_ns()}"
        files.mkdir()
        request = {"call": call, "arguments": arguments, "root": str(root.resolve()), "files": str(files)}
        pid = self._ask(request | {"fault": None if fault is None else vars(fault), "environment": environment})["pid"]
        self._started[pid] = (files, time.monotonic())
        return pid

    def wait(self, pid: int, timeout_s: float = 40) -> Ended:
        """Wait for a process; one that takes longer is killed with its children."""
        files, started = self._started.pop(pid)
        found = self._ask({"wait": pid, "timeout": timeout_s})
        counts, hit = {}, ""
        if (files / "plan").exists():
            plan = (files / "plan").read_bytes()
            counts = dict(zip((CONTENT, NAME, REMOVAL), struct.unpack_from("3l", plan), strict=True))
            hit = plan[32 : 32 + 512].split(b"\0")[0].decode(errors="replace")
        texts = [(files / name).read_text(encoding="utf-8", errors="replace") for name in ("out", "err")]
        for item in files.iterdir():
            item.unlink()
        files.rmdir()
        return Ended(found["code"], *texts, found["orphans"], counts, hit, time.monotonic() - started)

    def run(self, call: str, *arguments: Any, timeout_s: float = 40, **options: Any) -> Ended:
        """Start and wait."""
        return self.wait(self.start(call, *arguments, **options), timeout_s)

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def _sessions() -> dict[int, tuple[int, str]]:
    """Session and name of every process that has not ended."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                name, rest = (folder / "stat").read_text().rsplit(")", 1)
                state, _, _, session = rest.split()[:4]
                if state != "Z":
                    found[int(folder.name)] = (int(session), name.split("(", 1)[1])
    return found


def _reap(pid: int, timeout_s: float) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    code: int | None = None
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        time.sleep(0.002)
    else:
        for number, (session, _) in _sessions().items():
            if session == pid:
                os.kill(number, signal.SIGUSR1)  # writes where it hangs
        time.sleep(0.5)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    grace = time.monotonic() + 2  # children are told to end, and need a moment
    while (left := {p: name for p, (session, name) in _sessions().items() if session == pid}) and (
        time.monotonic() < grace
    ):
        time.sleep(0.02)
    for number in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGUSR1)
    time.sleep(0.5 * bool(left))
    for number in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    return {"code": code, "orphans": list(left.values())}


def _become(request: dict[str, Any], library: str) -> None:
    """Run a request in this forked process and end it."""
    os.setsid()
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{request['files']}/{name}", os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["root"])
    os.environ.update(request["environment"])
    faulthandler.register(signal.SIGUSR1)
    subjects = importlib.import_module("subjects")
    subjects.prepare_process(Path(request["root"]))
    if request["fault"] is not None:
        fault = request["fault"]
        values = (fault[name] for name in ("at", "kinds", "action", "error", "sticky"))
        armed = ctypes.CDLL(library).fault_arm(
            f"{request['files']}/plan".encode(), request["root"].encode(), *map(int, values)
        )
        assert armed == 0
    _end(_code_of(getattr(subjects, request["call"]), request["arguments"]))


def _code_of(function: Any, arguments: list[Any]) -> int:
    try:
        function(*arguments)
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1


def _end(code: int) -> None:
    """End as the interpreter does, but without tearing down thousands of modules, which takes seconds."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve() -> dict[str, Any] | None:
    """Answer requests; returns one in the process that was forked for it, and None at the end."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    while line := sys.stdin.buffer.raw.readline():  # type: ignore[attr-defined]
        request = json.loads(line)
        if "wait" in request:
            answer = _reap(request["wait"], request["timeout"])
        else:
            pid = os.fork()
            if pid == 0:
                return request
            answer = {"pid": pid}
        print(json.dumps(answer), file=answers, flush=True)
    return None


if __name__ == "__main__":
    importlib.import_module("subjects").warm_up()
    gc.collect()
    gc.freeze()
    if (asked := _serve()) is not None:
        _become(asked, sys.argv[1])
