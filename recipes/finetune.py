"""SAMed on your own scans: from a Decathlon, nnU-Net or picture folder to an adapter, its scores and pictures.

    accelerate launch recipes/finetune.py --data_dir Task04_Hippocampus --output_dir runs/hippocampus --plane sagittal
    accelerate launch recipes/finetune.py --data_dir polyps --output_dir runs/polyps --class_names polyp

DATA holds dataset.json, imagesTr and labelsTr, or images and masks. One of five folds of cases is left out of training
and scored; slices are those across the coarsest axis, CT is windowed as in SAMed, MR scaled by each scan's percentiles.
With --base tiny-sam --image_size 64 it runs on two CPU cores in minutes, to try things; its scores say nothing about
SAM. With SAM's ViT-B (the default) use a GPU of 24 GB. A stopped or killed run goes on with --resume. Exit codes: 0
done, 2 wrong input, 3 loss diverged, 75 stopped by a signal.
"""

import argparse
from pathlib import Path

from accelerate import Accelerator
from datasets import Dataset

from samed_peft import SamedConfig, TrainingConfig
from samed_peft.config import METHOD_FIELDS, TINY_SAM, add_options, from_options, lower_stop_epoch, option_values
from samed_peft.datasets import (
    ORIENTATIONS,
    CaseVolumes,
    LabelledFolder,
    Splits,
    check_cases,
    choose_splits,
    describe_folder,
    load_slices,
    open_folder,
)
from samed_peft.errors import exit_on_error
from samed_peft.prediction import load_segmenter, score_held_out
from samed_peft.training import Run, finish_run, fit, start_run

SHAPE = ("image_size", "input_size", *METHOD_FIELDS)
SPLIT = ("patient_pattern", "split_file", "test_cases", "validation_cases", "folds", "fold")


def parse_args() -> tuple[argparse.Namespace, TrainingConfig]:
    """Options, checked before anything is written; every field of TrainingConfig is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="dataset.json layout, or images and masks")
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder, or a run to --resume")
    parser.add_argument("--base", default="facebook/sam-vit-base", help=f"Hub id, folder, Meta .pth or {TINY_SAM}")
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="by default Accelerate's setting")
    parser.add_argument("--channel", help="name or number, where dataset.json lists several")
    parser.add_argument("--class_names", type=lambda text: text.split(","), help="a,b,c; by default dataset.json's")
    parser.add_argument("--plane", choices=tuple(ORIENTATIONS), help="of the slices; by default across the coarsest")
    parser.add_argument("--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="intensities to scale to [0, 1]")
    parser.add_argument("--empty_share", type=float, default=1.0, help="share of slices without foreground to keep")
    parser.add_argument("--folds", type=int, default=5, help="number of folds; --fold is left out and scored")
    parser.add_argument("--fold", type=int, default=0, help="counted from 0")
    parser.add_argument("--split_file", type=Path, help="in place of folds: nnU-Net's splits_final.json")
    parser.add_argument("--test_cases", nargs="+", help="in place of folds: the cases to hold out")
    parser.add_argument("--validation_cases", nargs="+", default=[], help="taken from training for --validate_epochs")
    parser.add_argument(
        "--patient_pattern", help="expression whose group is a case's patient, such as '(.+)_scan[0-9]+'"
    )
    add_options(parser, SamedConfig, SHAPE)
    add_options(parser, TrainingConfig)
    parser.add_argument("--resume", action="store_true", help="continue the run in --output_dir")
    parser.add_argument("--push_to_hub", metavar="REPO", help="upload the adapter, as name/repository")
    args = parser.parse_args()
    lower_stop_epoch(args, parser)
    if bool(args.validate_epochs) != bool(args.validation_cases):
        parser.error("--validate_epochs and --validation_cases go together")
    return args, from_options(args, TrainingConfig)


def load_rows(
    args: argparse.Namespace, folder: LabelledFolder, cases: Splits, accelerator: Accelerator
) -> tuple[Dataset, SamedConfig]:
    """Training slices and the adapter's config; one process reads the scans, the others find the cache."""
    chosen = describe_folder(folder, class_names=args.class_names, plane=args.plane, window=args.window)
    config = SamedConfig(args.base, **chosen, **option_values(args, SamedConfig, SHAPE))
    options = {"num_classes": len(config.class_names), "window": config.window}
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            check_cases(folder, cases.test + cases.validation, **options)
        slices = {"orientation": config.orientation, "empty_share": args.empty_share}
        return load_slices(folder, cases.train, **options, **slices), config


@exit_on_error
def main() -> None:
    """Train, test, report."""
    args, training = parse_args()
    out, repo_id = args.output_dir, args.push_to_hub
    accelerator = start_run(out, mixed_precision=args.mixed_precision, repo_id=repo_id)
    folder = open_folder(args.data_dir, channel=args.channel, class_names=args.class_names)
    cases = choose_splits(folder.cases, **{name: vars(args)[name] for name in SPLIT})
    rows, config = load_rows(args, folder, cases, accelerator)
    # Apart, since the validation chooses the adapter that the test is of.
    held_out = (folder.data_name("test", cases.test), folder.data_name("validation", cases.validation))
    data = (rows.config_name, *held_out)
    validation = CaseVolumes.of_folder(folder, cases.validation) if cases.validation else None
    run = Run(config, training, rows, out, data, validation)
    adapter, settings = fit(run, accelerator=accelerator, resume=args.resume)

    settings |= {"dataset": folder.name} if folder.name else {}
    model = load_segmenter(adapter, accelerator=accelerator)  # test the adapter as it was saved
    scans, references = CaseVolumes.of_folder(folder, cases.test)
    report = score_held_out(model, scans, references, out, accelerator=accelerator, settings=settings)
    finish_run(run, adapter, report, accelerator=accelerator, repo_id=repo_id)


if __name__ == "__main__":
    main()
