"""Gather the scores of several processes with an `evaluate.Metric`."""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import evaluate
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from numpy.typing import ArrayLike

from samed_peft.errors import InputError
from samed_peft.metrics.scores import DEFAULT_TOLERANCE_MM, CaseScores, checked_tolerance, score_case
from samed_peft.metrics.summary import summarise, without_nan

_INPUTS = """
Args:
    prediction: (D, H, W) label map, 0 is background; of a picture (H, W).
    reference: label map on the same grid.
    case: name of the case; one that is added twice, as padded samplers do, counts once.
    spacing_zyx_mm: voxel size in millimetres.
    ignored_label: voxels of this label in the reference count nowhere.
"""


class SegmentationScores(evaluate.Metric):
    """Average scores per class and overall, in both conventions, over the cases of all processes.

    Each case is scored when it is added. Processes exchange scores alone, a few numbers per class: a volume written as
    an Arrow list would cost far more.

    Args:
        class_names: names of labels 1..K, background left out.
        tolerance_mm: of the surface Dice; see `score_labels`.
        options: those of `evaluate.Metric`: `num_process` and `process_id` (its own number for each process),
            `experiment_id` (one for all), `cache_dir` (on a file system that all share).
    """

    def __init__(
        self, class_names: Sequence[str], *, tolerance_mm: float = DEFAULT_TOLERANCE_MM, **options: Any
    ) -> None:
        self.class_names = tuple(class_names)
        self.tolerance_mm = checked_tolerance(tolerance_mm)
        super().__init__(**options)

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Overlap and surface distances of segmentations, per class and overall.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"case": text, "scores": text}),
        )

    def add(
        self,
        *,
        prediction: ArrayLike,
        reference: ArrayLike,
        case: str,
        spacing_zyx_mm: Sequence[float] = (1.0, 1.0, 1.0),
        ignored_label: int | None = None,
    ) -> None:
        """Score one case and keep its scores.

        Raises:
            InputError: the label maps differ in shape, hold labels without a name, or all voxels are to be ignored.
        """
        try:
            scores = score_case(
                prediction,
                reference,
                num_classes=len(self.class_names),
                spacing_zyx_mm=spacing_zyx_mm,
                tolerance_mm=self.tolerance_mm,
                ignored_label=ignored_label,
            )
        except InputError as error:
            raise InputError(f"{case}: {error}") from error
        self.add_scores(case, scores)

    def add_scores(self, case: str, scores: CaseScores) -> None:
        """Keep the scores of a case that is already scored."""
        super().add(case=case, scores=json.dumps(scores))  # JSON keeps every bit of a float, and NaN

    def compute(self, *, per_case: bool = False, **options: Any) -> dict[str, Any] | None:
        """Average over all cases, as in `report.json`; None on every process but the first.

        Args:
            per_case: add "cases", case -> its `CaseScores`.
            options: those of `evaluate.Metric.compute`.
        """
        if self.writer is None:
            # A process without cases must still write its file, since the first one waits for it.
            super().add_batch(case=[], scores=[])
        return super().compute(per_case=per_case, **options)

    def _compute(self, *, per_case: bool, case: Sequence[str], scores: Sequence[str]) -> dict[str, Any]:
        by_case = dict(zip(case, map(json.loads, scores), strict=True))
        means = without_nan(summarise([by_case[name] for name in sorted(by_case)], self.class_names))
        return means | ({"cases": by_case} if per_case else {})


def gather_scores(
    scores: Mapping[str, CaseScores], class_names: Sequence[str], *, accelerator: Accelerator
) -> dict[str, CaseScores]:
    """Gather case -> scores of all processes with `SegmentationScores`; all have to call, and get the same.

    `evaluate` exchanges them through files, here in a temporary folder that is removed afterwards. If some processes do
    not see the main process's folder, being on other nodes, Accelerate's `gather_object` exchanges them instead.
    """
    folder = tempfile.mkdtemp(prefix="samed_scores_") if accelerator.is_main_process else ""
    (folder,) = broadcast_object_list([folder])
    try:
        if not all(gather_object([_sees(folder)])):
            return dict(gather_object(list(scores.items())))
        metric = SegmentationScores(
            class_names,
            cache_dir=folder,
            experiment_id=Path(folder).name,  # no other use has this name
            num_process=accelerator.num_processes,
            process_id=accelerator.process_index,
            keep_in_memory=accelerator.num_processes == 1,
        )
        for case, found in scores.items():
            metric.add_scores(case, found)
        computed = metric.compute(per_case=True)
        (cases,) = broadcast_object_list([computed and computed["cases"]])
        return cases
    except (OSError, ValueError):  # the latter is what `evaluate` makes of missing files
        if not Path(folder).is_dir():
            # The main process has ended and removed it; waiting for it says so as in all other exchanges.
            accelerator.wait_for_everyone()
        raise
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(folder)


def _sees(folder: str) -> bool:
    return Path(folder).is_dir()
