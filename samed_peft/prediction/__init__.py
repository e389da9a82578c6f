"""Files in, mask files out."""

from samed_peft.prediction.files import Outcome, PredictionOptions, predict_files
from samed_peft.prediction.scans import Scan, list_scans, plan_masks

__all__ = ["Outcome", "PredictionOptions", "Scan", "list_scans", "plan_masks", "predict_files"]
