"""`samed evaluate`: a folder of masks against a folder of references."""

import argparse
import sys
from pathlib import Path

from samed_peft.cli.options import Commands, names, new_command
from samed_peft.errors import printable

_DESCRIPTION = """\
Scores every case and class: Dice, IoU, surface distances and more, in millimetres with absent organs left out
(standard) and in voxels as SAMed's own code scores them (samed), with confidence intervals, pictures of the worst
cases, and one page that shows it all: report.html. Files belong together if their names without suffix are equal.
References may also be a file for each class (CASE/CLASS.nii.gz, CLASS/CASE.nii.gz or TotalSegmentator's
CASE/segmentations/CLASS.nii.gz), pictures in the colours of a colours.json, or have their names in a labels.txt."""

_EPILOG = """\
samed evaluate --predictions masks --references labelsTs --images imagesTs --dataset_json dataset.json --output report

A case that cannot be read, has no partner, lies on another grid or has unnamed labels is reported and left out.

exit codes: 0 done, 1 some cases failed and the report has the others, 2 wrong input and no report"""


def add_parser(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = new_command(
        commands,
        "evaluate",
        help="masks and references -> scores, pictures and report.html",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument("--predictions", type=Path, required=True, metavar="DIR", help="folder of predicted masks")
    parser.add_argument("--references", type=Path, required=True, metavar="DIR", help="folder of reference masks")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="new folder, or an earlier report to replace"
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the scans, for pictures")
    naming = parser.add_mutually_exclusive_group()
    naming.add_argument(
        "--class_names",
        type=names,
        metavar="A,B,C",
        help="names of labels 1, 2, 3 and so on; of a file for each class, those to score",
    )
    naming.add_argument(
        "--dataset_json",
        type=Path,
        metavar="FILE",
        help="dataset.json of the Decathlon or nnU-Net, for its labels",
    )
    parser.add_argument(
        "--tolerance_mm",
        type=float,
        default=2.0,
        metavar="T",
        help="tolerance of the surface Dice, default %(default)s mm; as many voxels in the samed convention",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Score the folder, write the report and print its table."""
    from samed_peft.datasets.dataset_json import scheme_of_dataset
    from samed_peft.evaluation import format_table, write_report
    from samed_peft.evaluation.artefacts import REPORT_FOLDER
    from samed_peft.evaluation.folders import evaluate_folders
    from samed_peft.io import atomic_dir, require_replaceable

    require_replaceable(args.output, REPORT_FOLDER)
    report = evaluate_folders(
        args.predictions,
        args.references,
        class_names=args.class_names if args.dataset_json is None else scheme_of_dataset(args.dataset_json),
        images=args.images,
        tolerance_mm=args.tolerance_mm,
        on_failure=_report_failure,
    )
    with atomic_dir(args.output) as folder:
        write_report(report, folder)
    print(format_table(report), printable(f"open {args.output / 'report.html'} for all of it"), sep="\n")
    report.require_all_cases()


def _report_failure(case: str, reason: str) -> None:
    print(printable(f"failed: {case}: {reason}"), file=sys.stderr)
