"""Exceptions for users, each with the exit code of a program that it ends."""


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


FORESEEN = (SomeCasesFailedError, InputError, NonFiniteLossError, RunInterruptedError, InterruptedBySignalError)
"""All of them: their messages are written for users."""
