"""`Report`: scores as JSON, Markdown and a terminal table."""

import io
import math
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samed_peft.errors import InputError
from samed_peft.io import write_bytes, write_json, write_text
from samed_peft.metrics import CONVENTIONS, CaseScores, Convention, Score, Summary, summarise, without_nan

CONVENTION_NOTES: dict[Convention, str] = {
    "standard": "millimetres; an organ that is in neither mask has no score, one in a single mask has "
    "Dice 0 and no HD95; means leave out what is undefined, and n counts what is left.",
    "samed": "voxels; a prediction without reference scores Dice 1 and HD95 0, a missed organ and one "
    "in neither mask 0 and 0, as in the published figures of SAMed (arXiv 2304.13785).",
}


@dataclass(frozen=True)
class Report:
    """Scores of all cases.

    Attributes:
        class_names: names of labels 1..K.
        cases: case -> its scores.
        settings: what is known about the run, as JSON values; `note` is printed on top.
        pictures: case -> PNG.
    """

    class_names: tuple[str, ...]
    cases: Mapping[str, CaseScores]
    settings: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def summary(self) -> dict[Convention, Summary]:
        """Means over cases for each class, and over classes, in both conventions; NaN where undefined."""
        return summarise(list(self.cases.values()), self.class_names)

    def to_dict(self) -> dict[str, Any]:
        """The content of `report.json`; None (null) where a score is undefined."""
        return without_nan({**self.summary, "cases": self._case_rows(), "settings": self.settings})

    def _case_rows(self) -> list[dict[str, Any]]:
        return [
            {
                "case": case,
                "classes": {
                    name: {convention: scores[convention][index] for convention in CONVENTIONS}
                    for index, name in enumerate(self.class_names)
                },
            }
            for case, scores in self.cases.items()
        ]

    def count_distances(self, index: int) -> int:
        """Number of cases in which class `index` (label `index` + 1) has a `standard` HD95."""
        return sum(not math.isnan(scores["standard"][index]["hd95"]) for scores in self.cases.values())


def write_report(report: Report, directory: str | Path, *, pictures: Mapping[str, bytes] | None = None) -> None:
    """Write report.json, report.md and pictures/CASE.png, each file atomically.

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
    links = _picture_links(pictures)
    # report.md comes last, so that it never points to a file that is not there yet.
    for case, data in pictures.items():
        write_bytes(directory / links[case], data)
    write_json(directory / "report.json", report.to_dict())
    write_text(directory / "report.md", _markdown(report, links))


def format_table(report: Report, *, width: int | None = None) -> str:
    """The scores per class as a table for the terminal, in ASCII.

    Args:
        report: the scores.
        width: columns to fill at most; the terminal's if None. Less than 80 is taken as 80.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    width = max(80, shutil.get_terminal_size().columns if width is None else width)
    table = Table(box=box.MARKDOWN)
    table.add_column("Class", overflow="fold", min_width=12)
    for name in ("Dice", "HD95 mm", "n Dice", "n HD95", "samed Dice", "HD95 vox"):
        table.add_column(name, justify="right", no_wrap=True)
    for cells in _class_rows(report):
        # Text, because a class name in square brackets would be read as markup.
        table.add_row(*(Text(cell) for cell in cells))
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, color_system=None, legacy_windows=False)
    console.print(table)
    for line in _remarks(report):
        console.print(Text(line))
    return "\n".join(line.rstrip() for line in buffer.getvalue().strip("\n").splitlines())


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is aligned left, the others right."""
    align = ["---", *["---:"] * (len(header) - 1)]
    lines = [header, align, *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_score(score: Score) -> tuple[str, str]:
    """Dice with four digits and HD95 with two; n/a where undefined."""
    return _number(score["dice"], 4), _number(score["hd95"], 2)


def _number(value: float, digits: int) -> str:
    return "n/a" if math.isnan(value) else f"{value:.{digits}f}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _class_rows(report: Report) -> list[tuple[str, ...]]:
    """Name, standard Dice and HD95, cases with each, samed Dice and HD95; the mean last."""
    summary, total = report.summary, len(report.cases)
    rows: list[tuple[str, ...]] = []
    for index, name in enumerate(report.class_names):
        standard, samed = (summary[convention]["classes"][name] for convention in CONVENTIONS)
        counts = (f"{standard['n_valid']}/{total}", f"{report.count_distances(index)}/{total}")
        rows.append((name, *format_score(standard), *counts, *format_score(samed)))
    standard_mean, samed_mean = (summary[convention]["mean"] for convention in CONVENTIONS)
    rows.append(("mean", *format_score(standard_mean), "", "", *format_score(samed_mean)))
    return rows


def _remarks(report: Report) -> list[str]:
    remarks = [str(report.settings["note"])] if "note" in report.settings else []
    assumed = report.settings.get("cases_without_spacing", [])
    if assumed:
        remarks.append(
            f"{len(assumed)} of {len(report.cases)} references have no voxel size: 1 mm was assumed for them."
        )
    return remarks


def _case_table(report: Report, convention: Convention) -> str:
    rows = []
    for case, scores in report.cases.items():
        rows.append([case, *(" / ".join(format_score(score)) for score in scores[convention])])
    return markdown_table(["Case", *(_cell(name) for name in report.class_names)], rows)


def _markdown(report: Report, links: Mapping[str, str]) -> str:
    header = ["Class", "Dice", "HD95 (mm)", "n Dice", "n HD95", "Dice (samed)", "HD95 (samed, voxels)"]
    notes = [f"- `{convention}`: {CONVENTION_NOTES[convention]}" for convention in CONVENTIONS]
    parts = [
        "# Evaluation",
        *_remarks(report),
        f"{len(report.cases)} cases, {len(report.class_names)} classes. Scores come in two conventions:",
        "\n".join(notes),
        "## Classes",
        markdown_table(header, _class_rows(report)),
    ]
    units = {"standard": "Dice / HD95 in millimetres", "samed": "Dice / HD95 in voxels"}
    for convention in CONVENTIONS:
        parts += [f"## Cases, {convention} ({units[convention]})", _case_table(report, convention)]
    if links:
        parts.append("## Pictures")
        parts += [f"{_cell(case)}\n\n![{_cell(case)}]({links[case]})" for case in report.cases if case in links]
    if report.settings:
        rows = [(name, str(value)) for name, value in report.settings.items()]
        parts += ["## Settings", markdown_table(["Setting", "Value"], rows)]
    return "\n\n".join(parts) + "\n"


def _picture_links(pictures: Iterable[str]) -> dict[str, str]:
    """Case -> path below the report's folder; cases may have characters in them that links may not."""
    links: dict[str, str] = {}
    taken: set[str] = set()
    for case in pictures:
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", case)
        name, number = stem, 1
        while name.lower() in taken:
            number += 1
            name = f"{stem}_{number}"
        taken.add(name.lower())
        links[case] = f"pictures/{name}.png"
    return links
