"""Compile a model for prediction with `torch.compile`."""

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import SemanticSegmenterOutput

from samed_peft.config import SamedConfig
from samed_peft.errors import InputError
from samed_peft.models.modeling import SamForSemanticSegmentation


class CompiledSegmenter(nn.Module):
    """Compiles a model once, for one batch size, and pads smaller batches.

    Args:
        model: returns `logits` for `pixel_values` and has a `samed_config`.
        batch_size: largest number of slices in a batch.

    Raises:
        InputError: nothing can be compiled on this machine.
    """

    samed_config: SamedConfig | None

    def __init__(self, model: PeftModel | SamForSemanticSegmentation, batch_size: int) -> None:
        super().__init__()
        _require_compiler(next(model.parameters()).device)
        self.training = model.training
        self.samed_config, self.config = model.samed_config, model.config
        self.batch_size = batch_size
        self.compiled = torch.compile(model, dynamic=False)

    def forward(self, pixel_values: Tensor) -> SemanticSegmenterOutput:
        """Logits (B, K + 1, h, w) of pixels (B, 3, S, S).

        Raises:
            InputError: B exceeds the batch size it was compiled for.
        """
        count = len(pixel_values)
        if count > self.batch_size:
            raise InputError(f"the model was compiled for batches of {self.batch_size}, found one of {count}")
        padded = F.pad(pixel_values, (0, 0) * 3 + (0, self.batch_size - count))
        return SemanticSegmenterOutput(logits=self.compiled(pixel_values=padded).logits[:count])


def _require_compiler(device: torch.device) -> None:
    """Compile a trivial function, so that a missing compiler is found before the first scan."""
    try:
        torch.compile(torch.neg)(torch.zeros(2, device=device))
    except RuntimeError as error:  # base class of all errors of torch.compile
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"torch.compile cannot compile for {device.type} here: {reason}; it needs a C++ compiler such as g++, and "
            "Triton for GPUs: install what is missing, or leave compile out, --compile on the command line"
        ) from error
