"""Strong augmentation, of the kinds and about the strengths that nnU-Net (Isensee et al. 2021) trains with."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

MIRROR_AXES = ("rows", "columns")
"""Axes of a slice that can be mirrored: the order of its rows (up and down), that of its columns (left and right)."""

_LARGEST_TURN_DEG, _SCALES, _LARGEST_SHIFT = 30.0, (0.7, 1.4), 0.1
_LARGEST_NOISE = 0.06
"""Standard deviation, for intensities in [0, 1]."""


def augment_strongly(
    pixels: Tensor, label: Tensor, *, rng: np.random.Generator, mirror: Sequence[str] = (), aspect: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Turn, scale, shift and mirror a slice with its labels, then change its intensities.

    Each change comes with a probability of its own; all depend on `rng` alone.

    Args:
        pixels: (C, S, S) float32 in [0, 1].
        label: (S, S) uint8.
        rng: of this slice in this epoch.
        mirror: of `MIRROR_AXES`: axes that are mirrored in half of the slices.
        aspect: width over height of the slice before it was made square, so that turns do not shear it.

    Returns:
        New tensors of the same shapes; what lies outside the slice is 0 in both.
    """
    for axis in mirror:
        if rng.random() < 0.5:
            dim = MIRROR_AXES.index(axis) - 2
            pixels, label = pixels.flip(dim), label.flip(dim)
    if rng.random() < 0.7:
        pixels, label = _moved(pixels, label, rng=rng, aspect=aspect)
    return _with_other_intensities(pixels, rng=rng).clamp(0, 1), label


def _moved(pixels: Tensor, label: Tensor, *, rng: np.random.Generator, aspect: float) -> tuple[Tensor, Tensor]:
    """Turn, scale and shift, in one interpolation: bilinear, and of labels by nearest neighbour."""
    turn = math.radians(rng.uniform(-_LARGEST_TURN_DEG, _LARGEST_TURN_DEG))
    zoom = math.exp(rng.uniform(*np.log(_SCALES)))
    stretch = math.exp(rng.uniform(-0.1, 0.1))
    cos, sin = math.cos(turn) / zoom, math.sin(turn) / zoom
    shift = rng.uniform(-_LARGEST_SHIFT, _LARGEST_SHIFT, size=2) * 2
    theta = torch.tensor(
        [[cos * stretch, -sin / aspect, shift[0]], [sin * aspect, cos / stretch, shift[1]]], dtype=torch.float32
    )
    grid = F.affine_grid(theta[None], [1, 1, *label.shape], align_corners=False)
    moved = F.grid_sample(pixels[None], grid, mode="bilinear", align_corners=False)[0]
    labels = F.grid_sample(label[None, None].float(), grid, mode="nearest", align_corners=False)[0, 0]
    return moved, labels.to(label.dtype)


def _with_other_intensities(pixels: Tensor, *, rng: np.random.Generator) -> Tensor:
    size = list(pixels.shape[-2:])
    if rng.random() < 0.15:
        noise = rng.standard_normal(pixels.shape, np.float32) * rng.uniform(0, _LARGEST_NOISE)
        pixels = pixels + torch.from_numpy(noise.astype(np.float32))
    if rng.random() < 0.2:
        pixels = TF.gaussian_blur(pixels, [5, 5], [rng.uniform(0.5, 1.0)])
    if rng.random() < 0.25:
        pixels = pixels * rng.uniform(0.75, 1.25)
    if rng.random() < 0.25:
        mean = float(pixels.numpy().mean(dtype=np.float64))  # PyTorch's sum depends on the number of threads
        pixels = (pixels - mean) * rng.uniform(0.75, 1.25) + mean
    if rng.random() < 0.15:
        small = [max(1, round(side * rng.uniform(0.5, 1.0))) for side in size]
        low = F.interpolate(pixels[None], size=small, mode="nearest-exact")
        pixels = F.interpolate(low, size=size, mode="bicubic", align_corners=False)[0]
    if rng.random() < 0.3:
        pixels = pixels.clamp(0, 1) ** rng.uniform(0.7, 1.5)
    elif rng.random() < 0.1:
        pixels = 1 - (1 - pixels.clamp(0, 1)) ** rng.uniform(0.7, 1.5)
    return pixels
