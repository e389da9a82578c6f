"""A scan in, a label mask on the scan's own grid out."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
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
    normalized_array,
    reorientation,
    reoriented,
    resize_label,
    spline_matrix,
    warn_of_window,
)
from samed_peft.errors import InputError
from samed_peft.io import Volume, write_mask
from samed_peft.models.modeling import SamForSemanticSegmentation, config_of
from samed_peft.models.precision import hold_frozen_weights, product_dtype
from samed_peft.prediction.compiled import CompiledSegmenter
from samed_peft.prediction.pipeline import overlap

Segmenter: TypeAlias = PeftModel | SamForSemanticSegmentation | CompiledSegmenter
"""An adapter on its base, a merged model, or either compiled; all have a `samed_config`."""


def load_segmenter(
    source: str | Path,
    *,
    accelerator: Accelerator,
    base: str | None = None,
    dtype: str | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
) -> Segmenter:
    """An adapter as it predicts fastest: in float32 merged into its base, where PEFT can merge its kind.

    Merged, q and v take one product instead of three, and masks differ in ties alone. In half precision the adapter
    stays apart and its sums are rounded as in a training with autocast, under which the model has to run, and frozen
    weights are held in that type (`hold_frozen_weights`).

    Args:
        source: as for `load_adapter`.
        accelerator: device, and precision where `dtype` names none.
        base: as for `load_adapter`.
        dtype: "float32", "bfloat16" or "float16".
        device: in place of the accelerator's.
        revision: as for `load_adapter`.

    Raises:
        InputError: as `load_adapter`.
    """
    place = accelerator.device if device is None else device
    products = product_dtype(accelerator, dtype)
    if products == torch.float32:
        # PEFT's word for kinds that are no change of a weight, such as Lily; by then it has taken the model apart.
        with contextlib.suppress(NotImplementedError):
            return load_adapter(source, base=base, merge=True, device=place, revision=revision)
    model = load_adapter(source, base=base, revision=revision)
    hold_frozen_weights(model, products)
    return model.to(place)


def settings_of(model: Segmenter) -> SamedConfig:
    """How a model sees scans.

    Raises:
        InputError: it was built by hand and does not say.
    """
    return config_of(model)


def predict_volume(
    model: Segmenter, volume: Volume, *, batch_size: int = 8, flips: bool = False, keep_largest: bool = False
) -> np.ndarray:
    """Segment a scan slice by slice, as SAMed's test does, but in batches and without labels.

    Each slice is normalised, resized by cubic spline (through the low-resolution bottleneck where the adapter has
    one), segmented, and its arg max at the model's size brought back by nearest neighbour. A scan in another
    orientation than the adapter's is flipped and transposed first, and the mask back.

    Args:
        model: from `load_segmenter`, `load_adapter`, `add_lora` or `load_sam`; its `samed_config` says how it sees
            scans. It runs in evaluation mode and is left in the mode it came in.
        volume: the scan, (D, H, W), or a colour picture (1, H, W, 3).
        batch_size: slices per forward pass.
        flips: average the logits over each slice and its flips along rows, columns and both, in four times the time.
        keep_largest: keep only the largest connected part of each class (`largest_parts`).

    Returns:
        (D, H, W) uint8 on the grid of `volume`, 0 is background.

    Raises:
        InputError: `batch_size` is below 1, the model does not say how it sees scans, or the scan is constant and
            the model has no fixed window.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1; found {batch_size}")
    config = settings_of(model)
    warn_of_window(volume, config.window)
    there, back = reorientation(volume, config.orientation)
    array = reoriented(normalized_array(volume, config.window), there)
    was_training = model.training
    model.eval()
    try:
        mask = np.empty(array.shape[:3], np.uint8)
        for start in range(0, len(array), batch_size):
            batch = slice(start, start + batch_size)
            mask[batch] = _predict_slices(model, array[batch], flips=flips)
    finally:
        model.train(was_training)
    if keep_largest:  # before the way back, so that ties fall alike in every orientation
        mask = largest_parts(mask)
    return np.ascontiguousarray(reoriented(mask, back))


@torch.inference_mode()
def _predict_slices(model: Segmenter, slices: np.ndarray, *, flips: bool) -> np.ndarray:
    """Labels (B, H, W) uint8 of normalised slices (B, H, W) or (B, H, W, 3)."""
    config = settings_of(model)
    device = next(model.parameters()).device
    channels = slices[:, None] if slices.ndim == 3 else np.moveaxis(slices, -1, 1)
    sizes = (config.image_size,) if config.input_size is None else (config.input_size, config.image_size)
    # MPS has no float64.
    tensor = torch.from_numpy(np.ascontiguousarray(channels)).to("cpu" if device.type == "mps" else device)
    inputs = resized_slices(tensor, sizes).to(device).expand(-1, 3, -1, -1)
    logits = _mean_over_flips(model, inputs) if flips else model(pixel_values=inputs).logits
    labels = upsampled_argmax(logits, config.image_size)
    return resize_label(labels.cpu().numpy(), slices.shape[1:3])


def resized_slices(slices: Tensor, sizes: Sequence[int]) -> Tensor:
    """What `preprocessing.resize_image` makes of each slice, for all at once and on their device.

    In float64, which neither autocast nor TF32 touches; between two sizes float32, as in SAMed.

    Args:
        slices: (B, C, H, W) float32.
        sizes: sides of the squares they become, one after the other.
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

    Logits and not probabilities, as in nnU-Net: their mean and their resizing may change places, so that a model
    that does not care about flips gives the mask it gives without them.
    """
    total: Tensor | None = None
    for axes in ((), (-2,), (-1,), (-2, -1)):
        logits = torch.flip(model(pixel_values=torch.flip(inputs, axes)).logits.float(), axes)
        total = logits if total is None else total + logits
    assert total is not None
    return total / 4


def upsampled_argmax(logits: Tensor, size: int) -> Tensor:
    """Labels (B, size, size) uint8 of logits (B, K + 1, h, w), resized bilinearly as SAM resizes its masks."""
    # Slice by slice: K + 1 maps of one slice stay in a processor's cache, those of a batch fill memory. `max` finds the
    # place that `argmax` finds, and finds it faster on CPUs.
    resized = (
        F.interpolate(one.float(), size=(size, size), mode="bilinear", align_corners=False) for one in logits.split(1)
    )
    return torch.cat([one.max(dim=1).indices.to(torch.uint8) for one in resized])


def segment_cases(
    model: Segmenter, images: Mapping[str, Volume], directory: Path, *, accelerator: Accelerator
) -> dict[str, Path]:
    """Write a mask for every case, the cases shared out among processes.

    While one is segmented, a thread reads the next and another writes the mask before.

    Args:
        model: as for `predict_volume`.
        images: case -> scan, read when its turn comes, in a thread.
        directory: where `CASE.nii.gz` go; each appears whole or not at all.
        accelerator: processes and precision.

    Returns:
        case -> file, the same on every process, once all are written.
    """
    files = {case: directory / f"{case}.nii.gz" for case in images}
    names = dict(enumerate(settings_of(model).class_names, start=1))
    mine = list(images)[accelerator.process_index :: accelerator.num_processes]

    def compute(case: str, read: Callable[[], Volume]) -> Callable[[], None]:
        image = read()
        with accelerator.autocast():
            mask = predict_volume(model, image)
        return partial(write_mask, mask, image, files[case], label_names=names)

    progress = tqdm(total=len(mine), desc="segmenting", unit="case", disable=not accelerator.is_main_process)
    overlap(mine, images.__getitem__, compute, progress=progress)
    accelerator.wait_for_everyone()
    return files


def largest_parts(mask: np.ndarray) -> np.ndarray:
    """Keep the largest connected part of each class; smaller ones become background.

    Voxels that touch at a face, an edge or a corner are connected (26 neighbours). Of equally large parts the one
    that comes first in the array stays.

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
