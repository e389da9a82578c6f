"""SAMed on Synapse multi-organ CT: from scans on disk to an adapter, its scores and pictures.

    accelerate launch recipes/synapse.py --data_dir DATA --output_dir runs/synapse
    python recipes/synapse.py --demo --output_dir runs/demo

DATA is raw BTCV, or SAMed's train_npz and test_vol_h5. The defaults are SAMed's, published with 81.88 DSC / 20.64 HD95
on two 24 GB cards (--batch_size 12 each). The demo adapts a tiny stand-in to synthetic CT in minutes on two CPU cores;
its scores say nothing about SAM. A stopped or killed run goes on with --resume. Exit codes: 0 done, 2 wrong input,
3 loss diverged, 75 stopped by a signal.
"""

import argparse
from pathlib import Path

from accelerate import Accelerator
from datasets import Dataset

from samed_peft import SamedConfig, TrainingConfig, push_to_hub
from samed_peft.adapters.save_load import write_card
from samed_peft.config import (
    METHOD_FIELDS,
    SYNAPSE_CLASSES,
    SYNAPSE_NAME,
    TINY_SAM,
    add_options,
    from_options,
    lower_stop_epoch,
    option_values,
)
from samed_peft.config.presets import DEMO, PRESETS
from samed_peft.datasets import CaseVolumes, common_orientation, load_synapse, write_phantom
from samed_peft.datasets.synapse_files import require_disjoint, split_cases
from samed_peft.errors import exit_on_error
from samed_peft.evaluation import format_table
from samed_peft.hub.push import check_repo_id
from samed_peft.io import require_replaceable, require_writable_folder
from samed_peft.models.bases import recorded_base
from samed_peft.prediction.held_out import score_held_out
from samed_peft.prediction.inference import load_segmenter
from samed_peft.training import state
from samed_peft.training.fit import Run, fit

SHAPE = ("image_size", "input_size", *METHOD_FIELDS)


def parse_args() -> tuple[argparse.Namespace, TrainingConfig]:
    """Options, checked before anything is written; every field of TrainingConfig is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, help="raw BTCV or SAMed's preprocessed folder")
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder, or a run to --resume")
    parser.add_argument("--preset", choices=PRESETS, default="samed", help="published variant to start from")
    parser.add_argument("--base", help=f"Hub id, folder, Meta .pth or {TINY_SAM}; by default the preset's")
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="by default the preset's")
    add_options(parser, SamedConfig, SHAPE)
    add_options(parser, TrainingConfig)
    parser.add_argument("--demo", action="store_true", help="phantom CT and the tiny SAM, nothing downloaded")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output_dir")
    parser.add_argument("--push_to_hub", metavar="REPO", help="upload the adapter, as name/repository")
    parser.add_argument("--train_cases", type=int, nargs="+", help="in place of SAMed's 18, such as 0005 0007")
    parser.add_argument("--validation_cases", type=int, nargs="+", default=[], help="held out, for --validate_epochs")
    parser.add_argument("--test_cases", type=int, nargs="+", help="in place of SAMed's 12")
    known = parser.parse_known_args()[0]
    parser.set_defaults(**PRESETS[known.preset].options | (DEMO if known.demo else {}))
    args = parser.parse_args()
    lower_stop_epoch(args, parser)
    if args.demo == (args.data_dir is not None) or bool(args.validate_epochs) != bool(args.validation_cases):
        parser.error("give either --data_dir or --demo; --validate_epochs and --validation_cases go together")
    if args.push_to_hub:
        check_repo_id(args.push_to_hub)
    require_writable_folder(args.output_dir)
    require_replaceable(args.output_dir, marker=state.RUN_FILE)
    return args, from_options(args, TrainingConfig)


def load_data(args: argparse.Namespace, accelerator: Accelerator) -> tuple[Dataset, Dataset, Dataset | None]:
    """Training slices, test volumes, validation volumes; one process prepares the cache, the others find it."""
    data_dir, held_out = args.data_dir, args.validation_cases
    with accelerator.main_process_first():
        if args.demo:
            data_dir = Path(f"{args.output_dir.resolve()}-phantom")
            if accelerator.is_main_process:
                write_phantom(data_dir, cases=args.train_cases + args.test_cases, seed=0)
        train_cases = split_cases(data_dir, "train", args.train_cases, without=held_out)
        test_cases = split_cases(data_dir, "test", args.test_cases)
        require_disjoint(train=train_cases, validation=held_out, test=test_cases)
        train = load_synapse(data_dir, "train", cases=train_cases)
        test = load_synapse(data_dir, "test", cases=test_cases)
        return train, test, load_synapse(data_dir, "test", cases=held_out) if held_out else None


@exit_on_error
def main() -> None:
    """Train, test, report."""
    args, training = parse_args()
    logs = {"log_with": "tensorboard", "project_dir": args.output_dir}
    accelerator = Accelerator(mixed_precision=args.mixed_precision, **logs)
    state.require_replicas(accelerator)
    out = args.output_dir
    train_rows, test_rows, validation_rows = splits = load_data(args, accelerator)
    shape = option_values(args, SamedConfig, (*SHAPE, "preset"))
    config = SamedConfig(recorded_base(args.base), SYNAPSE_CLASSES, orientation=common_orientation(train_rows), **shape)
    # The fingerprints of all files are in the names of the prepared splits.
    data = tuple(rows.config_name for rows in splits if rows is not None)
    validation = None if validation_rows is None else CaseVolumes.pairs(validation_rows)
    run = Run(config, training, train_rows, out, data, validation)
    adapter, settings = fit(run, accelerator=accelerator, resume=args.resume)

    if args.demo or not args.test_cases:  # cases of one's own may be of anywhere
        settings |= {"dataset": "synthetic CT of samed_peft" if args.demo else SYNAPSE_NAME}
    # What is tested is what was saved, read back from disk.
    tested = load_segmenter(adapter, accelerator=accelerator)
    report = score_held_out(tested, *CaseVolumes.pairs(test_rows), out, accelerator=accelerator, settings=settings)
    if report is not None:
        write_card(adapter, report=report, training=training)
        print(format_table(report), f"adapter, masks, report and pictures are in {out}", sep="\n")
        if args.push_to_hub:
            print(push_to_hub(adapter, args.push_to_hub))
    accelerator.end_training()


if __name__ == "__main__":
    main()
