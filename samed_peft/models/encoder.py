"""Layers of SAM's image encoder, computed on real tokens only and each matrix product in one type of numbers."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.sam.modeling_sam import SamMLPBlock

from samed_peft.models.attention import SamSplitAttention


class SamEncoderLayer(GradientCheckpointingLayer):
    """A layer of Transformers' `SamVisionEncoder` around `SamSplitAttention`, with the same names of weights.

    What is normalised is converted to the type that matrix products are computed in once, not by every projection;
    the sum that runs through all layers stays in the type it comes in, float32.

    Args:
        config: a `SamVisionConfig`.
        index: number of the layer; it decides between windows and the whole image.
    """

    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = SamSplitAttention(
            config.hidden_size,
            config.num_attention_heads,
            grid_size=config.image_size // config.patch_size,
            window_size=0 if index in config.global_attn_indexes else config.window_size,
            qkv_bias=config.qkv_bias,
            use_rel_pos=config.use_rel_pos,
        )
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SamMLPBlock(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        dtype = compute_dtype(self.attn.proj.weight)
        # Patches come out of their convolution with channels first, and sums would keep that order in memory, in which
        # every norm has to copy its input. Here it is changed once, in the first layer.
        hidden_states = hidden_states.contiguous()
        hidden_states = hidden_states + self.attn(self.layer_norm1(hidden_states).to(dtype))
        tokens = self.layer_norm2(hidden_states).to(dtype).flatten(1, 2)
        return hidden_states + self.mlp(tokens).view_as(hidden_states)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Type that a product with `weight` is computed in: autocast's where it is on, else its own, float32 for 4 bits."""
    device = weight.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype if weight.is_floating_point() else torch.float32
