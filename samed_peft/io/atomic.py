"""Files and folders that appear whole or not at all, and targets that cannot be written refused before work is done."""

import contextlib
import hashlib
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from samed_peft.errors import InputError

_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
"""Stands in temporary names: process numbers of another machine on the same disk say nothing here."""


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
    """A hidden, unused name beside `path` with its suffix, which some writers choose the format by."""
    return path.with_name(f".tmp-{_HOST}-{os.getpid()}-{secrets.token_hex(4)}-{path.name}")


def _let_others_read(file: Path) -> None:
    """Give a file the permissions of any new one: safetensors makes its files for their owner alone."""
    probe = _temporary_sibling(file)
    probe.touch()
    usual = probe.stat().st_mode & 0o777
    probe.unlink()
    if file.stat().st_mode & 0o777 != usual:
        file.chmod(usual)


def _process_is_alive(pid: int) -> bool:
    if os.name == "nt":
        return True  # os.kill(pid, 0) would end the process there
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_leftovers(path: Path) -> None:
    """Delete temporary siblings of `path` whose process, of this machine, was killed before it could."""
    if not path.parent.is_dir():
        return
    mine = re.compile(rf"\.tmp-{_HOST}-(\d+)-[0-9a-f]{{8}}-{re.escape(path.name)}")
    for sibling in path.parent.iterdir():
        match = mine.fullmatch(sibling.name)
        if match and not _process_is_alive(int(match[1])):
            _remove(sibling)


def require_writable(path: str | Path) -> None:
    """Refuse a target that cannot be created, before work is put into its content; folders are tried, not made.

    Raises:
        InputError: something above `path` is a file, or the folder it belongs in may not be written.
    """
    path = Path(path).resolve()
    _try_to_write(path, path.parents)


def require_writable_folder(path: str | Path) -> None:
    """`require_writable` for a folder that files go into, which may be there already.

    Raises:
        InputError: as there, or `path` is a file, or a folder that may not be written.
    """
    path = Path(path).resolve()
    with contextlib.suppress(OSError):  # a name that cannot be asked about is refused below
        if path.is_file():
            raise InputError(_found_file(path))
    _try_to_write(path, (path, *path.parents))


def _found_file(path: Path) -> str:
    return f"expected a folder or a free name at {path}, found a file; choose another name or move it"


def _try_to_write(path: Path, folders: Sequence[Path]) -> None:
    """Make and remove a file in the first of these folders that is there."""
    folder = path.parent
    try:
        folder = next(parent for parent in folders if parent.exists())
        if folder.is_dir():
            probe = _temporary_sibling(folder / (path.name or "probe"))
            probe.touch()
            probe.unlink()
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror} in {folder}; choose another place") from error
    if not folder.is_dir():
        raise InputError(f"expected a folder above {path}, but {folder} is a file; choose another name")


def require_writable_file(path: str | Path) -> None:
    """`require_writable` for a file, which no folder may stand in the place of.

    Raises:
        InputError: as there, or `path` is a folder.
    """
    with contextlib.suppress(OSError):  # a name that cannot be asked about cannot be written either
        if Path(path).is_dir():
            raise InputError(f"expected a file name, found the folder {path}; add a name for the file in it")
    require_writable(path)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling to write to; on success it is synced and replaces `path`, else it is deleted.

    Missing parent folders are made.

    Raises:
        InputError: `path` is a folder, below a file, or where nothing may be written.
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


def _backup_of(path: Path) -> Path:
    return path.with_name(f".backup-{path.name}")


def recover_dir(path: str | Path) -> None:
    """Repair what a process killed inside `atomic_dir(path)` left behind; does nothing otherwise.

    If `path` is missing and its backup exists, the kill fell between the two renames: the old folder comes
    back. If both exist, the new folder was complete and the backup goes. Temporary folders of dead processes
    go too.
    Call it from one process at a time, and not while another one is writing `path`.
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


def _sync_tree(directory: Path) -> None:
    for root, _, names in os.walk(directory):
        for name in names:
            _let_others_read(Path(root, name))
            _sync(Path(root, name))
        _sync(Path(root))


def _swap_in(new: Path, path: Path) -> None:
    """Rename `new` over `path`; the folder that was there is kept as backup until the new one is in place."""
    backup = _backup_of(path)
    had_old = path.exists()
    if had_old:
        os.rename(path, backup)
    try:
        os.rename(new, path)
    except OSError:
        if had_old:
            os.rename(backup, path)
        raise
    _sync(path.parent)
    if had_old:
        shutil.rmtree(backup)


def require_replaceable(directory: Path, *, marker: str, allowed: str | None = None) -> None:
    """Refuse to replace a folder that is neither missing, nor empty, nor of its own kind.

    Args:
        directory: folder to be replaced.
        marker: file that shows the folder to be of that kind.
        allowed: regular expression of all names a folder of that kind may hold; None for any.

    Raises:
        InputError: `directory` is a file, holds files but no `marker`, or holds files that are not `allowed`.
    """
    if not directory.exists():
        return
    if not directory.is_dir():
        raise InputError(_found_file(directory))
    # What a killed write left behind is nobody's file.
    names = [p.name for p in directory.iterdir() if not p.name.startswith(".tmp-")]
    foreign = [name for name in names if allowed is not None and not re.fullmatch(allowed, name)]
    if foreign or (names and marker not in names):
        raise InputError(
            f"expected an empty folder or an earlier one with {marker} at {directory}, found other files "
            f"{', '.join(sorted(foreign)[:3])}, which must not be lost; choose an empty or new folder".replace(
                " ,", ","
            )
        )


@contextlib.contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Write a folder as a whole: it appears under `path` complete, or not at all.

    Yields a temporary sibling folder to fill. On success every file in it is synced and it replaces `path`,
    old content included; on an exception it is deleted and `path` stays as it was. After a kill, the next
    `atomic_dir` or `recover_dir` on the same path restores the last complete folder.

    Raises:
        InputError: `path` is a file, below one, or where nothing may be written.
    """
    path = Path(path).resolve()  # a link is followed: its target is replaced, not the link
    if path.exists() and not path.is_dir():
        raise InputError(_found_file(path))
    require_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_dir(path)
    temporary = _temporary_sibling(path)
    temporary.mkdir()
    try:
        yield temporary
        _sync_tree(temporary)
        _swap_in(temporary, path)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
