"""One geometry for slices, logits and masks: every pixel is an area, and corners of areas meet ("aligned")."""

from torch import Tensor
from torch.nn import functional as F


def resize_aligned(slices: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Resize slices by areas of pixels, with a low-pass filter where they shrink: the resizer of "aligned" adapters.

    Unlike SAMed's splines from corner to corner, it moves no edge against logits and masks, which are resized the same
    way, and it does not alias. Training and prediction both call it.

    Args:
        slices: (B, C, H, W) float32.
        size: pixels per side of a square, or (height, width).

    Returns:
        (B, C, height, width) float32; `slices` itself if the size does not change.
    """
    size_hw = (size, size) if isinstance(size, int) else size
    if slices.shape[-2:] == size_hw:
        return slices
    return F.interpolate(slices, size=size_hw, mode="bilinear", align_corners=False, antialias=True)


def pad_to(slices: Tensor, size: int) -> Tensor:
    """Pad slices that are smaller than a tile with zeros, alike on both sides but for one odd row or column at the end.

    Training on crops and prediction in tiles (`SamedConfig.tile`) both call it.

    Args:
        slices: (B, C, H, W).
        size: least height and width.

    Returns:
        (B, C, max(H, size), max(W, size)); `slices` itself if nothing is missing.
    """
    height, width = (max(size - length, 0) for length in slices.shape[-2:])
    if not height and not width:
        return slices
    return F.pad(slices, (width // 2, width - width // 2, height // 2, height - height // 2))
