"""Segment and score Synapse's test cases with an adapter, such as a converted checkpoint of SAMed.

    samed convert --checkpoint epoch_159.pth --base sam_vit_b_01ec64.pth --output samed --input_size 224
    accelerate launch recipes/score_synapse.py --adapter samed --data_dir DATA --output_dir runs/samed

DATA is raw BTCV, or SAMed's test_vol_h5. On one GPU the twelve cases take minutes, on a CPU hours. SAMed's published
checkpoint scores 81.88 DSC and 20.64 HD95 there, in the `samed` convention.
"""

import argparse
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from accelerate import Accelerator

from samed_peft import SamedConfig, evaluate_cases
from samed_peft.config import SYNAPSE_CLASSES
from samed_peft.datasets import CaseVolumes, load_synapse
from samed_peft.datasets.synapse_files import TEST_CASES
from samed_peft.errors import InputError, exit_on_error
from samed_peft.evaluation import format_table, write_report
from samed_peft.io import FolderKind, require_replaceable, write_json
from samed_peft.prediction.inference import load_segmenter, segment_cases, settings_of

MARKER = "scores.json"
"""Says of a folder that this recipe fills it, from the first mask on: a killed run is simply started again."""

FOLDER = FolderKind((MARKER,), rf"{re.escape(MARKER)}|predictions|pictures|report\.\w+", in_place=True)


def check_classes(config: SamedConfig, adapter: str) -> None:
    """Refuse an adapter whose labels are not Synapse's."""
    if config.class_names != SYNAPSE_CLASSES:
        raise InputError(
            f"expected an adapter of Synapse's organs ({', '.join(SYNAPSE_CLASSES)}), found {adapter} of "
            f"{', '.join(config.class_names[:8])}; score its masks against your references with samed evaluate"
        )


def claim(folder: Path, settings: dict[str, object]) -> None:
    """Mark the folder and clear what an earlier run left in it."""
    write_json(folder / MARKER, settings)
    for path in set(folder.iterdir()) - {folder / MARKER}:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def coverage_note(cases: Iterable[str]) -> dict[str, str]:
    """What a reader must know of scores on other cases than SAMed's twelve; stands above them in the report."""
    of_samed, scored = [f"case{number:04d}" for number in TEST_CASES], set(cases)
    missing, others = [case for case in of_samed if case not in scored], sorted(scored - {*of_samed})
    if not missing and not others:
        return {}
    parts = [f"missing {', '.join(missing)}"] * bool(missing) + [f"besides {', '.join(others)}"] * bool(others)
    found = len(of_samed) - len(missing)
    note = f"scored {found} of SAMed's {len(of_samed)} test cases; {'; '.join(parts)}; published figures are of all"
    return {"note": note}


@exit_on_error
def main() -> None:
    """Segment, score, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="adapter folder or Hub id")
    parser.add_argument("--base", help="its SAM, where it is not to be had under its recorded name")
    parser.add_argument("--data_dir", type=Path, required=True, help="raw BTCV or SAMed's preprocessed folder")
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder, or one of this recipe to replace")
    parser.add_argument("--test_cases", type=int, nargs="+", help="in place of SAMed's 12")
    args = parser.parse_args()
    require_replaceable(args.output_dir, FOLDER)
    accelerator = Accelerator()
    model = load_segmenter(args.adapter, base=args.base, accelerator=accelerator)
    config = settings_of(model)
    check_classes(config, args.adapter)
    with accelerator.main_process_first():
        rows = load_synapse(args.data_dir, "test", cases=args.test_cases, window=config.window)
    if accelerator.is_main_process:
        claim(args.output_dir, {"adapter": args.adapter, "data_dir": str(args.data_dir)})
    accelerator.wait_for_everyone()
    images, references = CaseVolumes.pairs(rows)
    masks = segment_cases(model, images, args.output_dir / "predictions", accelerator=accelerator)
    if accelerator.is_main_process:
        labels = {"class_names": config.class_names, "settings": config.to_dict() | coverage_note(references)}
        report = evaluate_cases(CaseVolumes.of_masks(masks), references, images=images, **labels)
        write_report(report, args.output_dir)
        print(format_table(report), f"masks, report and pictures are in {args.output_dir}", sep="\n")
    accelerator.end_training()


if __name__ == "__main__":
    main()
