"""Attention against SAM's formula written out, on grids that windows fill and on ones that they do not."""

import pytest
import torch
from torch.nn import functional as F
from transformers import SamVisionConfig

from samed_peft.models import cpu_attention
from samed_peft.models.attention import SamSplitAttention, fused_attention
from samed_peft.models.cpu_attention import TiledAttention

pytestmark = pytest.mark.usefixtures("two_threads")

HEADS, DIM = 3, 8
GRIDS = [(10, 4), (8, 4), (9, 5), (3, 4), (6, 6)]  # tokens per side, window


def make_attention(grid, window):
    generator = torch.Generator().manual_seed(0)
    config = SamVisionConfig(hidden_size=HEADS * DIM, num_attention_heads=HEADS, image_size=grid, patch_size=1)
    attention = SamSplitAttention(config, window)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return attention, torch.randn(2, grid, grid, HEADS * DIM, generator=generator)


def plain(attention, tokens):
    """SAM's own order of steps: pad with zeros, cut windows, project, attend with a bias, put together, crop."""
    window, (batch, height, width, channels) = attention.window, tokens.shape
    tall, wide = -(-height // window), -(-width // window)
    padded = F.pad(tokens, (0, 0, 0, wide * window - width, 0, tall * window - height))
    windows = padded.reshape(batch, tall, window, wide, window, channels).transpose(2, 3)
    windows = windows.reshape(-1, window * window, channels)
    q, k, v = (
        project(windows).reshape(len(windows), window * window, HEADS, DIM).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    distance = torch.arange(window)[:, None] - torch.arange(window)[None, :] + window - 1
    grid = q.reshape(len(windows), HEADS, window, window, DIM)
    by_row = torch.einsum("bnyxd,ykd->bnyxk", grid, attention.rel_pos_h[distance])
    by_column = torch.einsum("bnyxd,xkd->bnyxk", grid, attention.rel_pos_w[distance])
    bias = (by_row[..., :, None] + by_column[..., None, :]).reshape(len(windows), HEADS, window**2, window**2)
    weights = (q @ k.mT * DIM**-0.5 + bias).softmax(-1)
    output = attention.proj((weights @ v).transpose(1, 2).reshape(len(windows), window, window, channels))
    output = output.reshape(batch, tall, wide, window, window, channels).transpose(2, 3)
    return output.reshape(batch, tall * window, wide * window, channels)[:, :height, :width]


def results(attention, run, tokens):
    """Output and gradients of tokens and all weights."""
    tokens = tokens.clone().requires_grad_()
    output = run(tokens)
    weighted = output * torch.linspace(-1, 1, output.numel()).reshape(output.shape)
    return [output.detach(), *torch.autograd.grad(weighted.sum(), [tokens, *attention.parameters()])]


@pytest.mark.parametrize("kind", ["tiled", "tiled in pieces", "fused"])
@pytest.mark.parametrize(("grid", "window"), GRIDS)
def test_attention_and_its_gradients_are_those_of_the_formula(grid, window, kind, monkeypatch):
    if kind == "tiled in pieces":
        monkeypatch.setattr(cpu_attention, "CACHE_BYTES", 1)
    if kind == "fused":
        monkeypatch.setattr("samed_peft.models.attention._is_tiled", lambda query: False)
    attention, tokens = make_attention(grid, window)
    expected = results(attention, lambda x: plain(attention, x), tokens)
    # Some gradients, of the keys' bias for one, are sums that cancel: rounding is as large as that of the largest.
    allowed = 1e-5 * max(float(wanted.abs().max()) for wanted in expected)
    for found, wanted in zip(results(attention, attention, tokens), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=allowed, rtol=0)


def test_bfloat16_is_near_float32_and_stays_bfloat16_under_autocast():
    attention, tokens = make_attention(10, 4)
    expected = results(attention, attention, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results(attention, attention, tokens)
    assert found[0].dtype == torch.bfloat16
    for mine, wanted in zip(found[:2], expected[:2], strict=True):
        assert float((mine.float() - wanted).abs().max()) < 0.05 * float(wanted.abs().max())


def test_both_kernels_agree_without_relative_positions():
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, 5, 5, HEADS, DIM, generator=generator) for _ in range(3))
    pads = torch.randn(2, HEADS, DIM, generator=generator)
    tensors = (query, key, value, pads[0], pads[1], None)
    torch.testing.assert_close(TiledAttention.apply(3, *tensors), fused_attention(3, *tensors), atol=1e-6, rtol=1e-5)
