"""Hold a scan or label map with its grid, and compare and check grids."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from samed_peft.errors import InputError

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""ITK's world axes point left, posterior, superior; nibabel's right, anterior, superior. Its own inverse."""


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan or label map on its own voxel grid.

    Attributes:
        array: (D, H, W); `array[z, y, x]` is voxel (x, y, z) of nibabel, SAMed's order of axes. Pictures have D = 1,
            and, if in colour, a fourth axis of three colours; scans of which several channels are read have a fourth
            axis of these.
        affine: (4, 4) float64, voxel index (x, y, z, 1) to RAS+ millimetres; None if the file stores none.
        path: file or folder it was read from.
        normalized: intensities are already in [0, 1], so no window is applied.
        ignored_label: of a label map, the label of voxels that count nowhere; None: all count.
    """

    array: np.ndarray
    affine: np.ndarray | None = None
    path: Path | None = None
    normalized: bool = False
    ignored_label: int | None = None

    @property
    def spacing_zyx_mm(self) -> tuple[float, float, float]:
        """Distance between voxel centres along each axis of `array`; ones without an affine."""
        if self.affine is None:
            return (1.0, 1.0, 1.0)
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return (z, y, x)

    @property
    def orientation(self) -> str | None:
        """Where the (x, y, z) voxel axes point, as nibabel's axis codes ("LAS"); None without an affine."""
        if self.affine is None:
            return None
        from nibabel.orientations import aff2axcodes

        return "".join(str(code) for code in aff2axcodes(self.affine))


_GRID_TOLERANCE = 0.1
"""Share of a voxel by which two grids may differ: files that store affines in float32 differ by less."""


def grids_apart_mm(one: Volume, other: Volume) -> float:
    """Measure how far two grids of one shape lie apart, at the corner where they differ most.

    Returns:
        Millimetres; 0 if it is less than a tenth of a voxel, or if a volume has no affine to compare.
    """
    if one.affine is None or other.affine is None:
        return 0.0
    last_xyz = np.array(other.array.shape[2::-1]) - 1
    corners = np.array([[*(corner * last_xyz), 1] for corner in np.ndindex(2, 2, 2)])
    apart_mm = float(np.linalg.norm(corners @ (one.affine - other.affine)[:3].T, axis=1).max())
    return apart_mm if apart_mm > _GRID_TOLERANCE * min(other.spacing_zyx_mm) else 0.0


def checked_affine(affine: np.ndarray, path: Path | None) -> np.ndarray:
    """Return an affine, refused if it has no inverse or holds NaN or infinity."""
    # Relative to the axes' lengths, so that micrometre voxels are not mistaken for flat ones.
    scale = float(np.prod(np.linalg.norm(affine[:3, :3], axis=0)))
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) <= 1e-6 * scale:
        raise InputError(
            f"expected an invertible affine, found {affine.tolist()} in {path}; its header is broken, "
            "export the scan again"
        )
    return affine


def warn_of_shear(volume: Volume, path: Path) -> None:
    """Warn of a NIfTI mask of a file or DICOM series whose axes are not at right angles, as with a tilted gantry.

    ITK opens NIfTI up to a deviation of about 1e-4 only; of NRRD and MetaImage it takes any axes.
    """
    if volume.affine is None or volume.path is None:
        return
    axes = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    off = float(np.abs(axes.T @ axes - np.eye(3)).max())
    if off > 1e-4:
        warnings.warn(
            f"{path} has voxel axes {np.degrees(np.arcsin(min(off, 1.0))):.1f} degrees off right angles, as the scan "
            f"{volume.path} has, probably by a tilted gantry; ITK, ITK-SNAP and SimpleITK do not open such "
            "NIfTI. Write .nrrd or .mha, which they open, or DICOM SEG, or resample the scan first",
            stacklevel=3,
        )


def checked_mask(mask: np.ndarray, like: Volume, path: Path) -> np.ndarray:
    """Return a mask as contiguous uint8, refused if its shape is not the scan's or a value does not fit."""
    if mask.shape != like.array.shape[:3]:
        raise InputError(
            f"expected a mask of the scan's shape {like.array.shape[:3]} ({like.path}), found {mask.shape} "
            f"for {path}; resample it"
        )
    if mask.dtype.kind not in "biu" or mask.min() < 0 or mask.max() > 255:
        raise InputError(f"expected integer labels in 0..255, found {mask.dtype} up to {mask.max()} for {path}")
    return np.ascontiguousarray(mask, dtype=np.uint8)
