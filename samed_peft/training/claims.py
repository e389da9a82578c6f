"""Claim the folder of a training run: for a new run, for one that resumes, or for one that goes on for longer."""

import contextlib
import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from samed_peft.config import SamedConfig, TrainingConfig
from samed_peft.errors import InputError
from samed_peft.io import FolderKind, read_json, require_replaceable, write_json
from samed_peft.training.batch_trial import BATCH_FILE
from samed_peft.training.length import LENGTH_FIELDS, LENGTH_FILE, LengthRecord
from samed_peft.training.planning import PLAN_FILE
from samed_peft.training.progress import is_number

RUN_FILE = "run.json"
"""Record of a run's settings; marks a folder as that of a run."""

RUN_FOLDER = FolderKind(markers=(RUN_FILE,), in_place=True)
"""Output folder of a training run."""

_WRITTEN_BEFORE_STEPS = (BATCH_FILE, LENGTH_FILE, PLAN_FILE, "checkpoints", "logs", RUN_FILE)
"""What a run writes before its first step; the file that marks the folder goes last."""

_DEFAULTS = {
    field.name: list(field.default) if isinstance(field.default, tuple) else field.default
    for kind in (SamedConfig, TrainingConfig)
    for field in dataclasses.fields(kind)
    if field.default is not dataclasses.MISSING
}
"""Settings that a run of an older version did not record, as JSON values."""


def claim_run_folder(
    directory: Path, settings: dict[str, Any], *, resume: bool, accelerator: Accelerator
) -> dict[str, Any]:
    """Make `directory` the folder of the run with these settings, or refuse without touching it.

    The main process checks; if it refuses, all processes raise the same error. A run that resumes may be given more
    epochs, steps or minutes than it had.

    Args:
        directory: output folder.
        settings: from `run_settings`; written to `RUN_FILE`.
        resume: whether to continue a run that is there already.
        accelerator: its processes.

    Returns:
        Settings of the run's length that are recorded and now larger, with the recorded values.

    Raises:
        InputError: the folder holds other files, another run, or this run and `resume` is not set.
    """
    agreed: list[Any] = [None, {}]
    if accelerator.is_main_process:
        try:
            agreed[1] = _claim(directory, settings, resume=resume)
        except InputError as error:
            agreed[0] = str(error)
    message, exceeded = broadcast_object_list(agreed)
    if message is not None:
        raise InputError(message)
    return exceeded


@dataclasses.dataclass
class FolderBefore:
    """What a run's folder was before it was claimed, to be restored if the run ends before its first step.

    Attributes:
        directory: folder of the run.
        names: of what was in it.
        missing: folders that were not there, innermost first.
        is_used: whether a step was taken.
    """

    directory: Path
    names: frozenset[str]
    missing: tuple[Path, ...]
    is_used: bool = False

    @classmethod
    def of(cls, directory: Path) -> "FolderBefore":
        """A folder as it is now."""
        names = frozenset(path.name for path in directory.iterdir()) if directory.is_dir() else frozenset[str]()
        return cls(directory, names, tuple(p for p in (directory, *directory.parents) if not p.exists()))

    @contextlib.contextmanager
    def restored_unless_used(self, *, accelerator: Accelerator) -> Iterator[None]:
        """Remove what a new run has written, if an error or a signal ends it before its first step."""
        try:
            yield
        except BaseException:
            if accelerator.is_main_process and not self.is_used and RUN_FILE not in self.names:
                self._restore()
            raise

    def _restore(self) -> None:
        for name in _WRITTEN_BEFORE_STEPS:
            path = self.directory / name
            if name in self.names or not path.exists():
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for folder in self.missing:
            with contextlib.suppress(OSError):  # others may have written there
                folder.rmdir()


@contextlib.contextmanager
def only_run_in(directory: Path, *, accelerator: Accelerator) -> Iterator[None]:
    """Keep other runs out of a claimed folder within `with`; they would write its checkpoints too.

    The system forgets the lock when the process ends, however it ends, and nothing is left in the folder. Windows has
    no such locks; there nothing is kept out.

    Raises:
        InputError: another process is training in this folder; on all processes.
    """
    with contextlib.ExitStack() as stack:
        messages: list[str | None] = [None]
        if accelerator.is_main_process and sys.platform != "win32":
            record = stack.enter_context((directory / RUN_FILE).open("rb"))
            if not _locked(record):
                messages = [
                    f"another process{_holder_of(record)} is training in {directory}; wait until it has ended, or "
                    "choose another --output_dir"
                ]
        if broadcast_object_list(messages)[0] is not None:
            raise InputError(messages[0])
        yield


def _locked(record: BinaryIO) -> bool:
    """Lock a file; False if another process holds it after a second, which one that was just killed may need to end."""
    import fcntl

    for _ in range(10):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.1)
    return False


def _holder_of(record: BinaryIO) -> str:
    """Process number, in brackets, of the one that holds the lock; empty where the system does not tell."""
    inode = f":{os.fstat(record.fileno()).st_ino} "
    try:
        locks = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return ""
    return next((f" ({line.split()[4]})" for line in locks if " FLOCK " in line and inode in line), "")


def _claim(directory: Path, settings: dict[str, Any], *, resume: bool) -> dict[str, Any]:
    record = directory / RUN_FILE
    if not record.is_file():
        require_replaceable(directory, RUN_FOLDER)
        write_json(record, settings)
        return {}
    recorded = read_json(record)
    if not isinstance(recorded, dict):
        raise InputError(
            f"expected an object with the settings of a run in {record}, found {recorded!r:.80}; the file is damaged: "
            "choose another --output_dir, or put the right one back"
        )
    found = {name: value for name, value in _DEFAULTS.items() if name in settings} | recorded
    found |= LengthRecord.read(directory).latest
    # The note is a text for readers, worded otherwise in older versions.
    names = [n for n in sorted({*settings, *found} - {"note"}) if found.get(n) != settings.get(n)]
    exceeded = {name: found.get(name) for name in names}
    if names and not _is_longer(exceeded, settings):
        differing = [f"{n:.80}: {found.get(n)!s:.200} there, {settings.get(n)!s:.200} now" for n in names]
        raise InputError(
            f"{directory} holds a run with other settings ({'; '.join(differing)}); "
            "choose another --output_dir, or give the same settings to go on; only epochs, steps or minutes may be "
            "more than they were, and not for adalora, which prunes by their number"
        )
    if not resume:
        settings_there = "fewer epochs, steps or minutes" if names else "these settings"
        raise InputError(f"{directory} holds a run with {settings_there}; pass --resume to continue it")
    return exceeded


def _is_longer(exceeded: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a run differs from the recorded one by its length alone, and is longer."""
    if not exceeded.keys() <= {*LENGTH_FIELDS} or exceeded.keys() == {"epochs"} or settings.get("method") == "adalora":
        return False
    for name, before in exceeded.items():
        now = settings.get(name)
        if name == "stop_step" and now is None:
            continue  # all of `max_steps` in place of some of them
        if now is None or not is_number(before) or now <= before:
            return False
    return True
