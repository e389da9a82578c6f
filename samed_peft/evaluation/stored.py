"""Check and convert the content of a report.json; files of older versions have fewer fields."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from samed_peft.errors import InputError
from samed_peft.metrics import CONVENTIONS, METRICS, CaseScores, ClassScore, Convention, Intervals, Presence, Summary

_COUNTS = ("n_valid", "n_cases", "n_absent", "n_missed", "n_spurious")
_PRINTED = {
    "note": (str, "a string"),
    "failed_cases": (dict, "an object"),
    "cases_without_spacing": (list, "a list"),
    "cases_without_image": (list, "a list"),
}
"""Settings that reports print, and their types."""


@dataclass(frozen=True)
class Means:
    """Means over cases and their confidence intervals, as a file states them."""

    n_cases: int
    summary: Mapping[Convention, Summary]
    intervals: Mapping[Convention, Intervals]


@dataclass(frozen=True)
class Entry:
    """A value of a report.json and its place in the file; its methods raise InputError if it is of another kind."""

    value: Any
    place: str = "the report"

    def expect(self, is_expected: bool, expected: str) -> Any:
        """The value, if the condition holds."""
        if not is_expected:
            raise InputError(f"expected {expected} as {self.place}, found {self.value!r:.80}")
        return self.value

    def members(self) -> dict[str, Any]:
        """An object."""
        return self.expect(isinstance(self.value, dict), "an object")

    def has(self, key: str) -> bool:
        """Whether an object has this key."""
        return key in self.members()

    def __getitem__(self, key: str) -> "Entry":
        self.expect(self.has(key), f"an object with {key!r}")
        return Entry(self.value[key], f"{self.place}: {key}")

    def rows(self) -> "list[Entry]":
        """The entries of a list."""
        values = self.expect(isinstance(self.value, list), "a list")
        return [Entry(value, f"{self.place}[{index}]") for index, value in enumerate(values)]

    def count(self) -> int:
        """A whole number of at least 0."""
        return self.expect(type(self.value) is int and self.value >= 0, "a number of cases")

    def number(self) -> float:
        """A number; NaN for null."""
        is_number = isinstance(self.value, int | float) and type(self.value) is not bool and abs(self.value) < math.inf
        # The values of a report in memory have NaN itself.
        is_undefined = self.value is None or self.value != self.value
        self.expect(is_number or is_undefined, "a number or null")
        return float(self.value) if is_number else math.nan


def read_cases(report: Entry, names: Sequence[str]) -> dict[str, CaseScores]:
    """Case -> scores, of all rows under `cases`; presence is derived from the scores if an older file lacks it."""
    cases: dict[str, CaseScores] = {}
    for row in report["cases"].rows():
        case = row["case"].expect(isinstance(row["case"].value, str), "a name")
        row["case"].expect(case not in cases, "a different name for each case")
        row["classes"].expect(row["classes"].members().keys() == set(names), f"an object with {', '.join(names)} alone")
        standard, samed = ([_scores(row["classes"][name][convention]) for name in names] for convention in CONVENTIONS)
        if row.has("presence"):
            presence = [_presence(row["presence"][name]) for name in names]
        else:
            presence = [_derived_presence(*pair) for pair in zip(standard, samed, strict=True)]
        cases[case] = {"standard": standard, "samed": samed, "presence": presence}
    return cases


def _presence(entry: Entry) -> Presence:
    return entry.expect(entry.value in get_args(Presence), f"one of {', '.join(get_args(Presence))}")


def _derived_presence(standard: ClassScore, samed: ClassScore) -> Presence:
    if math.isnan(standard["dice"]):
        return "absent"
    if not math.isnan(standard["hd95"]):
        return "both"
    return "spurious" if samed["dice"] == 1 else "missed"


def read_means(report: Entry, names: Sequence[str], *, n_cases: int) -> Means | None:
    """Summary and intervals; None for an older file without intervals, whose cases have to be summarised again.

    An older file without cases, as `push_to_hub` made it, states no intervals and the first two counts only.
    """
    is_older = not report["standard"].has("mean_ci95") or report["standard"]["mean_ci95"].value is None
    if is_older and report["cases"].rows():
        return None
    summary: dict[Convention, Summary] = {}
    intervals: dict[Convention, Intervals] = {}
    for convention in CONVENTIONS:
        found = report[convention]
        classes = {name: found["classes"][name] for name in names}
        summary[convention] = {
            "mean": _scores(found["mean"]),
            "classes": {name: _scores(entry) | _counts(entry, is_older=is_older) for name, entry in classes.items()},
        }
        intervals[convention] = {
            "mean": _intervals(found, "mean_ci95", is_older=is_older),
            "classes": {name: _intervals(entry, "ci95", is_older=is_older) for name, entry in classes.items()},
        }
    return Means(n_cases, summary, intervals)


def _counts(entry: Entry, *, is_older: bool) -> dict[str, float]:
    unknown = [key for key in _COUNTS[2:] if is_older and not (entry.has(key) and entry[key].value is not None)]
    return {key: math.nan if key in unknown else entry[key].count() for key in _COUNTS}


def read_settings(report: Entry) -> dict[str, Any]:
    """The settings, some of which must be of the types that reports print."""
    settings = report["settings"]
    for name, (kind, expected) in _PRINTED.items():
        if settings.has(name):
            settings[name].expect(isinstance(settings[name].value, kind), expected)
    if settings.has("surface_dice_tolerance_mm"):
        settings["surface_dice_tolerance_mm"].number()
    return settings.value


def _stored(entry: Entry) -> dict[str, Entry]:
    """The metrics of a file; Dice and HD95 are in files of every version."""
    return {metric: entry[metric] for metric in METRICS if metric in ("dice", "hd95") or entry.has(metric)}


def _scores(entry: Entry) -> ClassScore:
    return dict.fromkeys(METRICS, math.nan) | {metric: found.number() for metric, found in _stored(entry).items()}


def _intervals(parent: Entry, key: str, *, is_older: bool) -> dict[str, tuple[float, float]]:
    found = {} if is_older else _stored(parent[key])
    return dict.fromkeys(METRICS, (math.nan, math.nan)) | {metric: _interval(entry) for metric, entry in found.items()}


def _interval(entry: Entry) -> tuple[float, float]:
    ends = [end.number() for end in entry.rows()]
    entry.expect(len(ends) == 2, "two ends of an interval")
    return ends[0], ends[1]
