"""`METRICS`: one record for each metric; scores, tables, reports and cards loop over it.

To add a metric, add its record here and its values to the tests.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal, get_args

from samed_peft.metrics.surfaces import SurfaceDistances

Convention = Literal["standard", "samed"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)

Presence = Literal["both", "missed", "spurious", "absent"]
"""Which masks contain a class: both, the reference only, the prediction only, neither."""

Metric = str
"""Name of a metric, a key of `METRICS`."""

_DISTANCE_UNITS: Mapping[Convention, str] = MappingProxyType({"standard": "mm", "samed": "voxels"})


@dataclass(frozen=True)
class Comparison:
    """Voxel counts and surface distances of a class that both masks contain; lengths in the convention's unit."""

    predicted: int
    referenced: int
    shared: int
    distances: SurfaceDistances
    tolerance: float


AbsentScores = Mapping[Convention, Mapping[Presence, float]]
"""Convention -> presence other than "both" -> score."""

_SHARES: AbsentScores = {
    "standard": {"missed": 0.0, "spurious": 0.0, "absent": math.nan},
    "samed": {"missed": 0.0, "spurious": 1.0, "absent": 0.0},
}
_DISTANCES: AbsentScores = {
    "standard": {"missed": math.nan, "spurious": math.nan, "absent": math.nan},
    "samed": {"missed": 0.0, "spurious": 0.0, "absent": 0.0},
}


@dataclass(frozen=True)
class MetricRecord:
    """All facts about one metric."""

    title: str  # in tables and texts
    summary: str  # one line for users
    compute: Callable[[Comparison], float]  # scores a class that both masks contain
    absent: AbsentScores  # scores of a class that one mask or neither contains
    unit: Literal["", "distance"] = ""  # "" for shares of 1, "distance" for mm (`standard`) or voxels (`samed`)
    higher_is_better: bool = True
    digits: int = 4  # after the point, in print

    def unit_in(self, convention: Convention) -> str:
        """Label of the unit: "mm" or "voxels" for distances, "" for shares."""
        return _DISTANCE_UNITS[convention] if self.unit else ""


_share = partial(MetricRecord, absent=_SHARES)
_distance = partial(MetricRecord, absent=_DISTANCES, unit="distance", higher_is_better=False, digits=2)

METRICS: Mapping[Metric, MetricRecord] = MappingProxyType(
    {
        "dice": _share(
            "Dice",
            "twice the shared voxels over the voxels of both masks",
            lambda found: 2.0 * found.shared / (found.predicted + found.referenced),
        ),
        "iou": _share(
            "IoU",
            "shared voxels over the voxels of the union",
            lambda found: found.shared / (found.predicted + found.referenced - found.shared),
        ),
        "hd95": _distance(
            "HD95",
            "95th percentile of the distances between the surfaces",
            lambda found: found.distances.hd95,
        ),
        "assd": _distance(
            "ASSD",
            "mean distance between the surfaces, in both directions",
            lambda found: found.distances.assd,
        ),
        "surface_dice": _share(
            "surface Dice",
            "share of the surfaces within the tolerance of each other",
            lambda found: found.distances.within(found.tolerance),
        ),
    }
)
"""Every metric by name, in the order of tables."""


def format_metric(metric: Metric, value: float | None) -> str:
    """`value` with the digits of its metric; "n/a" for NaN or None."""
    return "n/a" if value is None or math.isnan(value) else f"{value:.{METRICS[metric].digits}f}"
