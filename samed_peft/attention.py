"""SAM's attention with relative positions, exact, without the (N, N) bias in memory."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SamSplitAttention(nn.Module):
    """Self-attention of SAM's image encoder with separate `q_proj`, `k_proj` and `v_proj`.

    SAM (arXiv 2304.02643) adds to each logit a term that depends on the query and on the vertical and horizontal
    distance of the key: q·k / sqrt(d) + q·Rh[y - y'] + q·Rw[x - x']. Both terms are inner products of their own
    (with the key's row and column as one-hot vectors), so they are appended to queries and keys, and one stock
    scaled-dot-product kernel computes all three at once. The result is the same sum; the bias of N x N numbers
    per head is never built, which is most of the encoder's memory at 512 pixels.

    Args:
        hidden_size: width of the encoder.
        num_heads: attention heads.
        grid_size: tokens per side of what is attended to: the window, or the whole image.
        qkv_bias: whether the three projections have a bias.
        use_rel_pos: whether relative positions are added.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        grid_size: int,
        qkv_bias: bool = True,
        use_rel_pos: bool = True,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.use_rel_pos = use_rel_pos
        if use_rel_pos:
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * grid_size - 1, self.head_dim))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * grid_size - 1, self.head_dim))

    def _heads(self, tokens: Tensor) -> Tensor:
        batch, height, width, _ = tokens.shape
        return tokens.reshape(batch, height * width, self.num_heads, self.head_dim).transpose(1, 2)

    def _append_positions(self, query: Tensor, key: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, heads, H·W, d) -> (B, heads, H·W, d + H + W) whose product holds the bias."""
        batch, heads, tokens, dim = query.shape
        grid = query.reshape(batch, heads, height, width, dim)
        rows = _relative(self.rel_pos_h.to(query.dtype), height)
        columns = _relative(self.rel_pos_w.to(query.dtype), width)
        # The kernel scales every logit by d ** -0.5; SAM scales q·k alone.
        undo_scale = dim**0.5
        rel_h = torch.einsum("bnyxd,ykd->bnyxk", grid, rows * undo_scale).reshape(batch, heads, tokens, height)
        rel_w = torch.einsum("bnyxd,xkd->bnyxk", grid, columns * undo_scale).reshape(batch, heads, tokens, width)
        row_of_key = torch.eye(height, dtype=key.dtype, device=key.device).repeat_interleave(width, 0)
        column_of_key = torch.eye(width, dtype=key.dtype, device=key.device).repeat(height, 1)
        key_grid = torch.cat([row_of_key, column_of_key], dim=1).expand(batch, heads, -1, -1)
        return torch.cat([query, rel_h, rel_w], dim=-1), torch.cat([key, key_grid], dim=-1)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        """Attend within (B, H, W, C); the second value stands where SAM returns attention weights."""
        batch, height, width, channels = hidden_states.shape
        query = self._heads(self.q_proj(hidden_states))
        key = self._heads(self.k_proj(hidden_states))
        value = self._heads(self.v_proj(hidden_states))
        scale = self.head_dim**-0.5
        if self.use_rel_pos:
            query, key = self._append_positions(query, key, height, width)
            # Fused kernels want equal widths; zero columns of the values come out as zeros and are cut off.
            value = F.pad(value, (0, query.shape[-1] - self.head_dim))
        output = F.scaled_dot_product_attention(query, key, value, scale=scale)[..., : self.head_dim]
        return self.proj(output.transpose(1, 2).reshape(batch, height, width, channels)), None


def _relative(table: Tensor, size: int) -> Tensor:
    """Rows of a (2 size - 1, d) table by query and key position: (size, size, d)."""
    position = torch.arange(size, device=table.device)
    return table[position[:, None] - position[None, :] + size - 1]
