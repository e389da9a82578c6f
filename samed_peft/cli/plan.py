"""`samed plan`: how to train on a folder of labelled scans, and why."""

import argparse
from pathlib import Path

from samed_peft.cli.options import Commands, names, new_command
from samed_peft.errors import printable

_DESCRIPTION = """\
Reads all scans and label maps of a folder once and decides how to train on them: plane, intensities, image size, batch,
steps, learning rate, augmentation, validation and more, each with its reason in one line. Nothing is trained."""

_EPILOG = """\
samed plan Task04_Hippocampus --base tiny-sam --max_minutes 10 --output plan.json
samed plan polyps --class_names polyp

exit codes: 0 done, 2 wrong input"""


def add_parser(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = new_command(
        commands, "plan", help="labelled scans -> settings of a training", description=_DESCRIPTION, epilog=_EPILOG
    )
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="folder of labelled scans, in a layout of recipes/finetune.py")
    add("--base", default="facebook/sam-vit-base", help="Hub id, folder, Meta .pth or tiny-sam; default %(default)s")
    add("--max_minutes", type=float, metavar="M", help="time for the training; by default what the data ask for")
    add("--seconds_per_step", type=float, metavar="S", help="as resources.json of a run has it; else estimated on CPUs")
    add("--output", type=Path, metavar="FILE", help="also write the plan and what it was made from, as JSON")
    channels = "names or numbers, if dataset.json lists several: one, or two or three seen together; by default all"
    add("--channel", nargs="+", metavar="NAME", help=channels)
    add("--class_names", type=names, metavar="A,B,C", help="by default dataset.json's")
    add("--plane", choices=("axial", "coronal", "sagittal"), help="of the slices; by default from spacings and labels")
    add("--patient_pattern", help="expression whose group is a case's patient, such as '(.+)_scan[0-9]+'")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Plan, print the table and write the file."""
    from samed_peft.datasets import open_folder
    from samed_peft.io import require_writable_file
    from samed_peft.training import planned_options, write_plan

    if args.output is not None:
        require_writable_file(args.output)
    folder = open_folder(args.data, channel=args.channel, class_names=args.class_names, take_all=True)
    given = {name: vars(args)[name] for name in ("max_minutes", "class_names", "plane", "patient_pattern")}
    plan = planned_options(folder, base=args.base, given=given, seconds_per_step=args.seconds_per_step).plan
    print(printable(plan.table()))
    if args.output is not None:
        write_plan(plan, args.output)
        print(printable(f"\nplan written to {args.output}"))
