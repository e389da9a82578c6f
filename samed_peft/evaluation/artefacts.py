"""A report on disk: report.json, report.csv, report.html, report.md and pictures."""

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from samed_peft.errors import InputError
from samed_peft.evaluation.page import html_page
from samed_peft.evaluation.report import (
    CONVENTION_NOTES,
    METRIC_NOTE,
    Report,
    class_rows,
    failures,
    format_score,
    further_rows,
    interval_rows,
    markdown_cell,
    markdown_table,
    remarks,
)
from samed_peft.io import FolderKind, write_bytes, write_json, write_text
from samed_peft.metrics import CONVENTIONS, METRICS, Convention, presence

REPORT_FOLDER = FolderKind(markers=("report.json",), allowed=r"report\.(json|csv|html|md)|pictures")
"""A folder that `write_report` filled."""

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


def write_report(report: Report, directory: str | Path, *, pictures: Mapping[str, bytes] | None = None) -> None:
    """Write report.json, report.csv, report.html, report.md and pictures/CASE.png, each file atomically.

    Args:
        report: the scores.
        directory: folder to write to; it is made if missing.
        pictures: case -> PNG; the report's own if None.

    Raises:
        InputError: a picture is of no case of the report.
    """
    directory = Path(directory)
    pictures = report.pictures if pictures is None else pictures
    unknown = sorted(set(pictures) - set(report.cases))
    if unknown:
        raise InputError(f"pictures must be of cases of the report; found {', '.join(unknown)}")
    links = picture_links(pictures)
    # Pages come after what they point to.
    for case, data in pictures.items():
        write_bytes(directory / links[case], data)
    write_json(directory / "report.json", report.to_dict())
    write_text(directory / "report.csv", csv_text(report))
    write_text(directory / "report.html", html_page(report, pictures=pictures, links=links))
    write_text(directory / "report.md", markdown_text(report, links))


def csv_text(report: Report) -> str:
    """One row for each case, class and convention; a score that is undefined is empty.

    Names that a spreadsheet would take for a formula get an apostrophe in front, which it takes for text.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer)  # line ends are RFC 4180's, so that those in names are quoted
    writer.writerow(["case", "class", "convention", "presence", *METRICS])
    for case, scores in report.cases.items():
        for index, name in enumerate(report.class_names):
            for convention in CONVENTIONS:
                score = scores[convention][index]
                values = ["" if math.isnan(score[metric]) else repr(score[metric]) for metric in METRICS]
                names = (_inert(case), _inert(name))
                writer.writerow([*names, convention, presence(scores, index), *values])
    return buffer.getvalue()


def _inert(name: str) -> str:
    return f"'{name}" if name.lstrip(" ").startswith(_FORMULA_STARTS) else name


def markdown_text(report: Report, links: Mapping[str, str]) -> str:
    """The report as Markdown.

    Args:
        report: the scores.
        links: case -> path of its picture.
    """
    header = ["Class", "Dice", "HD95 (mm)", "n Dice", "n HD95", "Dice (samed)", "HD95 (samed, voxels)"]
    further = [
        *("Class", "IoU", "ASSD (mm)", "Surface Dice", "IoU (samed)", "ASSD (samed, voxels)", "Surface Dice (samed)"),
        *("in neither", "missed", "spurious"),
    ]
    intervals = ["Class", "Dice", "HD95 (mm)", "Dice (samed)", "HD95 (samed, voxels)"]
    notes = [f"- `{convention}`: {CONVENTION_NOTES[convention]}" for convention in CONVENTIONS]
    failed = [f"- {markdown_cell(line)}" for line in failures(report)]
    parts = [
        "# Evaluation",
        *(markdown_cell(remark) for remark in remarks(report)),
        *(["\n".join(failed)] if failed else []),
        f"{len(report.cases)} cases, {len(report.class_names)} classes. Scores come in two conventions:",
        "\n".join(notes),
        METRIC_NOTE,
        *("## Classes", markdown_table(header, class_rows(report))),
        *("## Further metrics and counts", markdown_table(further, further_rows(report))),
        *("## 95 % confidence intervals", markdown_table(intervals, interval_rows(report))),
    ]
    units = {"standard": "Dice / HD95 in millimetres", "samed": "Dice / HD95 in voxels"}
    for convention in CONVENTIONS:
        parts += [f"## Cases, {convention} ({units[convention]})", _case_table(report, convention)]
    if links:
        parts.append("## Pictures")
        shown = [(markdown_cell(case), links[case]) for case in report.cases if case in links]
        parts += [f"{case}\n\n![{case}]({link})" for case, link in shown]
    if report.settings:
        rows = [(name, _setting(value)) for name, value in report.settings.items()]
        parts += ["## Settings", markdown_table(["Setting", "Value"], rows)]
    return "\n\n".join(parts) + "\n"


def _setting(value: object) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping) else str(value)


def _case_table(report: Report, convention: Convention) -> str:
    rows = []
    for case, scores in report.cases.items():
        rows.append([case, *(" / ".join(format_score(score)) for score in scores[convention])])
    return markdown_table(["Case", *(markdown_cell(name) for name in report.class_names)], rows)


def picture_links(pictures: Iterable[str]) -> dict[str, str]:
    """Case -> path below the report's folder; cases may have characters in them that links may not."""
    links: dict[str, str] = {}
    taken: set[str] = set()
    for case in pictures:
        # Cut, since what is written goes by a longer name until it is complete.
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", case)[:100]
        name, number = stem, 1
        while name.lower() in taken:
            number += 1
            name = f"{stem}_{number}"
        taken.add(name.lower())
        links[case] = f"pictures/{name}.png"
    return links
