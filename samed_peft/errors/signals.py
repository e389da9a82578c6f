"""Signals that ask a program to stop, and what they mean to the processes that it forks."""

import _thread
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import ClassVar, Self

from samed_peft.errors.exceptions import FORESEEN

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_SIGNAL_AT_PARENTS_DEATH = 1
"""PR_SET_PDEATHSIG of Linux."""

_LONGEST_END_S = 15.0
"""Time that an interrupted program gets for its cleaning up; launchers end it by force after 30 s."""

_ONE_REQUEST_S = 2.0
"""Launchers pass on a signal that the whole group got already; a person who presses Ctrl-C again takes longer."""


_AGAIN_AFTER_S = 0.05

_PARENT_IS_SOUGHT_EVERY_S = 0.5

_FORCED = b"\nerror: stopped by %s while libraries waited for their processes; files that were finished are whole\n"


class StopSignal:
    """Catch Ctrl-C (SIGINT) and SIGTERM within `with`.

    Forked processes, such as workers that load slices or prepare scans, get neither: they leave the process group that
    a terminal or a scheduler signals, end when told to by the process that forked them, and end with it.

    Args:
        raises: raise KeyboardInterrupt at once; otherwise the first signal is only noted, so that the work at hand
            can be finished, and a second one, later by some seconds, raises.
        code: exit code of a process that does not end within seconds after it raised; by default 128 + signal.
        on_first: called at the first signal, to tell other processes for instance.

    Attributes:
        received: number of the first signal, or None.
    """

    _active: ClassVar[list["StopSignal"]] = []
    _forking: ClassVar[tuple[int, bool]] = 0, False
    _has_interrupted: bool = False

    def __init__(
        self, *, raises: bool = False, code: int | None = None, on_first: Callable[[], None] | None = None
    ) -> None:
        self.received: int | None = None
        self._raises = raises
        self._code = code
        self._on_first = on_first
        self._ends = False
        self._is_lost = False
        self._hook_before = sys.unraisablehook
        self._first_at_s = 0.0
        self._before: dict[int, object] = {}
        self._end: threading.Timer | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there alone
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
            StopSignal._active.append(self)
            self._hook_before, sys.unraisablehook = sys.unraisablehook, self._raise_again
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # typeshed knows no type for what signal() returns
        if self._before:
            if self in StopSignal._active:  # not in a process that was forked within
                StopSignal._active.remove(self)
            sys.unraisablehook = self._hook_before
        if self._end is not None:
            self._end.cancel()
        # Libraries raise errors of their own where a signal interrupts them.
        if self.received is not None and isinstance(error, Exception) and not isinstance(error, FORESEEN):
            raise KeyboardInterrupt(self.received) from error

    def note_only(self) -> None:
        """Raise no more from here on: the program is about to print its final message."""
        self._ends = True

    @classmethod
    def results_are_whole(cls) -> None:
        """Only note signals from here on: there is nothing left to stop, and the program ends as if none came."""
        for active in cls._active:
            active.note_only()

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        first = self.received is None
        if first:
            self.received, self._first_at_s = number, now
            if self._on_first is not None:
                self._on_first()
        if self._ends:
            return
        if self._raises if first else self._is_lost or now - self._first_at_s > _ONE_REQUEST_S:
            self._is_lost = False
            StopSignal._has_interrupted = True
            if self._raises and self._end is None:
                # Libraries may wait for workers that the signal ended too.
                self._end = threading.Timer(_LONGEST_END_S, self._end_by_force, [number])
                self._end.daemon = True
                self._end.start()
            raise KeyboardInterrupt(self.received)

    def _end_by_force(self, number: int) -> None:
        if not self._ends:  # the final message was not printed
            os.write(2, _FORCED % signal.Signals(number).name.encode())
        os._exit(self._code or 128 + number)

    def _raise_again(self, ignored: "sys.UnraisableHookArgs") -> None:
        """Send a signal again whose error Python ignores, as in destructors and in what runs before and after forks.

        Other errors that Python ignores after a signal, and only prints, are those of objects that it left half made.
        """
        if self.received is None:
            self._hook_before(ignored)
        if self.received is None or not isinstance(ignored.exc_value, KeyboardInterrupt):
            return
        self._is_lost = True
        _thread.start_new_thread(self._send_again, (self.received,))  # of threading, it would be waited for, here

    @staticmethod
    def _send_again(number: int) -> None:
        time.sleep(_AGAIN_AFTER_S)
        os.kill(os.getpid(), number)

    @classmethod
    def _before_fork(cls) -> None:
        cls._forking = os.getpid(), threading.current_thread() is threading.main_thread()
        # Python forgets a signal that reaches a new process before it is set up, and its pool would wait for it.
        if cls._active:
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    @classmethod
    def _after_fork(cls) -> None:
        if cls._active:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    @classmethod
    def _in_forked(cls) -> None:
        # Pools may replace workers until the very end of a program that was interrupted.
        if sys.platform == "linux" and (cls._active or cls._has_interrupted):
            cls._end_with_parent()
        if not cls._active:
            return
        cls._active.clear()
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        is_told_to_end = _takes_pending_signals()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if is_told_to_end:
            os.kill(os.getpid(), signal.SIGTERM)

    @classmethod
    def _end_with_parent(cls) -> None:
        """End this forked process when the one that forked it does."""
        parent, is_main_thread = cls._forking
        if is_main_thread:
            ctypes.CDLL(None).prctl(_SIGNAL_AT_PARENTS_DEATH, signal.SIGKILL)
        else:  # Linux would send the signal when that thread ends: to a pool's new worker, which may hold its locks
            threading.Thread(target=_end_without, args=(parent,), daemon=True).start()
        if os.getppid() != parent:  # it has ended before
            os._exit(1)


def _takes_pending_signals() -> bool:
    """Drop signals that reached a new process before it left the group; whether its parent sent one of them."""
    is_told_to_end = False
    while sys.platform != "darwin" and (found := signal.sigtimedwait(SIGNALS, 0)) is not None:
        is_told_to_end |= found.si_pid == os.getppid()
    return is_told_to_end


def _end_without(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_IS_SOUGHT_EVERY_S)
    os._exit(1)


if sys.platform != "win32":
    os.register_at_fork(
        before=StopSignal._before_fork,
        after_in_parent=StopSignal._after_fork,
        after_in_child=StopSignal._in_forked,
    )
