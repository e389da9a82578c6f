"""SAMed on your own scans: from a folder of labelled scans to an adapter, its scores and pictures.

    accelerate launch recipes/finetune.py --data_dir Task04_Hippocampus --output_dir runs/hippocampus --max_minutes 60
    accelerate launch recipes/finetune.py --data_dir polyps --output_dir runs/polyps --class_names polyp

DATA holds dataset.json, imagesTr and labelsTr, or another layout of docs/data.md. Settings are planned from data and
machine, as by `samed plan`, and printed with their reasons; each option overrules its own decision, and --preset samed
takes SAMed's published settings instead. One of five folds of cases is left out of training and scored; a fifth
of the other patients chooses the best epoch. --fold each trains and scores all folds, then a final adapter on every
case. With --base tiny-sam it runs on two CPU cores in minutes, to try things; its scores say nothing about SAM. With
SAM's ViT-B (the default) use a GPU of 24 GB. A stopped or killed run goes on with --resume. Exit codes: 0 done, 1 some
held-out cases failed, 2 wrong input, 3 loss diverged, 75 stopped by a signal.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

# Its names are imported on first use, so that help is printed and Ctrl-C is heeded from the start.
import samed_peft as sp

if TYPE_CHECKING:
    from accelerate import Accelerator

PRESETS = ("plan", "samed")
SPLIT = ("patient_pattern", "split_file", "test_cases", "validation_cases", "validation_share", "folds")


def fold(text: str) -> int | str:
    """A value of --fold."""
    if text not in ("all", "each") and not text.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number, all or each, found {text!r}")
    return text if text in ("all", "each") else int(text)


def build_parser() -> argparse.ArgumentParser:
    """Options for the data; those of every training, such as --output_dir and --learning_rate, are added to them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data_dir", type=Path, required=True, help="dataset.json layout, or images and masks")
    add("--preset", choices=PRESETS, default="plan", help="plan settings from the data, or take SAMed's; default: plan")
    add("--plan", type=Path, metavar="FILE", help="of samed plan --output, in place of a new plan")
    channels = "names or numbers, if dataset.json lists several: one, or two or three seen together; by default all"
    add("--channel", nargs="+", metavar="NAME", help=channels)
    add("--class_names", type=lambda text: text.split(","), help="a,b,c; by default dataset.json's")
    add("--plane", choices=("axial", "coronal", "sagittal"), help="of the slices; by default across the coarsest axis")
    of_intensities = parser.add_mutually_exclusive_group()
    add = of_intensities.add_argument
    add("--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="intensities to scale to [0, 1]")
    several = f"two or three through which each slice is seen: LOW HIGH, or {', '.join(sp.config.CT_WINDOWS)}"
    add("--windows", dest="window", nargs="+", metavar="WINDOW", action=sp.config.WindowsAction, help=several)
    add = parser.add_argument
    add("--empty_share", type=float, default=1.0, help="share of slices without foreground to keep")
    add("--folds", type=int, default=5, help="number of folds; --fold is left out and scored")
    add("--fold", type=fold, default=0, help="counted from 0; all: train on every case; each: all folds, then that")
    add("--split_file", type=Path, help="in place of folds: nnU-Net's splits_final.json")
    add("--test_cases", nargs="+", help="in place of folds: the cases to hold out")
    add("--validation_share", type=float, default=0.2, help="of the patients to train on; 0 for no validation")
    add("--validation_cases", nargs="+", default=[], help="in place of a share: cases taken from training")
    add("--patient_pattern", help="expression whose group is a case's patient, such as '(.+)_scan[0-9]+'")
    add(
        "--init",
        metavar="ADAPTER",
        help="folder or Hub id of an adapter whose training goes on, on new data or classes",
    )
    refining = "decide on validation cases how prediction refines masks"
    add("--refine", action=argparse.BooleanOptionalAction, default=True, help=refining)
    sp.config.add_run_options(parser, base="facebook/sam-vit-base")
    parser.set_defaults(validate_epochs=1)
    return parser


@sp.exit_resumable
def main() -> None:
    """Train an adapter, test it on held-out cases and report its scores."""
    parser = build_parser()
    args, adapter_options, training = sp.config.parse_run_options(parser)
    if args.preset == "samed" and args.plan is not None:
        parser.error("--preset samed takes SAMed's settings and --plan those of a file; give one of them")
    out, hub = args.output_dir, {"repo_id": args.push_to_hub}
    by_plan = sp.training.planned_precision(out, plan_file=args.plan) if args.preset == "plan" else None
    accelerator = sp.training.start_run(out, mixed_precision=args.mixed_precision or by_plan, **hub)

    # 1. Plan: find the scans and their label maps, and decide how to train on them.
    planned = args.preset == "plan"
    folder = sp.datasets.open_folder(
        args.data_dir, channel=args.channel, class_names=args.class_names, take_all=planned
    )
    plan = None
    if planned:
        given, options = sp.config.given_options(parser), {"base": args.base, "plan_file": args.plan}
        adapter_options, training, others, plan = sp.training.plan_of_run(
            folder, out, given=given, accelerator=accelerator, **options
        )
        vars(args).update(others)

    # 2. Cases: decide which are held out.
    cases, folds = split_cases(args, folder, plan)

    # 3. What the adapter will be: classes, window, orientation and channel follow from the data.
    described = sp.datasets.describe_folder(folder, class_names=args.class_names, plane=args.plane, window=args.window)
    config = sp.SamedConfig(args.base, **described | adapter_options)

    # 4. and 5. Rows and training; of all folds, the final adapter comes first, so that all that could stop it does so.
    job = Job(args, accelerator, folder, config, training, plan)
    run, adapter, settings = train(job, cases, out)

    # 6. Prediction and scores, with the adapter as it was saved. With all folds, the final adapter, trained on every
    # case, gets the scores of the folds' adapters.
    report = score_folds(job, folds, settings) if folds else None
    if cases.test:
        report = sp.score_held_out(adapter, *run.test, out, accelerator=accelerator, settings=settings)

    # 7. Sharing: scores go into the adapter's card, and all of it to the Hub if asked to.
    sp.training.finish_run(run, adapter, report, accelerator=accelerator, **hub)


def split_cases(
    args: argparse.Namespace, folder: "sp.datasets.LabelledFolder", plan: "sp.training.Plan | None"
) -> "tuple[sp.datasets.Splits, list[sp.datasets.Splits]]":
    """The cases to train, test and validate on, and those of each fold if all are trained and scored."""
    split = {name: vars(args)[name] for name in SPLIT}
    folds = sp.datasets.choose_folds(folder.cases, **split) if args.fold == "each" else []
    cases = sp.datasets.choose_splits(folder.cases, **split, fold="all" if folds else args.fold)
    empty = sp.datasets.empty_cases(folder, folder.cases) if plan is None else plan.fingerprint.empty_cases
    sp.datasets.require_foreground(folds or [cases], empty=empty)
    return cases, folds


class Job(NamedTuple):
    """What the trainings of all folds have in common."""

    args: argparse.Namespace
    accelerator: "Accelerator"
    folder: "sp.datasets.LabelledFolder"
    config: "sp.SamedConfig"
    training: "sp.TrainingConfig"
    plan: "sp.training.Plan | None"


def train(job: Job, cases: "sp.datasets.Splits", directory: Path) -> "tuple[sp.training.Run, Path, dict[str, object]]":
    """Train an adapter on some cases; returns the run, the adapter's folder and facts for the report."""
    args, accelerator, folder, config, training, plan = job
    accelerator.print(f"{directory.name}: {cases.summary(validation_share=args.validation_share)}")

    # 4. Rows: slices of the training scans. One process prepares them, and reads the held-out scans so that a bad file
    # stops the run now and not after the training; the other processes find the verified cache.
    with accelerator.main_process_first():
        rows = sp.datasets.load_slices(
            folder,
            cases.train,
            num_classes=len(config.class_names),
            orientation=config.orientation,
            window=config.window,
            empty_share=args.empty_share,
            held_out=cases.held_out if accelerator.is_main_process else [],
            verify=sp.training.verifies_rows(accelerator),
        )

    # 5. Training: the base with LoRA, optimizer steps, validation, checkpoints.
    run = sp.training.Run(config, training, rows, directory, folder, cases, args.init, plan)
    resume = args.resume and (directory == args.output_dir or directory.exists())  # later folds may not have begun
    adapter, settings = sp.training.fit(run, accelerator=accelerator, resume=resume)
    if plan is not None:
        sp.training.record_postprocessing(run, adapter, accelerator=accelerator, refine=args.refine)
    return run, adapter, settings | ({"dataset": folder.name} if folder.name else {})


def score_folds(job: Job, folds: "list[sp.datasets.Splits]", settings: dict[str, object]) -> "sp.Report | None":
    """Train an adapter for each fold and score it on the fold's cases."""
    out, accelerator = job.args.output_dir, job.accelerator
    trained = (train(job, cases, out / f"fold_{number}") for number, cases in enumerate(folds))
    reports = [sp.training.score_fold(*of_fold, accelerator=accelerator) for of_fold in trained]
    return sp.training.join_folds(reports, out, accelerator=accelerator, settings=settings)


if __name__ == "__main__":
    main()
