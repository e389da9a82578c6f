"""Temporary names beside files that are being written, what killed processes left under them, and flags."""

import contextlib
import hashlib
import os
import platform
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
"""Part of temporary names, because process numbers of another machine on the same disk mean nothing here."""

_TEMPORARY = re.compile(rf"\.tmp-{_HOST}-(\d{{1,9}})-[0-9a-f]{{8}}.*")
"""Temporary names of processes of this machine."""

_LONGEST_SUFFIX = 16


def temporary_sibling(path: Path) -> Path:
    """A hidden, unused name beside `path`, with the suffix by which some writers choose the format.

    It leaves out the rest of the name, which may already have as many bytes as the system allows.
    """
    suffix = path.suffix if len(path.suffix) <= _LONGEST_SUFFIX else ""
    return path.with_name(f".tmp-{_HOST}-{os.getpid()}-{secrets.token_hex(4)}{suffix}")


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files and folders in `folder` whose process, of this machine, was killed before it could."""
    try:
        found = [(item, match) for item in folder.iterdir() if (match := _TEMPORARY.fullmatch(item.name))]
    except OSError:  # missing, or it may be written but not listed
        return
    for item, match in found:
        if _is_left_by(int(match[1]), item):
            shutil.rmtree(item, ignore_errors=True) if item.is_dir() else item.unlink(missing_ok=True)


@dataclass(frozen=True)
class SharedFlag:
    """A flag that any process raises for all that see the same folder, whatever they are doing meanwhile.

    Attributes:
        file: hidden, and there while the flag is raised.
    """

    file: Path

    @classmethod
    def new_in(cls, folder: Path) -> "SharedFlag":
        """A flag that nobody has raised; what a killed process leaves of it, the next write to the folder removes."""
        return cls(temporary_sibling(folder / "flag"))

    def raise_(self) -> None:
        """Raise it; nothing happens where nothing can be written."""
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.touch()

    def is_raised(self) -> bool:
        """Whether any process has raised it."""
        return self.file.exists()

    def remove(self) -> None:
        """Remove its file, if it is there."""
        with contextlib.suppress(OSError):
            self.file.unlink()


def _is_left_by(process: int, item: Path) -> bool:
    """Whether a process has ended; another one may have its number since, as is usual in containers."""
    import psutil

    try:
        return psutil.Process(process).create_time() > item.lstat().st_mtime + 1
    except psutil.NoSuchProcess:
        return True
    except (psutil.AccessDenied, OSError):  # another user's process, or the file has just been removed
        return False
