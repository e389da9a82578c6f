"""Exceptions for users, the exit codes that programs end with, and signals that ask them to stop."""

import contextlib
import ctypes
import errno
import functools
import os
import re
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn, ParamSpec, Self, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class SomeCasesFailedError(RuntimeError):
    """Some cases of many failed; the others are done and their results written."""

    exit_code = 1


class InputError(ValueError):
    """A file, folder or option of the user cannot be used.

    The message names what was expected, what was found, the file, and a remedy. Recipes and the command line print it
    without a traceback.
    """

    exit_code = 2


class NonFiniteLossError(ArithmeticError):
    """The loss of a step is NaN or infinite; no weight was changed in that step."""

    exit_code = 3


class RunInterruptedError(RuntimeError):
    """A signal asked the run to stop; its state is saved."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h, which job schedulers read as "try again"


class InterruptedBySignalError(RuntimeError):
    """A signal asked for a stop; the message says what was finished before.

    Args:
        message: for users.
        number: of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number  # as shells report it: 130 for Ctrl-C, 143 for SIGTERM


_FAULT_CODE = 70
"""EX_SOFTWARE of sysexits.h: an error that nobody foresaw."""

_PIPE_CODE = 128 + 13
"""As if SIGPIPE had ended the program, which Python turns into an error."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_REMEDIES = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there or ask for a larger quota",
    errno.EROFS: "it is mounted read-only, choose another place",
    errno.EACCES: "check its permissions, or choose another place",
    errno.EPERM: "check its permissions, or choose another place",
    errno.EIO: "the disk or its connection fails, check it",
    errno.ENOENT: "check that nothing removed it meanwhile",
    errno.EMFILE: "raise the limit of open files, ulimit -n",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def exit_on_error(main: Callable[P, R], *, resumable: bool = False) -> Callable[P, R]:
    """Decorate a program to end with one message and an exit code, whatever happens.

    The errors above end it with their own codes; a disk that is full or fails, and memory that runs out, with 2; Ctrl-C
    and SIGTERM with 130 and 143, or with 75 if the program is resumable; anything else is a fault of the program: 70.

    Args:
        main: the program.
        resumable: whether the same command goes on with its work when it is started again with --resume.
    """

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with StopSignal(raises=True) as stop:
            try:
                result = main(*args, **kwargs)
                sys.stdout.flush()
                return result
            except SystemExit:
                raise
            except BaseException as error:
                if isinstance(error, BrokenPipeError) and _reader_has_left():
                    sys.exit(_PIPE_CODE)
                message, code = _message_and_code(error, stop.received, resumable)
        with contextlib.suppress(OSError):
            print(f"error: {printable(message)}", file=sys.stderr)
        sys.exit(code)

    return wrapped


def exit_resumable(main: Callable[P, R]) -> Callable[P, R]:
    """`exit_on_error` for a training, whose state is saved: signals end it with 75, and --resume goes on with it."""
    return exit_on_error(main, resumable=True)


def _message_and_code(error: BaseException, received: int | None, resumable: bool) -> tuple[str, int]:
    if isinstance(
        error,
        (SomeCasesFailedError, InputError, NonFiniteLossError, RunInterruptedError, InterruptedBySignalError),
    ):
        return str(error), error.exit_code
    # Libraries may raise errors of their own where a signal interrupts them or ends their workers.
    if received is not None or isinstance(error, KeyboardInterrupt):
        number = received or signal.SIGINT
        name = signal.Signals(number).name
        if resumable:
            return f"stopped by {name}; --resume goes on with what was saved", RunInterruptedError.exit_code
        return f"stopped by {name}; files that were finished are whole, the others are not there", 128 + number
    if (refusal := system_error(error)) is not None:
        return describe_system_error(refusal), InputError.exit_code
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error)):
        return (
            f"not enough memory ({_first_line(error)}); choose a smaller batch_size or image_size, or close other "
            "programs",
            InputError.exit_code,
        )
    return _fault(error), _FAULT_CODE


def _reader_has_left() -> bool:
    """Whether the program that reads our output, such as `head`, has seen enough; then nothing more is written."""
    output = select.poll()
    output.register(sys.stdout, 0)
    if not output.poll(0):  # another pipe broke
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def system_error(error: BaseException | None) -> OSError | None:
    """Find the system's refusal to read or write behind a library's error; None if it is not the reason."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        if match := re.search(r"\((?:os error|errno:?) (\d+)\)|\[Errno (\d+)\]", str(error)):  # Rust's and Python's
            number = int(match[1] or match[2])
            return OSError(number, os.strerror(number))
        error = error.__cause__ or error.__context__
    return None


def describe_system_error(error: OSError) -> str:
    """One line: the file, the system's reason and a remedy."""
    remedy = _REMEDIES.get(error.errno or 0, "check the file, its disk and its permissions")
    named = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
    return f"{named}{error.strerror}; {remedy}, then start again. Results that were finished before are whole"


def _fault(error: BaseException) -> str:
    """Write an unforeseen error's trace to a file, and name both."""
    trace = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="samed-", suffix=".txt", delete=False, encoding="utf-8") as file:
            file.write(trace)
        where = f"with the trace in {file.name}"
    except OSError:
        print(trace, file=sys.stderr)
        where = "with the trace above"
    return f"unexpected {type(error).__name__}: {_first_line(error)}; please report this fault of samed_peft, {where}"


_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    r"""Text from files as it may go to a terminal: control characters, and those that reorder text, as `\x1b`."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), str(text))


class StopSignal:
    """Catch Ctrl-C (SIGINT) and SIGTERM within `with`.

    Forked processes, such as workers that load slices or prepare scans, get neither: they leave the process group that
    a terminal or a scheduler signals, end when told to by the process that forked them, and end with it.

    Args:
        raises: raise KeyboardInterrupt at once; otherwise the first signal is only noted, so that the work at hand
            can be finished, and the second one raises.

    Attributes:
        received: number of the first signal, or None.
    """

    _active: int = 0

    def __init__(self, *, raises: bool = False) -> None:
        self.received: int | None = None
        self._raises = raises
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there alone
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
            StopSignal._active += 1
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # typeshed knows no type for what signal() returns
        StopSignal._active -= bool(self._before)

    def _note(self, number: int, _: FrameType | None) -> None:
        first = self.received is None
        self.received = self.received or number
        if self._raises or not first:
            raise KeyboardInterrupt

    @classmethod
    def after_fork(cls) -> None:
        """Set up a forked process; called by Python in each."""
        if cls._active:
            cls._active = 0
            with contextlib.suppress(OSError):
                os.setpgid(0, 0)
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the process that forked it
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, _leave)
            reading, writing = os.pipe()
            os.set_blocking(writing, False)
            signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
            threading.Thread(target=_wake, args=(reading, threading.get_ident()), daemon=True).start()


def _leave(number: int, _: FrameType | None) -> NoReturn:
    # By an exception, so that locks that others wait for are released.
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def _wake(signals: int, thread: int) -> None:
    # Python runs a handler between two instructions. A signal that comes right before a lock is waited for is seen
    # only when another one interrupts the wait.
    while signal.SIGTERM not in os.read(signals, 64):
        pass
    while True:
        signal.pthread_kill(thread, signal.SIGTERM)
        time.sleep(0.1)


if sys.platform != "win32":
    os.register_at_fork(after_in_child=StopSignal.after_fork)


@contextlib.contextmanager
def naming_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name the file in errors of the system that name none, or only its temporary sibling."""
    try:
        yield
    except OSError as error:
        if error.filename is None or os.path.basename(os.fsdecode(error.filename)).startswith(".tmp-"):
            error.filename = os.fspath(path)
        raise
