"""Read text, JSON and folder listings; fingerprint files by content."""

import contextlib
import hashlib
import json
import os
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from samed_peft.errors import InputError


@contextlib.contextmanager
def naming_unreadable(path: Path) -> Iterator[None]:
    """Turn a refusal of the system to read or examine `path` into an error that names it."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; check its name and permissions") from error


def damaged(path: Path, reason: object) -> InputError:
    """The error for a file that a checksum or a contradiction shows to be damaged."""
    return InputError(f"{path} cannot be read: {reason}; it is damaged or cut off, fetch it again")


def unreadable(path: Path, reason: object) -> InputError:
    """The error for a file that a library gives up, with the library's words."""
    return InputError(
        f"{path} cannot be read: {reason}; it may be damaged or of another format than its name says, open it in a "
        "viewer and export it again, or fetch it again"
    )


@contextlib.contextmanager
def naming_damaged(path: Path, *errors: type[Exception]) -> Iterator[None]:
    """Turn a library's error on a file into one that names the file."""
    try:
        yield
    except InputError:
        raise
    except errors as error:
        raise unreadable(path, str(error).strip().rpartition("\n")[2]) from error  # ITK's reason is on its last line


_OUR_MISTAKES = (TypeError, AttributeError, LookupError, NameError, AssertionError)


@contextlib.contextmanager
def naming_any_error(path: Path) -> Iterator[None]:
    """Turn whatever a library raises while it reads a file into an `InputError` that names the file.

    Errors of kinds that mistakes in code have are let through if a line of ours raises them.
    """
    try:
        yield
    except (InputError, ImportError, Warning):
        raise
    except MemoryError as error:
        raise InputError(
            f"{path} cannot be read: it needs more memory than is free ({error}); crop or downsample it, or free memory"
        ) from error
    except OSError as error:
        if error.strerror and error.filename is not None:
            raise InputError(f"{path} cannot be read: {error.strerror}; check its name and permissions") from error
        raise unreadable(path, error) from error
    except Exception as error:
        module = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
        library = module.partition(".")[0]
        if library == __name__.partition(".")[0] and isinstance(error, _OUR_MISTAKES):
            raise
        reason = str(error).strip().rpartition("\n")[2]
        raise unreadable(path, f"{library} says {type(error).__name__}: {reason}") from error


def require_file(path: str | Path) -> Path:
    """Return `path` as a Path, refused unless it is a file that may be read and is not empty."""
    path = Path(path)
    with naming_unreadable(path):
        if not path.exists():
            raise InputError(f"{path} does not exist; check the path")
        if not path.is_file():
            raise InputError(f"expected a file, found a folder: {path}")
        with path.open("rb") as stream:
            if not stream.read(1):
                raise InputError(f"{path} has zero bytes; it was probably cut off while being copied, fetch it again")
    return path


def list_folder(path: Path) -> list[Path]:
    """List files and folders directly in a folder, sorted.

    Raises:
        InputError: it is missing, is a file, or may not be read.
    """
    with naming_unreadable(path):
        if not path.is_dir():
            found = "a file" if path.exists() else "nothing"
            raise InputError(f"expected a folder at {path}, found {found}; check the path")
        return sorted(path.iterdir())


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file, without the byte order mark that some Windows programs put in front.

    Raises:
        InputError: the file is missing, empty or not UTF-8.
    """
    path = require_file(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"expected UTF-8 text in {path}, found other bytes ({error}); was it damaged?") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def read_json(path: str | Path) -> Any:
    """Read the value of a JSON file.

    Raises:
        InputError: the file is missing, empty or not JSON.
    """
    text = read_text(path)
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"expected JSON in {path}, but it cannot be read: {error}; write the file again") from error


def _sha256(path: Path) -> str:
    with naming_unreadable(path), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content_fingerprint(paths: Iterable[str | Path]) -> str:
    """SHA-256 over names and bytes of files in any order; an edited, added or removed file changes it.

    Names are taken relative to the files' common folder, so that moving that folder changes nothing.

    Raises:
        InputError: a file is missing or unreadable.
    """
    files = [Path(path).absolute() for path in paths]
    if not files:
        return hashlib.sha256().hexdigest()
    base = os.path.commonpath([file.parent for file in files])
    # Hashing releases the interpreter lock, so threads use all cores and overlap with reading.
    with ThreadPoolExecutor(max_workers=min(len(files), os.cpu_count() or 1, 16)) as pool:
        digests = list(pool.map(_sha256, files))
    names = [file.relative_to(base).as_posix() for file in files]
    total = hashlib.sha256()
    for name, digest in sorted(zip(names, digests, strict=True)):
        total.update(json.dumps([name, digest]).encode())
    return total.hexdigest()
