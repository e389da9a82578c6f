"""Segment slices in overlapping tiles of the encoder's size, so that nothing shrinks."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from samed_peft.models.resizing import pad_to

_SIGMA = 1 / 8
"""Standard deviation of the importance map over the tile's size, as in nnU-Net."""


def tile_starts(length: int, size: int) -> list[int]:
    """First pixels of the fewest evenly spaced tiles that overlap by half or more and cover an axis."""
    if length <= size:
        return [0]
    count = math.ceil(2 * (length - size) / size) + 1
    return [round((length - size) * number / (count - 1)) for number in range(count)]


def importance_map(size: int) -> Tensor:
    """Weights (size, size) of a tile's pixels, 1 at its centre: a Gaussian, since logits are worst at the edges.

    Source: nnU-Net (Isensee et al., Nature Methods 2021), `compute_gaussian`; here symmetric for even sizes too.
    """
    distance = torch.arange(size) - (size - 1) / 2
    along = torch.exp(-0.5 * (distance / (_SIGMA * size)) ** 2)
    along /= along.max()
    return along[:, None] * along


def tiled_logits(
    forward: Callable[[Tensor], Tensor], channels: Tensor, *, size: int, batch_size: int
) -> Iterator[Tensor]:
    """Blend the logits of tiles, slice by slice.

    Args:
        forward: tiles (B, 3, size, size) -> logits (B, K + 1, h, w).
        channels: slices (B, 3, H, W); smaller ones are padded (`pad_to`).
        size: pixels per side of a tile.
        batch_size: tiles per call of `forward`.

    Yields:
        Logits (1, K + 1, H, W) float32 of each slice.
    """
    padded = pad_to(channels, size)
    (height, width), (full_height, full_width) = channels.shape[-2:], padded.shape[-2:]
    top, left = (full_height - height) // 2, (full_width - width) // 2
    weights = importance_map(size).to(channels.device)
    places = [
        (slice(y, y + size), slice(x, x + size))
        for y in tile_starts(full_height, size)
        for x in tile_starts(full_width, size)
    ]
    whole = weights.new_zeros(full_height, full_width)
    for rows, columns in places:
        whole[rows, columns] += weights
    for one in padded.split(1):
        total: Tensor | None = None
        for start in range(0, len(places), batch_size):
            chunk = places[start : start + batch_size]
            logits = forward(torch.cat([one[..., rows, columns] for rows, columns in chunk])).float()
            logits = F.interpolate(logits, size=(size, size), mode="bilinear", align_corners=False)
            if total is None:
                total = logits.new_zeros(logits.shape[1], full_height, full_width)
            for (rows, columns), tile in zip(chunk, logits, strict=True):
                total[:, rows, columns] += tile * weights
        assert total is not None, "every slice has a tile"
        yield (total / whole)[None, :, top : top + height, left : left + width]
