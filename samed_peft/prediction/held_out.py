"""Segment and score held-out cases: masks, scores and pictures in a folder."""

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from samed_peft.config import SamedConfig, first_window
from samed_peft.datasets import CaseVolumes
from samed_peft.errors import reason_of
from samed_peft.evaluation.artefacts import write_report
from samed_peft.evaluation.cases import (
    check_same_cases,
    evaluate_cases,
    regions_report,
    require_scored,
    warn_of_failure,
)
from samed_peft.evaluation.report import Report
from samed_peft.io import Volume, first_channel
from samed_peft.metrics import DEFAULT_TOLERANCE_MM
from samed_peft.models.modeling import config_of
from samed_peft.prediction.averaging import Segmenters, as_models
from samed_peft.prediction.inference import load_segmenter, segment_cases


def score_held_out(
    model: Segmenters | Path,
    images: Mapping[str, Volume],
    references: Mapping[str, Volume],
    directory: Path,
    *,
    accelerator: Accelerator,
    settings: Mapping[str, Any],
) -> Report | None:
    """Segment cases without their labels and score the masks that were written; each process scores its own cases.

    A case that cannot be read, segmented or scored fails alone: it is left out, named in a warning and, with the
    reason, in the report's settings under `failed_cases`.

    Args:
        model: from `load_segmenter`, one or several to average; or the folder of an adapter, which is then tested as it
            was saved.
        images: case -> scan, read when its turn comes.
        references: case -> label map.
        directory: gets `predictions` and the report's files.
        accelerator: divides the cases among its processes.
        settings: facts about the run for the report.

    Returns:
        The report on the main process, None on the others.

    Raises:
        InputError: scans and references are of different cases, or every case failed.
    """
    scans = list(images)
    mine = scans[accelerator.process_index :: accelerator.num_processes]
    own = [case for case in references if case in mine or case not in scans]  # the latter are refused
    if own or mine or accelerator.is_main_process:  # there may be fewer cases than processes
        check_same_cases(mine, own)
    if isinstance(model, Path):
        model = load_segmenter(model, accelerator=accelerator)
    failed: dict[str, str] = {}

    def fail(case: str, error: Exception) -> None:
        failed[case] = reason_of(error)
        warn_of_failure(case, error)

    masks = segment_cases(model, images, directory / "predictions", accelerator=accelerator, on_failure=fail)
    config = config_of(as_models(model)[0])
    names = config.class_names
    if left := [case for case in own if case not in failed]:
        part = evaluate_cases(
            CaseVolumes.of_masks({case: masks[case] for case in left}, label_values=config.label_values),
            CaseVolumes({case: partial(references.__getitem__, case) for case in left}),
            class_names=names,
            images=CaseVolumes({case: partial(_shown, images, case, config) for case in left}),
            window=first_window(config.window),
            on_failure=fail,
            regions=config.regions,
        )
    else:
        part = Report(names, {}, regions=regions_report(config.regions, {}))
    report = _gathered(part, failed, references, settings, accelerator=accelerator)
    if not accelerator.is_main_process:
        return None
    write_report(report, directory)
    return report


def _shown(images: Mapping[str, Volume], case: str, config: SamedConfig) -> Volume:
    """What pictures show of a scan: of several channels the first."""
    return images[case] if config.channels is None else first_channel(images[case])


def _gathered(
    part: Report,
    failed: Mapping[str, str],
    order: Collection[str],
    settings: Mapping[str, Any],
    *,
    accelerator: Accelerator,
) -> Report:
    """One report of all processes' cases, in this order; all have to call."""
    from samed_peft.metrics.gather import gather_scores  # `evaluate` takes seconds to import

    cases = gather_scores(part.cases, part.class_names, accelerator=accelerator)
    regions = None
    if part.regions is not None:
        names = part.regions.class_names
        found = gather_scores(part.regions.cases, names, accelerator=accelerator)
        regions = Report(names, {case: found[case] for case in order if case in found})
    pictures = dict(gather_object(list(part.pictures.items())))
    failures = dict(gather_object(list(failed.items())))
    without_spacing = gather_object(list(part.settings.get("cases_without_spacing", [])))
    require_scored(cases, failures)
    lists = {
        "cases_without_spacing": [case for case in order if case in without_spacing],
        "failed_cases": {case: failures[case] for case in order if case in failures},
    }
    return Report(
        part.class_names,
        {case: cases[case] for case in order if case in cases},
        settings={
            **settings,
            "surface_dice_tolerance_mm": DEFAULT_TOLERANCE_MM,
            **{name: found for name, found in lists.items() if found},
        },
        pictures={case: pictures[case] for case in order if case in pictures},
        regions=regions,
    )
