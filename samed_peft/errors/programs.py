"""End a program with one message and an exit code; say what the system's refusals mean."""

import atexit
import contextlib
import errno
import functools
import os
import re
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from samed_peft.errors.exceptions import FORESEEN, InputError, RunInterruptedError, SomeCasesFailedError
from samed_peft.errors.signals import SIGNALS, StopSignal

P = ParamSpec("P")
R = TypeVar("R")

_FAULT_CODE = 70
"""EX_SOFTWARE of sysexits.h: an error that nobody foresaw."""

_PIPE_CODE = 128 + 13
"""As if SIGPIPE had ended the program, which Python turns into an error."""

_CLOCK_STEP_S = 1.0
"""Precision of the times at which processes began."""

_LONGEST_END_OF_CHILDREN_S = 3.0
"""Time that processes get for their own end; those that load and prepare slices need none."""

_REMEDIES = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there or ask for a larger quota",
    errno.EFBIG: "raise the limit of a file's size, ulimit -f, or choose another place",
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
        began_s = time.time()
        with (
            StopSignal(raises=True, code=RunInterruptedError.exit_code if resumable else None) as stop,
            _printable_warnings(),
        ):
            try:
                result = main(*args, **kwargs)
                sys.stdout.flush()
                atexit.register(_end_at_signals, 0)
                return result
            except SystemExit:
                raise
            except BaseException as error:
                stop.note_only()
                if isinstance(error, BrokenPipeError) and _reader_has_left():
                    sys.exit(_PIPE_CODE)
                code = _print_final_message(error, stop.received, resumable)
                if stop.received is not None:
                    _end_children(began_s)
                _leave_launch()
        atexit.register(_end_at_signals, code)
        sys.exit(code)

    return wrapped


def exit_resumable(main: Callable[P, R]) -> Callable[P, R]:
    """`exit_on_error` for a training, whose state is saved: signals end it with 75, and --resume goes on with it."""
    return exit_on_error(main, resumable=True)


def _print_final_message(error: BaseException, received: int | None, resumable: bool) -> int:
    """Print the message of an error; returns the exit code."""
    message, code = _message_and_code(error, received, resumable)
    is_signal = code in (RunInterruptedError.exit_code, *(128 + number for number in SIGNALS))
    if received is not None:
        import traceback  # costs the start of each command some milliseconds

        traceback.clear_frames(error.__traceback__)  # ends the line of a progress bar that it left open
        if _has_open_bar():
            print(file=sys.stderr)
    # All processes of a launch get a signal, and one says so.
    if not is_signal or os.environ.get("RANK", "0") == "0" or _lost_process(error):
        with contextlib.suppress(OSError):
            print(f"error: {printable(message)}", file=sys.stderr)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    return code


def _has_open_bar() -> bool:
    """Whether a progress bar is left that could not end its line, as where the signal came while it was drawn."""
    if "tqdm.std" not in sys.modules:
        return False
    from tqdm import tqdm

    # One that the signal left half made has no fields yet.
    return any(not vars(bar).get("disable", True) for bar in list(tqdm._instances))


def _end_children(began_s: float) -> None:
    """End processes that this one began: Python waits at its end for some that a signal kept from being ended."""
    import psutil

    children = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.create_time() >= began_s - _CLOCK_STEP_S:
                child.terminate()
                children.append(child)
    for child in psutil.wait_procs(children, timeout=_LONGEST_END_OF_CHILDREN_S)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def _leave_launch() -> None:
    """End gloo's threads, which abort a process that ends with Python alone; NCCL would wait for the others."""
    if os.environ.get("WORLD_SIZE", "1") != "1" and "torch.distributed" in sys.modules:
        with contextlib.suppress(ImportError, AttributeError, RuntimeError):  # PyTorch may be half imported
            from torch import distributed

            if distributed.is_initialized() and distributed.get_backend() == "gloo":
                distributed.destroy_process_group()


def _end_at_signals(code: int) -> None:
    """Let signals end a program that has printed its final message with its own code, and without a traceback."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: os._exit(code))


def _message_and_code(error: BaseException, received: int | None, resumable: bool) -> tuple[str, int]:
    # Libraries may raise errors of their own where a signal interrupts them or ends their workers, and a file that was
    # being read then looks damaged.
    if isinstance(error, FORESEEN) and not (received is not None and isinstance(error, InputError)):
        return str(error), error.exit_code
    if received is not None or isinstance(error, KeyboardInterrupt):
        number = received or next((number for number in error.args if number in SIGNALS), signal.SIGINT)
        name = signal.Signals(number).name
        if resumable:
            return f"stopped by {name}; --resume goes on with what was saved", RunInterruptedError.exit_code
        return f"stopped by {name}; files that were finished are whole, the others are not there", 128 + number
    if (lost := _lost_process(error)) is not None:
        code = RunInterruptedError.exit_code if resumable else SomeCasesFailedError.exit_code
        then = "--resume goes on with what was saved" if resumable else "Files that were finished are whole"
        why = "its own message says why, and one without was killed, often for want of memory"
        return f"lost the connection to another process of this launch ({lost}); {why}. {then}", code
    if (refusal := system_error(error)) is not None:
        return describe_system_error(refusal), InputError.exit_code
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error)):
        return (
            f"not enough memory ({_first_line(error)}); choose a smaller batch_size or image_size, or close other "
            "programs",
            InputError.exit_code,
        )
    return _fault(error), _FAULT_CODE


_LOST_CONNECTION = re.compile(
    "(?:closed|reset) by peer|broken pipe|connection refused|connection was (?:likely )?closed|pair closure|"
    "remote process exited|timed out",
    re.IGNORECASE,
)


def _lost_process(error: BaseException | None) -> str | None:
    """What gloo, NCCL or PyTorch's store say where another process of the launch has ended; None for other errors."""
    while error is not None:
        # This module must not import PyTorch, whose store and NCCL raise errors of their own, and gloo plain ones.
        is_distributed = any(kind.__name__ == "DistError" for kind in type(error).__mro__) or (
            isinstance(error, RuntimeError) and "gloo/" in str(error)
        )
        if is_distributed and (found := _LOST_CONNECTION.search(str(error))):
            return found[0].lower()
        error = error.__cause__ or error.__context__
    return None


def _reader_has_left() -> bool:
    """Whether the program that reads our output, such as `head`, has seen enough; then nothing more is written."""
    output = select.poll()
    output.register(sys.stdout, 0)
    if not output.poll(0):  # another pipe broke
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def reason_of(error: Exception) -> str:
    """Why one case of many failed, in one line; errors that nobody foresaw are preceded by their type."""
    if isinstance(error, MemoryError):
        return f"it does not fit into memory ({_first_line(error)}); close other programs, or crop or resample it"
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        return _refusal(error)
    return str(error) if isinstance(error, (InputError, OSError)) else f"{type(error).__name__}: {_first_line(error)}"


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


_THEN = "then start again. Results that were finished before are whole"


def describe_system_error(error: OSError, *, then: str = _THEN) -> str:
    """One line: the file, the system's reason, a remedy, and what comes then."""
    return f"{_refusal(error)}, {then}"


def _refusal(error: OSError) -> str:
    remedy = _REMEDIES.get(error.errno or 0, "check the file, its disk and its permissions")
    named = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
    return f"{named}{error.strerror}; {remedy}"


def _fault(error: BaseException) -> str:
    """Write an unforeseen error's trace to a file, and name both."""
    import tempfile
    import traceback

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


@contextlib.contextmanager
def _printable_warnings() -> Iterator[None]:
    """Print warnings, which name files and quote headers, without control characters; ours without a place in code."""
    before = warnings.formatwarning

    def formatted(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> str:
        text = f"warning: {message}\n" if category is UserWarning else before(message, category, *where, **options)
        return printable(text)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = before


@contextlib.contextmanager
def naming_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name the file in errors of the system that name none, or only its temporary sibling."""
    try:
        yield
    except OSError as error:
        if error.filename is None or os.path.basename(os.fsdecode(error.filename)).startswith(".tmp-"):
            error.filename = os.fspath(path)
        raise
