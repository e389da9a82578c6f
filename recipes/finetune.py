"""SAMed on scans of one's own: from a Decathlon, nnU-Net or picture folder to an adapter, its scores and pictures.

    accelerate launch recipes/finetune.py --data_dir Task04_Hippocampus --output_dir runs/hippocampus --plane sagittal
    accelerate launch recipes/finetune.py --data_dir polyps --output_dir runs/polyps --class_names polyp

DATA holds dataset.json, imagesTr and labelsTr, or images and masks. One of five folds of cases is held out and scored;
slices are those across the coarsest axis, CT is windowed as in SAMed, MR scaled by each scan's percentiles. With
--base tiny-sam --image_size 64 it runs on two CPU cores in minutes, to try things; its scores say nothing about SAM.
With SAM's ViT-B (the default) use a GPU of 24 GB. A stopped or killed run goes on with --resume. Exit codes: 0 done,
2 wrong input, 3 loss diverged, 75 stopped by a signal.
"""

import argparse
from pathlib import Path

from accelerate import Accelerator
from datasets import Dataset

from samed_peft import SamedConfig, TrainingConfig, push_to_hub
from samed_peft.adapters.save_load import write_card
from samed_peft.config import METHOD_FIELDS, TINY_SAM, add_options, from_options, lower_stop_epoch, option_values
from samed_peft.datasets import CaseVolumes, splits
from samed_peft.datasets import slices as msd
from samed_peft.datasets.layouts import LabelledFolder, open_folder
from samed_peft.errors import exit_on_error
from samed_peft.evaluation import format_table
from samed_peft.hub.push import check_repo_id
from samed_peft.io import content_fingerprint, require_replaceable, require_writable_folder
from samed_peft.models.bases import recorded_base
from samed_peft.prediction.held_out import score_held_out
from samed_peft.prediction.inference import load_segmenter
from samed_peft.training import state
from samed_peft.training.fit import Run, fit

SHAPE = ("image_size", "input_size", *METHOD_FIELDS)


def parse_args() -> tuple[argparse.Namespace, TrainingConfig]:
    """Options, checked before anything is written; every field of TrainingConfig is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="dataset.json layout, or images and masks")
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder, or a run to --resume")
    parser.add_argument("--base", default="facebook/sam-vit-base", help=f"Hub id, folder, Meta .pth or {TINY_SAM}")
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="by default Accelerate's setting")
    parser.add_argument("--channel", help="name or number, where dataset.json lists several")
    parser.add_argument("--class_names", type=lambda text: text.split(","), help="a,b,c; by default dataset.json's")
    parser.add_argument(
        "--plane", choices=tuple(msd.ORIENTATIONS), help="of the slices; by default across the coarsest"
    )
    parser.add_argument("--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="intensities to scale to [0, 1]")
    parser.add_argument("--empty_share", type=float, default=1.0, help="share of slices without foreground to keep")
    parser.add_argument("--folds", type=int, default=5, help="of which --fold is held out")
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
    if args.push_to_hub:
        check_repo_id(args.push_to_hub)
    require_writable_folder(args.output_dir)
    require_replaceable(args.output_dir, marker=state.RUN_FILE)
    return args, from_options(args, TrainingConfig)


def split(args: argparse.Namespace, folder: LabelledFolder) -> tuple[list[str], list[str]]:
    """Cases to train on and cases to test on, less those of the validation."""
    patients = splits.patients_of(list(folder.images), args.patient_pattern)
    if args.split_file:
        train, test = splits.listed_split(args.split_file, patients, fold=args.fold)
    elif args.test_cases:
        train, test = splits.named_split(patients, args.test_cases)
    else:
        train, test = splits.fold_split(patients, folds=args.folds, fold=args.fold)
    if args.validation_cases:
        train, _ = splits.named_split({case: patients[case] for case in train}, args.validation_cases)
    return train, test


def pairs(folder: LabelledFolder, cases: list[str]) -> tuple[CaseVolumes, CaseVolumes]:
    """Scans and references, as they lie on disk."""
    images, labels = ({case: files[case] for case in cases} for files in (folder.images, folder.labels))
    return CaseVolumes.of_scans(images, channel=folder.channel), CaseVolumes.of_masks(labels)


def load_rows(
    args: argparse.Namespace, folder: LabelledFolder, train: list[str], held_out: list[str], accelerator: Accelerator
) -> tuple[Dataset, SamedConfig]:
    """Training slices, and what the adapter is to be; one process reads the scans, the others find the cache."""
    config = SamedConfig(
        recorded_base(args.base),
        msd.class_names_for(folder, args.class_names),
        window=tuple(args.window) if args.window else msd.choose_window(folder),
        orientation=msd.choose_orientation(folder, plane=args.plane),
        channel=folder.channel,
        **option_values(args, SamedConfig, SHAPE),
    )
    options = {"num_classes": len(config.class_names), "window": config.window}
    slices = {"orientation": config.orientation, "empty_share": args.empty_share}
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            msd.check_cases(folder, held_out, **options)
        return msd.load_slices(folder, train, **options, **slices), config


@exit_on_error
def main() -> None:
    """Train, test, report."""
    args, training = parse_args()
    logs = {"log_with": "tensorboard", "project_dir": args.output_dir}
    accelerator = Accelerator(mixed_precision=args.mixed_precision, **logs)
    state.require_replicas(accelerator)
    out, folder = args.output_dir, open_folder(args.data_dir, channel=args.channel, class_names=args.class_names)
    train_cases, test_cases = split(args, folder)
    rows, config = load_rows(args, folder, train_cases, test_cases + args.validation_cases, accelerator)
    # Apart, since the validation chooses the adapter that the test is of.
    held_out = {
        name: content_fingerprint(files[case] for case in cases for files in (folder.images, folder.labels))[:16]
        for name, cases in (("test", test_cases), ("validation", args.validation_cases))
    }
    data = (rows.config_name, *(f"{name}-{digest}" for name, digest in held_out.items()))
    validation = pairs(folder, args.validation_cases) if args.validation_cases else None
    run = Run(config, training, rows, out, data, validation)
    adapter, settings = fit(run, accelerator=accelerator, resume=args.resume)

    settings |= {"dataset": folder.name} if folder.name else {}
    # What is tested is what was saved, read back from disk.
    tested = load_segmenter(adapter, accelerator=accelerator)
    report = score_held_out(tested, *pairs(folder, test_cases), out, accelerator=accelerator, settings=settings)
    if report is not None:
        write_card(adapter, report=report, training=training)
        print(format_table(report), f"adapter, masks, report and pictures are in {out}", sep="\n")
        if args.push_to_hub:
            print(push_to_hub(adapter, args.push_to_hub))
    accelerator.end_training()


if __name__ == "__main__":
    main()
