"""Synthetic images with labels for pretraining: warped organs in contrasts drawn anew for each image.

Only the shapes and their places relative to each other are constant, so a model cannot learn grey values. Every shape
differs from its surroundings, so there is always a boundary to find. The three channels are those that adapters see
later: one grey slice, neighbouring slices, or colours.
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
HEAD, BODY, SHEATH, CUSHION, CELL, WALL, LUMEN = range(len(ABDOMEN) + 1, len(ABDOMEN) + 8)
NUM_LABELS = LUMEN + 1
"""Labels of the images, background included."""

NUM_CELLS, NUM_VESSELS = 16, 4


def smooth_noise(shape: tuple[int, int], cells: int, rng: torch.Generator) -> Tensor:
    """Draw smooth random fields (B, C, SIZE, SIZE) with about `cells` bumps a side."""
    coarse = torch.randn(*shape, cells, cells, generator=rng)
    return F.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic", align_corners=True)


def uniform(shape: tuple[int, ...], low: float, high: float, rng: torch.Generator) -> Tensor:
    """Draw uniform numbers in [low, high)."""
    return low + (high - low) * torch.rand(shape, generator=rng)


def warped_grids(batch: int, rng: torch.Generator) -> Tensor:
    """Draw coordinates (B, 2, 3 * SIZE, SIZE), x and y in about [-1, 1], of three slices, one below another.

    They are rotated, scaled, shifted and warped; from slice to slice the warp goes on by a little.
    """
    axis = torch.linspace(-1, 1, SIZE)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy")).expand(batch, -1, -1, -1)
    turn = uniform((batch,), -0.5, 0.5, rng)
    rotation = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], -1).reshape(batch, 2, 2)
    grid = torch.einsum("bij,bjyx->biyx", rotation, grid) / uniform((batch, 1, 1, 1), 0.7, 1.6, rng)
    grid = grid + 0.06 * smooth_noise((batch, 2), 5, rng) + uniform((batch, 2, 1, 1), -0.2, 0.2, rng)
    drift = uniform((batch, 1, 1, 1), 0.0, 0.06, rng) * smooth_noise((batch, 2), 4, rng)
    growth = uniform((batch, 1, 1, 1), -0.08, 0.08, rng)
    return torch.cat([(grid + step * drift) * (1 + step * growth) for step in (-1, 0, 1)], dim=2)


def ellipse_distances(grid: Tensor, layout: Tensor, rng: torch.Generator) -> Tensor:
    """Squared distances (B, N, *grid), below 1 inside the N jittered ellipses of `layout` (N, 5) or (B, N, 5)."""
    batch, number = len(grid), layout.shape[-2]
    jitter = torch.randn(batch, number, 5, generator=rng) * torch.tensor([0.05, 0.05, 0.0, 0.0, 15.0])
    x, y, along, across, angle = (layout + jitter).unbind(-1)
    along, across = (r * uniform((batch, number), 0.7, 1.35, rng) for r in (along, across))
    angle = (angle * math.pi / 180)[..., None, None]
    dx, dy = grid[:, :1] - x[..., None, None], grid[:, 1:] - y[..., None, None]
    u = (dx * angle.cos() + dy * angle.sin()) / along[..., None, None]
    v = (dy * angle.cos() - dx * angle.sin()) / across[..., None, None]
    return u.square() + v.square()


def draw_abdomens(grid: Tensor, rng: torch.Generator) -> Tensor:
    """Draw label maps (B, *grid): 0 background, k the k-th ellipse of ABDOMEN; some organs are absent."""
    distance = ellipse_distances(grid, ABDOMEN, rng)
    absent = torch.rand(len(grid), len(ABDOMEN), 1, 1, generator=rng) < 0.15
    nearest, label = distance.masked_fill(absent, math.inf).min(dim=1)
    return (label + 1) * (nearest < 1)


def draw_long_organs(grid: Tensor, rng: torch.Generator) -> Tensor:
    """Draw label maps (B, *grid): a bent organ with head and body, in a sheath, on a rounded neighbour."""
    batch = len(grid)
    t = torch.linspace(0, 1, 24)
    bezier = torch.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2])
    points = torch.einsum("bkc,kt->bct", SPINE_XY + 0.07 * torch.randn(batch, 3, 2, generator=rng), bezier)
    radius = SPINE_RADIUS * uniform((batch, 3), 0.4, 1.6, rng) @ bezier
    distances = torch.cdist(grid.flatten(2).transpose(1, 2), points.transpose(1, 2))
    outside, nearest = (part.unflatten(1, grid.shape[2:]) for part in (distances - radius[:, None]).min(dim=2))
    split = uniform((batch, 1, 1), 11, 18, rng)
    labels = torch.where(nearest >= split, HEAD, BODY)
    sheath = uniform((batch, 1, 1), 0.0, 0.12, rng)
    cushion = ellipse_distances(grid, NEIGHBOUR, rng)[:, 0] < 1
    surroundings = torch.where(outside < sheath, SHEATH, torch.where(cushion, CUSHION, 0))
    return torch.where(outside < 0, labels, surroundings)


def draw_cells(grid: Tensor, rng: torch.Generator) -> Tensor:
    """Draw label maps (B, *grid): many small round cells, anywhere."""
    inside = ellipse_distances(grid, _scattered(len(grid), NUM_CELLS, (0.06, 0.16), rng), rng).amin(1) < 1
    return CELL * inside


def draw_vessels(grid: Tensor, rng: torch.Generator) -> Tensor:
    """Draw label maps (B, *grid): a few walls around a lumen, anywhere."""
    distance = ellipse_distances(grid, _scattered(len(grid), NUM_VESSELS, (0.15, 0.4), rng), rng).amin(1)
    thin = uniform((len(grid), 1, 1), 0.25, 0.75, rng)
    return torch.where(distance < thin, LUMEN, torch.where(distance < 1, WALL, 0))


def _scattered(batch: int, number: int, radii: tuple[float, float], rng: torch.Generator) -> Tensor:
    """A layout (B, number, 5) of ellipses at random places."""
    places, angles = uniform((batch, number, 2), -0.9, 0.9, rng), uniform((batch, number, 1), 0, 180, rng)
    size = uniform((batch, 1, 1), *radii, rng) * uniform((batch, number, 2), 0.7, 1.4, rng)
    return torch.cat([places, size, angles], dim=-1)


def paint(labels: Tensor, rng: torch.Generator) -> Tensor:
    """Paint images (B, 3, SIZE, SIZE) in [0, 1]: random contrast per label, soft and folded tissue, blur and noise.

    Args:
        labels: (B, 3, SIZE, SIZE) of three neighbouring slices.
        rng: of all that is random. A third of the images shows the middle slice in all channels, a third its neighbours
            in the outer ones, as scans do, and a third the middle slice in colours, as pictures do.
    """
    batch = len(labels)
    kind = torch.arange(batch) % 3
    labels = torch.where((kind == 1)[:, None, None, None], labels, labels[:, 1:2].expand(-1, 3, -1, -1))
    surround = uniform((batch, 1), 0, 1, rng)
    means = (surround + uniform((batch, NUM_LABELS), 0.2, 0.8, rng)) % 1
    means[:, :1] = surround
    means[:, HEAD] = means[:, BODY] + uniform((batch,), -0.05, 0.05, rng)  # only the shape shows the border
    tint = uniform((batch, 3, NUM_LABELS), -0.3, 0.3, rng) * (kind == 2)[:, None, None]
    spread = uniform((batch, 1, NUM_LABELS), 0.0, 0.08, rng).expand(-1, 3, -1)
    grain = torch.randn(batch, 3, SIZE * SIZE, generator=rng)
    grain = torch.where((kind == 0)[:, None, None], grain[:, :1], grain)
    flat = labels.flatten(2)
    image = ((means[:, None] + tint).gather(2, flat) + spread.gather(2, flat) * grain).unflatten(2, (SIZE, SIZE))
    soft, folds = (uniform((batch, 1, 1, 1), 0, high, rng) for high in (0.1, 0.15))
    tissue = soft * smooth_noise((batch, 1), 6, rng) + folds * smooth_noise((batch, 1), 9, rng).sign()
    image = image + tissue * (labels == 0)
    blurred = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    image = torch.lerp(image, blurred, uniform((batch, 1, 1, 1), 0.3, 1.0, rng))
    image = image * (1 + 0.15 * smooth_noise((batch, 1), 3, rng))
    noise = torch.randn(image.shape, generator=rng)
    noise = torch.where((kind == 0)[:, None, None, None], noise[:, :1], noise)
    image = image + uniform((batch, 1, 1, 1), 0, 0.06, rng) * noise
    image = image - image.amin((1, 2, 3), keepdim=True)
    return (image / image.amax((1, 2, 3), keepdim=True)) ** uniform((batch, 1, 1, 1), 0.6, 1.6, rng)


def synthetic_batch(batch: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw images (B, 3, SIZE, SIZE) and labels (B, SIZE, SIZE): abdomens and long organs, and a quarter of others."""
    eighth = batch // 8
    counts = {draw_cells: eighth, draw_vessels: eighth, draw_abdomens: 3 * eighth}
    counts[draw_long_organs] = batch - sum(counts.values())
    drawn = [draw(warped_grids(number, rng), rng) for draw, number in counts.items() if number]
    labels = torch.cat(drawn).unflatten(1, (3, SIZE))
    order = torch.randperm(batch, generator=rng)
    labels = labels[order]
    return paint(labels, rng), labels[:, 1]
