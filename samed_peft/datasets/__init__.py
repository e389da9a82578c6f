"""Labelled scans as Hugging Face Datasets, and analytic ones to try things on."""

from samed_peft.datasets.cases import CaseVolumes
from samed_peft.datasets.phantom import phantom_case, write_phantom
from samed_peft.datasets.rows import common_orientation
from samed_peft.datasets.synapse import load_synapse
from samed_peft.datasets.synapse_files import list_cases, require_disjoint, split_cases

__all__ = [
    "CaseVolumes",
    "common_orientation",
    "list_cases",
    "load_synapse",
    "phantom_case",
    "require_disjoint",
    "split_cases",
    "write_phantom",
]
