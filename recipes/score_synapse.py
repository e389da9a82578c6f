"""Segment and score Synapse's test cases with an adapter, such as a converted checkpoint of SAMed.

    samed convert --checkpoint epoch_159.pth --base sam_vit_b_01ec64.pth --output samed --input_size 224
    accelerate launch recipes/score_synapse.py --adapter samed --data_dir DATA --output_dir runs/samed

DATA is raw BTCV, or SAMed's test_vol_h5. On one GPU the twelve cases take minutes, on a CPU hours. SAMed's published
checkpoint scores 81.88 DSC and 20.64 HD95 there, in the `samed` convention; medpy computes these columns once more, as
in SAMed's test. Exit codes: 0 done, 1 medpy disagrees or some cases failed, 2 wrong input.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

# Its names are imported on first use, so that help is printed and Ctrl-C is heeded from the start.
import samed_peft as sp
from samed_peft.config import SYNAPSE_CLASSES
from samed_peft.errors import printable
from samed_peft.io import FolderKind, require_replaceable, write_json

MARKER = "scores.json"
"""Marks a folder that this recipe fills, from the first mask on; a killed run is simply started again."""

FOLDER = FolderKind((MARKER,), rf"{re.escape(MARKER)}|predictions|pictures|report\.\w+", in_place=True)

ALLOWED = 1e-9
"""Largest difference allowed between the report's `samed` columns and medpy's."""


def check_classes(class_names: tuple[str, ...], adapter: str) -> None:
    """Refuse an adapter whose labels are not Synapse's."""
    if class_names != SYNAPSE_CLASSES:
        raise sp.InputError(
            f"expected an adapter of Synapse's organs ({', '.join(SYNAPSE_CLASSES)}), found {adapter} of "
            f"{', '.join(class_names[:8])}; score its masks against your references with samed evaluate"
        )


def claim(folder: Path, facts: Mapping[str, object]) -> None:
    """Mark the folder and clear what an earlier run left in it."""
    write_json(folder / MARKER, facts)
    for path in set(folder.iterdir()) - {folder / MARKER}:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def coverage_note(cases: Iterable[str]) -> dict[str, str]:
    """A note above the report's scores if they are of other cases than SAMed's twelve."""
    of_samed, scored = [f"case{number:04d}" for number in sp.datasets.TEST_CASES], set(cases)
    missing, others = [case for case in of_samed if case not in scored], sorted(scored - {*of_samed})
    if not missing and not others:
        return {}
    parts = [f"missing {', '.join(missing)}"] * bool(missing) + [f"besides {', '.join(others)}"] * bool(others)
    found = len(of_samed) - len(missing)
    note = f"scored {found} of SAMed's {len(of_samed)} test cases; {'; '.join(parts)}; published figures are of all"
    return {"note": note}


def score_with_medpy(
    report: "sp.Report", references: Mapping[str, "sp.Volume"], predictions: Path
) -> dict[str, object]:
    """The `samed` scores of the written masks by medpy: means, cases, and the largest difference from the report's."""
    masks = sp.datasets.CaseVolumes.of_masks({case: predictions / f"{case}.nii.gz" for case in report.cases})
    cases, differences, values = {}, [], {"dice": [], "hd95": []}
    for case, ours in report.cases.items():
        scores = sp.metrics.medpy_scores(masks[case].array, references[case].array, num_classes=len(SYNAPSE_CLASSES))
        cases[case] = dict(zip(SYNAPSE_CLASSES, scores, strict=True))
        for metric, column in values.items():
            column += [score[metric] for score in scores]
            differences += [abs(a[metric] - b[metric]) for a, b in zip(ours["samed"], scores, strict=True)]
    means = {metric: sum(column) / len(column) for metric, column in values.items()}
    return {"mean": means, "largest_difference": max(differences), "cases": cases}


@sp.exit_on_error
def main() -> None:
    """Segment, score, report."""
    from accelerate import Accelerator

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="adapter folder or Hub id")
    parser.add_argument("--base", help="base SAM, if it is not at the recorded location")
    parser.add_argument("--data_dir", type=Path, required=True, help="raw BTCV or SAMed's preprocessed folder")
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder, or one of this recipe to replace")
    parser.add_argument("--test_cases", type=int, nargs="+", help="in place of SAMed's 12")
    args = parser.parse_args()
    out, facts = args.output_dir, {"adapter": args.adapter, "data_dir": str(args.data_dir)}
    require_replaceable(out, FOLDER)
    accelerator = Accelerator()
    model = sp.load_segmenter(args.adapter, base=args.base, accelerator=accelerator)
    config = model.samed_config
    check_classes(config.class_names, args.adapter)
    folder = sp.datasets.open_synapse(args.data_dir)
    cases = sp.datasets.split_cases(args.data_dir, "test", args.test_cases)
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            sp.datasets.check_cases(folder, cases, num_classes=len(SYNAPSE_CLASSES), window=config.window)
            claim(out, facts)
    images, references = sp.datasets.CaseVolumes.of_folder(folder, cases)
    settings = config.to_dict() | coverage_note(references)
    report = sp.score_held_out(model, images, references, out, accelerator=accelerator, settings=settings)
    if report is not None:
        by_medpy = score_with_medpy(report, references, out / "predictions")
        write_json(out / MARKER, facts | {"medpy": by_medpy | {"allowed_difference": ALLOWED}})
        mean, apart = by_medpy["mean"], by_medpy["largest_difference"]
        print(sp.format_table(report), printable(f"masks, report and pictures are in {out}"), sep="\n")
        print(f"medpy: samed Dice {mean['dice']:.4f}, HD95 {mean['hd95']:.2f}; largest difference {apart:.1e}")
        if not apart <= ALLOWED:
            message = f"error: scores differ from medpy's by {apart:.1e}, more than {ALLOWED}; see {out / MARKER}"
            sys.exit(printable(message))
    accelerator.end_training()
    if report is not None:
        report.require_all_cases()


if __name__ == "__main__":
    main()
