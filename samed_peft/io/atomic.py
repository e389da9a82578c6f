"""Write files and folders whole or not at all."""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from samed_peft.errors import InputError, naming_file
from samed_peft.io.targets import FolderKind, require_replaceable, require_writable_file
from samed_peft.io.temporary import remove_leftovers, temporary_sibling

T = TypeVar("T")

_SWAPS = 2  # RENAME_EXCHANGE of Linux


def _sync(path: Path) -> None:
    """Flush a file or directory to disk, so that a later rename cannot overtake its content."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open directories
    # Windows flushes only handles that may write; elsewhere a read handle also serves read-only files.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _let_others_read(file: Path) -> None:
    """Give a file that its writer made for its owner alone, as safetensors does, the permissions of any new one."""
    if file.stat().st_mode & 0o077 == 0:
        probe = temporary_sibling(file)
        probe.touch()
        file.chmod(probe.stat().st_mode & 0o777)
        probe.unlink()


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling to write to; on success it is synced and replaces `path`, else it is deleted.

    Missing parent folders are made.

    Raises:
        InputError: `path` is a folder, below a file or may not be written.
    """
    path = Path(path)
    require_writable_file(path)
    with naming_file(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        temporary = temporary_sibling(path)
        try:
            yield temporary
            _let_others_read(temporary)
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            _remove(temporary)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8 with the line ends it has."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` to `path` atomically as indented JSON.

    Raises:
        ValueError: `value` holds NaN or infinity, which JSON cannot express; write None for them.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def _backup_of(path: Path) -> Path:
    return path.with_name(f".backup-{hashlib.sha256(path.name.encode()).hexdigest()[:16]}")


def recover_dir(path: str | Path) -> None:
    """Repair what a process killed inside `atomic_dir(path)` left behind; does nothing otherwise.

    Where folders cannot be exchanged at once, they are renamed in two steps. If `path` is missing and its backup
    exists, the process died between the two, and the old folder is restored. If both exist, the new folder is complete
    and the backup is deleted, as are temporary folders of dead processes. Call it from one process at a time, and not
    while another one is writing `path`.
    """
    path = Path(path).resolve()
    backup = _backup_of(path)
    if backup.exists():
        if path.exists():
            shutil.rmtree(backup)
        else:
            os.rename(backup, path)
            _sync(path.parent)
    remove_leftovers(path.parent)


def _identity(path: Path) -> tuple[int, int] | None:
    """Which folder lies under a name now; None for no folder."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step, so that no reader finds neither; False if the system cannot."""
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        renameat2 = libc.renameat2
    except AttributeError:  # a C library from before 2018
        return False
    at_working_folder = -100
    if renameat2(at_working_folder, os.fsencode(one), at_working_folder, os.fsencode(other), _SWAPS) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS):  # this file system cannot, as NFS
        return False
    raise OSError(number, os.strerror(number), str(other))


def _swap_in(new: Path, path: Path) -> None:
    """Put `new` in the place of `path`, whose old folder is kept until the new one is there."""
    if not path.exists():
        os.rename(new, path)
    elif not _exchange(new, path):
        backup = _backup_of(path)
        os.rename(path, backup)
        try:
            os.rename(new, path)
        except OSError:
            os.rename(backup, path)
            raise
        os.rename(backup, new)
    _sync(path.parent)


@contextlib.contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Write a folder as a whole: it appears under `path` complete, or not at all.

    Yields a temporary sibling folder to fill. On success every file in it is synced and it replaces `path`,
    old content included; on an exception it is deleted and `path` stays as it was. After a kill, the next
    `atomic_dir` or `recover_dir` on the same path restores the last complete folder.

    Raises:
        InputError: `path` is a file, below a file or may not be written; or another process replaced it meanwhile,
            whose folder stays.
    """
    path = Path(path).resolve()  # a link is followed: its target is replaced, not the link
    require_replaceable(path, FolderKind())
    with naming_file(path):
        yield from _filled(path)


def _filled(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_dir(path)
    before = _identity(path)
    temporary = temporary_sibling(path)
    try:
        temporary.mkdir()
        yield temporary
        for root, _, names in os.walk(temporary):
            for name in names:
                _let_others_read(Path(root, name))
                _sync(Path(root, name))
            _sync(Path(root))
        if _identity(path) != before:
            raise InputError(
                f"expected {path} as it was, found it replaced by another process meanwhile, whose result stays; "
                "run one at a time, or choose another name"
            )
        _swap_in(temporary, path)
    finally:
        _remove(temporary)


def _remove(temporary: Path) -> None:
    """Remove a temporary file or folder, if it is there; on a failing disk it stays, and the error before counts."""
    with contextlib.suppress(OSError):
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)


def read_whole(directory: str | Path, read: Callable[[Path], T]) -> T:
    """Read several files of a folder that another process may replace by `atomic_dir`, all of the same version.

    Args:
        directory: the folder, which may be missing.
        read: reads it; called again if the folder was replaced meanwhile.

    Raises:
        Exception: an error of `read`, if the folder was not replaced meanwhile.
    """
    directory = Path(directory)
    while True:
        before = _version(directory)
        try:
            value = read(directory)
        except Exception:
            if _version(directory) == before:
                raise
        else:
            if _version(directory) == before:
                return value


def _version(directory: Path) -> tuple[int, ...] | None:
    """Identity of a folder and the time of its last change: numbers of deleted folders are used again."""
    identity = _identity(directory.resolve())
    return None if identity is None else (*identity, directory.stat().st_ctime_ns)
