"""Draw pictures of a case: image, reference if given, and prediction side by side."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from samed_peft.errors import InputError
from samed_peft.io import Volume, grids_apart_mm, label_colour

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMN_INCHES = 3.2
_FILL, _EDGE = 0.35, 0.95


@dataclass(frozen=True)
class _View:
    """How stored slices are shown: flipped along these axes (0 rows, 1 columns), with rows of this relative size."""

    flipped: tuple[int, ...]
    note: str
    row_over_column: float


def case_picture(
    image: Volume | NDArray,
    reference: Volume | NDArray | None,
    prediction: Volume | NDArray,
    *,
    class_names: Sequence[str],
    window: tuple[float, float] | None = None,
    spacing_zyx_mm: tuple[float, float, float] | None = None,
) -> bytes:
    """Draw up to three representative slices of a case: image, reference and prediction as overlays, and a legend.

    An image with an affine is shown the radiological way: anterior up, the patient's right on the viewer's
    left. Without one, slices are shown as stored, row 0 on top.

    Args:
        image: (D, H, W) intensities, or (D, H, W, 3) colours.
        reference: (D, H, W) labels, 0 is background; None leaves its column out. Voxels of a `Volume`'s
            `ignored_label` are shown as "not annotated".
        prediction: (D, H, W) labels.
        class_names: names of labels 1..K.
        window: intensities of black and white. By default, normalized images are shown from 0 to 1, colour ones too
            or, with values above 1, from 0 to 255, and others from the 0.5 to the 99.5 percentile of the slices shown.
        spacing_zyx_mm: voxel size, for the aspect; None for the image's own.

    Returns:
        The bytes of a PNG.

    Raises:
        InputError: the shapes differ or are not those above, or the grids lie at different places in space.
    """
    scan, labels = _checked(image, {"reference": reference, "prediction": prediction})
    ignored = reference.ignored_label if isinstance(reference, Volume) else None
    if ignored is None:
        rows = representative_slices(labels.get("reference"), labels["prediction"])
    else:
        counted = labels["reference"] != ignored
        rows = representative_slices(*(np.where(counted, labels[role], 0) for role in ("reference", "prediction")))
        labels["reference"] = np.where(counted, labels["reference"], len(class_names) + 1)
        class_names = [*class_names, "not annotated"]
    low, high = window or _window(scan, list(rows))
    view = _view(scan, spacing_zyx_mm or scan.spacing_zyx_mm)
    panels = [
        [
            np.flip(pixels, view.flipped)
            for pixels in (_scaled(scan.array[z], low, high), *(array[z] for array in labels.values()))
        ]
        for z in rows
    ]
    titles = [f"slice {z}\n{reason}" for z, reason in rows.items()]
    # (K + 1, 3) in [0, 1]; the background's is never shown.
    colours = np.array([(0.0, 0.0, 0.0), *(label_colour(label) for label in range(1, len(class_names) + 1))])
    figure = _figure(panels, titles, columns=("image", *labels), view=view, colours=colours)
    _legend(figure, panels, class_names)
    buffer = io.BytesIO()
    # Without Matplotlib's version in the file, equal inputs give equal bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _checked(
    image: Volume | NDArray, given: Mapping[str, Volume | NDArray | None]
) -> tuple[Volume, dict[str, NDArray]]:
    """The image, and the arrays of the label maps that are given."""
    scan = image if isinstance(image, Volume) else Volume(np.asarray(image))
    labels = {
        role: volume.array if isinstance(volume, Volume) else np.asarray(volume)
        for role, volume in given.items()
        if volume is not None
    }
    shape = scan.array.shape
    colour = len(shape) == 4 and shape[-1] == 3
    if not (len(shape) == 3 or colour) or any(array.shape != shape[:3] for array in labels.values()):
        found = ", ".join(f"a {role} of {array.shape}" for role, array in labels.items())
        raise InputError(
            "expected an image of shape (D, H, W) or (D, H, W, 3) and label maps of its (D, H, W); "
            f"found an image of {shape}, {found}"
        )
    for volume in given.values():
        if isinstance(volume, Volume) and (apart_mm := grids_apart_mm(scan, volume)):
            raise InputError(
                f"expected an image on the grid of its label maps, found corners {apart_mm:.3g} mm apart; "
                "resample the image to that grid"
            )
    return scan, labels


def representative_slices(reference: NDArray | None, prediction: NDArray) -> dict[int, str]:
    """Choose up to three slices of (D, H, W) labels worth looking at: index -> reason.

    They are the slices with the most classes, the largest disagreement and the most foreground, kept apart.
    """
    maps = [prediction] if reference is None else [reference, prediction]
    depth = len(prediction)
    area = np.sum([[np.count_nonzero(labels) for labels in slices] for slices in maps], axis=0)
    classes = np.sum([[len(np.unique(labels[labels > 0])) for labels in slices] for slices in maps], axis=0)
    if not area.any():
        return {depth // 2: "no label" if reference is None else "no label in either"}
    # Area breaks ties between slices with equally many classes.
    values = {"most classes": classes + area / (area.max() + 1)}
    if reference is not None:
        differing = [np.count_nonzero(a != b) for a, b in zip(reference, prediction, strict=True)]
        values["largest disagreement"] = np.array(differing)
    values["most foreground"] = area
    apart = max(1, int(np.count_nonzero(area)) // 8)
    chosen: dict[int, str] = {}
    for reason, value in values.items():
        free = [z for z in range(depth) if area[z] and all(abs(z - other) >= apart for other in chosen)]
        if free:
            chosen[max(free, key=value.__getitem__)] = reason
    return dict(sorted(chosen.items()))


def scan_window(image: Volume | NDArray, window: tuple[float, float] | None) -> tuple[float, float] | None:
    """An adapter's window, if it applies to the image: not to normalized or colour ones."""
    return None if isinstance(image, Volume) and (image.normalized or image.array.ndim == 4) else window


def _window(scan: Volume, rows: Sequence[int]) -> tuple[float, float]:
    shown = np.asarray(scan.array[rows])
    if shown.ndim == 4:
        bytes_range = shown.dtype == np.uint8 or (not scan.normalized and shown.max() > 1)
        return 0.0, 255.0 if bytes_range else 1.0
    if scan.normalized:
        return 0.0, 1.0
    low, high = np.nanpercentile(shown.astype(np.float32), [0.5, 99.5])
    return float(low), float(high if high > low else low + 1)


def _scaled(pixels: NDArray, low: float, high: float) -> NDArray[np.float32]:
    """A grey or colour slice with `low` at 0 and `high` at 1."""
    return np.clip((pixels.astype(np.float32) - low) / ((high - low) or 1), 0, 1)


def _view(scan: Volume, spacing_zyx_mm: tuple[float, float, float]) -> _View:
    _, row_mm, column_mm = spacing_zyx_mm
    if scan.orientation is None:
        return _View((), "as stored, orientation unknown", row_mm / column_mm)
    x, y = scan.orientation[0], scan.orientation[1]
    if x in "LR" and y in "AP":
        note = "anterior up, patient's right on the left"
        flipped = (0,) * (y == "A") + (1,) * (x == "R")
        return _View(flipped, note, row_mm / column_mm)
    return _View((), f"as stored: rows run to {y}, columns to {x}", row_mm / column_mm)


def _figure(
    panels: Sequence[Sequence[NDArray]],
    titles: Sequence[str],
    *,
    columns: Sequence[str],
    view: _View,
    colours: NDArray[np.float64],
) -> "Figure":
    """Draw one row for each slice, with the image in the first column and overlays in the others."""
    from matplotlib.figure import Figure

    height, width = panels[0][0].shape[:2]
    # The clip keeps long, thin slices from making a picture of unreasonable size.
    row_inches = _COLUMN_INCHES * float(np.clip(height * view.row_over_column / width, 0.25, 2.0))
    figure = Figure(
        figsize=(len(columns) * _COLUMN_INCHES, row_inches * len(panels) + 0.9), dpi=110, layout="compressed"
    )
    grid = figure.subplots(len(panels), len(columns), squeeze=False)
    for axes, (pixels, *labels), title in zip(grid, panels, titles, strict=True):
        axes[0].set_ylabel(title, fontsize=9)
        for panel, overlay in zip(axes, (None, *labels), strict=True):
            panel.imshow(pixels, cmap="gray", vmin=0, vmax=1, aspect=view.row_over_column)
            if overlay is not None:
                panel.imshow(_overlay(overlay, colours), aspect=view.row_over_column, interpolation="nearest")
            panel.set(xticks=[], yticks=[])
    for panel, title in zip(grid[0], columns, strict=True):
        panel.set_title(title, fontsize=10)
    figure.suptitle(view.note, fontsize=8, color="dimgray")
    return figure


def _overlay(labels: NDArray, colours: NDArray[np.float64]) -> NDArray[np.float64]:
    """(H, W, 4) RGBA: classes filled faintly, with an opaque outline."""
    whole = labels.astype(np.int64)
    padded = np.pad(whole, 1, mode="edge")
    neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    edge = np.any([neighbour != whole for neighbour in neighbours], axis=0)
    alpha = np.where(whole > 0, np.where(edge, _EDGE, _FILL), 0.0)
    return np.concatenate([colours[whole], alpha[..., None]], axis=-1)


def _legend(figure: "Figure", panels: Sequence[Sequence[NDArray]], class_names: Sequence[str]) -> None:
    """Name the classes that are shown."""
    from matplotlib.patches import Patch

    shown = sorted({int(label) for _, *maps in panels for labels in maps for label in np.unique(labels)} - {0})
    if not shown:
        return
    handles = [Patch(color=label_colour(label), label=str(label)) for label in shown]
    legend = figure.legend(
        handles=handles, loc="outside lower center", ncols=min(4 if len(panels[0]) > 2 else 3, len(shown)), fontsize=9
    )
    for text, label in zip(legend.get_texts(), shown, strict=True):
        # Set afterwards: a leading underscore would hide the entry, and a dollar sign start a formula.
        text.set_parse_math(False)
        text.set_text(class_names[label - 1])
