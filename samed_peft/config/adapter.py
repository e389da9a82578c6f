"""What an adapter is: `SamedConfig`."""

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from samed_peft.config.fields import JsonFields, described, documented, require, short
from samed_peft.config.methods import ATTENTION_TARGETS, DECODER_TARGETS, METHODS, MLP_TARGETS, methods_with

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

SYNAPSE_NAME = "Synapse multi-organ CT (BTCV)"
"""What reports and model cards call that data."""

CT_WINDOW_HU = (-125.0, 275.0)
"""Hounsfield units that SAMed (arXiv 2304.13785) clips to before scaling to [0, 1]."""

TINY_SAM = "tiny-sam"
"""Base name of the small SAM that ships with this package; it does not replace SAM."""

TINY_SAM_NOTE = (
    "The base is no SAM but the tiny stand-in that ships with samed_peft; these scores say nothing about SAM."
)
"""Shown with all figures of the tiny SAM."""


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


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


@documented
@dataclass(frozen=True)
class SamedConfig(JsonFields):
    """What an adapter is: everything needed, besides its weights, to predict with it.

    Raises:
        InputError: a value is out of range.
    """

    base: str = described("Hub id, local folder or Meta `.pth` of the SAM that is adapted")
    class_names: tuple[str, ...] = described("names of labels 1..K; background (0) is left out")
    base_revision: str | None = described("commit or tag of `base` on the Hub", None)
    base_sha256: str | None = described("fingerprint of the base weights, filled in by `load_sam`", None)
    image_size: int = described("pixels per side that the encoder sees; a multiple of its patch size", 512)
    input_size: int | None = described(
        "pixels per side of SAMed's low-resolution bottleneck at prediction (224), or None", None
    )
    window: tuple[float, float] | None = described(
        "(low, high) intensities clipped to and scaled to [0, 1], or None for 0.5-99.5 percentiles per scan",
        CT_WINDOW_HU,
    )
    orientation: str | None = described(
        "axis codes of the (x, y, z) voxel axes of the training scans, such as LAS, or None", None
    )
    channel: int | None = described(
        "number of the channel it was trained on, of 4-D scans or of files named as nnU-Net's, or None", None
    )
    preset: str = described("name of the published recipe that this config follows", "samed")
    method: str = described(f"how the encoder is adapted: {_listed(METHODS)}", "lora")
    rank: int = described("rank of the low-rank updates", 4)
    alpha: int | None = described(
        "numerator of LoRA's scaling alpha / rank; None for no scaling, as in SAMed (2 / sqrt(rank) for rslora)", None
    )
    targets: tuple[str, ...] = described(
        "linear layers that are adapted, of q_proj, k_proj, v_proj and proj of attention, lin1 and lin2 of MLPs",
        ("q_proj", "v_proj"),
    )
    layers: tuple[int, ...] | None = described(
        "numbers of the encoder's layers that are adapted, counted from 0; None for all", None
    )
    rank_pattern: dict[str, int] | None = described(  # noqa: RUF009
        "ranks of layers whose names end in a regular expression, such as 'layers.11.attn.q_proj=8'", None
    )
    decoder: str = described(
        '"full" trains the whole mask decoder, as SAMed; "lora" adapts its frozen transformer, as SAMed_s', "full"
    )
    dropout: float = described("dropout in front of LoRA's A", 0.0)

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
                f"input_size ({self.input_size}) is larger than image_size ({self.image_size}), so slices are resized "
                "twice for nothing; leave input_size out",
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
        self._check_method()

    def _check_method(self) -> None:
        require(self.method in METHODS, f"method must be one of {_listed(METHODS)}; found {self.method!r}")
        method = METHODS[self.method]
        require(self.alpha is None or self.alpha > 0, f"alpha must be at least 1 or None; found {self.alpha}")
        require(
            self.rank >= method.min_rank,
            f"rank must be at least {method.min_rank} for {self.method}, {method.summary}; found {self.rank}",
        )
        allowed = (*ATTENTION_TARGETS, *MLP_TARGETS)
        require(
            bool(self.targets) and set(self.targets) <= set(allowed) and len(set(self.targets)) == len(self.targets),
            f"targets must be some of {_listed(allowed)}; found {list(self.targets)}",
        )
        require(
            self.layers is None or (bool(self.layers) and min(self.layers) >= 0),
            f"layers must be numbers from 0 on, or None; found {self.layers}",
        )
        require(self.decoder in ("full", "lora"), f"decoder must be full or lora; found {self.decoder!r}")
        require(0 <= self.dropout < 1, f"dropout must be in [0, 1); found {self.dropout}")
        self._check_rank_pattern()
        for name in ("alpha", "rank_pattern", "dropout", "layers"):
            require(
                not vars(self)[name] or name in method.options,
                f"{name} means nothing to {self.method}, only to {_listed(methods_with(name))}; leave it out",
            )
        require(
            self.decoder == "full" or "decoder" in method.options,
            f"decoder must be full with {self.method}; found {self.decoder!r}",
        )
        require(
            self.decoder == "full" or bool(set(self.targets) & set(DECODER_TARGETS)),
            f"decoder lora adapts {_listed(DECODER_TARGETS)}, of which targets must have one; "
            f"found {list(self.targets)}",
        )

    def _check_rank_pattern(self) -> None:
        for pattern, rank in (self.rank_pattern or {}).items():
            require(rank > 0, f"rank_pattern must give ranks of at least 1; found {rank} for {pattern!r}")
            try:
                re.compile(pattern)
            except re.error as error:
                require(False, f"rank_pattern must have regular expressions; found {pattern!r}: {error}")

    @property
    def num_labels(self) -> int:
        """Number of classes, background included: K + 1."""
        return len(self.class_names) + 1
