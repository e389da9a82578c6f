"""Exceptions for users, and the exit codes that programs end with."""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

EXIT_SOME_FAILED = 1
EXIT_WRONG_INPUT = 2
EXIT_DIVERGED = 3
EXIT_INTERRUPTED = 75
"""Saved and ready to resume: EX_TEMPFAIL of sysexits.h, which job schedulers read as "try again"."""

P = ParamSpec("P")
R = TypeVar("R")


class InputError(ValueError):
    """A file, folder or option of the user cannot be used.

    The message names what was expected, what was found, the file, and a remedy. Recipes and the command line print it
    without a traceback and exit with code 2.
    """


class SomeCasesFailedError(RuntimeError):
    """Some cases of many failed; the others are done and their results written."""


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
    """Decorate a program to end with one message and an exit code if one of the errors above is raised."""

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return main(*args, **kwargs)
        except tuple(_EXIT_CODES) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(next(code for kind, code in _EXIT_CODES.items() if isinstance(error, kind)))

    return wrapped
