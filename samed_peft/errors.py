"""Exceptions for users, and the exit codes that programs end with."""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

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


def exit_on_error(main: Callable[P, R]) -> Callable[P, R]:
    """Decorate a program to end with one message and an exit code if one of the errors above is raised."""

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return main(*args, **kwargs)
        except (SomeCasesFailedError, InputError, NonFiniteLossError, RunInterruptedError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)

    return wrapped
