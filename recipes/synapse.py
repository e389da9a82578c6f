"""SAMed on Synapse multi-organ CT: from scans on disk to an adapter, its scores and pictures.

    accelerate launch recipes/synapse.py --data_dir DATA --output_dir runs/synapse
    python recipes/synapse.py --demo --output_dir runs/demo

DATA is raw BTCV, or SAMed's train_npz and test_vol_h5. The defaults are SAMed's, published with 81.88 DSC / 20.64 HD95
on two 24 GB cards (--batch_size 12 each). The demo adapts a tiny stand-in to synthetic CT in minutes on two CPU cores;
its scores say nothing about SAM. A stopped or killed run goes on with --resume. Exit codes: 0 done, 1 some
held-out cases failed, 2 wrong input, 3 loss diverged, 75 stopped by a signal.
"""

import argparse
from pathlib import Path

# Its names are imported on first use, so that help is printed and Ctrl-C is heeded from the start.
import samed_peft as sp


def build_parser() -> argparse.ArgumentParser:
    """Options for the data, and those of every training with the defaults of a preset or of the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, help="raw BTCV or SAMed's preprocessed folder")
    parser.add_argument("--demo", action="store_true", help="phantom CT and the tiny SAM, nothing downloaded")
    parser.add_argument("--preset", choices=sp.config.PRESETS, default="samed", help="published variant to start from")
    parser.add_argument("--train_cases", type=int, nargs="+", help="in place of SAMed's 18, such as 0005 0007")
    parser.add_argument("--validation_cases", type=int, nargs="+", default=[], help="held out, for --validate_epochs")
    parser.add_argument("--test_cases", type=int, nargs="+", help="in place of SAMed's 12")
    sp.config.add_run_options(parser)
    known = parser.parse_known_args()[0]
    parser.set_defaults(**sp.config.PRESETS[known.preset].options | (sp.config.DEMO if known.demo else {}))
    if known.demo == (known.data_dir is not None):
        parser.error("give either --data_dir or --demo")
    return parser


@sp.exit_resumable
def main() -> None:
    """Train an adapter, test it on held-out cases and report its scores."""
    args, adapter_options, training = sp.config.parse_run_options(build_parser())
    out, hub = args.output_dir, {"repo_id": args.push_to_hub}
    accelerator = sp.training.start_run(out, mixed_precision=args.mixed_precision, **hub)

    # One process prepares scans and rows; the others wait and find them.
    with accelerator.main_process_first():
        # 1. Cases: SAMed's 18 to train on and 12 to test on, or those given.
        data_dir = Path(f"{out.resolve()}-phantom") if args.demo else args.data_dir
        if args.demo and accelerator.is_main_process:
            sp.datasets.write_phantom(data_dir, cases=args.train_cases + args.test_cases, seed=0)
        splits = {"train": args.train_cases, "test": args.test_cases, "validation": args.validation_cases}
        folder, cases = sp.datasets.synapse_cases(data_dir, **splits)

        # 2. Rows: slices of the training scans. Held-out scans are read too, so that a bad file stops the run now and
        # not after the training.
        held_out = cases.held_out if accelerator.is_main_process else []
        verify = sp.training.verifies_rows(accelerator)
        rows = sp.datasets.load_synapse(data_dir, "train", cases=cases.train, held_out=held_out, verify=verify)

    # 3. What the adapter will be.
    described = {
        "class_names": folder.class_names,
        "orientation": sp.datasets.common_orientation(rows),
        "preset": args.preset,
    }
    config = sp.SamedConfig(args.base, **described, **adapter_options)

    # 4. Training: the base with LoRA, optimizer steps, validation, checkpoints.
    run = sp.training.Run(config, training, rows, out, folder, cases)
    adapter, settings = sp.training.fit(run, accelerator=accelerator, resume=args.resume)

    # 5. Prediction and scores, with the adapter as it was saved.
    if args.demo or not args.test_cases:  # other cases may come from elsewhere
        settings |= {"dataset": "synthetic CT of samed_peft" if args.demo else sp.config.PRESETS[args.preset].dataset}
    report = sp.score_held_out(adapter, *run.test, out, accelerator=accelerator, settings=settings)

    # 6. Sharing: scores go into the adapter's card, and all of it to the Hub if asked to.
    sp.training.finish_run(run, adapter, report, accelerator=accelerator, **hub)


if __name__ == "__main__":
    main()
