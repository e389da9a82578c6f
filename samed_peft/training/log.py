"""Write a run's values for TensorBoard."""

import io
import os
import socket
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from samed_peft.errors import describe_system_error, naming_file


class EventLog:
    """A file of TensorBoard events, complete after each call of `write`.

    Everything happens in the calling thread: TensorBoard's own writer has a thread, which prints a traceback where the
    disk is full. A log is not worth ending a training, so its first failure is a warning, and what could not be
    written is kept in memory and tried again with the next values.

    Args:
        folder: of all logs of the run.
        start: steps done before; a resumed run replaces the later ones that its earlier logs hold.
        enabled: False writes nothing, for all processes but the main one.
    """

    def __init__(self, folder: Path, *, start: int, enabled: bool = True) -> None:
        now_ns = time.time_ns()
        # TensorBoard reads the files of a run in the order of their names.
        name = f"events.out.tfevents.{now_ns // 10**9:010d}.{socket.gethostname()}.{os.getpid()}.{now_ns % 10**9:09d}"
        self._file = folder / name
        self._enabled = enabled
        self._written = 0
        self._left = io.BytesIO()
        self._has_failed = False
        self._append(Event(file_version="brain.Event:2"))
        self._append(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, values: Mapping[str, float], *, step: int) -> None:
        """Log the values of one step.

        Warns:
            UserWarning: the file cannot be written; once.
        """
        entries = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._append(Event(step=step, summary=Summary(value=entries)))

    def _append(self, event: Event) -> None:
        if not self._enabled:
            return
        event.wall_time = time.time()
        RecordWriter(self._left).write(event.SerializeToString())
        try:
            with naming_file(self._file):
                self._file.parent.mkdir(parents=True, exist_ok=True)
                with self._file.open("ab") as file:
                    if file.tell() > self._written:  # a write that failed left a part
                        file.truncate(self._written)
                    file.write(self._left.getvalue())
        except OSError as error:
            if not self._has_failed:
                then = "while the training goes on; it tries to write its log again with each step"
                warnings.warn(describe_system_error(error, then=then), stacklevel=3)
            self._has_failed = True
        else:
            self._written += self._left.tell()
            self._left = io.BytesIO()
