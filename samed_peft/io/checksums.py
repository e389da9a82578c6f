"""Checksums of files, so that damage is noticed when they are read: SHA-256 in a folder's record, XXH3 for caches."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from samed_peft.errors import InputError
from samed_peft.io.files import naming_unreadable

CHECKSUMS = "checksums"
"""The record's entry: name of each file, the record's own among them -> SHA-256."""


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    path = Path(path)
    with naming_unreadable(path), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fast_checksums(paths: Sequence[Path]) -> dict[str, str]:
    """Name of each file -> XXH3 of its bytes, which shows damage, but not who is behind a change.

    For large files that nobody is sent: SHA-256 takes six to ten times as long.
    """
    # Hashing releases the interpreter lock, so threads use all cores and overlap with reading.
    with ThreadPoolExecutor(max_workers=min(len(paths), os.cpu_count() or 1, 16)) as pool:
        return dict(zip((path.name for path in paths), pool.map(_xxh3, paths), strict=True))


def _xxh3(path: Path) -> str:
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(1 << 18))
    with naming_unreadable(path), path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def with_checksums(values: Mapping[str, Any], record: str, files: Mapping[str, str]) -> dict[str, Any]:
    """Add the entry to a record's JSON values.

    Args:
        values: the record's content.
        record: name of its file.
        files: name of each other file -> SHA-256 of its bytes.
    """
    return {**values, CHECKSUMS: {**files, record: _content_sha256(values)}}


def without_checksums(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Take the entry out of a record's values, after checking the others by it; records of before have none.

    Raises:
        InputError: the entry is malformed, or other values were changed since it was written.
    """
    own = {name: value for name, value in values.items() if name != CHECKSUMS}
    if CHECKSUMS in values:
        expected = _entry(values, path)
        if path.name not in expected:
            raise _damaged_entry(path)
        _require_equal(path, expected[path.name], _content_sha256(own), record=path)
    return own


def check_files(values: Mapping[str, Any], path: Path, names: tuple[str, ...]) -> None:
    """Compare files beside a record with its checksums, if it has any.

    Args:
        values: the record's content, with its entry.
        path: the record.
        names: the files that it must name beside itself.

    Raises:
        InputError: naming the first file that was changed, or the record if it names other files.
    """
    if CHECKSUMS not in values:
        return
    expected = _entry(values, path)
    if expected.keys() != {*names, path.name}:
        raise _damaged_entry(path)
    for name in names:
        _require_equal(path.with_name(name), expected[name], file_sha256(path.with_name(name)), record=path)


def _content_sha256(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _entry(values: Mapping[str, Any], path: Path) -> dict[str, str]:
    found = values[CHECKSUMS]
    if not isinstance(found, dict) or not all(
        isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) for value in found.values()
    ):
        raise _damaged_entry(path)
    return found


def _damaged_entry(path: Path) -> InputError:
    return InputError(
        f"expected SHA-256 checksums of the files beside {path} as its entry {CHECKSUMS}, found something else; the "
        f"file is damaged: fetch or save it again, or remove the entry {CHECKSUMS} if it was edited on purpose"
    )


def _require_equal(path: Path, expected: str, found: str, *, record: Path) -> None:
    if found != expected:
        raise InputError(
            f"expected {path} as it was saved, with SHA-256 {expected[:12]}, found {found[:12]}; it is damaged or was "
            f"edited: fetch or save it again, or, if it was edited on purpose, remove the entry {CHECKSUMS} from "
            f"{record}"
        )
