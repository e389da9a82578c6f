"""What an adapter is (`SamedConfig`) and how it is trained (`TrainingConfig`)."""

from samed_peft.config.adapter import BTCV_ORIENTATION as BTCV_ORIENTATION
from samed_peft.config.adapter import SYNAPSE_CLASSES as SYNAPSE_CLASSES
from samed_peft.config.adapter import SYNAPSE_NAME as SYNAPSE_NAME
from samed_peft.config.adapter import TINY_SAM as TINY_SAM
from samed_peft.config.adapter import TINY_SAM_NOTE as TINY_SAM_NOTE
from samed_peft.config.adapter import SamedConfig as SamedConfig
from samed_peft.config.adapter import is_hub_id as is_hub_id
from samed_peft.config.methods import METHODS as METHODS
from samed_peft.config.methods import Storage as Storage
from samed_peft.config.options import add_run_options as add_run_options
from samed_peft.config.options import given_options as given_options
from samed_peft.config.options import parse_run_options as parse_run_options
from samed_peft.config.presets import DEMO as DEMO
from samed_peft.config.presets import PRESETS as PRESETS
from samed_peft.config.training import TrainingConfig as TrainingConfig
from samed_peft.config.windows import CT_WINDOW_HU as CT_WINDOW_HU
from samed_peft.config.windows import CT_WINDOWS as CT_WINDOWS
from samed_peft.config.windows import Windows as Windows
from samed_peft.config.windows import WindowsAction as WindowsAction
from samed_peft.config.windows import first_window as first_window
from samed_peft.config.windows import windows_of as windows_of
from samed_peft.config.windows import windows_text as windows_text
