"""Distributions as inline SVG: for each class a box, its median and a dot for each case."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from samed_peft.evaluation.render import render

Points = Sequence[tuple[str, float]]
"""(case, value) pairs without NaN."""

_WIDTH, _LEFT, _RIGHT, _TOP, _ROW = 580, 132, 64, 8, 30
_MOST_LETTERS = 19
_FEWEST_FOR_A_BOX = 5
_JITTER = (0, -5, 5, -2.5, 2.5, -7.5, 7.5)
"""Offsets of neighbouring dots, so that equal values stay apart. Fixed: equal reports give equal pages."""


def box_plots(points: Mapping[str, Points], *, label: str, top: float | None = None) -> Markup:
    """One row for each class on a common axis from 0.

    Boxes reach from the first to the third quartile, whiskers to the last value within 1.5 of its length from it
    (Tukey's rule); classes of fewer than five cases have dots and a median only. Values are at least 0; the axis ends
    at `top`, by default at the largest.
    """
    largest = max((value for row in points.values() for _, value in row), default=0.0)
    ticks = _ticks(top or largest or 1.0)
    scale = (_WIDTH - _LEFT - _RIGHT) / ticks[-1]
    rows = [
        _row(name, row, middle=_TOP + _ROW * (index + 0.5), scale=scale)
        for index, (name, row) in enumerate(points.items())
    ]
    return render(
        "box_plots.svg.jinja",
        label=label,
        width=_WIDTH,
        left=_LEFT,
        right=_WIDTH - _RIGHT,
        top=_TOP,
        bottom=_TOP + _ROW * len(points),
        ticks=[(_x(tick, scale), f"{tick:g}") for tick in ticks],
        rows=rows,
    )


def _ticks(top: float) -> list[float]:
    """From 0 to at least `top` in four to nine steps of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(top / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if top / (power * factor) <= 6)
    return [step * index for index in range(math.ceil(round(top / step, 9)) + 1)]


def _x(value: float, scale: float) -> float:
    return round(float(_LEFT + value * scale), 1)


def _row(name: str, points: Points, *, middle: float, scale: float) -> dict[str, Any]:
    """Texts and coordinates of one class."""
    from matplotlib.cbook import boxplot_stats

    stats = boxplot_stats([value for _, value in points])[0]
    parts = ("whislo", "q1", "q3", "whishi") if len(points) >= _FEWEST_FOR_A_BOX else ()
    return {
        "name": name,
        "short": name if len(name) <= _MOST_LETTERS else name[: _MOST_LETTERS - 1] + "…",
        "middle": middle,
        "box": [_x(stats[part], scale) for part in parts],
        "median": [_x(stats["med"], scale)] if points else [],
        "dots": [
            (_x(value, scale), middle + _JITTER[index % len(_JITTER)], f"{case}: {value:.4g}")
            for index, (case, value) in enumerate(sorted(points, key=lambda point: point[1]))
        ],
    }
