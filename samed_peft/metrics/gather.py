"""The scores as an `evaluate.Metric` that gathers the cases of several processes."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
from numpy.typing import ArrayLike

from samed_peft.errors import InputError
from samed_peft.metrics import (
    CONVENTIONS,
    DEFAULT_TOLERANCE_MM,
    METRICS,
    CaseScores,
    ClassScores,
    Convention,
    checked_tolerance,
    score_case,
    summarise,
    without_nan,
)

_INPUTS = """
Args:
    prediction: (D, H, W) label map, 0 is background; of a picture (H, W).
    reference: label map on the same grid.
    case: name of the case; one that is added twice, as padded samplers do, counts once.
    spacing_zyx_mm: voxel size in millimetres.
"""


class SegmentationScores(evaluate.Metric):
    """Mean scores per class and overall, in both conventions, over the cases of all processes.

    Each case is scored when it is added, and only its scores, a few numbers a class, travel between
    processes: a volume written as an Arrow list would cost far more than its scores.

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
        scores = datasets.Sequence(datasets.Value("float64"))
        features = {f"{convention}_{name}": scores for convention in CONVENTIONS for name in METRICS}
        return evaluate.MetricInfo(
            description="Overlap and surface distances of segmentations, per class and overall.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"case": datasets.Value("string"), "presence": datasets.Sequence(datasets.Value("string")), **features}
            ),
        )

    def add(
        self,
        *,
        prediction: ArrayLike,
        reference: ArrayLike,
        case: str,
        spacing_zyx_mm: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        """Score one case and keep its scores.

        Raises:
            InputError: the label maps differ in shape, or hold labels without a name.
        """
        try:
            scores = score_case(
                prediction,
                reference,
                num_classes=len(self.class_names),
                spacing_zyx_mm=spacing_zyx_mm,
                tolerance_mm=self.tolerance_mm,
            )
        except InputError as error:
            raise InputError(f"{case}: {error}") from error
        row = {
            f"{convention}_{name}": [values[name] for values in scores[convention]]
            for convention in CONVENTIONS
            for name in METRICS
        }
        super().add(case=case, presence=scores["presence"], **row)

    def compute(self, **options: Any) -> dict[str, Any] | None:
        """Means over all cases, as in `report.json`; None on every process but the first."""
        if self.writer is None:
            # A process that was given no case must still leave its file, or the first one waits for it.
            super().add_batch(**{name: [] for name in self._feature_names()})
        return super().compute(**options)

    def _compute(self, **columns: Sequence[Any]) -> dict[str, Any]:
        by_case = {case: _scores_at(columns, index) for index, case in enumerate(columns["case"])}
        return without_nan(summarise([by_case[case] for case in sorted(by_case)], self.class_names))


def _scores_at(columns: dict[str, Sequence[Any]], index: int) -> CaseScores:
    def scores(convention: Convention) -> ClassScores:
        by_metric = zip(*(columns[f"{convention}_{metric}"][index] for metric in METRICS), strict=True)
        return [dict(zip(METRICS, values, strict=True)) for values in by_metric]

    return {"standard": scores("standard"), "samed": scores("samed"), "presence": list(columns["presence"][index])}
