"""Options and parsing that subcommands share."""

import argparse

Commands = argparse._SubParsersAction
"""Type that `add_subparsers` returns; argparse has no public name for it."""


def new_command(
    commands: "Commands[argparse.ArgumentParser]", name: str, *, help: str, description: str, epilog: str
) -> argparse.ArgumentParser:
    """Add a subcommand whose description and epilog keep their line breaks."""
    return commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def names(text: str) -> tuple[str, ...]:
    """Split `a,b,c`."""
    return tuple(name.strip() for name in text.split(","))
