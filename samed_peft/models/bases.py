"""Open base models: a Hub id, a folder, one of Meta's checkpoints or the tiny SAM -> a SAM and its fingerprint."""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, SamConfig, SamModel

from samed_peft.config import TINY_SAM, SamedConfig, is_hub_id
from samed_peft.errors import InputError
from samed_peft.models.base_files import check_base_config, check_base_folder, check_no_adapter, check_shards
from samed_peft.models.checkpoints import load_meta_checkpoint
from samed_peft.models.modeling import SamForSemanticSegmentation

_UNUSABLE = (
    OSError, ValueError, StrictDataclassError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError
)  # fmt: skip
"""Errors that Transformers raises for files that it cannot use, values of wrong types among them."""

TINY_SAM_DIR = Path(__file__).parent / "tiny_sam"


def load_sam(
    base: str | Path, *, class_names: Sequence[str], image_size: int = 512, revision: str | None = None
) -> SamForSemanticSegmentation:
    """Load a SAM to adapt: K + 1 class maps, new mask tokens, positions resized for `image_size`.

    Args:
        base: Hub id ("facebook/sam-vit-base"), local `SamModel` folder, Meta `.pth`, or "tiny-sam" for the small
            model that ships with this package.
        class_names: names of labels 1..K, background left out.
        image_size: pixels per side of the encoder's input.
        revision: commit or tag of a Hub id.

    Raises:
        InputError: `base` is missing or not a SAM, or `image_size` is not a multiple of its patch size.
    """
    config = SamedConfig(base=str(base), class_names=tuple(class_names), base_revision=revision, image_size=image_size)
    sam = open_sam(str(base), revision)
    sha256 = _fingerprint(sam)
    model = SamForSemanticSegmentation.from_sam(sam, num_labels=config.num_labels, image_size=image_size)
    model.base_sha256 = sha256
    model.base_revision = revision or vars(sam.config).get("_commit_hash")  # set by Transformers for the Hub
    model.samed_config = dataclasses.replace(config, base_sha256=sha256, base_revision=model.base_revision)
    return model


def require_base(base: str, name: str = "base") -> None:
    """Require that `base` is a file, a folder or a Hub id.

    Raises:
        InputError: otherwise; the message calls it `name`.
    """
    if base != TINY_SAM and not Path(base).exists() and not is_hub_id(base):
        raise InputError(f"{name} {base} is neither a file, nor a folder, nor a Hub id such as facebook/sam-vit-base")


def base_config(base: str, revision: str | None = None) -> SamConfig:
    """Read the settings of a base, any that `load_sam` takes; of Meta's files alone, the weights are read too.

    Raises:
        InputError: it is missing, damaged or not a SAM.
    """
    path = _path_of(base)
    if path.is_file():
        return load_meta_checkpoint(path).config
    require_base(base)
    source = str(path) if path.is_dir() else base
    if path.is_dir():
        check_base_folder(path)
        check_no_adapter(source, revision)  # one of the Hub, after its config was found
    try:
        values, _ = SamConfig.get_config_dict(source, revision=revision)
        check_base_config(values, f"config.json of base {base}")
        # By default Transformers asks on the terminal whether to run code from the folder.
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except _UNUSABLE as error:
        raise _cannot_open(base, error) from error
    if not isinstance(config, SamConfig):
        raise InputError(
            f"base {base} is a {config.model_type} model, not a SAM; use facebook/sam-vit-base, -large or -huge"
        )
    return config


def _path_of(base: str) -> Path:
    return TINY_SAM_DIR if base == TINY_SAM else Path(base)


def open_sam(base: str, revision: str | None = None) -> SamModel:
    """Open a SAM by any name that `load_sam` takes, unchanged.

    Raises:
        InputError: it is missing, damaged or not a SAM.
    """
    path = _path_of(base)
    if path.is_file():
        return load_meta_checkpoint(path)
    base_config(base, revision)
    source = str(path) if path.is_dir() else base
    check_no_adapter(source, revision)
    try:
        check_shards(source, revision)
        sam, info = SamModel.from_pretrained(
            source,
            revision=revision,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=True,  # never a pickle
        )
    except (SafetensorError, *_UNUSABLE) as error:
        raise _cannot_open(base, error) from error
    lacking = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lacking:
        raise InputError(f"base {base} lacks weights of a SAM: {', '.join(lacking[:5])} ({len(lacking)} in all)")
    if unread := sorted(key for key in info["unexpected_keys"] if key.startswith("vision_encoder.layers.")):
        raise InputError(
            f"base {base} has weights that its config.json leaves out: {', '.join(unread[:3])} ({len(unread)} in all); "
            "fetch it again"
        )
    return sam


def _fingerprint(sam: SamModel) -> str:
    """SHA-256 of the encoder and positional encoding at the base's own size; the decoder is saved with the adapter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(sam.state_dict().items()):
        if name.startswith(("vision_encoder.", "shared_image_embedding.")):
            if not torch.isfinite(tensor).all():
                raise InputError(f"the base's weight {name} holds values that are not finite; download it anew")
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.float().contiguous().numpy())
    return digest.hexdigest()


def recorded_base(base: str) -> str:
    """Make `base` absolute if it is a file or folder on disk, so that an adapter finds it from anywhere."""
    # Links are not resolved: their target, in a cache for instance, often has a meaningless name.
    return os.path.abspath(base) if base != TINY_SAM and os.path.exists(base) else base


@torch.no_grad()
def randomize_weights(sam: nn.Module) -> None:
    """Draw a SAM's weights anew, in place, at a scale that trains; Transformers initialises its encoder near 1e-10.

    Fourier features of positions get SAM's frequencies, of deviation 1; Transformers' are so high that they alias.
    """
    for name, parameter in sam.named_parameters():
        if "positional_embedding" in name:
            nn.init.normal_(parameter)
        elif parameter.ndim >= 2:
            nn.init.trunc_normal_(parameter, std=0.02 if "encoder" in name else parameter[0].numel() ** -0.5)
        else:
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)


def _cannot_open(base: str, error: Exception) -> InputError:
    """Build the error for a base that Transformers cannot open, with advice for offline use of a Hub id."""
    if isinstance(error, InputError):
        return error
    message = f"base {base} cannot be opened as a SAM: {' '.join(str(error).split()):.1000}"
    if is_hub_id(base) and isinstance(error, OSError):
        message += "; without a connection, give as base a folder that Transformers saved or one of Meta's .pth files"
    return InputError(message)
