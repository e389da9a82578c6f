"""Refuse output names that cannot be written, before the work whose result goes there."""

import contextlib
import errno
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from samed_peft.errors import InputError
from samed_peft.io.files import naming_unreadable
from samed_peft.io.temporary import remove_leftovers, temporary_sibling


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
            remove_leftovers(folder)
            probe = temporary_sibling(folder / "probe")
            probe.touch()
            probe.unlink()
            # Parts of `path` that are made later are not seen by the system now.
            longest = 255 if os.name == "nt" else os.pathconf(folder, "PC_NAME_MAX")
            if any(len(os.fsencode(part)) > longest for part in path.parts):
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror} in {folder}; choose another place") from error
    if not folder.is_dir():
        raise InputError(f"expected a folder above {path}, but {folder} is a file; choose another name")
