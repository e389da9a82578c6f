"""`Report`: scores of many cases, their means and confidence intervals."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from samed_peft.errors import SomeCasesFailedError
from samed_peft.evaluation.stored import Entry, Means, read_cases, read_means, read_settings
from samed_peft.metrics import (
    CONVENTIONS,
    CaseScores,
    Convention,
    Intervals,
    Metric,
    Summary,
    confidence_intervals,
    mean_defined,
    summarise,
    without_nan,
)


@dataclass(frozen=True)
class Report:
    """Scores of all cases.

    Attributes:
        class_names: names of labels 1..K.
        cases: case -> its scores; empty for a published report, which has `means` only.
        settings: facts about the run as JSON values; `note` and `failed_cases` (case -> reason) are printed on top.
        pictures: case -> PNG.
        means: summary and intervals as a file states them; None to compute them from the cases.
        regions: scores of regions, each made of several labels, in place of classes; None without regions. They do not
            count in the means of the classes.
    """

    class_names: tuple[str, ...]
    cases: Mapping[str, CaseScores]
    settings: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    means: Means | None = field(default=None, repr=False)
    regions: "Report | None" = None

    @property
    def n_cases(self) -> int:
        """Number of cases that the means summarise."""
        return len(self.cases) if self.means is None else self.means.n_cases

    @functools.cached_property
    def summary(self) -> Mapping[Convention, Summary]:
        """Means over cases for each class, and over classes, in both conventions; NaN where undefined."""
        return summarise(list(self.cases.values()), self.class_names) if self.means is None else self.means.summary

    @functools.cached_property
    def intervals(self) -> Mapping[Convention, Intervals]:
        """95 % confidence intervals of the means in `summary`; equal reports have equal ones."""
        if self.means is not None:
            return self.means.intervals
        return confidence_intervals(list(self.cases.values()), self.class_names, rng=np.random.default_rng(0))

    def to_dict(self) -> dict[str, Any]:
        """The content of `report.json`; None (null) where a score is undefined."""
        summaries = {convention: self._summary_dict(convention) for convention in CONVENTIONS}
        number = {} if self.cases else {"n_cases": self.n_cases}
        regions = {} if self.regions is None else {"regions": self.regions.to_dict()}
        return without_nan({**summaries, "cases": self._case_rows(), **number, **regions, "settings": self.settings})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Report":
        """The report that `to_dict` made these values of; unknown fields are left out.

        Reports without cases, as `push_to_hub` publishes them, have the stored means. Files of versions that stored
        neither presence nor intervals have them derived from their cases.

        Raises:
            InputError: naming the first field that is missing or of a wrong type.
        """
        return cls._read(Entry(dict(values)))

    @classmethod
    def _read(cls, report: Entry) -> "Report":
        names = tuple(report["standard"]["classes"].members())
        cases = read_cases(report, names)
        n_cases = report["n_cases"].count() if report.has("n_cases") else len(cases)
        if cases:
            report["cases"].expect(n_cases == len(cases), f"a list of {n_cases} cases")
        means = read_means(report, names, n_cases=n_cases)
        regions = cls._read(report["regions"]) if report.has("regions") else None
        return cls(names, cases, settings=read_settings(report), means=means, regions=regions)

    def require_all_cases(self) -> None:
        """Require that no case failed and was left out.

        Raises:
            SomeCasesFailedError: with their number.
        """
        if failed := self.settings.get("failed_cases", {}):
            total = len({*self.cases, *failed})
            raise SomeCasesFailedError(f"{len(failed)} of {total} cases failed; the report names them")

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
                "presence": dict(zip(self.class_names, scores["presence"], strict=True)),
            }
            for case, scores in self.cases.items()
        ]

    def case_mean(self, case: str, metric: Metric = "dice") -> float:
        """Mean `standard` score of a case over its classes; NaN if none has one."""
        return mean_defined([score[metric] for score in self.cases[case]["standard"]])

    def worst_first(self) -> list[str]:
        """The cases by mean Dice, those without one last."""
        order = {case: self.case_mean(case) for case in self.cases}
        return sorted(order, key=lambda case: (math.isnan(order[case]), order[case], case))
