from . import config as config
from . import datasets as datasets
from . import metrics as metrics
from . import training as training
from .adapters.save_load import add_lora as add_lora
from .adapters.save_load import load_adapter as load_adapter
from .adapters.save_load import save_adapter as save_adapter
from .config import SamedConfig as SamedConfig
from .config import TrainingConfig as TrainingConfig
from .errors import InputError as InputError
from .errors import exit_on_error as exit_on_error
from .errors import exit_resumable as exit_resumable
from .evaluation import Report as Report
from .evaluation import evaluate_cases as evaluate_cases
from .evaluation import format_table as format_table
from .hub.push import push_to_hub as push_to_hub
from .io import Volume as Volume
from .io import read_volume as read_volume
from .io import write_mask as write_mask
from .models.bases import load_sam as load_sam
from .models.losses import dice_ce_loss as dice_ce_loss
from .prediction.held_out import score_held_out as score_held_out
from .prediction.inference import load_segmenter as load_segmenter
from .prediction.inference import predict_probabilities as predict_probabilities
from .prediction.inference import predict_volume as predict_volume

__version__: str
