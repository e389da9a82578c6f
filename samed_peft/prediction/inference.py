"""Predict a label mask, and probabilities, on a scan's own grid."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from samed_peft.adapters.save_load import load_adapter
from samed_peft.datasets.preprocessing import reorientation, reoriented, warn_of_window
from samed_peft.errors import InputError
from samed_peft.io import Volume, stored_mask, stored_names, write_mask
from samed_peft.models.modeling import config_of
from samed_peft.models.precision import cast_frozen_weights, product_dtype
from samed_peft.prediction.averaging import (
    PROBABILITY_BITS,
    Segmenters,
    as_models,
    new_sums,
    one_of,
    rescaled,
    segmented,
)
from samed_peft.prediction.pipeline import process_in_order
from samed_peft.prediction.postprocessing import largest_parts
from samed_peft.prediction.slices import Segmenter


def load_segmenter(
    source: str | Path,
    *,
    accelerator: Accelerator,
    base: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    revision: str | None = None,
) -> Segmenter:
    """Load an adapter for the fastest prediction: in float32 merged into its base, if PEFT can merge its method.

    Merged, q and v take one product instead of three, and masks differ in ties alone. In half precision the adapter
    stays apart so that its sums are rounded as in training with autocast, under which the model has to run; frozen
    weights are cast to that type (`cast_frozen_weights`).

    Args:
        source: as for `load_adapter`.
        accelerator: default of device and precision.
        base: as for `load_adapter`.
        dtype: "float32", "bfloat16" or "float16"; None for the accelerator's precision.
        device: such as "cuda:1"; None for the accelerator's device.
        revision: as for `load_adapter`.

    Raises:
        InputError: as `load_adapter`, or this computer does not have `device`.
    """
    place = accelerator.device if device is None else _available_device(device, accelerator)
    products = product_dtype(accelerator, dtype)
    if products == torch.float32:
        # PEFT raises it for methods that change no weight, such as Lily, after it has taken the model apart.
        with contextlib.suppress(NotImplementedError):
            return load_adapter(source, base=base, merge=True, device=place, revision=revision)
    model = load_adapter(source, base=base, revision=revision)
    cast_frozen_weights(model, products)
    return model.to(place)


def _available_device(name: str, accelerator: Accelerator) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"expected cpu, cuda, cuda:1 or mps as device, found {name!r}; choose one of these") from error
    if accelerator.num_processes > 1 and device.type != "cpu":
        raise InputError(
            f"expected no device for {accelerator.num_processes} processes, found {name}; each has its own"
        )
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= count.get(device.type, 0):
        found = ", ".join(f"{number} {kind}" for kind, number in count.items())
        raise InputError(f"device {name} is not there; this computer has {found}; leave it out to have one chosen")
    return device


def predict_volume(
    model: Segmenters, volume: Volume, *, batch_size: int = 8, flips: bool = False, keep_largest: bool | None = None
) -> np.ndarray:
    """Segment a scan slice by slice, as SAMed's test does, but in batches and without labels.

    Each slice is normalised, resized by cubic spline (through the low-resolution bottleneck if the adapter has one) and
    segmented; the arg max at the model's size is resized back by nearest neighbour. For an adapter whose resampling is
    "aligned", slices are resized by `resize_aligned`, and logits straight to the slice's own size before the arg max.
    For an adapter of tiles (`SamedConfig.tile`), slices are not resized but cut into tiles, whose logits are blended.
    A scan in another orientation than the adapter's is flipped and transposed first, and the mask back.

    Args:
        model: from `load_segmenter`, `load_adapter`, `add_lora` or `load_sam`; its `samed_config` says how
            to prepare scans. It runs in evaluation mode and returns to its mode afterwards. Of several, which may
            differ in all but the classes, the probabilities are averaged (`predict_probabilities`).
        volume: the scan, (D, H, W), a colour picture (1, H, W, 3), or all channels that the adapter sees, (D, H, W, C)
            (`SamedConfig.channels`).
        batch_size: slices, or tiles, per forward pass.
        flips: average the logits over each slice and its flips along rows, columns and both, in four times the time.
        keep_largest: keep only the largest connected part of each class (`largest_parts`): True for all classes, False
            for none, None for those that the adapter records (`SamedConfig.keep_largest`), or all of several adapters.

    Returns:
        (D, H, W) uint8 on the grid of `volume`, 0 is background.

    Raises:
        InputError: `batch_size` is below 1, the model has no `samed_config`, the scan is constant and the model has no
            fixed window, it lacks a channel that the adapter sees, or the adapter sees neighbouring slices and the scan
            has no spacing; several models have different classes.
    """
    models = as_models(model)
    for window in {config_of(one).window for one in models}:
        warn_of_window(volume, window)
    sums = None if len(models) == 1 else new_sums(models, volume, 16)
    mask = segmented(models, volume, sums, batch_size=batch_size, flips=flips)
    return _cleaned(mask, volume, models, keep_largest)


def predict_probabilities(
    model: Segmenters,
    volume: Volume,
    *,
    bits: int = 16,
    batch_size: int = 8,
    flips: bool = False,
    keep_largest: bool | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Segment a scan as `predict_volume` does, to the same mask, and return the probabilities behind it too.

    They are the softmax of the logits on the scan's own grid; with SAMed's resampling, of the logits at the encoder's
    size, resized by nearest neighbour as the mask is. The mask is their arg max, but for ties that rounding makes and
    for the parts that `keep_largest` removes. (K + 1) D H W numbers of 8 or 16 bits are in memory; of several models,
    whose sums have 16 bits, and of 8 bits asked for, both.

    Args:
        model: as for `predict_volume`.
        volume: as for `predict_volume`.
        bits: 8 or 16 for each probability.
        batch_size: as for `predict_volume`.
        flips: as for `predict_volume`.
        keep_largest: as for `predict_volume`; probabilities stay as they are.

    Returns:
        The mask (D, H, W) uint8, and probabilities (K + 1, D, H, W) uint8 or uint16, background first, in which 255 or
        65535 stands for 1. Rounded one by one, they add up to 1 within (K + 1) / 2 of these steps.

    Raises:
        InputError: as `predict_volume`; `bits` is neither 8 nor 16.
    """
    if bits not in PROBABILITY_BITS:
        raise InputError(f"bits must be 8 or 16; found {bits}")
    models = as_models(model)
    for window in {config_of(one).window for one in models}:
        warn_of_window(volume, window)
    sums = new_sums(models, volume, bits if len(models) == 1 else 16)
    mask = segmented(models, volume, sums, batch_size=batch_size, flips=flips)
    one = one_of(sums, models) * len(models)
    return _cleaned(mask, volume, models, keep_largest), rescaled(sums, one, bits)


def _cleaned(mask: np.ndarray, volume: Volume, models: Sequence[Segmenter], keep_largest: bool | None) -> np.ndarray:
    """The mask with the largest parts alone of some classes."""
    configs = [config_of(model) for model in models]
    names = [
        name
        for name in configs[0].class_names
        if (all(name in config.keep_largest for config in configs) if keep_largest is None else keep_largest)
    ]
    if not names:
        return mask
    labels = [configs[0].class_names.index(name) + 1 for name in names]
    # In the model's orientation, so that ties are broken alike in every orientation of the scan.
    there, back = reorientation(volume, configs[0].orientation)
    return np.ascontiguousarray(reoriented(largest_parts(reoriented(mask, there), labels), back))


def segment_cases(
    model: Segmenters,
    images: Mapping[str, Volume],
    directory: Path,
    *,
    accelerator: Accelerator,
    on_failure: Callable[[str, Exception], None] | None = None,
) -> dict[str, Path]:
    """Write a mask for every case, with the cases divided among processes.

    While a case is segmented, a thread prefetches the next and another writes the mask of the previous one.

    Args:
        model: as for `predict_volume`.
        images: case -> scan, read in a thread when it is needed.
        directory: folder for `CASE.nii.gz`; each appears whole or not at all.
        accelerator: processes and precision.
        on_failure: called with a case that cannot be read, segmented or written, and its error; None to raise that.

    Returns:
        case -> file, the same on every process, once all that this process does not call a failure are written.
    """
    files = {case: directory / f"{case}.nii.gz" for case in images}
    config = config_of(as_models(model)[0])
    values = config.label_values
    names = stored_names(config.class_names, values)
    mine = list(images)[accelerator.process_index :: accelerator.num_processes]

    def compute(case: str, read: Callable[[], Volume]) -> Callable[[], None] | None:
        with _failing_alone(case, on_failure):
            image = read()
            with accelerator.autocast():
                mask = predict_volume(model, image)
            return partial(write, case, mask, image)
        return None

    def write(case: str, mask: np.ndarray, image: Volume) -> None:
        with _failing_alone(case, on_failure):
            write_mask(stored_mask(mask, values), image, files[case], label_names=names)

    progress = tqdm(total=len(mine), desc="segmenting", unit="case", disable=not accelerator.is_main_process)
    process_in_order(mine, images.__getitem__, compute, progress=progress)
    accelerator.wait_for_everyone()
    return files


@contextlib.contextmanager
def _failing_alone(case: str, on_failure: Callable[[str, Exception], None] | None) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # libraries raise errors of many kinds for bad files
        if on_failure is None or isinstance(error, Warning):
            raise
        on_failure(case, error)
