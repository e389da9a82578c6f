"""Tables of report.html, which sort when a header is pressed."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from samed_peft.metrics import METRICS, ClassScore, Interval, Metric, format_metric

METRIC_TITLES: dict[Metric, str] = {
    "dice": "Dice",
    "iou": "IoU",
    "hd95": "HD95",
    "assd": "ASSD",
    "surface_dice": "Surface Dice",
}


def sortable_table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    groups: Sequence[tuple[str, int]],
    foot: Sequence[str] = (),
    names: int = 1,
) -> str:
    """A table that sorts by its headers.

    Args:
        header: titles of the columns.
        rows: cells of each row, as made by the functions below.
        groups: title and number of columns of each group of columns.
        foot: cells of a last row, which stays last.
        names: how many of the first columns hold text.
    """
    over = "".join(
        f'<th colspan="{span}" scope="colgroup" class="group">{escape(title)}</th>'
        if title
        else f'<td colspan="{span}"></td>'
        for title, span in groups
    )
    starts = [sum(span for _, span in groups[:index]) for index in range(1, len(groups))]
    heads = "".join(
        f'<th scope="col" data-column="{index}" class="{"name" if index < names else "number"}'
        f'{" start" if index in starts else ""}"><button type="button">{escape(title)}</button></th>'
        for index, title in enumerate(header)
    )
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    end = f"\n<tfoot><tr>{''.join(foot)}</tr></tfoot>" if foot else ""
    return (
        f'<table class="sortable">\n<thead><tr>{over}</tr>\n<tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>{end}\n'
        "</table>"
    )


def scrolling(label: str, table: str) -> str:
    """A table in a frame of its own, `label` being what a screen reader calls it."""
    # Reachable by keyboard, since what is wider than a phone can only be read by scrolling.
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{table}</div>'


def score_cells(score: ClassScore, intervals: Mapping[Metric, Interval] | None = None) -> list[str]:
    """A cell for each metric, with its interval where there are any."""
    cells = []
    for metric in METRICS:
        text = format_metric(metric, score[metric])
        if intervals is not None and text != "n/a":
            text += f' <span class="quiet">{_short_interval(metric, intervals[metric])}</span>'
        cells.append(number_cell(text, score[metric], first=metric == next(iter(METRICS))))
    return cells


def number_cell(text: str, value: float, *, first: bool = False) -> str:
    """A cell that sorts by the number it begins with; `first` of a group has a line before it."""
    none, start = " none" if math.isnan(value) else "", " start" if first else ""
    return f'<td class="number{none}{start}">{text}</td>'


def name_cell(text: str) -> str:
    """The name of a row."""
    return f'<th scope="row" class="name">{escape(text)}</th>'


def _short_interval(metric: Metric, interval: Interval) -> str:
    """With one digit less than the score where that is enough, so that both conventions fit side by side."""
    if math.isnan(interval[0]):
        return "no interval"
    digits = METRICS[metric].digits - (METRICS[metric].digits > 2 or interval[1] >= 10)
    return f"{interval[0]:.{digits}f}\u2013{interval[1]:.{digits}f}"
