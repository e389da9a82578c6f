"""Synthetic images with labels for pretraining: warped ellipses on a mosaic, in contrasts drawn anew for each image.

Nothing in them is constant but the shapes and how they lie to each other, so a model cannot learn grey values.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SIZE = 64
"""Pixels per side."""

# Ellipses as (x, y, radius along, radius across, angle in degrees); the viewer's left is the patient's right.
ABDOMEN = torch.tensor([
    (-0.42, -0.10, 0.42, 0.28, 60), (0.55, -0.02, 0.24, 0.13, 100), (-0.42, 0.42, 0.19, 0.12, 70),
    (0.42, 0.42, 0.19, 0.12, 110), (-0.22, -0.38, 0.13, 0.08, 70), (0.28, -0.32, 0.30, 0.17, 30),
    (0.06, 0.26, 0.08, 0.08, 0), (0.10, -0.02, 0.30, 0.07, 160), (-0.02, 0.52, 0.15, 0.12, 0),
])  # fmt: skip
# A long organ of a head, a body and a tail in the middle of the view, beside two hollow neighbours.
TUBE = torch.tensor([
    (-0.30, 0.05, 0.24, 0.19, 20), (0.15, 0.08, 0.34, 0.14, 170), (0.05, -0.35, 0.40, 0.09, 10),
    (0.45, 0.45, 0.2, 0.1, 40),
])  # fmt: skip
NUM_LABELS = 1 + len(ABDOMEN) + len(TUBE)
"""Labels of the images, background included."""


def smooth_noise(shape: tuple[int, int], cells: int, rng: torch.Generator) -> Tensor:
    """Smooth random fields (B, C, SIZE, SIZE) with about `cells` bumps a side."""
    coarse = torch.randn(*shape, cells, cells, generator=rng)
    return F.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic", align_corners=True)


def uniform(shape: tuple[int, ...], low: float, high: float, rng: torch.Generator) -> Tensor:
    """Uniform numbers in [low, high)."""
    return low + (high - low) * torch.rand(shape, generator=rng)


def draw_shapes(batch: int, layout: Tensor, rng: torch.Generator) -> Tensor:
    """Label maps (B, SIZE, SIZE) of jittered, warped ellipses: 0 is background, k the k-th row of `layout`."""
    axis = torch.linspace(-1, 1, SIZE)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy")).expand(batch, -1, -1, -1)
    turn = uniform((batch,), -0.5, 0.5, rng)
    rotation = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], -1).reshape(batch, 2, 2)
    grid = torch.einsum("bij,bjyx->biyx", rotation, grid) / uniform((batch, 1, 1, 1), 0.65, 1.35, rng)
    grid = grid + 0.06 * smooth_noise((batch, 2), 5, rng) + uniform((batch, 2, 1, 1), -0.2, 0.2, rng)
    jitter = torch.randn(batch, len(layout), 5, generator=rng) * torch.tensor([0.05, 0.05, 0.0, 0.0, 15.0])
    x, y, along, across, angle = (layout + jitter).unbind(-1)
    along, across = (r * uniform((batch, len(layout)), 0.7, 1.35, rng) for r in (along, across))
    angle = (angle * math.pi / 180)[..., None, None]
    dx, dy = grid[:, :1] - x[..., None, None], grid[:, 1:] - y[..., None, None]
    u = (dx * angle.cos() + dy * angle.sin()) / along[..., None, None]
    v = (dy * angle.cos() - dx * angle.sin()) / across[..., None, None]
    absent = torch.rand(batch, len(layout), 1, 1, generator=rng) < 0.15
    distance = (u.square() + v.square()).masked_fill(absent, math.inf)
    nearest, label = distance.min(dim=1)
    return (label + 1) * (nearest < 1)


def paint(labels: Tensor, rng: torch.Generator) -> Tensor:
    """Images (B, 3, SIZE, SIZE) in [0, 1]: random contrast per label over a mosaic, with texture, blur and noise."""
    batch = len(labels)
    mosaic = smooth_noise((batch, 5), 6, rng).argmax(dim=1)
    regions = torch.where(labels > 0, labels + 5, mosaic)
    means = torch.rand(batch, NUM_LABELS + 5, generator=rng)
    spread = uniform((batch, NUM_LABELS + 5), 0.0, 0.08, rng)
    image = means.gather(1, regions.flatten(1)) + spread.gather(1, regions.flatten(1)) * torch.randn(
        batch, SIZE * SIZE, generator=rng
    )
    image = image.reshape(batch, 1, SIZE, SIZE)
    blurred = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    image = torch.lerp(image, blurred, uniform((batch, 1, 1, 1), 0.3, 1.0, rng))
    image = image * (1 + 0.15 * smooth_noise((batch, 1), 3, rng))
    image = image + uniform((batch, 1, 1, 1), 0, 0.06, rng) * torch.randn(image.shape, generator=rng)
    image = image - image.amin((2, 3), keepdim=True)
    image = (image / image.amax((2, 3), keepdim=True)) ** uniform((batch, 1, 1, 1), 0.6, 1.6, rng)
    return image.expand(-1, 3, -1, -1)


def synthetic_batch(batch: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Half abdomens, half tubes: images (B, 3, SIZE, SIZE) and labels (B, SIZE, SIZE)."""
    abdomens = draw_shapes(batch // 2, ABDOMEN, rng)
    tubes = draw_shapes(batch - batch // 2, TUBE, rng)
    labels = torch.cat([abdomens, torch.where(tubes > 0, tubes + len(ABDOMEN), 0)])
    return paint(labels, rng), labels
