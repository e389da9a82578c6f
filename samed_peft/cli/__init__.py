"""The `samed` command. Each subcommand imports heavy libraries when it runs, so that help is printed at once."""

import argparse
from collections.abc import Sequence

from samed_peft.cli import convert, evaluate, export, info, plan, predict, push
from samed_peft.errors import exit_on_error


@exit_on_error
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="samed",
        description="SAMed on PEFT and Transformers.",
        epilog="exit codes: 0 done, 1 some cases failed, 2 wrong input or disk, 70 fault, 130 Ctrl-C, 143 SIGTERM",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (plan, predict, evaluate, convert, export, push, info):
        command.add_parser(commands)
    args = parser.parse_args(arguments)
    args.run(args)
