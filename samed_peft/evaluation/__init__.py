"""Scores of many cases against their references, as a `Report` with tables and pictures."""

from samed_peft.evaluation.artefacts import write_report
from samed_peft.evaluation.cases import evaluate_cases
from samed_peft.evaluation.pictures import case_picture
from samed_peft.evaluation.report import Report
from samed_peft.evaluation.tables import format_table

__all__ = ["Report", "case_picture", "evaluate_cases", "format_table", "write_report"]
