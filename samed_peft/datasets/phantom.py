"""Analytic abdominal CT in Hounsfield units, written as a raw BTCV folder.

A stand-in for scans that may not be shipped: eight organs, body, fat, spine, bowel and vein as ellipsoids and
bent tubes, varied in place, size, turn and brightness from case to case. It shows that a pipeline works
and says nothing about a model's quality on patients.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.ndimage import gaussian_filter

from samed_peft.errors import InputError
from samed_peft.io import FolderKind, Volume, atomic_dir, require_replaceable, write_json, write_mask, write_volume

RECIPE_FILE = "phantom.json"
"""Marks a folder as a phantom, which a later call may replace."""

_FIELD_OF_VIEW_MM = (384.0, 384.0, 120.0)  # x, y, z; the anatomy below is laid out in it and scaled to any other


@dataclass(frozen=True)
class _Tissue:
    label: int  # of raw BTCV; 0 is not labelled
    hounsfield: tuple[float, float]  # range of the mean over cases
    wander_mm: float = 5.0  # standard deviation of the position is half of it


@dataclass(frozen=True)
class _Ellipsoid:
    tissue: str
    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    turn_deg: float = 0.0  # about z
    power: float = 2.0  # above 2: boxier

    def inside(self, points: np.ndarray) -> np.ndarray:
        """Which of `points` (3, D, H, W) lie inside: (D, H, W) bool."""
        x, y, z = (points[axis] - self.centre[axis] for axis in range(3))
        cos, sin = np.cos(np.deg2rad(self.turn_deg)), np.sin(np.deg2rad(self.turn_deg))
        parts = (cos * x + sin * y, cos * y - sin * x, z)
        scaled = [np.abs(part / radius) for part, radius in zip(parts, self.radii, strict=True)]
        return np.asarray(sum(s * s if self.power == 2 else s**self.power for s in scaled) < 1)


@dataclass(frozen=True)
class _Tube:
    tissue: str
    knots: tuple[tuple[float, float, float, float], ...]  # x, y, z and radius along the middle line

    def inside(self, points: np.ndarray) -> np.ndarray:
        """Which of `points` (3, D, H, W) lie inside: (D, H, W) bool."""
        knots = np.array(self.knots)
        steps = np.linspace(0, len(knots) - 1, 7 * len(knots))
        inside = np.zeros(points.shape[1:], bool)
        for x, y, z, radius in CubicSpline(np.arange(len(knots)), knots)(steps).astype(np.float32):
            near = np.abs(points[2, :, 0, 0] - z) < radius + 12  # slices the sphere can reach, warp included
            block = points[:, near]
            inside[near] |= (block[0] - x) ** 2 + (block[1] - y) ** 2 + (block[2] - z) ** 2 < radius**2
        return inside


# x grows to the patient's left, y to the front, z to the head; millimetres from the middle of the view.
_TISSUES = {
    "spleen": _Tissue(1, (100, 140)),
    "right kidney": _Tissue(2, (140, 190)),
    "left kidney": _Tissue(3, (140, 190)),
    "gallbladder": _Tissue(4, (0, 20), wander_mm=4),
    "liver": _Tissue(6, (90, 130)),
    "stomach": _Tissue(7, (-20, 50)),
    "aorta": _Tissue(8, (170, 260), wander_mm=3),
    "pancreas": _Tissue(11, (70, 110), wander_mm=4),
    "bowel": _Tissue(0, (10, 45), wander_mm=10),
    "gas": _Tissue(0, (-400, -250), wander_mm=10),
    "vein": _Tissue(0, (110, 150), wander_mm=3),
    "bone": _Tissue(0, (250, 400), wander_mm=0),
    "marrow": _Tissue(0, (140, 200), wander_mm=0),
    "cord": _Tissue(0, (20, 40), wander_mm=0),
    "psoas": _Tissue(0, (50, 65), wander_mm=3),
}
_WALL = (
    ("skin fat", -100.0, _Ellipsoid("wall", (0, -5, 0), (172, 124, 900), power=2.3)),
    ("muscle", 55.0, _Ellipsoid("wall", (0, -8, 0), (153, 106, 900), power=2.3)),
    ("inner fat", -95.0, _Ellipsoid("wall", (0, -3, 0), (141, 93, 900), power=2.3)),
)
# Later shapes cover earlier ones, as organs dent the liver.
_SHAPES: tuple[_Ellipsoid | _Tube, ...] = (
    _Ellipsoid("psoas", (-38, -62, -30), (19, 19, 60)),
    _Ellipsoid("psoas", (38, -62, -30), (19, 19, 60)),
    _Ellipsoid("bone", (0, -62, 0), (25, 21, 900)),
    _Ellipsoid("marrow", (0, -62, 0), (20, 17, 900)),
    _Ellipsoid("bone", (0, -94, 0), (30, 12, 900)),
    _Ellipsoid("cord", (0, -87, 0), (10, 8, 900)),
    _Ellipsoid("bowel", (60, 40, -48), (40, 30, 22), 20),
    _Ellipsoid("bowel", (-5, 45, -50), (36, 26, 18), -10),
    _Ellipsoid("bowel", (-85, 30, -55), (30, 30, 20)),
    _Ellipsoid("gas", (-85, 42, -55), (17, 11, 13)),
    _Ellipsoid("gas", (62, 52, -50), (20, 10, 12)),
    _Ellipsoid("liver", (-76, 4, 16), (62, 78, 60), -8, 2.5),
    _Ellipsoid("liver", (-22, 48, 34), (62, 32, 30), -6),
    _Ellipsoid("spleen", (104, -38, 22), (25, 46, 38), 22),
    _Tube("stomach", ((78, 8, 48, 24), (74, 42, 26, 30), (56, 58, -2, 24), (18, 56, -20, 16), (-10, 46, -20, 12))),
    _Ellipsoid("right kidney", (-66, -56, -22), (27, 23, 38), -25),
    _Ellipsoid("left kidney", (66, -54, -12), (27, 23, 38), 25),
    _Tube("vein", ((-22, -30, -90, 11), (-21, -28, 0, 12), (-24, -22, 90, 13))),
    _Tube("pancreas", ((-34, 4, -30, 15), (-16, 16, -18, 13), (10, 20, -6, 10), (40, 4, 4, 10), (70, -22, 12, 9))),
    _Ellipsoid("gallbladder", (-58, 44, -26), (18, 22, 22), 15),
    _Tube("aorta", ((9, -32, -90, 11), (9, -29, 0, 12), (7, -31, 90, 13))),
)


def _points(shape_dhw: tuple[int, int, int], *, rng: np.random.Generator) -> np.ndarray:
    """Positions of voxel centres in the layout, moved, scaled and bent: (3, D, H, W) float32 millimetres."""
    axes = [
        ((np.arange(size) + 0.5) / size - 0.5) * extent
        for size, extent in zip(shape_dhw[::-1], _FIELD_OF_VIEW_MM, strict=True)
    ]
    z, y, x = np.meshgrid(*axes[::-1], indexing="ij", sparse=True)
    turn = np.deg2rad(rng.normal(0, 2.5))
    shift = rng.uniform(-8, 8, 3) * (1, 1, 0.6)
    scale = rng.uniform(0.94, 1.06, 3) * (1, 1, 0.95)
    moved = [np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x, z]
    moved = [m / s - d for m, s, d in zip(moved, scale, shift, strict=True)]
    # Slow waves across the field of view make every outline irregular without tearing it.
    waves = rng.uniform(0.6, 1.6, (3, 3)) * (2 * np.pi / 250) * rng.choice([-1, 1], (3, 3))
    phases = rng.uniform(0, 2 * np.pi, 3)
    bent = [m + 3.0 * np.sin(w[0] * x + w[1] * y + w[2] * z + p) for m, w, p in zip(moved, waves, phases, strict=True)]
    return np.stack([np.broadcast_to(b, shape_dhw) for b in bent]).astype(np.float32)


def _move(name: str, *, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Matrix (3, 3) and offset (3,) from points to the layout of a moved, scaled and turned tissue."""
    wander_mm = _TISSUES[name].wander_mm
    if wander_mm == 0:
        return np.eye(3), np.zeros(3)
    shapes = [shape for shape in _SHAPES if shape.tissue == name]
    # They move and turn together about their mean position.
    places = [np.mean([k[:3] for k in s.knots], axis=0) if isinstance(s, _Tube) else s.centre for s in shapes]
    middle = np.mean(places, axis=0)
    shift = np.clip(rng.normal(0, wander_mm / 2, 3), -wander_mm, wander_mm)
    scale = rng.uniform(0.9, 1.12, 3)
    turn = np.deg2rad(np.clip(rng.normal(0, 5), -10, 10))
    rotate = np.array([[np.cos(turn), np.sin(turn), 0], [-np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    matrix = rotate / scale[:, None]
    return matrix, middle - matrix @ (middle + shift)


def phantom_case(
    case: int,
    *,
    seed: int,
    shape_dhw: tuple[int, int, int] = (24, 96, 96),
    spacing_zyx_mm: tuple[float, float, float] = (5.0, 4.0, 4.0),
) -> tuple[np.ndarray, np.ndarray]:
    """One case; equal arguments give equal arrays.

    Args:
        case: number of the case, at least 0.
        seed: seed of the whole set, at least 0.
        shape_dhw: voxels along z, y and x; the anatomy always fills the field of view.
        spacing_zyx_mm: size of a voxel, which sets how far blur reaches.

    Returns:
        image (D, H, W) int16 in Hounsfield units, label (D, H, W) uint8 with raw BTCV's numbers. Along x the
        patient's left comes last, along y the front, along z the head.
    """
    rng = np.random.default_rng([seed, case])
    points = _points(shape_dhw, rng=rng)
    image = np.full(shape_dhw, -1000, np.float32)
    label = np.zeros(shape_dhw, np.uint8)
    cavity = np.zeros(shape_dhw, bool)
    for _, hounsfield, wall in _WALL:
        cavity = wall.inside(points)
        image[cavity] = hounsfield
    hounsfields = {name: rng.uniform(*tissue.hounsfield) for name, tissue in _TISSUES.items()}
    moves = {name: _move(name, rng=rng) for name in _TISSUES}
    for tissue, shapes in groupby(_SHAPES, key=lambda shape: shape.tissue):
        matrix, offset = (part.astype(np.float32) for part in moves[tissue])
        seen = np.tensordot(matrix, points, axes=1) + offset[:, None, None, None]
        inside = np.logical_or.reduce([shape.inside(seen) for shape in shapes])
        if tissue not in ("bone", "marrow", "cord"):
            inside &= cavity
        image[inside] = hounsfields[tissue]
        label[inside] = _TISSUES[tissue].label
    blur_mm = (2.5, rng.uniform(1.5, 3.0), rng.uniform(1.5, 3.0))
    image = gaussian_filter(image, [blur / size for blur, size in zip(blur_mm, spacing_zyx_mm, strict=True)])
    noise = gaussian_filter(rng.standard_normal(shape_dhw, dtype=np.float32), (0, 0.5, 0.5))
    image += noise * (rng.uniform(8, 16) / noise.std())
    return np.clip(np.rint(image), -1024, 3071).astype(np.int16), label


def write_phantom(
    directory: str | Path,
    *,
    cases: Sequence[int],
    seed: int,
    shape_dhw: tuple[int, int, int] = (24, 96, 96),
    spacing_zyx_mm: tuple[float, float, float] = (5.0, 4.0, 4.0),
) -> Path:
    """Write cases as a raw BTCV folder: `Training/img/imgNNNN.nii.gz` and `Training/label/labelNNNN.nii.gz`.

    The folder appears complete or not at all; an earlier phantom there is replaced. Equal arguments give
    equal bytes.

    Args:
        directory: new, empty, or an earlier phantom.
        cases: numbers of the cases, 0 to 9999, such as those of SAMed's split.
        seed: seed of the whole set.
        shape_dhw: voxels along z, y and x.
        spacing_zyx_mm: size of a voxel along z, y and x.

    Returns:
        `directory`, to be given to `load_synapse`.

    Raises:
        InputError: a case number is out of range or doubled, a size is not positive, or the folder holds
            other files.
    """
    directory = Path(directory)
    if not cases or len(set(cases)) != len(cases) or min(cases) < 0 or max(cases) > 9999:
        raise InputError(f"expected different case numbers from 0 to 9999, found {list(cases)}")
    if seed < 0 or min(shape_dhw) < 1 or min(spacing_zyx_mm) <= 0:
        raise InputError(
            f"expected seed >= 0 and positive shape_dhw and spacing_zyx_mm, found {seed}, {shape_dhw}, {spacing_zyx_mm}"
        )
    require_replaceable(directory, FolderKind(markers=(RECIPE_FILE,)))
    # Raw BTCV's axes: x to the left, y to the front, z to the head ("LAS").
    affine = np.diag([-spacing_zyx_mm[2], spacing_zyx_mm[1], spacing_zyx_mm[0], 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape_dhw[::-1]) - 1) / 2)
    with atomic_dir(directory) as folder:
        for case in cases:
            image, label = phantom_case(case, seed=seed, shape_dhw=shape_dhw, spacing_zyx_mm=spacing_zyx_mm)
            scan = Volume(image, affine)
            write_volume(scan, folder / "Training" / "img" / f"img{case:04d}.nii.gz")
            write_mask(label, scan, folder / "Training" / "label" / f"label{case:04d}.nii.gz")
        recipe = {"cases": list(cases), "seed": seed, "shape_dhw": shape_dhw, "spacing_zyx_mm": spacing_zyx_mm}
        write_json(folder / RECIPE_FILE, recipe)
    return directory
