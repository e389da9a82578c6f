"""Tables and texts of a report, for Markdown, HTML and the terminal alike."""

import io
import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from samed_peft.errors import printable
from samed_peft.evaluation.report import Report
from samed_peft.metrics import CONVENTIONS, METRICS, Convention, Interval, Metric, format_metric

CONVENTION_NOTES: Mapping[Convention, str] = {
    "standard": "millimetres; an organ absent from both masks has no score, one in a single mask has "
    "Dice 0 and no HD95; means leave out undefined scores, and n counts the others.",
    "samed": "voxels; a prediction without reference scores Dice 1 and HD95 0, a missed organ and one "
    "absent from both masks 0 and 0, as in the published figures of SAMed (arXiv 2304.13785).",
}
METRIC_NOTE = (
    "; ".join(f"{record.title}: {record.summary}" for record in METRICS.values())
    + ". Intervals are a 95 % percentile bootstrap over cases."
)
MAIN_METRICS: tuple[Metric, ...] = ("dice", "hd95")
"""Metrics of the first tables; the others of `METRICS` come in further ones."""

Columns = Sequence[tuple[Convention, Metric]]
MAIN_COLUMNS: Columns = [(convention, metric) for convention in CONVENTIONS for metric in MAIN_METRICS]
FURTHER_COLUMNS: Columns = [(c, metric) for c in CONVENTIONS for metric in METRICS if metric not in MAIN_METRICS]


def metric_title(metric: Metric) -> str:
    """Name of a metric as a heading."""
    name = METRICS[metric].title
    return name[0].upper() + name[1:]


def column_titles(columns: Columns) -> list[str]:
    """Headings such as "HD95 (mm)" and "HD95 (samed, voxels)"."""
    titles = []
    for convention, metric in columns:
        notes = ["samed" if convention == "samed" else "", METRICS[metric].unit_in(convention)]
        note = ", ".join(filter(None, notes))
        titles.append(f"{metric_title(metric)} ({note})" if note else metric_title(metric))
    return titles


_MARKDOWN = re.compile(
    r"[\\|<\[\]`*~$&]|^>|^[#+=-](?=[\s#=-]|$)|^\d+[.)](?=\s|$)|(?<=\w):(?=//)|(?<=www)\.|@(?=\w)", re.IGNORECASE
)
"""What Markdown readers take for the end of a cell, a link, code, HTML, formulas, mentions or the start of a block."""


def plain_line(value: Any) -> str:
    """`value` in one line without control characters."""
    return printable(" ".join(str(value).split()))


def markdown_text(value: Any) -> str:
    """`value` in one line that Markdown readers show as it is, in a cell as in running text."""
    return _MARKDOWN.sub(lambda found: "".join(f"\\{c}" if not c.isdigit() else c for c in found[0]), plain_line(value))


def markdown_code(name: str) -> str:
    """A name as code, if it cannot end the code, otherwise as text."""
    return f"`{name}`" if re.fullmatch(r"[\w./\\ :+-]+", name, re.ASCII) else markdown_text(name)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]], *, text_columns: int = 1) -> str:
    """A Markdown table of escaped cells; the first columns, of text, are aligned left, the others right."""
    align = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    lines = [map(markdown_text, header), align, *(map(markdown_text, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_count(number: float) -> str:
    """A number of cases; n/a if an older file does not state it."""
    return "n/a" if math.isnan(number) else str(number)


def format_interval(metric: Metric, interval: Interval) -> str:
    """Both ends; n/a if undefined."""
    low, high = (format_metric(metric, end) for end in interval)
    return "n/a" if low == "n/a" else f"{low} to {high}"


def score_rows(report: Report, columns: Columns) -> list[list[str]]:
    """Name and mean scores of each class; the mean over classes last."""
    return _rows(report.summary, columns, format_metric)


def interval_rows(report: Report) -> list[list[str]]:
    """Name and intervals of the main metrics of each class; those of the mean last."""
    return _rows(report.intervals, MAIN_COLUMNS, format_interval)


def _rows(found: Mapping[Convention, Any], columns: Columns, text_of: Callable[[Metric, Any], str]) -> list[list[str]]:
    rows = [
        [name, *(text_of(metric, found[convention]["classes"][name][metric]) for convention, metric in columns)]
        for name in found["standard"]["classes"]
    ]
    return [*rows, ["mean", *(text_of(metric, found[convention]["mean"][metric]) for convention, metric in columns)]]


def with_counts(rows: Sequence[Sequence[str]], counts: Iterable[Sequence[str]], *, at: int) -> list[list[str]]:
    """Rows of classes and their mean, with counts of each class inserted before column `at`."""
    counts = list(counts)
    return [[*row[:at], *cells, *row[at:]] for row, cells in zip(rows, [*counts, [""] * len(counts[0])], strict=True)]


def class_rows(report: Report) -> list[list[str]]:
    """Name, Dice and HD95 of each class, cases with each, and both in the samed convention; the mean last."""
    counts = []
    for index, summary in enumerate(report.summary["standard"]["classes"].values()):
        distances = [scores["standard"][index]["hd95"] for scores in report.cases.values()]
        number = sum(not math.isnan(distance) for distance in distances)
        # Means alone do not say how many cases have a distance.
        known = f"{number}/{report.n_cases}" if report.cases else "n/a"
        counts.append((f"{summary['n_valid']}/{report.n_cases}", known))
    return with_counts(score_rows(report, MAIN_COLUMNS), counts, at=1 + len(MAIN_METRICS))


def region_rows(report: Report) -> list[list[str]]:
    """`class_rows` of the regions, marked as such; none without regions."""
    if report.regions is None:
        return []
    *rows, mean = class_rows(report.regions)
    return [*([f"region {name}", *cells] for name, *cells in rows), ["mean of regions", *mean[1:]]]


def further_rows(report: Report) -> list[list[str]]:
    """Name and other metrics of each class, and cases with the class in neither or one mask; the mean last."""
    keys = ("n_absent", "n_missed", "n_spurious")
    counts = [[format_count(scores[key]) for key in keys] for scores in report.summary["standard"]["classes"].values()]
    return with_counts(score_rows(report, FURTHER_COLUMNS), counts, at=1 + len(FURTHER_COLUMNS))


def remarks(report: Report) -> list[str]:
    """Facts that a reader of the scores must know first."""
    found = [str(report.settings["note"])] if "note" in report.settings else []
    if assumed := report.settings.get("cases_without_spacing", []):
        found.append(f"{len(assumed)} of {report.n_cases} references have no voxel size: 1 mm was assumed for them.")
    return found


def format_table(report: Report, *, width: int | None = None) -> str:
    """The scores per class as an ASCII table of at most `width` columns, at least 80; by default the terminal's."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    width = max(80, shutil.get_terminal_size().columns if width is None else width)
    table = Table(box=box.MARKDOWN)
    table.add_column("Class", overflow="fold", min_width=12)
    for name in ("Dice", "HD95 mm", "n Dice", "n HD95", "samed Dice", "HD95 vox"):
        table.add_column(name, justify="right", no_wrap=True)
    for cells in [*class_rows(report), *region_rows(report)]:
        # Text, because a class name in square brackets would be read as markup.
        table.add_row(*(Text(plain_line(cell)) for cell in cells))
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, color_system=None, legacy_windows=False)
    console.print(table)
    for line in remarks(report):
        console.print(Text(plain_line(line)))
    if failed := report.settings.get("failed_cases", {}):
        console.print(Text(plain_line(f"{len(failed)} failed and left out: {', '.join(failed)}")))
    return "\n".join(line.rstrip() for line in buffer.getvalue().strip("\n").splitlines())
