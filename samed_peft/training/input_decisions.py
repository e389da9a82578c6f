"""The rules of a plan on what the encoder sees: one function for each decision, as in `decisions`."""

import math
from typing import Any

from samed_peft.config import CT_WINDOW_HU, windows_of
from samed_peft.errors import InputError
from samed_peft.training.situation import CONSTANTS, Situation

Decided = tuple[Any, str]
"""A value and its reason, one line."""

_EACH_SLICE = "the slice itself in all three channels"


def plane(s: Situation) -> Decided:
    """Along which axis slices are cut."""
    if s.data.plane is None or s.data.spacing_mm is None:
        return None, "slices as they are stored: the files do not record an orientation"
    through, row, column = s.data.spacing_mm
    if through > 1.1 * sorted(s.data.spacing_mm)[1]:
        return s.data.plane, f"across the coarsest axis: slices {through:g} mm apart, pixels of {row:g} x {column:g} mm"
    if s.data.plane == "axial":
        return s.data.plane, "no axis is the coarsest, and labels fill about as many slices in other planes"
    return s.data.plane, "no axis is the coarsest, and labels fill the fewest slices in this plane, each with more"


def channels(s: Situation) -> Decided | None:
    """Channels of a scan that fill the encoder's."""
    if not s.data.channels:
        return None
    names = [name or f"channel {number}" for number, name in zip(s.data.channels, s.data.channel_names, strict=True)]
    last = f", {names[1]} in the third too" if len(names) == 2 else ""
    return s.data.channels, f"{', '.join(names[:-1])} and {names[-1]} in the encoder's three channels{last}"


def window(s: Situation) -> Decided:
    """Intensities that are scaled to [0, 1]."""
    data, (low, high) = s.data, s.data.intensity_range
    if data.modality == "picture":
        if 1 < high <= 255:
            return (0.0, 255.0), f"8-bit pictures, intensities {low:g} to {high:g}"
        return None, f"percentiles of each picture: intensities {low:g} to {high:g} are not those of 8 bits"
    if data.modality != "CT":
        kind = "MR has no fixed scale" if data.modality == "MR" else "nothing says what the intensities mean"
        return None, f"0.5 and 99.5 percentiles of each {'channel of each ' * bool(data.channels)}scan: {kind}"
    if data.normalized or data.foreground is None:
        return CT_WINDOW_HU, "SAMed's, for scans in Hounsfield units; these are scaled to [0, 1] already"
    first, lower, _, upper, last = data.foreground
    inside = min(upper, CT_WINDOW_HU[1]) - max(lower, CT_WINDOW_HU[0])
    if inside >= CONSTANTS.inside_window * (upper - lower):
        return CT_WINDOW_HU, f"SAMed's, for soft tissue: most labelled voxels are {lower:g} to {upper:g} HU"
    margin = max(CONSTANTS.window_margin * (last - first), (CONSTANTS.least_window_hu - (last - first)) / 2)
    wide = (5.0 * math.floor((first - margin) / 5), 5.0 * math.ceil((last + margin) / 5))
    return wide, f"labelled voxels are {first:g} to {last:g} HU, beyond SAMed's window; with a margin"


def neighbour_mm(s: Situation) -> Decided:
    """Distance of the slices in the outer channels."""
    if s.data.colour:
        return None, "the three channels hold the colours"
    if s.data.channels or len(windows_of(s.chosen["window"])) > 1:
        return None, f"the three channels hold {'those of the scans' if s.data.channels else 'the windows'}"
    if s.data.modality == "picture" or s.data.patient_slices[2] < 3:
        return None, f"{_EACH_SLICE}: pictures have no neighbours"
    if s.data.spacing_mm is None:
        return None, f"{_EACH_SLICE}: the distance of slices is unknown"
    through = s.data.spacing_mm[0]
    if through > CONSTANTS.most_slice_distance_mm:
        return None, f"{_EACH_SLICE}: others are {through:g} mm away, more than {CONSTANTS.most_slice_distance_mm:g}"
    return max(through, CONSTANTS.neighbour_mm), f"slices before and after in the outer channels: {through:g} mm apart"


def resampling(s: Situation) -> Decided:
    """Geometry of images, logits and masks."""
    if s.given.get("input_size") is not None:
        return "samed", f"input_size {s.given['input_size']} belongs to SAMed's resampling"
    return "aligned", "one geometry for images, logits and masks; labels are chosen on the scan's own grid"


def image_size(s: Situation) -> Decided:
    """Pixels per side that the encoder sees."""
    trained, side = s.base.image_size, max(s.data.slice_hw)
    low, high = min(trained, CONSTANTS.least_pixels), min(2 * trained, CONSTANTS.most_pixels)
    step = CONSTANTS.step_in_patches * s.base.patch_size
    sizes = [size for size in range(step, high + 1, step) if size >= low] or [s.base.patch_size]
    wanted = min(sizes, key=lambda size: abs(size - CONSTANTS.enlargement * side))
    fitting = [size for size in sizes if size <= wanted and s.slice_gb(size, checkpointed=True) <= s.free_gb]
    if not fitting:
        raise _no_memory(s, sizes[0])
    if fitting[-1] < wanted:
        return fitting[-1], f"the largest that {s.machine.memory_gb:g} GB hold a slice of; {wanted} would suit the data"
    limits = f"{sizes[0]} to {sizes[-1]} suit a base trained at {trained}"
    if sizes[0] < wanted < sizes[-1]:
        return wanted, f"near {CONSTANTS.enlargement:g} times the {side} pixels of a typical slice; {limits}"
    return wanted, f"typical slices have {side} pixels, and {limits}"


def _no_memory(s: Situation, image_size: int) -> InputError:
    need_gb = (s.base.weights_gb + s.slice_gb(image_size, checkpointed=True)) / CONSTANTS.share_of_memory
    return InputError(
        f"expected memory for one slice of {image_size} pixels, about {need_gb:.1f} GB free with base {s.base.base}, "
        f"found {s.machine.memory_gb:g} GB on {s.machine.device} ({s.machine.name}); free memory, or choose a smaller "
        "--image_size or --base, or a larger machine"
    )


def gradient_checkpointing(s: Situation) -> Decided:
    """Whether layers are computed twice to save memory."""
    size = s.chosen["image_size"]
    plain, checkpointed = (s.slice_gb(size, checkpointed=value) for value in (False, True))
    if checkpointed > s.free_gb:
        raise _no_memory(s, size)
    if plain > s.free_gb:
        return True, f"a slice needs about {plain:.2g} GB, and {checkpointed:.2g} if layers are computed twice"
    return False, f"a slice needs about {plain:.2g} GB of {s.machine.memory_gb:g}"


def best_precision(device: str, name: str, bf16: bool) -> tuple[str, str]:
    """Accelerate's name of the precision that a device trains in best, and the reason; see `this_device`."""
    if bf16:
        return "bf16", f"{name} multiplies bfloat16 in hardware; sums, and the weights that are trained, stay float32"
    if device == "cuda":
        return "fp16", f"as SAMed: {name} does not multiply bfloat16 in hardware"
    return "no", f"float32: {name} does not multiply bfloat16 in hardware"


def mixed_precision(s: Situation) -> Decided:
    """Precision of products."""
    return best_precision(s.machine.device, s.machine.name, s.machine.bf16)
