"""The exceptions a user meets, and the exit codes they end a program with."""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

EXIT_SOME_FAILED = 1
EXIT_WRONG_INPUT = 2
EXIT_DIVERGED = 3
EXIT_INTERRUPTED = 75
"""Saved and ready to be resumed: EX_TEMPFAIL of sysexits.h, which job schedulers know as "try again"."""

P = ParamSpec("P")
R = TypeVar("R")


class InputError(ValueError):
    """A file, folder or option of the user's cannot be used.

    The message says what was expected, what was found, in which file, and what to do. Recipes and the command
    line print it alone, without a traceback, and exit with code 2.
    """


class SomeCasesFailedError(RuntimeError):
    """Some cases of many could not be used; the others are done and their results written."""


class NonFiniteLossError(ArithmeticError):
    """The loss of a step is NaN or infinite; no weight was changed in that step."""


class RunInterruptedError(RuntimeError):
    """A signal asked the run to stop; its state is saved."""


_EXIT_CODES = {
    SomeCasesFailedError: EXIT_SOME_FAILED,
    InputError: EXIT_WRONG_INPUT,
    NonFiniteLossError: EXIT_DIVERGED,
    RunInterruptedError: EXIT_INTERRUPTED,
}


def exit_on_error(main: Callable[P, R]) -> Callable[P, R]:
    """Let a program end with one clear message and its exit code where one of the errors above is raised."""

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return main(*args, **kwargs)
        except tuple(_EXIT_CODES) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(next(code for kind, code in _EXIT_CODES.items() if isinstance(error, kind)))

    return wrapped
