"""`samed push`: an adapter to the Hugging Face Hub."""

import argparse
from pathlib import Path

from samed_peft.cli.options import Commands, new_command
from samed_peft.errors import printable

_DESCRIPTION = """\
Uploads an adapter in one commit: its four files and, if it was evaluated, report.json and report.md. Paths on this
machine and names of cases are left out. The token is that of hf auth login, or HF_TOKEN. Pushing again is harmless."""

_EPILOG = """\
samed push runs/synapse/adapter NAME/REPOSITORY --private

exit codes: 0 done, 2 wrong input, or the Hub cannot be reached or refuses"""


def add_parser(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = new_command(commands, "push", help="adapter -> Hugging Face Hub", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="adapter folder")
    parser.add_argument("repository", metavar="REPO", help="name/repository; a missing one is created")
    parser.add_argument(
        "--private", action="store_true", help="create it as private; an existing public one is refused"
    )
    parser.add_argument("--pictures", action="store_true", help="also send the report's pictures, which show scans")
    parser.add_argument("--cases", action="store_true", help="also send names and scores of single cases")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Push one adapter and list the files sent."""
    from samed_peft.hub.content import published_files
    from samed_peft.hub.push import check_repo_id, send_files

    check_repo_id(args.repository)
    files = published_files(args.adapter, pictures=args.pictures, cases=args.cases)
    url = send_files(files, args.repository, private=args.private)
    print(printable(f"sent to {url}: {', '.join(files)}"))
