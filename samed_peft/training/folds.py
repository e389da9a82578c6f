"""Score the folds of a training, each by its own adapter, and join their scores."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from samed_peft.adapters.folder import REPORT_FILE, WEIGHTS_FILE
from samed_peft.errors import InputError
from samed_peft.evaluation.artefacts import picture_links, write_report
from samed_peft.evaluation.report import Report
from samed_peft.io import file_sha256, read_json
from samed_peft.prediction.held_out import score_held_out
from samed_peft.training.runs import Run


def score_fold(run: Run, adapter: Path, settings: dict[str, Any], *, accelerator: Accelerator) -> Report | None:
    """Score a fold's held-out cases, or read its report if it is one of this adapter without failed cases.

    Args:
        run: the fold's.
        adapter: folder of its adapter, from `fit`.
        settings: facts about the run for the report.
        accelerator: divides the cases among its processes.

    Returns:
        The report on the main process, None on the others.

    Raises:
        InputError: as `score_held_out`.
    """
    settings = settings | {"adapter_sha256": file_sha256(adapter / WEIGHTS_FILE)}
    report = _stored(run, settings["adapter_sha256"]) if accelerator.is_main_process else None
    if broadcast_object_list([report is not None])[0]:
        return report
    return score_held_out(adapter, *run.test, run.output_dir, accelerator=accelerator, settings=settings)


def _stored(run: Run, adapter_sha256: str) -> Report | None:
    """The report in a run's folder, with its pictures, if it is of this adapter and of all cases."""
    file = run.output_dir / REPORT_FILE
    if not file.is_file():
        return None
    try:
        report = Report.from_dict(read_json(file))
    except (InputError, TypeError, ValueError):
        return None  # damaged: it is made again
    if report.settings.get("adapter_sha256") != adapter_sha256 or {*report.cases} != {*run.cases.test}:
        return None
    files = {case: run.output_dir / link for case, link in picture_links(report.cases).items()}
    return replace(report, pictures={case: path.read_bytes() for case, path in files.items() if path.is_file()})


def join_folds(
    reports: Sequence[Report | None], directory: Path, *, accelerator: Accelerator, settings: dict[str, Any]
) -> Report | None:
    """Write one report over the cases of all folds, and return it.

    Args:
        reports: of the folds, from `score_fold`.
        directory: gets the report's files; masks stay in the folds' folders.
        accelerator: the main process writes.
        settings: facts about the final run for the report.

    Returns:
        The report on the main process, None on the others.
    """
    if not accelerator.is_main_process:
        return None
    parts = [report for report in reports if report is not None]
    note = (
        f"Out-of-fold scores: each case was segmented by one of {len(parts)} adapters, trained without its patient; "
        "the final adapter was trained on all cases."
    )
    named: dict[str, Any] = {
        "cases_without_spacing": [case for part in parts for case in part.settings.get("cases_without_spacing", [])],
        "failed_cases": {c: why for part in parts for c, why in part.settings.get("failed_cases", {}).items()},
    }
    kept = {name: value for name, value in parts[0].settings.items() if name == "surface_dice_tolerance_mm"}
    report = Report(
        parts[0].class_names,
        {case: scores for part in parts for case, scores in part.cases.items()},
        regions=_joined_regions(parts),
        settings={
            **settings,
            "note": f"{settings.get('note', '')} {note}".strip(),
            "folds": len(parts),
            **kept,
            **{name: found for name, found in named.items() if found},
        },
        pictures={case: picture for part in parts for case, picture in part.pictures.items()},
    )
    write_report(report, directory)
    return report


def _joined_regions(parts: Sequence[Report]) -> Report | None:
    """Scores of regions over the cases of all folds, if there are regions."""
    found = [part.regions for part in parts if part.regions is not None]
    if not found:
        return None
    return Report(found[0].class_names, {case: scores for part in found for case, scores in part.cases.items()})
