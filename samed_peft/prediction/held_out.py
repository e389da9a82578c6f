"""An adapter on held-out cases: masks, scores and pictures in a folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from samed_peft.datasets import CaseVolumes
from samed_peft.evaluation.artefacts import write_report
from samed_peft.evaluation.cases import evaluate_cases
from samed_peft.evaluation.report import Report
from samed_peft.io import Volume
from samed_peft.prediction.inference import Segmenter, segment_cases, settings_of


def score_held_out(
    model: Segmenter,
    images: Mapping[str, Volume],
    references: Mapping[str, Volume],
    directory: Path,
    *,
    accelerator: Accelerator,
    settings: Mapping[str, Any],
) -> Report | None:
    """Segment cases as if they had no labels, and score the masks that were written.

    Args:
        model: from `load_segmenter`.
        images: case -> scan, read when its turn comes.
        references: case -> label map.
        directory: gets `predictions` and the report's files.
        accelerator: its processes share the cases out.
        settings: what the report says about the run.

    Returns:
        The report on the main process, None on the others.
    """
    masks = segment_cases(model, images, directory / "predictions", accelerator=accelerator)
    if not accelerator.is_main_process:
        return None
    names = settings_of(model).class_names
    written = CaseVolumes.of_masks(masks)
    report = evaluate_cases(written, references, class_names=names, images=images, settings=settings)
    write_report(report, directory)
    return report
