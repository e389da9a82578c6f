"""What attacks report, and how their trials are shared between processes."""

import hashlib
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from .zygote import Zygote, build_library

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """A trial that did not hold: its kind, what happened, and how to repeat it."""

    kind: str
    what: str
    repeat: str


@dataclass
class Result:
    """How many trials of an attack were made, and which did not hold."""

    attack: str
    tried: int = 0
    failures: list[Failure] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def held(self) -> int:
        """Trials that held."""
        return self.tried - len(self.failures)

    def add(self, found: "Iterable[Failure | None]") -> "Result":
        """Count trials; None is one that held."""
        for failure in found:
            self.tried += 1
            if failure is not None:
                self.failures.append(failure)
        return self

    @property
    def kinds(self) -> dict[str, int]:
        """Failures by kind, most frequent first."""
        return dict(Counter(failure.kind for failure in self.failures).most_common())

    def text(self) -> str:
        """One line, and one more for each failure."""
        line = f"{self.attack}: {self.tried} tried, {self.held} held"
        return "\n".join([line, *(f"  {f.kind}: {f.what} [{f.repeat}]" for f in self.failures)])


class Workshop:
    """A folder to work in, and processes to fork from, each with its own folder for trials.

    Args:
        folder: an empty one.
        processes: how many trials run at the same time.
    """

    def __init__(self, folder: Path, processes: int = 2) -> None:
        self.folder = folder.resolve()
        library = build_library(self.folder)
        self._zygotes = [Zygote(library, self.folder / f"zygote-{number}") for number in range(processes)]
        self._free: SimpleQueue[tuple[Zygote, Path]] = SimpleQueue()
        for number, zygote in enumerate(self._zygotes):
            self._free.put((zygote, self.folder / f"trial-{number}"))
        self.prepared: dict[str, Any] = {}
        self.inputs = self.folder / "inputs"
        self.inputs.mkdir()
        ended = self._zygotes[0].run("write_inputs", ".", root=self.inputs)
        if not (self.inputs / "done").exists():
            raise RuntimeError(f"inputs could not be written: {ended.err}")

    def map(self, trial: Callable[[Zygote, Path, T], Any], items: Sequence[T]) -> list[Any]:
        """Run trials, each with a process to fork from and the path of a folder that is not there yet."""

        def one(item: T) -> Any:
            zygote, root = self._free.get()
            try:
                return trial(zygote, root, item)
            finally:
                remove(root)
                self._free.put((zygote, root))

        with ThreadPoolExecutor(len(self._zygotes)) as threads:
            return list(threads.map(one, items))

    def close(self) -> None:
        """End the processes."""
        for zygote in self._zygotes:
            zygote.close()


def remove(root: Path) -> None:
    """Remove a trial's folder, whatever a trial made of its permissions."""
    if root.exists():
        for folder, _, _ in os.walk(root):
            os.chmod(folder, 0o700)
        shutil.rmtree(root)


def generator(seed: int, *names: object) -> random.Random:
    """A random generator for one trial, the same in every run of it."""
    return random.Random(":".join(map(str, (seed, *names))))


def digests(root: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of all files at or below `names`, where the path of `root` itself does not count."""
    found = {}
    for name in names:
        path = root / name
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        for file in files:
            data = file.read_bytes().replace(os.fsencode(root), b"ROOT")
            found[str(file.relative_to(root))] = hashlib.sha256(data).hexdigest()
    return found


def litter(root: Path) -> list[str]:
    """Temporary names that were left behind."""
    # Unfinished rows of Hugging Face Datasets too, but not its locks, which stay there by design.
    marks = (".tmp-", ".backup-")
    return [str(p.relative_to(root)) for p in root.rglob("*") if p.name.startswith(marks) or p.suffix == ".incomplete"]


def last_line(text: str) -> str:
    """The last line of an output, shortened."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""
