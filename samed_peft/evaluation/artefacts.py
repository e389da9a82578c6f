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
from samed_peft.evaluation.report import Report
from samed_peft.evaluation.tables import (
    CONVENTION_NOTES,
    MAIN_COLUMNS,
    MAIN_METRICS,
    METRIC_NOTE,
    class_rows,
    column_titles,
    further_table,
    interval_rows,
    markdown_table,
    markdown_text,
    metric_title,
    remarks,
)
from samed_peft.io import write_bytes, write_json, write_text
from samed_peft.metrics import CONVENTIONS, METRICS, Convention, format_metric

REPORT_FILES = ("report.json", "report.csv", "report.html", "report.md", "pictures")
"""Names of all that `write_report` writes."""

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


def write_report(report: Report, directory: str | Path, *, pictures: Mapping[str, bytes] | None = None) -> None:
    """Write report.json, report.csv, report.html, report.md and pictures/CASE.png, each file atomically.

    Args:
        report: the scores.
        directory: folder to write to; it is made if missing.
        pictures: case -> PNG; the report's own if None.

    Raises:
        InputError: a picture belongs to a case that the report does not have.
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
    write_text(directory / "report.md", report_text(report, links))


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
                values = scores[convention][index]
                row = [_inert(case), _inert(name), convention, scores["presence"][index]]
                writer.writerow(
                    [*row, *("" if math.isnan(values[metric]) else repr(values[metric]) for metric in METRICS)]
                )
    return buffer.getvalue()


def _inert(name: str) -> str:
    return f"'{name}" if name.lstrip(" ").startswith(_FORMULA_STARTS) else name


def report_text(report: Report, links: Mapping[str, str]) -> str:
    """The report as Markdown.

    Args:
        report: the scores.
        links: case -> path of its picture.
    """
    titles = column_titles(MAIN_COLUMNS)
    failed = report.settings.get("failed_cases", {})
    parts = [
        "# Evaluation",
        *map(markdown_text, remarks(report)),
        *(
            ["\n".join(f"- {markdown_text(f'failed: {case}: {reason}')}" for case, reason in failed.items())]
            if failed
            else []
        ),
        f"{report.n_cases} cases, {len(report.class_names)} classes. Scores come in two conventions:",
        "\n".join(f"- `{convention}`: {note}" for convention, note in CONVENTION_NOTES.items()),
        METRIC_NOTE,
        "## Classes",
        markdown_table(["Class", *titles[:2], "n Dice", "n HD95", *titles[2:]], class_rows(report)),
        *("## Further metrics and counts", further_table(report)),
        *("## 95 % confidence intervals", markdown_table(["Class", *titles], interval_rows(report))),
    ]
    for convention in CONVENTIONS:
        parts += [_case_heading(convention), _case_table(report, convention)]
    if links:
        shown = [(markdown_text(case), links[case]) for case in report.cases if case in links]
        parts += ["## Pictures", *(f"{case}\n\n![{case}]({link})" for case, link in shown)]
    if report.settings:
        rows = [(name, _setting(value)) for name, value in report.settings.items()]
        parts += ["## Settings", markdown_table(["Setting", "Value"], rows, text_columns=2)]
    return "\n\n".join(parts) + "\n"


def _setting(value: object) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping) else str(value)


def _case_heading(convention: Convention) -> str:
    units = {"mm": "millimetres"}
    shown = [(metric_title(metric), METRICS[metric].unit_in(convention)) for metric in MAIN_METRICS]
    columns = " / ".join(f"{name} in {units.get(unit, unit)}" if unit else name for name, unit in shown)
    return f"## Cases, {convention} ({columns})"


def _case_table(report: Report, convention: Convention) -> str:
    rows = [
        [
            case,
            *(
                " / ".join(format_metric(metric, score[metric]) for metric in MAIN_METRICS)
                for score in scores[convention]
            ),
        ]
        for case, scores in report.cases.items()
    ]
    return markdown_table(["Case", *report.class_names], rows)


def picture_links(pictures: Iterable[str]) -> dict[str, str]:
    """Case -> path below the report's folder, without the characters that links must not have."""
    links: dict[str, str] = {}
    taken: set[str] = set()
    for case in pictures:
        # Cut, because the temporary file has a longer name.
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", case)[:100]
        name, number = stem, 1
        while name.lower() in taken:
            number += 1
            name = f"{stem}_{number}"
        taken.add(name.lower())
        links[case] = f"pictures/{name}.png"
    return links
