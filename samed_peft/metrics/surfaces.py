"""Measure distances between the surfaces of two masks: medpy's values at a fraction of its time.

medpy erodes and transforms whole arrays, once for each metric. Here only the border voxels inside each mask's bounding
box are kept, and every metric reads the same distances.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_DENSE = 0.25
"""Share of border voxels in the pair's bounding box above which a distance transform beats a tree of points."""

_ROUNDING = 1e-9
"""Relative slack of the tolerance: 20 voxels of 0.1 mm lie 2.0000000000000004 mm apart."""


@dataclass(frozen=True)
class SurfaceDistances:
    """(N,) distances from each border voxel of one mask to the nearest one of the other, in both directions."""

    all: NDArray[np.float64]

    @property
    def hd95(self) -> float:
        """95th percentile of all distances: medpy's `hd95`."""
        return float(np.percentile(self.all, 95))

    @property
    def assd(self) -> float:
        """Mean of all distances, each border voxel counted once: medpy's `assd`."""
        return float(self.all.mean())

    def within(self, tolerance: float) -> float:
        """Share of border voxels no further than `tolerance` from the other border: the surface Dice.

        The definition is that of Nikolov et al. (arXiv 1809.04430) with border voxels in place of surface area.
        """
        return float(np.count_nonzero(self.all <= tolerance * (1 + _ROUNDING)) / self.all.size)


def border_voxels(mask: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Indices (N, ndim) of foreground voxels with background across a face; outside the array is background.

    These are the voxels that medpy keeps: `mask ^ binary_erosion(mask)` with connectivity 1.
    """
    interior = mask.copy()
    for axis in range(mask.ndim):
        here, there = np.moveaxis(interior, axis, 0), np.moveaxis(mask, axis, 0)
        here[1:] &= there[:-1]
        here[:-1] &= there[1:]
        here[[0, -1]] = False
    # Several times as fast as argwhere, which reads the axes one by one.
    flat = np.flatnonzero(mask ^ interior)
    return np.stack(np.unravel_index(flat, mask.shape), axis=1)


def surface_distances(
    first: NDArray[np.intp], second: NDArray[np.intp], *, spacing: Sequence[float]
) -> SurfaceDistances:
    """Measure distances between (N, ndim) and (M, ndim) border voxels, neither empty, of this size along each axis."""
    low = np.minimum(first.min(axis=0), second.min(axis=0))
    size = np.maximum(first.max(axis=0), second.max(axis=0)) - low + 1
    if len(first) + len(second) > _DENSE * np.prod(size):
        points = first - low, second - low
        there, back = (_transformed(*pair, size, spacing) for pair in (points, points[::-1]))
    else:
        places = first * np.asarray(spacing), second * np.asarray(spacing)
        there, back = (_nearest(*pair) for pair in (places, places[::-1]))
    return SurfaceDistances(np.concatenate([there, back]))


def _nearest(queries: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    from scipy.spatial import cKDTree  # reading a report does not need it

    # Balancing the tree costs more than it saves, and is slow where many points are equally far.
    tree = cKDTree(points, balanced_tree=False, compact_nodes=False)
    return np.asarray(tree.query(queries)[0])


def _transformed(
    queries: NDArray[np.intp], points: NDArray[np.intp], size: NDArray[np.intp], spacing: Sequence[float]
) -> NDArray[np.float64]:
    from scipy.ndimage import distance_transform_edt  # reading a report does not need it

    away = np.ones(size, dtype=bool)
    away[tuple(points.T)] = False
    distances = np.asarray(distance_transform_edt(away, sampling=spacing))
    return np.asarray(distances[tuple(queries.T)])
