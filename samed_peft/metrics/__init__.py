"""Scores of masks and label maps, in two conventions side by side.

Each class of a case has five: Dice, IoU, HD95 (95th percentile of the surface distances), ASSD (their mean, in both
directions) and surface Dice (share of the surfaces within a tolerance of each other). Distances run between border
voxels, as in medpy, whose values they have.

`standard`: millimetres; an organ absent from both masks has no score (NaN), one absent from a single mask has
Dice, IoU and surface Dice 0 and no distance (NaN).
`samed`: the convention of the code of SAMed (arXiv 2304.13785): voxels; a prediction without reference scores
Dice 1 and HD95 0; a missed organ, or one absent from both, scores 0 and 0. That code has no other metric; here IoU and
surface Dice follow its Dice and ASSD its HD95, and the tolerance of the surface Dice is a number of voxels.

`samed_peft.metrics.gather.SegmentationScores` offers both as an `evaluate.Metric`; it is kept apart because
importing `evaluate` takes seconds.
"""

from samed_peft.metrics.records import (
    CONVENTIONS,
    METRICS,
    Comparison,
    Convention,
    Metric,
    MetricRecord,
    Presence,
    format_metric,
)
from samed_peft.metrics.reference import medpy_scores
from samed_peft.metrics.scores import (
    DEFAULT_TOLERANCE_MM,
    CaseScores,
    ClassScore,
    ClassScores,
    Score,
    checked_tolerance,
    presence,
    score_case,
    score_labels,
    score_masks,
)
from samed_peft.metrics.summary import (
    ClassSummary,
    Interval,
    Intervals,
    Summary,
    confidence_intervals,
    mean_defined,
    summarise,
    without_nan,
)

__all__ = [
    "CONVENTIONS",
    "DEFAULT_TOLERANCE_MM",
    "METRICS",
    "CaseScores",
    "ClassScore",
    "ClassScores",
    "ClassSummary",
    "Comparison",
    "Convention",
    "Interval",
    "Intervals",
    "Metric",
    "MetricRecord",
    "Presence",
    "Score",
    "Summary",
    "checked_tolerance",
    "confidence_intervals",
    "format_metric",
    "mean_defined",
    "medpy_scores",
    "presence",
    "score_case",
    "score_labels",
    "score_masks",
    "summarise",
    "without_nan",
]
