from .cases import CaseVolumes as CaseVolumes
from .phantom import phantom_case as phantom_case
from .phantom import write_phantom as write_phantom
from .rows import common_orientation as common_orientation
from .synapse import load_synapse as load_synapse
from .synapse_files import list_cases as list_cases
from .synapse_files import require_disjoint as require_disjoint
from .synapse_files import split_cases as split_cases
