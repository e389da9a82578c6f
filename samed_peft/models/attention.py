"""SAM's encoder layer with exact attention that builds no (N, N) bias and projects no padding."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.sam.modeling_sam import SamVisionLayer

from samed_peft.models.cpu_attention import TiledAttention


class SamSplitAttention(nn.Module):
    """Self-attention of SAM's image encoder with separate `q_proj`, `k_proj` and `v_proj`.

    SAM (arXiv 2304.02643) adds to each logit a term that depends on the query and on the key's vertical and horizontal
    distance: q·k / sqrt(d) + q·Rh[y - y'] + q·Rw[x - x']. With the key's row and column as one-hot vectors both terms
    are inner products, so they are appended to queries and keys and one product computes the whole sum.

    SAM pads the token grid with zeros to whole windows, 32 x 32 to 42 x 42 tokens at 512 pixels. All zero tokens have
    the same projections, which are computed once; only real tokens are projected.

    CPUs run `TiledAttention`. Other devices and tracing run PyTorch's scaled_dot_product_attention, with head sizes
    padded to multiples of 8 for its fused kernels. A window of 0 tokens per side is the whole image.
    """

    def __init__(self, config: Any, window_size: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = width // self.num_heads
        self.window = window_size or config.image_size // config.patch_size
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=config.qkv_bias) for _ in range(3))
        self.proj = nn.Linear(width, width)
        self.use_rel_pos = config.use_rel_pos
        if self.use_rel_pos:
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * self.window - 1, self.head_dim))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * self.window - 1, self.head_dim))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Attend within windows of (B, H, W, C)."""
        grid = hidden_states.shape[1:3]
        tokens = hidden_states.flatten(1, 2)  # PEFT's OFT treats four axes as a convolution's input
        projections = (self.q_proj, self.k_proj, self.v_proj)
        heads = (self.num_heads, self.head_dim)
        query, key, value = (project(tokens).unflatten(-1, heads).unflatten(1, grid) for project in projections)
        pad_key = pad_value = None
        if any(size % self.window for size in grid):
            zero = hidden_states.new_zeros(1, hidden_states.shape[-1])
            pad_key, pad_value = (project(zero)[0].unflatten(-1, heads) for project in projections[1:])
        table = self._table(query.dtype) if self.use_rel_pos else None
        attend = TiledAttention.apply if _is_tiled(query) else fused_attention
        output = attend(self.window, query, key, value, pad_key, pad_value, table)
        return self.proj(output.flatten(3).flatten(1, 2)).unflatten(1, grid)

    def _table(self, dtype: torch.dtype) -> Tensor:
        """Relative positions (2 (2 window - 1), d) by the distance key - query, times sqrt(d): SAM scales q·k alone."""
        by_distance = torch.cat([self.rel_pos_h.flip(0), self.rel_pos_w.flip(0)])
        return (by_distance * self.head_dim**0.5).to(dtype)


def _is_tiled(query: Tensor) -> bool:
    # CPUs without float16 instructions are very slow at its products; fused kernels convert in between.
    fits = query.device.type == "cpu" and query.dtype in (torch.float32, torch.bfloat16)
    return fits and not torch.compiler.is_compiling()


def fused_attention(
    window: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    table: Tensor | None,
) -> Tensor:
    """Compute the same as `TiledAttention` with scaled_dot_product_attention, on any device and type, traceably."""
    height, width, _, dim = query.shape[1:]
    query, key, value = (
        _to_windows(tokens, window, padding) for tokens, padding in ((query, None), (key, pad_key), (value, pad_value))
    )
    if table is not None:
        query, key = _append_positions(query, key, table, window)
    # Fused kernels need equal widths; zero columns change no product, and the values' are cut off.
    head_size = -(-query.shape[-1] // 8) * 8
    query, key, value = (F.pad(tokens, (0, head_size - tokens.shape[-1])) for tokens in (query, key, value))
    output = F.scaled_dot_product_attention(query, key, value, scale=dim**-0.5)[..., :dim]
    return _from_windows(output, window, height, width)


def _to_windows(tokens: Tensor, window: int, padding: Tensor | None) -> Tensor:
    """Cut (B, H, W, heads, d) into (windows, heads, window², d), padded with `padding` (heads, d) or zeros."""
    height, width = tokens.shape[1:3]
    below, beyond = -height % window, -width % window
    if below or beyond:
        if padding is not None:
            tokens = tokens - padding
        tokens = F.pad(tokens, (0, 0, 0, 0, 0, beyond, 0, below))
        if padding is not None:
            tokens = tokens + padding
    tokens = tokens.unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return tokens.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(0, 2)


def _from_windows(tokens: Tensor, window: int, height: int, width: int) -> Tensor:
    """Undo `_to_windows` without the padding: (windows, heads, window², d) -> (B, H, W, heads, d)."""
    down, across = -(-height // window), -(-width // window)
    tokens = tokens.unflatten(2, (window, window)).unflatten(0, (-1, down, across))
    whole = tokens.permute(0, 1, 4, 2, 5, 3, 6).flatten(3, 4).flatten(1, 2)
    return whole[:, :height, :width]


def _append_positions(query: Tensor, key: Tensor, table: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Extend queries and keys (G, heads, window², d) by 2 window columns, so that their product includes the bias."""
    position = torch.arange(window, device=query.device)
    distance = position[None, :] - position[:, None] + window - 1  # from a query's row (first axis) to a key's (second)
    grid = query.unflatten(2, (window, window))
    rows, columns = table.chunk(2)
    by_row = torch.einsum("bnyxd,ykd->bnyxk", grid, rows[distance])
    by_column = torch.einsum("bnyxd,xkd->bnyxk", grid, columns[distance])
    one_hot = torch.eye(window, dtype=key.dtype, device=key.device)
    of_key = torch.cat([one_hot.repeat_interleave(window, 0), one_hot.repeat(window, 1)], dim=1)
    extended = torch.cat([query, by_row.flatten(2, 3), by_column.flatten(2, 3)], dim=-1)
    return extended, torch.cat([key, of_key.expand(*key.shape[:2], -1, -1)], dim=-1)


class SamEncoderLayer(SamVisionLayer):
    """Transformers' encoder layer with `SamSplitAttention` and the same names of weights.

    Normalised tokens are cast to the type of matrix products once, not by every projection; the residual sum stays in
    its own type, float32. The layer's number decides between windows and the whole image.
    """

    def __init__(self, config: Any, index: int) -> None:
        window_size = 0 if index in config.global_attn_indexes else config.window_size
        super().__init__(config, window_size)
        self.attn = SamSplitAttention(config, window_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Tokens (B, H, W, C) -> the same shape."""
        dtype = compute_dtype(self.attn.proj.weight)
        # The patch convolution leaves channels first in memory and sums keep that order, so every norm would copy its
        # input. The first layer changes it once.
        hidden_states = hidden_states.contiguous()
        hidden_states = hidden_states + self.attn(self.layer_norm1(hidden_states).to(dtype))
        tokens = self.layer_norm2(hidden_states).to(dtype).flatten(1, 2)
        return hidden_states + self.mlp(tokens).view_as(hidden_states)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Type of products with `weight`: autocast's if enabled, else the weight's own, or float32 for 4-bit weights."""
    device = weight.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype if weight.is_floating_point() else torch.float32
