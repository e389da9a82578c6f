"""Write files and folders whole or not at all; refuse output names that cannot be written before work is done."""

import contextlib
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samed_peft.errors import InputError
from samed_peft.io.files import naming_unreadable

_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
"""Part of temporary names, because process numbers of another machine on the same disk mean nothing here."""


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


def _temporary_sibling(path: Path) -> Path:
    """A hidden, unused name beside `path`, with the suffix by which some writers choose the format."""
    return path.with_name(f".tmp-{_HOST}-{os.getpid()}-{secrets.token_hex(4)}-{path.name}")


def _let_others_read(file: Path) -> None:
    """Give a file the permissions of any new one: safetensors makes its files for their owner alone."""
    probe = _temporary_sibling(file)
    probe.touch()
    usual = probe.stat().st_mode & 0o777
    probe.unlink()
    if file.stat().st_mode & 0o777 != usual:
        file.chmod(usual)


def _remove_leftovers(path: Path) -> None:
    """Delete temporary siblings of `path` whose process, of this machine, was killed before it could."""
    import psutil

    mine = re.compile(rf"\.tmp-{_HOST}-(\d{{1,9}})-[0-9a-f]{{8}}-{re.escape(path.name)}")
    for sibling in path.parent.iterdir() if path.parent.is_dir() else ():
        match = mine.fullmatch(sibling.name)
        if match and not psutil.pid_exists(int(match[1])):
            shutil.rmtree(sibling) if sibling.is_dir() else sibling.unlink(missing_ok=True)


@dataclass(frozen=True)
class FolderKind:
    """The files that an output folder of one kind may already hold.

    Attributes:
        markers: files that show a folder to be of this kind; none: a folder may hold anything.
        allowed: regular expression of all names that a folder of this kind holds; None for any.
        in_place: files are written into the folder one by one; otherwise `atomic_dir` replaces it as a whole.
    """

    markers: tuple[str, ...] = ()
    allowed: str | None = None
    in_place: bool = False


def require_replaceable(directory: str | Path, kind: FolderKind) -> None:
    """Refuse an output folder that cannot be written, or that is neither missing, nor empty, nor of its kind.

    Call it before the work whose result goes there; it creates nothing.

    Raises:
        InputError: `directory` is a file, below a file or may not be written; it holds files but not all markers, or
            files that are not `allowed`.
    """
    path = Path(directory).resolve()
    with contextlib.suppress(OSError):  # a name that the system refuses is refused below
        if path.exists() and not path.is_dir():
            raise InputError(
                f"expected a folder or a free name at {path}, found a file; choose another name or move it"
            )
    _try_to_write(path, (path, *path.parents) if kind.in_place else path.parents)
    if not kind.markers or not path.is_dir():
        return
    with naming_unreadable(path):
        # Leftovers of a killed write belong to nobody.
        names = [item.name for item in path.iterdir() if not item.name.startswith(".tmp-")]
    foreign = sorted(name for name in names if kind.allowed is not None and not re.fullmatch(kind.allowed, name))
    if foreign or (names and not {*kind.markers} <= {*names}):
        found = f"other files {', '.join(foreign[:5])}".rstrip()
        raise InputError(
            f"expected an empty folder or an earlier one with {' and '.join(kind.markers)} at {path}, found {found}, "
            "which must not be lost; choose an empty or new folder"
        )


def require_writable_file(path: str | Path, *, replace: bool = True) -> None:
    """Refuse the name of an output file that cannot be created, before the work whose result goes there.

    Args:
        path: the file.
        replace: whether it may exist already.

    Raises:
        InputError: `path` is a folder, below a file or may not be written; or it exists and `replace` is not set.
    """
    path = Path(path)
    with contextlib.suppress(OSError):  # a name that the system refuses is refused below
        if path.is_dir():
            raise InputError(f"expected a file name, found the folder {path}; add a name for the file in it")
    _try_to_write(path.resolve(), path.resolve().parents)
    if path.exists() and not replace:
        raise InputError(f"expected a free name at {path}, found a file; remove it or choose another name")


def _try_to_write(path: Path, folders: Sequence[Path]) -> None:
    """Create and remove a file in the first of `folders` that exists."""
    folder = path.parent
    try:
        folder = next((parent for parent in folders if parent.exists()), folder)
        if folder.is_dir():
            probe = _temporary_sibling(folder / (path.name or "probe"))
            probe.touch()
            probe.unlink()
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror} in {folder}; choose another place") from error
    if not folder.is_dir():
        raise InputError(f"expected a folder above {path}, but {folder} is a file; choose another name")


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling to write to; on success it is synced and replaces `path`, else it is deleted.

    Missing parent folders are made.

    Raises:
        InputError: `path` is a folder, below a file or may not be written.
    """
    path = Path(path)
    require_writable_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary = _temporary_sibling(path)
    try:
        yield temporary
        _let_others_read(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


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
    return path.with_name(f".backup-{path.name}")


def recover_dir(path: str | Path) -> None:
    """Repair what a process killed inside `atomic_dir(path)` left behind; does nothing otherwise.

    If `path` is missing and its backup exists, the process died between the two renames, and the old folder is
    restored. If both exist, the new folder is complete and the backup is deleted, as are temporary folders of dead
    processes. Call it from one process at a time, and not while another one is writing `path`.
    """
    path = Path(path).resolve()
    backup = _backup_of(path)
    if backup.exists():
        if path.exists():
            shutil.rmtree(backup)
        else:
            os.rename(backup, path)
            _sync(path.parent)
    _remove_leftovers(path)


def _swap_in(new: Path, path: Path) -> None:
    """Rename `new` over `path`, whose old folder is kept as a backup until the new one is in place."""
    backup = _backup_of(path)
    if path.exists():
        os.rename(path, backup)
    try:
        os.rename(new, path)
    except OSError:
        if backup.exists():
            os.rename(backup, path)
        raise
    _sync(path.parent)
    if backup.exists():
        shutil.rmtree(backup)


@contextlib.contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Write a folder as a whole: it appears under `path` complete, or not at all.

    Yields a temporary sibling folder to fill. On success every file in it is synced and it replaces `path`,
    old content included; on an exception it is deleted and `path` stays as it was. After a kill, the next
    `atomic_dir` or `recover_dir` on the same path restores the last complete folder.

    Raises:
        InputError: `path` is a file, below a file or may not be written.
    """
    path = Path(path).resolve()  # a link is followed: its target is replaced, not the link
    require_replaceable(path, FolderKind())
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_dir(path)
    temporary = _temporary_sibling(path)
    temporary.mkdir()
    try:
        yield temporary
        for root, _, names in os.walk(temporary):
            for name in names:
                _let_others_read(Path(root, name))
                _sync(Path(root, name))
            _sync(Path(root))
        _swap_in(temporary, path)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
