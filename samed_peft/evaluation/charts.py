"""Distributions as inline SVG: for each class a box, its median and a dot for each case."""

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

Points = Sequence[tuple[str, float]]
"""(case, value) pairs without NaN."""

_WIDTH, _LEFT, _RIGHT, _TOP, _ROW = 580, 132, 64, 8, 30
_MOST_LETTERS = 19
_FEWEST_FOR_A_BOX = 5
_JITTER = (0, -5, 5, -2.5, 2.5, -7.5, 7.5)
"""Offsets of neighbouring dots, so that equal values stay apart. Fixed: equal reports give equal pages."""


def box_plots(points: Mapping[str, Points], *, label: str, top: float | None = None) -> str:
    """One row for each class on a common axis from 0.

    Boxes reach from the first to the third quartile, whiskers to the last value within 1.5 of its length from it
    (Tukey's rule); classes of fewer than five cases have dots and a median only.

    Args:
        points: class -> its cases and values, all at least 0.
        label: name of the axis with its unit.
        top: end of the axis; None for the largest value.

    Returns:
        An `<svg>` element; every name in it is escaped.
    """
    largest = max((value for row in points.values() for _, value in row), default=0.0)
    ticks = _ticks(top or largest or 1.0)
    scale = (_WIDTH - _LEFT - _RIGHT) / ticks[-1]
    bottom = _TOP + _ROW * len(points)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {bottom + 38}" role="img" aria-label="{escape(label)} of each case, by class">',
        *(_tick(_LEFT + tick * scale, f"{tick:g}", bottom) for tick in ticks),
        f'<text class="tick" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{bottom + 33}" text-anchor="middle">'
        f"{escape(label)}</text>",
    ]
    for index, (name, row) in enumerate(points.items()):
        parts += _row(name, row, middle=_TOP + _ROW * (index + 0.5), scale=scale)
    return "\n".join([*parts, "</svg>"])


def _ticks(top: float) -> list[float]:
    """From 0 to at least `top` in four to nine steps of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(top / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if top / (power * factor) <= 6)
    return [step * index for index in range(math.ceil(round(top / step, 9)) + 1)]


def _tick(x: float, text: str, bottom: float) -> str:
    return (
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>'
        f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{text}</text>'
    )


def _row(name: str, points: Points, *, middle: float, scale: float) -> list[str]:
    short = name if len(name) <= _MOST_LETTERS else name[: _MOST_LETTERS - 1] + "…"
    parts = [
        f'<text x="{_LEFT - 10}" y="{middle + 4}" text-anchor="end"><title>{escape(name)}</title>'
        f"{escape(short)}</text>",
        f'<text class="tick" x="{_WIDTH - _RIGHT + 10}" y="{middle + 4}">n = {len(points)}</text>',
    ]
    values = np.array([value for _, value in points])
    if not len(values):
        return parts
    if len(values) >= _FEWEST_FOR_A_BOX:
        parts += _box(values, middle=middle, scale=scale)
    x = _LEFT + float(np.median(values)) * scale
    parts.append(f'<line class="median" x1="{x:.1f}" x2="{x:.1f}" y1="{middle - 9}" y2="{middle + 9}"/>')
    for index, (case, value) in enumerate(sorted(points, key=lambda point: point[1])):
        y = middle + _JITTER[index % len(_JITTER)]
        parts.append(
            f'<circle class="dot" cx="{_LEFT + value * scale:.1f}" cy="{y}" r="2.5">'
            f"<title>{escape(case)}: {value:.4g}</title></circle>"
        )
    return parts


def _box(values: np.ndarray, *, middle: float, scale: float) -> list[str]:
    first, third = np.percentile(values, [25, 75])
    reach = 1.5 * (third - first)
    low, high = values[values >= first - reach].min(), values[values <= third + reach].max()
    whiskers = [
        f'<line class="whisker" x1="{_LEFT + a * scale:.1f}" x2="{_LEFT + b * scale:.1f}" y1="{middle}" y2="{middle}"/>'
        for a, b in ((low, first), (third, high))
    ]
    box = (
        f'<rect class="box" x="{_LEFT + first * scale:.1f}" y="{middle - 9}" '
        f'width="{(third - first) * scale:.1f}" height="18"/>'
    )
    return [*whiskers, box]
