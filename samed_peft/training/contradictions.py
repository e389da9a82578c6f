"""Refuse data that no training can use, and options that contradict the data, before anything is planned."""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any

from samed_peft.config import SamedConfig, TrainingConfig, Windows, windows_of
from samed_peft.datasets.fingerprint import Fingerprint
from samed_peft.errors import InputError
from samed_peft.models.geometry import BaseGeometry

_DIVIDING = ("folds", "fold", "test_cases", "split_file", "validation_cases")
LENGTHS = ("epochs", "max_steps", "max_minutes")
"""Options that decide how long a training is; at most one may be given."""


def require_plannable(data: Fingerprint, base: BaseGeometry, given: Mapping[str, Any]) -> None:
    """Refuse data that cannot be trained on, and options that do not fit them.

    Raises:
        InputError: a value is out of range; no voxel is labelled, or those of one patient alone; one patient is to be
            divided; a window, a distance of neighbours, a plane, an image size or a number of folds does not fit data
            or base; or two options decide the length of the training.
    """
    _require_in_range(base, given)
    _require_foreground(data, given)
    _require_patients(data, given)
    _require_window(data, given.get("window"))
    _require_neighbours(data, given.get("neighbour_mm"))
    _require_one_channel(data, given.get("window"))
    plane, size, patch = given.get("plane"), given.get("image_size"), base.patch_size
    if plane is not None and plane != data.plane:
        raise InputError(
            f"expected a fingerprint of {plane} slices, found one of {data.plane or 'slices as they are stored'}; take "
            "it with the plane that is wanted"
        )
    if size is not None and size % patch:
        near = max(patch, round(size / patch) * patch)
        raise InputError(
            f"expected image_size to be a multiple of {patch}, the patch size of {base.base}, found {size}; give {near}"
        )
    lengths = [f"{name} {given[name]}" for name in LENGTHS if given.get(name) is not None]
    if len(lengths) > 1:
        raise InputError(f"{' and '.join(lengths)} each decide how long the training is; give one of them")


def require_time(name: str, value: float | None, unit: str) -> None:
    """Refuse a time that is not positive and finite."""
    if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
        raise InputError(f"{name} must be a positive number of {unit}; found {value!s:.200}")


def _require_in_range(base: BaseGeometry, given: Mapping[str, Any]) -> None:
    """Refuse values that the configs refuse, before rules calculate with them."""
    require_time("max_minutes", given.get("max_minutes"), "minutes")
    for name in ("validation_share", "empty_share"):
        if given.get(name) is not None and not 0 <= given[name] <= 1:
            raise InputError(f"{name} must be in [0, 1]; found {given[name]}")
    of_training, of_adapter = (
        # The recipe's channel is a name, which `open_folder` has understood.
        {
            field.name: given[field.name]
            for field in dataclasses.fields(kind)
            if field.name in given.keys() - {"channel"}
        }
        for kind in (TrainingConfig, SamedConfig)
    )
    if "epochs" in of_training:
        of_training.setdefault("stop_epoch", of_training["epochs"])
    if of_training:
        TrainingConfig(**of_training)
    if of_adapter:
        of_adapter.setdefault(
            "resampling", "aligned" if of_adapter.get("input_size") is None else "samed"
        )  # as planned
        with warnings.catch_warnings(action="ignore"):  # they come with the config that is used
            SamedConfig(**{"base": base.base, "class_names": ("any",)} | of_adapter)


def _require_foreground(data: Fingerprint, given: Mapping[str, Any]) -> None:
    labelled = data.patients_with_foreground
    if not labelled or not any(data.class_slices.values()):
        raise InputError(
            f"expected labelled voxels, found none in {data.slices} slices of {data.cases} cases; check that the label "
            "maps are the right files"
        )
    if labelled == 1 < data.patients and given.get("fold") != "all":
        raise InputError(
            f"expected labelled voxels of 2 patients at least, to train on and to test on, found those of 1 of "
            f"{data.patients}, so that one side of any split has none; label more cases, or train on all of them with "
            "--fold all"
        )


def _require_patients(data: Fingerprint, given: Mapping[str, Any]) -> None:
    dividing = [f"--{name}" for name in _DIVIDING if given.get(name) not in (None, "all", [], ())]
    if data.patients < 2 and dividing:
        raise InputError(
            f"expected 2 patients at least, to train on and to hold out, found {data.patients} ({data.cases} cases); "
            f"{' and '.join(dividing)} cannot divide that: leave it out to train on all cases, or add labelled ones"
        )
    folds = given.get("folds")
    if folds is not None and not 2 <= folds <= data.patients:
        raise InputError(
            f"expected 2 to {data.patients} folds, at most as many as there are patients, found {folds}; give --folds "
            f"{min(max(folds, 2), data.patients)}"
        )


def _require_window(data: Fingerprint, window: Windows) -> None:
    if data.normalized:
        return
    first, last = data.intensity_range
    for low, high in windows_of(window):
        if high <= first or low >= last or (data.modality == "picture" and low < 0):
            kind = "pictures" if data.modality == "picture" else "scans"
            raise InputError(
                f"expected a window within the {kind}' intensities, {first:g} to {last:g}, found {low:g} to {high:g}; "
                "leave --window out to have it chosen, or give one in their units"
            )


def _require_one_channel(data: Fingerprint, window: Windows) -> None:
    """Refuse several windows of what fills the encoder's channels already, or has no Hounsfield units."""
    number, found = len(windows_of(window)), None
    if data.channels:
        found = f"channels {', '.join(data.channel_names)}, of which --channel chooses one"
    elif data.colour:
        found = "colour pictures"
    elif data.normalized:
        found = "intensities in [0, 1], to which windows were applied before"
    if number > 1 and found:
        raise InputError(
            f"expected scans with one channel for {number} windows, which fill the encoder's three channels, found "
            f"{found}; leave --windows out"
        )


def _require_neighbours(data: Fingerprint, neighbour_mm: float | None) -> None:
    if neighbour_mm is None:
        return
    found = None
    if data.colour:
        found = "colour pictures, whose three channels are taken"
    elif data.channels:
        found = f"channels {', '.join(data.channel_names)}, which take all three, and of which --channel chooses one"
    elif data.modality == "picture":
        found = "pictures, which have no neighbours"
    elif data.spacing_mm is None:
        found = "scans without spacing"
    if found:
        raise InputError(
            f"expected scans whose slices have known distances, for neighbours at {neighbour_mm:g} mm, found {found}; "
            "leave --neighbour_mm out"
        )
