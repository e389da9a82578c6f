"""The measures of a base SAM that a plan needs, without downloading a published one."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from samed_peft.config.fields import AT_LEAST_1, JsonFields, described, documented
from samed_peft.models.bases import base_config


@documented
@dataclass(frozen=True)
class BaseGeometry(JsonFields):
    """Measures of a SAM's image encoder.

    Raises:
        InputError: a value is out of range.
    """

    base: str = described("Hub id, local folder or Meta `.pth`, as given")
    image_size: int = described("pixels per side that it was trained at", must=AT_LEAST_1)
    patch_size: int = described("pixels per side of a token", must=AT_LEAST_1)
    depth: int = described("number of layers", must=AT_LEAST_1)
    width: int = described("numbers a token has", must=AT_LEAST_1)

    def slice_gb(self, image_size: int, *, num_labels: int, checkpointed: bool = False) -> float:
        """Memory in GB (1e9 bytes) that training needs for each slice of a batch, in float32, estimated.

        Fitted to peaks of ViT-B at 512 pixels and of the tiny SAM at 64 to 128, with LoRA in attention and MLPs; on
        these it is right within a quarter, rather above than below.

        Args:
            image_size: pixels per side.
            num_labels: number of maps, background included.
            checkpointed: whether layers are recomputed in the backward pass.
        """
        token = _FLOATS_PER_WIDTH * self.width + _FLOATS_PER_TOKEN
        layers = token + self.depth * self.width if checkpointed else self.depth * token
        floats = (image_size / self.patch_size) ** 2 * layers + image_size**2 * (3 + 3 * num_labels)
        return 4 * floats / 1e9

    @property
    def weights_gb(self) -> float:
        """Memory in GB of the encoder's weights in float32, and of a process with PyTorch and Transformers."""
        return 4 * 12 * self.depth * self.width**2 / 1e9 + _PROCESS_GB


_FLOATS_PER_WIDTH, _FLOATS_PER_TOKEN = 24, 3500
"""Numbers kept for the backward pass, for each token of a layer: in proportion to its width, and besides."""

_PROCESS_GB = 0.9

PUBLISHED: Mapping[str, BaseGeometry] = MappingProxyType(
    {
        name: BaseGeometry(name, 1024, 16, depth, width)
        for name, depth, width in (
            ("facebook/sam-vit-base", 12, 768),
            ("facebook/sam-vit-large", 24, 1024),
            ("facebook/sam-vit-huge", 32, 1280),
        )
    }
)
"""Measures of SAM's three published sizes (arXiv 2304.02643)."""


def base_geometry(base: str, revision: str | None = None) -> BaseGeometry:
    """Measures of a base; those of `PUBLISHED` are known without its files.

    Raises:
        InputError: see `base_config`.
    """
    if base in PUBLISHED:
        return PUBLISHED[base]
    vision = base_config(base, revision).vision_config
    return BaseGeometry(base, vision.image_size, vision.patch_size, vision.num_hidden_layers, vision.hidden_size)
