"""`samed info`: describe an adapter on one screen."""

import argparse

from samed_peft.cli.options import Commands, new_command
from samed_peft.errors import printable

_DESCRIPTION = """\
Shows an adapter's classes, base, method, input and sizes, and its scores if it was evaluated. Only the adapter's own
files are read."""

_EPILOG = """\
samed info runs/synapse/adapter
samed info NAME/REPOSITORY --json

exit codes: 0 done, 2 wrong input"""


def add_parser(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = new_command(commands, "info", help="describe an adapter", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter folder, or Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of an adapter on the Hub")
    parser.add_argument("--json", action="store_true", help="everything as one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print one adapter's description."""
    import json

    from samed_peft.adapters.info import adapter_info, info_text

    info = adapter_info(args.adapter, revision=args.revision)
    if args.json:
        text = json.dumps(info, indent=2, ensure_ascii=False)
        # Characters that change what a terminal shows are written as JSON's escapes.
        print(text if printable(text) == text else json.dumps(info, indent=2))
    else:
        print(printable(info_text(info)))
