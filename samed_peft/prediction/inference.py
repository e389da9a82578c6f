"""Predict a label mask on a scan's own grid."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial, reduce
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from accelerate import Accelerator
from peft import PeftModel
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from samed_peft.adapters.save_load import load_adapter
from samed_peft.config import SamedConfig
from samed_peft.datasets.preprocessing import (
    neighbour_step,
    normalized_array,
    reorientation,
    reoriented,
    resize_label,
    slice_spacing_mm,
    spline_matrix,
    warn_of_window,
)
from samed_peft.errors import InputError
from samed_peft.io import Volume, stored_mask, stored_names, write_mask
from samed_peft.models.modeling import SamForSemanticSegmentation, config_of
from samed_peft.models.precision import cast_frozen_weights, product_dtype
from samed_peft.models.resizing import resize_aligned
from samed_peft.prediction.compiled import CompiledSegmenter
from samed_peft.prediction.pipeline import process_in_order

Segmenter: TypeAlias = PeftModel | SamForSemanticSegmentation | CompiledSegmenter
"""An adapter on its base, a merged model, or either of them compiled; all have a `samed_config`."""


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
    model: Segmenter, volume: Volume, *, batch_size: int = 8, flips: bool = False, keep_largest: bool = False
) -> np.ndarray:
    """Segment a scan slice by slice, as SAMed's test does, but in batches and without labels.

    Each slice is normalised, resized by cubic spline (through the low-resolution bottleneck if the adapter has one) and
    segmented; the arg max at the model's size is resized back by nearest neighbour. For an adapter whose resampling is
    "aligned", slices are resized by `resize_aligned`, and logits straight to the slice's own size before the arg max.
    A scan in another orientation than the adapter's is flipped and transposed first, and the mask back.

    Args:
        model: from `load_segmenter`, `load_adapter`, `add_lora` or `load_sam`; its `samed_config` says how
            to prepare scans. It runs in evaluation mode and returns to its mode afterwards.
        volume: the scan, (D, H, W), or a colour picture (1, H, W, 3).
        batch_size: slices per forward pass.
        flips: average the logits over each slice and its flips along rows, columns and both, in four times the time.
        keep_largest: keep only the largest connected part of each class (`largest_parts`).

    Returns:
        (D, H, W) uint8 on the grid of `volume`, 0 is background.

    Raises:
        InputError: `batch_size` is below 1, the model has no `samed_config`, the scan is constant and the model has no
            fixed window, or the adapter sees neighbouring slices and the scan has no spacing.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1; found {batch_size}")
    config = config_of(model)
    warn_of_window(volume, config.window)
    there, back = reorientation(volume, config.orientation)
    array = reoriented(normalized_array(volume, config.window), there)
    step = _neighbour_step(volume, slice_spacing_mm(volume, there), config)
    was_training = model.training
    model.eval()
    try:
        mask = np.empty(array.shape[:3], np.uint8)
        for start in range(0, len(array), batch_size):
            batch = slice(start, start + batch_size)
            mask[batch] = _predict_slices(model, slice_channels(array, batch, step), flips=flips)
    finally:
        model.train(was_training)
    if keep_largest:  # before turning back, so that ties are broken alike in every orientation
        mask = largest_parts(mask)
    return np.ascontiguousarray(reoriented(mask, back))


def _neighbour_step(volume: Volume, spacing_mm: float | None, config: SamedConfig) -> int | None:
    """Slices to the neighbours that fill the outer channels; None if the slice itself does."""
    if config.neighbour_mm is None:
        return None
    name = volume.path or "the scan"
    if volume.array.ndim == 4:
        raise InputError(f"{name} is a colour picture, but the adapter sees neighbouring slices of grey scans")
    return neighbour_step(spacing_mm, config.neighbour_mm, name=name)


def slice_channels(array: np.ndarray, batch: slice, step: int | None = None) -> np.ndarray:
    """The channels (B, 1 or 3, H, W) float32 that show the encoder some slices of a scan; one fills all three.

    Args:
        array: the normalised scan (D, H, W), or a colour picture (1, H, W, 3), in the adapter's orientation.
        batch: which slices.
        step: of the slices before and after that become the first and third channel, which at the ends of a scan is the
            slice itself; None to show the slice alone.
    """
    slices = array[batch]
    if step is not None:
        numbers = np.arange(len(array))[batch]
        sides = [numbers - step, numbers + step]
        inside = [np.where((side >= 0) & (side < len(array)), side, numbers) for side in sides]
        return np.stack([array[inside[0]], slices, array[inside[1]]], axis=1)
    return slices[:, None] if slices.ndim == 3 else np.moveaxis(slices, -1, 1)


@torch.inference_mode()
def _predict_slices(model: Segmenter, channels: np.ndarray, *, flips: bool) -> np.ndarray:
    """Labels (B, H, W) uint8 of channels (B, 1 or 3, H, W) from `slice_channels`."""
    config = config_of(model)
    inputs = _encoder_inputs(model, channels)
    logits = _mean_over_flips(model, inputs) if flips else model(pixel_values=inputs).logits
    size_hw = (channels.shape[2], channels.shape[3])
    if config.resampling == "aligned":
        return upsampled_argmax(logits, size_hw).cpu().numpy()
    return resize_label(upsampled_argmax(logits, config.image_size).cpu().numpy(), size_hw)


def _encoder_inputs(model: Segmenter, channels: np.ndarray) -> Tensor:
    """Pixels (B, 3, S, S) on the model's device, resized as its config says."""
    config, device = config_of(model), next(model.parameters()).device
    # MPS has no float64.
    tensor = torch.from_numpy(np.ascontiguousarray(channels)).to("cpu" if device.type == "mps" else device)
    if config.resampling == "aligned":
        resized = resize_aligned(tensor, config.image_size)
    else:
        sizes = (config.image_size,) if config.input_size is None else (config.input_size, config.image_size)
        resized = resize_on_device(tensor, sizes)
    return resized.to(device).expand(-1, 3, -1, -1)


def resize_on_device(slices: Tensor, sizes: Sequence[int]) -> Tensor:
    """Prediction's resizer: the cubic spline of `preprocessing.resize_image`, as matrices, for a batch on its device.

    Training keeps the other resizer, which adds in SciPy's order, so that its pixels equal SAMed's to the bit; that
    takes one slice at a time on the CPU. This one differs by rounding in float64, and leaves no slice to the CPU.
    Neither autocast nor TF32 touches float64; between two sizes slices are float32, as in SAMed.

    Args:
        slices: (B, C, H, W) float32.
        sizes: sides of the squares to resize to, one after the other.
    """
    for size in sizes:
        if slices.shape[-2:] != (size, size):
            rows, columns = (_spline_matrix(old, size, slices.device) for old in slices.shape[-2:])
            slices = (rows @ slices.double() @ columns.T).float()
    return slices


@lru_cache(maxsize=8)
def _spline_matrix(old: int, new: int, device: torch.device) -> Tensor:
    return torch.from_numpy(spline_matrix(old, new)).to(device)


def _mean_over_flips(model: Segmenter, inputs: Tensor) -> Tensor:
    """Mean logits (B, K + 1, h, w) over four flips of (B, 3, S, S), each turned back.

    Logits and not probabilities, as in nnU-Net: averaging and resizing of logits commute, so a model that is invariant
    to flips gives the same mask as without them.
    """
    all_axes: tuple[tuple[int, ...], ...] = ((), (-2,), (-1,), (-2, -1))
    turned = (torch.flip(model(pixel_values=torch.flip(inputs, axes)).logits.float(), axes) for axes in all_axes)
    return reduce(torch.add, turned) / len(all_axes)


def upsampled_argmax(logits: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Labels uint8 of logits (B, K + 1, h, w), resized bilinearly as SAM resizes its masks.

    Args:
        logits: of any float type.
        size: pixels per side of a square, or (height, width).
    """
    size_hw = (size, size) if isinstance(size, int) else size
    # Slice by slice: K + 1 maps of one slice fit into a processor's cache. `max` finds the same index as `argmax`, but
    # faster on CPUs.
    resized = (
        F.interpolate(one.float(), size=size_hw, mode="bilinear", align_corners=False) for one in logits.split(1)
    )
    return torch.cat([one.max(dim=1).indices.to(torch.uint8) for one in resized])


def segment_cases(
    model: Segmenter,
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
    values = config_of(model).label_values
    names = stored_names(config_of(model).class_names, values)
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


def largest_parts(mask: np.ndarray) -> np.ndarray:
    """Keep the largest connected part of each class; smaller ones become background.

    Voxels that touch at a face, an edge or a corner are connected (26 neighbours). Of equally large parts the
    first in the array stays.

    Args:
        mask: (D, H, W) uint8, 0 is background.

    Returns:
        A new array of the same shape and type.
    """
    kept = mask.copy()
    for label, box in enumerate(ndimage.find_objects(mask), start=1):
        if box is None:
            continue
        inside = kept[box]
        is_label = mask[box] == label
        parts, count = ndimage.label(is_label, structure=np.ones((3, 3, 3)))
        if count > 1:
            largest = 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
            inside[is_label & (parts != largest)] = 0
    return kept
