"""Synthetic images with labels for pretraining: warped organs in contrasts drawn anew for each image.

Only the shapes and their places relative to each other are constant, so a model cannot learn grey values. Every shape
differs from its surroundings, so there is always a boundary to find.
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
# Spine of a long organ from its tail to its head, and its radius there; it lies on a rounded neighbour.
SPINE_XY = torch.tensor([(-0.50, 0.40), (-0.25, -0.05), (0.55, -0.25)])
SPINE_RADIUS = torch.tensor([0.13, 0.11, 0.17])
NEIGHBOUR = torch.tensor([(0.25, 0.75, 0.60, 0.45, 0)])
HEAD, BODY, SHEATH, CUSHION = range(len(ABDOMEN) + 1, len(ABDOMEN) + 5)
NUM_LABELS = CUSHION + 1
"""Labels of the images, background included."""


def smooth_noise(shape: tuple[int, int], cells: int, rng: torch.Generator) -> Tensor:
    """Draw smooth random fields (B, C, SIZE, SIZE) with about `cells` bumps a side."""
    coarse = torch.randn(*shape, cells, cells, generator=rng)
    return F.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic", align_corners=True)


def uniform(shape: tuple[int, ...], low: float, high: float, rng: torch.Generator) -> Tensor:
    """Draw uniform numbers in [low, high)."""
    return low + (high - low) * torch.rand(shape, generator=rng)


def warped_grid(batch: int, rng: torch.Generator) -> Tensor:
    """Draw coordinates (B, 2, SIZE, SIZE), x and y in about [-1, 1]: rotated, scaled, shifted and warped."""
    axis = torch.linspace(-1, 1, SIZE)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy")).expand(batch, -1, -1, -1)
    turn = uniform((batch,), -0.4, 0.4, rng)
    rotation = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], -1).reshape(batch, 2, 2)
    grid = torch.einsum("bij,bjyx->biyx", rotation, grid) / uniform((batch, 1, 1, 1), 0.7, 1.35, rng)
    return grid + 0.06 * smooth_noise((batch, 2), 5, rng) + uniform((batch, 2, 1, 1), -0.15, 0.15, rng)


def ellipse_distances(grid: Tensor, layout: Tensor, rng: torch.Generator) -> Tensor:
    """Squared distances (B, N, SIZE, SIZE), below 1 inside the N jittered ellipses of `layout`."""
    batch = len(grid)
    jitter = torch.randn(batch, len(layout), 5, generator=rng) * torch.tensor([0.05, 0.05, 0.0, 0.0, 15.0])
    x, y, along, across, angle = (layout + jitter).unbind(-1)
    along, across = (r * uniform((batch, len(layout)), 0.7, 1.35, rng) for r in (along, across))
    angle = (angle * math.pi / 180)[..., None, None]
    dx, dy = grid[:, :1] - x[..., None, None], grid[:, 1:] - y[..., None, None]
    u = (dx * angle.cos() + dy * angle.sin()) / along[..., None, None]
    v = (dy * angle.cos() - dx * angle.sin()) / across[..., None, None]
    return u.square() + v.square()


def draw_abdomens(batch: int, rng: torch.Generator) -> Tensor:
    """Draw label maps (B, SIZE, SIZE): 0 background, k the k-th ellipse of ABDOMEN; some organs are absent."""
    distance = ellipse_distances(warped_grid(batch, rng), ABDOMEN, rng)
    absent = torch.rand(batch, len(ABDOMEN), 1, 1, generator=rng) < 0.15
    nearest, label = distance.masked_fill(absent, math.inf).min(dim=1)
    return (label + 1) * (nearest < 1)


def draw_long_organs(batch: int, rng: torch.Generator) -> Tensor:
    """Draw label maps (B, SIZE, SIZE): a bent organ with head and body, in a sheath, on a rounded neighbour."""
    grid = warped_grid(batch, rng)
    t = torch.linspace(0, 1, 24)
    bezier = torch.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2])
    points = torch.einsum("bkc,kt->bct", SPINE_XY + 0.07 * torch.randn(batch, 3, 2, generator=rng), bezier)
    radius = SPINE_RADIUS * uniform((batch, 3), 0.4, 1.6, rng) @ bezier
    offset = (grid[:, :, None] - points[..., None, None]).square().sum(1).sqrt()
    outside, nearest = (offset - radius[..., None, None]).min(dim=1)
    split = uniform((batch, 1, 1), 11, 18, rng)
    labels = torch.where(nearest >= split, HEAD, BODY)
    sheath = uniform((batch, 1, 1), 0.0, 0.12, rng)
    cushion = ellipse_distances(grid, NEIGHBOUR, rng)[:, 0] < 1
    surroundings = torch.where(outside < sheath, SHEATH, torch.where(cushion, CUSHION, 0))
    return torch.where(outside < 0, labels, surroundings)


def paint(labels: Tensor, rng: torch.Generator) -> Tensor:
    """Paint images (B, 3, SIZE, SIZE) in [0, 1]: random contrast per label, soft and folded tissue, blur and noise."""
    batch = len(labels)
    surround = uniform((batch, 1), 0, 1, rng)
    means = (surround + uniform((batch, NUM_LABELS), 0.2, 0.8, rng)) % 1
    means[:, :1] = surround
    means[:, HEAD] = means[:, BODY] + uniform((batch,), -0.05, 0.05, rng)  # only the shape shows the border
    spread = uniform((batch, NUM_LABELS), 0.0, 0.08, rng)
    image = means.gather(1, labels.flatten(1)) + spread.gather(1, labels.flatten(1)) * torch.randn(
        batch, SIZE * SIZE, generator=rng
    )
    image = image.reshape(batch, 1, SIZE, SIZE)
    soft, folds = (uniform((batch, 1, 1, 1), 0, high, rng) for high in (0.1, 0.15))
    tissue = soft * smooth_noise((batch, 1), 6, rng) + folds * smooth_noise((batch, 1), 9, rng).sign()
    image = image + tissue * (labels == 0)[:, None]
    blurred = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    image = torch.lerp(image, blurred, uniform((batch, 1, 1, 1), 0.3, 1.0, rng))
    image = image * (1 + 0.15 * smooth_noise((batch, 1), 3, rng))
    image = image + uniform((batch, 1, 1, 1), 0, 0.06, rng) * torch.randn(image.shape, generator=rng)
    image = image - image.amin((2, 3), keepdim=True)
    image = (image / image.amax((2, 3), keepdim=True)) ** uniform((batch, 1, 1, 1), 0.6, 1.6, rng)
    return image.expand(-1, 3, -1, -1)


def synthetic_batch(batch: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw half abdomens, half long organs: images (B, 3, SIZE, SIZE) and labels (B, SIZE, SIZE)."""
    labels = torch.cat([draw_abdomens(batch // 2, rng), draw_long_organs(batch - batch // 2, rng)])
    return paint(labels, rng), labels
