from .artefacts import write_report as write_report
from .cases import evaluate_cases as evaluate_cases
from .pictures import case_picture as case_picture
from .report import Report as Report
from .tables import format_table as format_table
