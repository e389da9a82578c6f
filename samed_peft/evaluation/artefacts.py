"""Write a report to disk: report.json, report.csv, report.html, report.md and pictures."""

import csv
import io
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from samed_peft.errors import InputError, printable
from samed_peft.evaluation.page import html_page
from samed_peft.evaluation.render import render
from samed_peft.evaluation.report import Report
from samed_peft.evaluation.tables import MAIN_METRICS
from samed_peft.io import FolderKind, write_bytes, write_json, write_text
from samed_peft.metrics import CONVENTIONS, METRICS, Convention, format_metric

REPORT_FOLDER = FolderKind(markers=("report.json",), allowed=r"report\.(json|csv|html|md)|pictures")
"""A folder that `write_report` filled."""

_FORMULA_STARTS = re.compile(r"[\s\0]*[=+\-@＝＋－＠−|%]|[\s\0]*[\t\r\n]")  # noqa: RUF001
"""How a text begins that a spreadsheet runs as a formula, in full width where it reads Japanese."""


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
    # Pages are written after the pictures that they link.
    for case, data in pictures.items():
        write_bytes(directory / links[case], data)
    write_json(directory / "report.json", report.to_dict())
    write_text(directory / "report.csv", csv_text(report))
    write_text(directory / "report.html", html_page(report, pictures=pictures, links=links))
    write_text(directory / "report.md", report_text(report, _case_tables(report), links=links))


def csv_text(report: Report) -> str:
    """One row for each case, class or region, and convention; a score that is undefined is empty.

    Names that a spreadsheet would run as a formula get an apostrophe in front, which marks text.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer)  # line ends are RFC 4180's, so that those in names are quoted
    writer.writerow(["case", "class", "convention", "presence", *METRICS])
    for prefix, part in {"": report, "region ": report.regions or Report((), {})}.items():
        for case, scores in part.cases.items():
            for index, name in enumerate(part.class_names):
                for convention in CONVENTIONS:
                    values = (scores[convention][index][metric] for metric in METRICS)
                    cells = ("" if math.isnan(value) else repr(value) for value in values)
                    row = [_inert(case), _inert(prefix + name), convention, scores["presence"][index], *cells]
                    writer.writerow(row)
    return buffer.getvalue()


def _inert(name: str) -> str:
    # Line ends stay: they are quoted.
    shown = re.sub(r"[^\r\n]+", lambda found: printable(found[0]), name)
    return f"'{shown}" if _FORMULA_STARTS.match(name) else shown


CaseTable = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""Heading, header and rows of a table with the scores of single cases."""


def report_text(report: Report, case_tables: Iterable[CaseTable], *, links: Mapping[str, str]) -> str:
    """The report as Markdown, with tables of single cases after those of means, and links (case -> picture)."""
    settings = [
        (name, json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping) else value)
        for name, value in report.settings.items()
    ]
    pictures = {case: links[case] for case in report.cases if case in links}
    return render("report.md.jinja", report=report, case_tables=case_tables, pictures=pictures, settings=settings)


def _case_tables(report: Report) -> Iterator[CaseTable]:
    """Dice and HD95 by case and class, a table for each convention."""
    units: Mapping[Convention, str] = {"standard": "millimetres", "samed": "voxels"}
    for convention, unit in units.items():
        rows = [
            [case, *(" / ".join(format_metric(m, score[m]) for m in MAIN_METRICS) for score in scores[convention])]
            for case, scores in report.cases.items()
        ]
        yield f"{convention} (Dice / HD95 in {unit})", ["Case", *report.class_names], rows


def picture_links(pictures: Iterable[str]) -> dict[str, str]:
    """Case -> path below the report's folder, without the characters that links must not have."""
    links: dict[str, str] = {}
    taken: set[str] = set()
    for case in pictures:
        # Cut, because the temporary file has a longer name.
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", case)[:100]
        names = itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(2)))
        name = next(name for name in names if name.lower() not in taken)
        taken.add(name.lower())
        links[case] = f"pictures/{name}.png"
    return links
