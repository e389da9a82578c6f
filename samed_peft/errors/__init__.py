"""Exceptions for users, the exit codes that programs end with, and signals that ask them to stop."""

from samed_peft.errors.exceptions import InputError as InputError
from samed_peft.errors.exceptions import InterruptedBySignalError as InterruptedBySignalError
from samed_peft.errors.exceptions import NonFiniteLossError as NonFiniteLossError
from samed_peft.errors.exceptions import RunInterruptedError as RunInterruptedError
from samed_peft.errors.exceptions import SomeCasesFailedError as SomeCasesFailedError
from samed_peft.errors.programs import describe_system_error as describe_system_error
from samed_peft.errors.programs import exit_on_error as exit_on_error
from samed_peft.errors.programs import exit_resumable as exit_resumable
from samed_peft.errors.programs import naming_file as naming_file
from samed_peft.errors.programs import printable as printable
from samed_peft.errors.programs import reason_of as reason_of
from samed_peft.errors.programs import system_error as system_error
from samed_peft.errors.signals import StopSignal as StopSignal
