"""Segment and score Synapse's test cases with an adapter, such as a converted checkpoint of SAMed.

    samed convert --checkpoint epoch_159.pth --base sam_vit_b_01ec64.pth --output samed --input_size 224
    accelerate launch recipes/score_synapse.py --adapter samed --data_dir DATA --output_dir runs/samed

DATA is raw BTCV, or SAMed's test_vol_h5. On one GPU the twelve cases take minutes, on a CPU hours. SAMed's published
checkpoint scores 81.88 DSC and 20.64 HD95 there, in the `samed` convention.
"""

import argparse
from pathlib import Path

from accelerate import Accelerator

from samed_peft import evaluate_cases, load_adapter
from samed_peft.datasets import CaseVolumes, load_synapse
from samed_peft.errors import exit_on_error
from samed_peft.evaluation import format_table, write_report
from samed_peft.inference import segment_cases, settings_of
from samed_peft.io import require_replaceable


@exit_on_error
def main() -> None:
    """Segment, score, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="adapter folder or Hub id")
    parser.add_argument("--base", help="its SAM, where it is not to be had under its recorded name")
    parser.add_argument("--data_dir", type=Path, required=True, help="raw BTCV or SAMed's preprocessed folder")
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder, or an earlier report to replace")
    parser.add_argument("--test_cases", type=int, nargs="+", help="in place of SAMed's 12")
    args = parser.parse_args()
    require_replaceable(args.output_dir, marker="report.json")
    accelerator = Accelerator()
    with accelerator.main_process_first():
        rows = load_synapse(args.data_dir, "test", cases=args.test_cases)
    model = load_adapter(args.adapter, base=args.base, device=accelerator.device)
    config = settings_of(model)
    images, references = CaseVolumes.pairs(rows)
    masks = segment_cases(model, images, args.output_dir / "predictions", accelerator=accelerator)
    if accelerator.is_main_process:
        labels = {"class_names": config.class_names, "settings": config.to_dict()}
        report = evaluate_cases(CaseVolumes.of_masks(masks), references, images=images, **labels)
        write_report(report, args.output_dir)
        print(format_table(report), f"masks, report and pictures are in {args.output_dir}", sep="\n")
    accelerator.end_training()


if __name__ == "__main__":
    main()
