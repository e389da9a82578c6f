"""Segment and score held-out cases: masks, scores and pictures in a folder."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from samed_peft.datasets import CaseVolumes
from samed_peft.evaluation.artefacts import write_report
from samed_peft.evaluation.cases import evaluate_cases
from samed_peft.evaluation.report import Report
from samed_peft.io import Volume
from samed_peft.models.modeling import config_of
from samed_peft.prediction.inference import Segmenter, load_segmenter, segment_cases


def score_held_out(
    model: Segmenter | Path,
    images: Mapping[str, Volume],
    references: Mapping[str, Volume],
    directory: Path,
    *,
    accelerator: Accelerator,
    settings: Mapping[str, Any],
) -> Report | None:
    """Segment cases without their labels and score the masks that were written; each process scores its own cases.

    Args:
        model: from `load_segmenter`, or the folder of an adapter, which is then tested as it was saved.
        images: case -> scan, read when its turn comes.
        references: case -> label map.
        directory: gets `predictions` and the report's files.
        accelerator: divides the cases among its processes.
        settings: facts about the run for the report.

    Returns:
        The report on the main process, None on the others.

    Raises:
        InputError: as `evaluate_cases`.
    """
    from samed_peft.metrics.gather import gather_scores  # `evaluate` takes seconds to import

    if isinstance(model, Path):
        model = load_segmenter(model, accelerator=accelerator)
    masks = segment_cases(model, images, directory / "predictions", accelerator=accelerator)
    config = config_of(model)
    names = config.class_names
    mine = list(images)[accelerator.process_index :: accelerator.num_processes]
    written = CaseVolumes.of_masks({case: masks[case] for case in mine})
    # References without a scan stay in: `evaluate_cases` refuses them.
    own = {case: partial(references.__getitem__, case) for case in references if case in mine or case not in images}
    if own or mine or accelerator.is_main_process:
        part = evaluate_cases(
            written, CaseVolumes(own), class_names=names, images=images, window=config.window, settings=settings
        )
    else:  # fewer cases than processes
        part = Report(names, {})
    cases = gather_scores(part.cases, names, accelerator=accelerator)
    pictures = dict(gather_object(list(part.pictures.items())))
    without_spacing = gather_object(list(part.settings.get("cases_without_spacing", [])))
    if not accelerator.is_main_process:
        return None
    spacing = {"cases_without_spacing": [case for case in references if case in without_spacing]}
    report = Report(
        names,
        {case: cases[case] for case in references},
        settings={**part.settings, **(spacing if without_spacing else {})},
        pictures={case: pictures[case] for case in references},
    )
    write_report(report, directory)
    return report
