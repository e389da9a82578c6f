"""Validate the content of a report.json field by field; files of older versions have fewer fields."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, get_args

from samed_peft.errors import InputError
from samed_peft.metrics import (
    CONVENTIONS,
    METRICS,
    CaseScores,
    ClassScore,
    Convention,
    Interval,
    Intervals,
    Metric,
    Presence,
    Summary,
)

_ALWAYS_STORED: tuple[Metric, ...] = ("dice", "hd95")
"""Metrics in files of every version; others are undefined if the file lacks them."""

_COUNTS = ("n_valid", "n_cases", "n_absent", "n_missed", "n_spurious")
_KINDS_OF_SETTINGS: Mapping[str, tuple[type, str]] = {
    "note": (str, "a string"),
    "failed_cases": (dict, "an object"),
    "cases_without_spacing": (list, "a list"),
    "cases_without_image": (list, "a list"),
    "surface_dice_tolerance_mm": (int | float, "a number"),  # type: ignore[dict-item]
}
"""Settings that reports print or hide, which must not surprise those who do."""


@dataclass(frozen=True)
class Means:
    """Means over cases and their confidence intervals, as a file states them."""

    n_cases: int
    summary: Mapping[Convention, Summary]
    intervals: Mapping[Convention, Intervals]


@dataclass(frozen=True)
class Entry:
    """A value of a report.json, and its place in there for error messages."""

    value: Any
    place: str = "report"

    def refuse(self, expected: str) -> NoReturn:
        """Raise an InputError with the expected kind, the place and the value."""
        raise InputError(f"expected {expected} as {self.place}, found {self.value!r:.80}")

    def checked(self, kind: type, expected: str) -> Any:
        """The value, if it is of this type; True and False are not numbers."""
        is_kind = isinstance(self.value, kind) and not isinstance(self.value, bool)
        return self.value if is_kind else self.refuse(expected)

    def __contains__(self, key: str) -> bool:
        return key in self.checked(dict, "an object")

    def __getitem__(self, key: str) -> "Entry":
        return Entry(self.value[key], f"{self.place}.{key}") if key in self else self.refuse(f"an object with {key!r}")

    def items(self) -> "list[Entry]":
        """The entries of a list."""
        values = self.checked(list, "a list")
        return [Entry(value, f"{self.place}[{index}]") for index, value in enumerate(values)]

    def count(self) -> int:
        """A whole number of at least 0."""
        return self.value if self.checked(int, "a count") >= 0 else self.refuse("a count")

    def number(self) -> float:
        """A finite number; NaN for null, which stands for an undefined one."""
        number = math.nan if self.value is None else float(self.checked(int | float, "a number or null"))  # type: ignore[arg-type]
        return self.refuse("a finite number or null") if math.isinf(number) else number


def check_settings(settings: Entry) -> dict[str, Any]:
    """The settings, if those that a report is made from are of their types."""
    for name, (kind, expected) in _KINDS_OF_SETTINGS.items():
        if name in settings:
            settings[name].checked(kind, expected)
    return settings.value


def read_cases(rows: Entry, names: Sequence[str]) -> dict[str, CaseScores]:
    """Case -> its scores.

    Args:
        rows: what `Report.to_dict` has under `cases`.
        names: names of labels 1..K, which each case must have scores of.

    Raises:
        InputError: a field is missing or of a wrong type, or two cases have one name.
    """
    cases: dict[str, CaseScores] = {}
    for row in rows.items():
        case = row["case"].checked(str, "a name")
        if case in cases:
            row["case"].refuse("another name for each case")
        classes = classes_of(row, names)
        standard, samed = ([_scores(found[convention]) for found in classes] for convention in CONVENTIONS)
        if "presence" in row:
            presence = [_presence(row["presence"][name]) for name in names]
        else:
            presence = [derived_presence(*pair) for pair in zip(standard, samed, strict=True)]
        cases[case] = {"standard": standard, "samed": samed, "presence": presence}
    return cases


def classes_of(entry: Entry, names: Sequence[str]) -> list[Entry]:
    """What `entry` says of each class, in the order of their labels."""
    classes = entry["classes"]
    if set(classes.checked(dict, "an object")) != set(names):
        classes.refuse(f"an object with {', '.join(names)}")
    return [classes[name] for name in names]


def _presence(entry: Entry) -> Presence:
    return entry.value if entry.value in get_args(Presence) else entry.refuse(f"one of {', '.join(get_args(Presence))}")


def derived_presence(standard: ClassScore, samed: ClassScore) -> Presence:
    """Which masks contain a class, for files of versions that did not store it; no other pair of scores fits."""
    if math.isnan(standard["dice"]):
        return "absent"
    if not math.isnan(standard["hd95"]):
        return "both"
    return "spurious" if samed["dice"] == 1 else "missed"


def read_means(report: Entry, names: Sequence[str], *, n_cases: int) -> Means:
    """Summary and intervals of a report.

    Raises:
        InputError: a field is missing or of a wrong type.
    """
    summary: dict[Convention, Summary] = {}
    intervals: dict[Convention, Intervals] = {}
    for convention in CONVENTIONS:
        found = report[convention]
        classes = dict(zip(names, classes_of(found, names), strict=True))
        counted = {name: {key: entry[key].count() for key in _COUNTS} for name, entry in classes.items()}
        summary[convention] = {
            "mean": _scores(found["mean"]),
            "classes": {name: {**_scores(entry), **counted[name]} for name, entry in classes.items()},
        }
        intervals[convention] = {
            "mean": _intervals(found["mean_ci95"]),
            "classes": {name: _intervals(entry["ci95"]) for name, entry in classes.items()},
        }
    return Means(n_cases, summary, intervals)


def _scores(entry: Entry) -> ClassScore:
    return {
        metric: entry[metric].number() if metric in _ALWAYS_STORED or metric in entry else math.nan
        for metric in METRICS
    }


def _intervals(entry: Entry) -> dict[Metric, Interval]:
    return {
        metric: _interval(entry[metric]) if metric in _ALWAYS_STORED or metric in entry else (math.nan, math.nan)
        for metric in METRICS
    }


def _interval(entry: Entry) -> Interval:
    ends = [end.number() for end in entry.items()]
    return (ends[0], ends[1]) if len(ends) == 2 else entry.refuse("two ends of an interval")
