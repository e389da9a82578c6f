"""`Report`: scores of many cases, their summary, and its table for the terminal."""

import functools
import io
import math
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from samed_peft.metrics import (
    CONVENTIONS,
    METRICS,
    CaseScores,
    Convention,
    Interval,
    Intervals,
    Metric,
    Summary,
    confidence_intervals,
    format_metric,
    mean_defined,
    summarise,
    without_nan,
)

CONVENTION_NOTES: dict[Convention, str] = {
    "standard": "millimetres; an organ that is in neither mask has no score, one in a single mask has "
    "Dice 0 and no HD95; means leave out what is undefined, and n counts what is left.",
    "samed": "voxels; a prediction without reference scores Dice 1 and HD95 0, a missed organ and one "
    "in neither mask 0 and 0, as in the published figures of SAMed (arXiv 2304.13785).",
}

METRIC_NOTE = (
    "ASSD is the mean distance between the surfaces, surface Dice the share of them within the tolerance of each "
    "other; intervals are a 95 % percentile bootstrap over cases."
)

_BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class Report:
    """Scores of all cases.

    Attributes:
        class_names: names of labels 1..K.
        cases: case -> its scores.
        settings: what is known about the run, as JSON values; `note` is printed on top, and so are
            `failed_cases`, case -> what is wrong with it.
        pictures: case -> PNG.
    """

    class_names: tuple[str, ...]
    cases: Mapping[str, CaseScores]
    settings: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def summary(self) -> dict[Convention, Summary]:
        """Means over cases for each class, and over classes, in both conventions; NaN where undefined."""
        return summarise(list(self.cases.values()), self.class_names)

    @functools.cached_property
    def intervals(self) -> dict[Convention, Intervals]:
        """95 % confidence intervals of the means in `summary`; equal reports have equal ones."""
        rng = np.random.default_rng(_BOOTSTRAP_SEED)
        return confidence_intervals(list(self.cases.values()), self.class_names, rng=rng)

    def to_dict(self) -> dict[str, Any]:
        """The content of `report.json`; None (null) where a score is undefined."""
        summaries = {convention: self._summary_dict(convention) for convention in CONVENTIONS}
        return without_nan({**summaries, "cases": self._case_rows(), "settings": self.settings})

    def _summary_dict(self, convention: Convention) -> dict[str, Any]:
        summary, intervals = self.summary[convention], self.intervals[convention]
        return {
            "mean": summary["mean"],
            "mean_ci95": intervals["mean"],
            "classes": {
                name: {**summary["classes"][name], "ci95": intervals["classes"][name]} for name in self.class_names
            },
        }

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

    def case_dice(self, case: str) -> float:
        """Mean `standard` Dice of a case over its classes; NaN if none has one."""
        return mean_defined([score["dice"] for score in self.cases[case]["standard"]])

    def worst_first(self) -> list[str]:
        """The cases by `case_dice`, those without one last."""
        order = {case: self.case_dice(case) for case in self.cases}
        return sorted(order, key=lambda case: (math.isnan(order[case]), order[case], case))


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
    for cells in class_rows(report):
        # Text, because a class name in square brackets would be read as markup.
        table.add_row(*(Text(cell) for cell in cells))
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, color_system=None, legacy_windows=False)
    console.print(table)
    failed = list(report.settings.get("failed_cases", {}))
    left_out = [f"{len(failed)} failed and left out: {', '.join(failed)}"] if failed else []
    for line in [*remarks(report), *left_out]:
        console.print(Text(line))
    return "\n".join(line.rstrip() for line in buffer.getvalue().strip("\n").splitlines())


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is aligned left, the others right."""
    align = ["---", *["---:"] * (len(header) - 1)]
    lines = [header, align, *([markdown_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_cell(text: str) -> str:
    """`text` in one line that no reader of Markdown takes for the end of a cell, a link, code or HTML."""
    return re.sub(r"[\\|<\[\]`]", r"\\\g<0>", " ".join(text.split()))


def format_score(score: Mapping[str, float]) -> tuple[str, str]:
    """Dice with four digits and HD95 with two; n/a where undefined."""
    return format_metric("dice", score["dice"]), format_metric("hd95", score["hd95"])


def format_interval(metric: Metric, interval: Interval) -> str:
    """Both ends; n/a where there is no interval."""
    low, high = (format_metric(metric, end) for end in interval)
    return "n/a" if low == "n/a" else f"{low} to {high}"


def class_rows(report: Report) -> list[tuple[str, ...]]:
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


def further_rows(report: Report) -> list[tuple[str, ...]]:
    """Name, IoU, ASSD and surface Dice in both conventions, cases with the class in neither or one mask; mean last."""
    others = [metric for metric in METRICS if metric not in ("dice", "hd95")]
    rows: list[tuple[str, ...]] = []
    for name in report.class_names:
        scores = [report.summary[convention]["classes"][name] for convention in CONVENTIONS]
        counts = (str(scores[0][key]) for key in ("n_absent", "n_missed", "n_spurious"))
        rows.append((name, *(format_metric(key, score[key]) for score in scores for key in others), *counts))
    means = [report.summary[convention]["mean"] for convention in CONVENTIONS]
    rows.append(("mean", *(format_metric(key, score[key]) for score in means for key in others), "", "", ""))
    return rows


def interval_rows(report: Report) -> list[tuple[str, ...]]:
    """Name, and the intervals of Dice and HD95 in both conventions; the mean last."""
    named = [(name, [report.intervals[c]["classes"][name] for c in CONVENTIONS]) for name in report.class_names]
    named.append(("mean", [report.intervals[c]["mean"] for c in CONVENTIONS]))
    keys: tuple[Metric, ...] = ("dice", "hd95")
    return [
        (name, *(format_interval(key, interval[key]) for interval in intervals for key in keys))
        for name, intervals in named
    ]


def remarks(report: Report) -> list[str]:
    """What a reader of the scores must know first."""
    found = [str(report.settings["note"])] if "note" in report.settings else []
    assumed = report.settings.get("cases_without_spacing", [])
    if assumed:
        found.append(f"{len(assumed)} of {len(report.cases)} references have no voxel size: 1 mm was assumed for them.")
    return found


def failures(report: Report) -> list[str]:
    """One line for each case that failed."""
    failed = report.settings.get("failed_cases", {})
    return [f"failed: {case}: {reason}" for case, reason in failed.items()]
