"""From slices of a scan to labels and probabilities on the slices' own grid."""

import copy
import dataclasses
import itertools
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial, reduce
from typing import TypeAlias

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F

from samed_peft.datasets.preprocessing import resize_label, spline_matrix
from samed_peft.errors import InputError
from samed_peft.models.modeling import SamForSemanticSegmentation, config_of
from samed_peft.models.resizing import resize_aligned
from samed_peft.prediction.compiled import CompiledSegmenter
from samed_peft.prediction.tiles import tiled_logits

Segmenter: TypeAlias = PeftModel | SamForSemanticSegmentation | CompiledSegmenter
"""An adapter on its base, a merged model, or either of them compiled; all have a `samed_config`."""


def slice_channels(array: np.ndarray, batch: slice, step: int | None = None) -> np.ndarray:
    """The channels (B, 1 or 3, H, W) float32 that show the encoder some slices of a scan; one fills all three.

    Args:
        array: the normalised scan (D, H, W) or (D, H, W, 3), from `scaled_slices`, in the adapter's orientation.
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


def with_tiles(model: Segmenter) -> Segmenter:
    """The same model, with shared weights, that segments in tiles what it was trained to see whole.

    It warns, because structures then have another size than in training; a model that was trained on tiles is returned
    as it is.
    """
    config = config_of(model)
    if config.tile:
        return model
    warnings.warn(
        f"the adapter was trained on whole slices resized to {config.image_size} pixels, not on tiles of that size, so "
        "it sees structures at another scale than in training; its masks may be worse than without tiles",
        stacklevel=2,
    )
    tiled = copy.copy(model)
    tiled.samed_config = dataclasses.replace(config, tile=True, resampling="aligned", input_size=None)
    return tiled


def unrefined(model: Segmenter) -> Segmenter:
    """The same model, with shared weights, that predicts without what was found on validation."""
    plain = copy.copy(model)
    plain.samed_config = dataclasses.replace(config_of(model), tta="none", smoothing_mm=0.0, keep_largest=())
    return plain


@torch.inference_mode()
def slice_logits(
    model: Segmenter, channels: np.ndarray, *, batch_size: int, flips: bool = False, shifts: bool = False
) -> Iterator[Tensor]:
    """Logits of slices of one scan, from one forward pass, or from tiles.

    Args:
        model: in evaluation mode.
        channels: (B, 1 or 3, H, W) from `slice_channels`.
        batch_size: tiles per forward pass, for a model that segments in tiles.
        flips: average the logits over each slice, or tile, and its flips.
        shifts: average the logits over four shifts of each slice, or tile.

    Yields:
        (B, K + 1, h, w) of all slices, or for a model of tiles (1, K + 1, H, W) of each.
    """
    config = config_of(model)
    inputs = _encoder_inputs(model, channels)
    forward: Callable[[Tensor], Tensor] = partial(_logits, model)
    if shifts:
        forward = partial(_mean_over_shifts, forward, patch=_patch_size(model))
    if flips:
        forward = partial(_mean_over_flips, forward)
    if config.tile:
        yield from tiled_logits(forward, inputs, size=config.image_size, batch_size=batch_size)
    else:
        yield forward(inputs)


@torch.inference_mode()
def smoothed_logits(parts: Iterable[Tensor], sigma: float) -> Iterator[Tensor]:
    """Smooth logits across the slices of a scan by a Gaussian, cut off at three standard deviations.

    Slices are segmented one by one, so their errors differ, but the organ goes on from one to the next. Beyond the ends
    the first and last slice are repeated. As many slices are in memory as the Gaussian reaches.

    Args:
        parts: (B, K + 1, h, w) for any B, of all slices in order.
        sigma: standard deviation in slices.

    Yields:
        Logits (1, K + 1, h, w) float32 of each slice.
    """
    reach = math.ceil(3 * sigma)
    distances = torch.arange(-reach, reach + 1) / sigma
    weights = torch.exp(-0.5 * distances.square())
    weights /= weights.sum()
    window: deque[Tensor] = deque(maxlen=2 * reach + 1)
    for one in _with_ends_repeated((one.float() for part in parts for one in part.split(1)), reach):
        window.append(one)
        if len(window) == window.maxlen:
            yield reduce(
                torch.add, (weight * neighbour for weight, neighbour in zip(weights.tolist(), window, strict=True))
            )


def _with_ends_repeated(slices: Iterator[Tensor], times: int) -> Iterator[Tensor]:
    last: Tensor | None = None
    for one in slices:
        yield from itertools.repeat(one, times + 1 if last is None else 1)
        last = one
    if last is not None:
        yield from itertools.repeat(last, times)


def choose_labels(
    model: Segmenter, logits: Tensor, size_hw: tuple[int, int], *, one: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Labels and probabilities on the slices' own grid, resized as the model's config says.

    Args:
        model: which the logits are from.
        logits: (B, K + 1, h, w) from `slice_logits` or `smoothed_logits`.
        size_hw: height and width (H, W) of the slices.
        one: the whole number, 65535 at most, that stands for a probability of 1; None for no probabilities.

    Returns:
        Labels (B, H, W) uint8, and rounded probabilities (B, K + 1, H, W) uint16, or (B, 0, H, W) without `one`.
    """
    config = config_of(model)
    if config.tile or config.resampling == "aligned":
        return _chosen(logits, size_hw, one)
    labels, shares = _chosen(logits, (config.image_size, config.image_size), one)
    return resize_label(labels, size_hw), _nearest_shares(shares, size_hw, one)


def _chosen(logits: Tensor, size_hw: tuple[int, int], one: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Labels and rounded probabilities (`choose_labels`) of logits resized to one size."""
    if one is None:
        return upsampled_argmax(logits, size_hw).cpu().numpy(), np.empty((len(logits), 0, *size_hw), np.uint16)
    labels, shares = [], []
    for resized in _upsampled(logits, size_hw):
        labels.append(resized.max(dim=1).indices.to(torch.uint8))
        # PyTorch has next to no functions of uint16.
        shares.append((resized.softmax(dim=1) * one).round().to(torch.int32).cpu().numpy().astype(np.uint16))
    return torch.cat(labels).cpu().numpy(), np.concatenate(shares)


def _nearest_shares(shares: np.ndarray, size_hw: tuple[int, int], one: int | None) -> np.ndarray:
    """Probabilities resized as SAMed resizes labels, so that the largest one stays that of the label."""
    resized = resize_label(shares, size_hw)
    is_inside = resize_label(np.ones(shares.shape[-2:], np.uint8), size_hw)
    if one is not None and not is_inside.all():  # labels are background there
        resized[:, 0, is_inside == 0] = one
    return resized


def _encoder_inputs(model: Segmenter, channels: np.ndarray) -> Tensor:
    """Pixels (B, 3, S, S) on the model's device, resized as its config says; for tiles (B, 3, H, W)."""
    config, device = config_of(model), next(model.parameters()).device
    # MPS has no float64.
    tensor = torch.from_numpy(np.ascontiguousarray(channels)).to("cpu" if device.type == "mps" else device)
    if config.tile:
        resized = tensor
    elif config.resampling == "aligned":
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


def _patch_size(model: Segmenter) -> int:
    size: int = model.config.vision_config.patch_size
    if size % 4:
        raise InputError(f"shifts need patches of a multiple of 4 pixels, found {size}; predict without them")
    return size


def _logits(model: Segmenter, inputs: Tensor) -> Tensor:
    return model(pixel_values=inputs).logits


def _mean_over_flips(forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """Mean logits (B, K + 1, h, w) over four flips of (B, 3, S, S), each turned back.

    Logits and not probabilities, as in nnU-Net: averaging and resizing of logits commute, so a model that is invariant
    to flips gives the same mask as without them.
    """
    all_axes: tuple[tuple[int, ...], ...] = ((), (-2,), (-1,), (-2, -1))
    turned = (torch.flip(forward(torch.flip(inputs, axes)).float(), axes) for axes in all_axes)
    return reduce(torch.add, turned) / len(all_axes)


def _mean_over_shifts(forward: Callable[[Tensor], Tensor], inputs: Tensor, *, patch: int) -> Tensor:
    """Mean logits (B, K + 1, h, w) over four diagonal shifts of (B, 3, S, S), each moved back.

    Patches cut each shift in other places, which evens out errors at their borders. A quarter of a patch is one pixel
    of the logits, so they are moved back without resampling. What leaves the picture comes back as a copy of the edge.
    """
    shifted = []
    for down, right in itertools.product((1, -1), repeat=2):
        logits = forward(_moved(inputs, down=down * patch // 4, right=right * patch // 4))
        shifted.append(_moved(logits.float(), down=-down, right=-right))
    return reduce(torch.add, shifted) / len(shifted)


def _moved(pictures: Tensor, *, down: int, right: int) -> Tensor:
    """Pictures (B, C, h, w) moved by some pixels; edges are repeated."""
    reach = max(abs(down), abs(right))
    height, width = pictures.shape[-2:]
    padded = F.pad(pictures, (reach,) * 4, mode="replicate")
    return padded[..., reach - down : reach - down + height, reach - right : reach - right + width]


def upsampled_argmax(logits: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Labels uint8 of logits (B, K + 1, h, w), resized bilinearly as SAM resizes its masks.

    Args:
        logits: of any float type.
        size: pixels per side of a square, or (height, width).
    """
    size_hw = (size, size) if isinstance(size, int) else size
    # `max` finds the same index as `argmax`, but faster on CPUs.
    return torch.cat([one.max(dim=1).indices.to(torch.uint8) for one in _upsampled(logits, size_hw)])


def _upsampled(logits: Tensor, size_hw: tuple[int, int]) -> Iterator[Tensor]:
    """Logits (1, K + 1, height, width) float32, slice by slice: those of one slice fit into a processor's cache."""
    for one in logits.split(1):
        is_sized = one.shape[-2:] == size_hw  # blended tiles
        yield (
            one.float() if is_sized else F.interpolate(one.float(), size=size_hw, mode="bilinear", align_corners=False)
        )
