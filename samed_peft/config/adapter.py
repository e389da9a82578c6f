"""What an adapter is."""

import warnings
from dataclasses import dataclass
from pathlib import Path

from samed_peft.config.fields import JsonFields, require, short

SYNAPSE_CLASSES = (
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    "liver",
    "stomach",
    "aorta",
    "pancreas",
)
"""The eight organs of Synapse multi-organ CT in SAMed's order; label k is `SYNAPSE_CLASSES[k - 1]`."""

CT_WINDOW_HU = (-125.0, 275.0)
"""Hounsfield units that SAMed (arXiv 2304.13785) clips to before scaling to [0, 1]."""

TINY_SAM = "tiny-sam"
"""Name of the small SAM that ships with this package, wherever a base is asked for. It is no substitute for SAM."""

TINY_SAM_NOTE = (
    "The base is no SAM but the tiny stand-in that ships with samed_peft; these scores say nothing about SAM."
)
"""Stands wherever figures of the tiny SAM are shown."""


def is_hub_id(base: str) -> bool:
    """Whether `base` reads like `owner/name` on the Hub and not like a file or folder."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if base.count("/") != 1 or base.startswith((".", "~", "/")) or base.endswith(".pth"):
        return False
    try:
        validate_repo_id(base)
    except HFValidationError:
        return False
    return not Path(base).exists()


def _is_orientation(codes: str) -> bool:
    axes = ("LR", "AP", "SI")
    return len(codes) == 3 and all(sum(code in axis for code in codes) == 1 for axis in axes)


@dataclass(frozen=True)
class SamedConfig(JsonFields):
    """What an adapter is: everything needed, besides its weights, to predict with it.

    Attributes:
        base: Hub id, local folder or Meta `.pth` of the SAM that is adapted.
        class_names: names of labels 1..K; background (0) is left out.
        base_revision: commit or tag of `base` on the Hub.
        base_sha256: fingerprint of the base weights, filled in when the adapter is saved.
        image_size: pixels per side that the encoder sees; a multiple of its patch size.
        input_size: pixels per side of SAMed's low-resolution bottleneck at prediction (224), or None.
        window: (low, high) intensities clipped to and scaled to [0, 1], or None for 0.5-99.5 percentiles per scan.
        orientation: axis codes of the (x, y, z) voxel axes of the training scans, "LAS" for example, or None.
        channel: number of the channel it was trained on, of 4-D scans or of files named as nnU-Net's, or None.
        preset: name of the published recipe these settings follow.
        rank: rank of the low-rank updates.
        alpha: numerator of LoRA's scaling alpha / rank; None means `rank`, that is no scaling, as in SAMed.
        targets: linear layers of attention that are adapted.
        decoder: "full" trains the whole mask decoder, as SAMed; "lora" adapts its frozen transformer, as SAMed_s.
        dropout: dropout in front of LoRA's A.

    Raises:
        InputError: a value is out of range.
    """

    base: str
    class_names: tuple[str, ...]
    base_revision: str | None = None
    base_sha256: str | None = None
    image_size: int = 512
    input_size: int | None = None
    window: tuple[float, float] | None = CT_WINDOW_HU
    orientation: str | None = None
    channel: int | None = None
    preset: str = "samed"
    rank: int = 4
    alpha: int | None = None
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    decoder: str = "full"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self._check_types()
        names = self.class_names
        require(
            1 <= len(names) <= 255 and len(set(names)) == len(names) and all(names),
            f"class_names must be 1 to 255 different names, background left out; "
            f"found {len(names)}: {short(list(names))}",
        )
        require(self.image_size > 0, f"image_size must be positive; found {self.image_size}")
        require(
            self.input_size is None or self.input_size > 0,
            f"input_size must be positive or None; found {self.input_size}",
        )
        if self.input_size is not None and self.input_size > self.image_size:
            warnings.warn(
                f"input_size ({self.input_size}) is larger than image_size ({self.image_size}), so that it is no "
                "bottleneck: slices are resized twice for nothing; leave input_size out",
                stacklevel=3,
            )
        require(
            self.window is None or (len(self.window) == 2 and self.window[0] < self.window[1]),
            f"window must be (low, high) with low < high, or None; found {self.window}",
        )
        require(self.channel is None or self.channel >= 0, f"channel must not be negative; found {self.channel}")
        require(
            self.orientation is None or _is_orientation(self.orientation),
            f"orientation must be three letters, one each of L or R, A or P, S or I, LAS for example; "
            f"found {self.orientation!r}",
        )
        require(self.alpha is None or self.alpha > 0, f"alpha must be at least 1 or None; found {self.alpha}")
        require(self.rank > 0, f"rank must be at least 1; found {self.rank}")
        allowed = ("q_proj", "k_proj", "v_proj")
        require(
            bool(self.targets) and set(self.targets) <= set(allowed),
            f"targets must be some of {', '.join(allowed)}; found {list(self.targets)}",
        )
        require(self.decoder in ("full", "lora"), f"decoder must be full or lora; found {self.decoder!r}")
        require(0 <= self.dropout < 1, f"dropout must be in [0, 1); found {self.dropout}")

    @property
    def num_labels(self) -> int:
        """Number of classes, background included: K + 1."""
        return len(self.class_names) + 1
