"""Read and validate an adapter's files."""

import re
from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftType
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor

from samed_peft.adapters.folder import CARD_FILE, CONFIG_FILE, PEFT_FILE, WEIGHTS_FILE, first_line
from samed_peft.adapters.peft_values import check_values
from samed_peft.config import METHODS, SamedConfig, Storage
from samed_peft.errors import InputError
from samed_peft.io import FolderKind, read_json, tensor_shapes
from samed_peft.models.bases import require_base

_OWN_FILES = "|".join(re.escape(name) for name in (WEIGHTS_FILE, PEFT_FILE, CONFIG_FILE, CARD_FILE))
_OWN_FILES += r"|report\.(json|csv|html|md)|pictures|plan\.json"
_SYSTEM_FILES = r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini|\.nfs.*|\.ipynb_checkpoints"
"""Files that file managers, NFS and Jupyter leave in folders that they show."""

ADAPTER_FOLDER = FolderKind(markers=(CONFIG_FILE,), allowed=f"{_OWN_FILES}|{_SYSTEM_FILES}")
"""An adapter, alone or with its report and plan."""

_PEFT_TYPES = [kind.value for kind in PeftType]
PEFT_ERRORS = (TypeError, ValueError, LookupError, AttributeError, RuntimeError, ImportError, re.error)
"""Errors that PEFT raises for values it was not written for."""


def require_recorded_base(config: SamedConfig, folder: Path) -> None:
    """Require that the base which an adapter records can name a SAM here.

    Raises:
        InputError: naming the file that records it, and the option for another location.
    """
    try:
        require_base(config.base)
    except InputError as error:
        raise InputError(
            f"{error}; {folder / CONFIG_FILE} records it: if the SAM lies elsewhere now, give that place as base, or "
            "--base on the command line"
        ) from error


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors whose names or shapes are not the expected ones.

    Raises:
        InputError: naming the first of them, with both shapes.
    """
    for problem, keys in (
        ("lacks", expected.keys() - found.keys()),
        ("has unknown", found.keys() - expected.keys()),
    ):
        if keys:
            raise InputError(
                f"{path} {problem} weights {', '.join(sorted(keys)[:3])} ({len(keys)} in all); "
                "was it made for another base?"
            )
    for key, tensor in expected.items():
        if tensor.shape != found[key].shape:
            raise InputError(
                f"{path}: {key} should be {tuple(tensor.shape)} for this base, these classes and this rank, "
                f"but is {tuple(found[key].shape)}"
            )


def read_peft_config(folder: Path, config: SamedConfig) -> PeftConfig:
    """Read `adapter_config.json` as PEFT's config, without letting it name code that PEFT would import.

    Raises:
        InputError: it is missing, damaged, or of another rank than `config`.
    """
    if not (folder / PEFT_FILE).is_file():
        raise InputError(f"{folder} is not an adapter directory: it lacks {PEFT_FILE}")
    values = read_json(folder / PEFT_FILE)
    if not isinstance(values, dict) or values.get("peft_type") not in _PEFT_TYPES:
        found = values.get("peft_type") if isinstance(values, dict) else type(values).__name__
        raise InputError(
            f"expected PEFT's config of an adapter with a peft_type, LORA for example, in {folder / PEFT_FILE}, "
            f"found {found!r}; save the adapter again"
        )
    if ".qkv" in str(values.get("target_modules")):
        raise InputError(
            f"{folder} is an export for stock PEFT (samed export --format peft-fused): it fits a plain SamModel, by "
            "PeftModel.from_pretrained(sam, folder) as in the README; here, give the adapter it was exported from"
        )
    if values.get("megatron_config") is not None:  # PEFT imports whatever module `megatron_core` names
        raise InputError(f"{folder / PEFT_FILE} asks for Megatron, which SAM does not use; save the adapter again")
    check_values(values, config, folder / PEFT_FILE)
    try:
        peft_config = PeftConfig.from_pretrained(str(folder))
    except PEFT_ERRORS as error:
        raise unusable(folder, error) from error
    if isinstance(peft_config, LoraConfig) and peft_config.r != config.rank and not _has_own_ranks(peft_config, config):
        raise InputError(
            f"{folder}: {CONFIG_FILE} says rank {config.rank}, {PEFT_FILE} says {peft_config.r}; "
            "the files of two adapters are mixed up"
        )
    return peft_config


def _has_own_ranks(peft_config: PeftConfig, config: SamedConfig) -> bool:
    """Whether an adapter is stored with ranks other than the one that its config names."""
    storage = METHODS[config.method].storage
    return storage is Storage.RANKS_LEFT or (storage is Storage.TWICE_THE_RANK and peft_config.r % 2 == 0)


def unusable(folder: Path, error: Exception) -> InputError:
    """The error to raise when PEFT fails on an adapter's config with one of `PEFT_ERRORS`."""
    return InputError(
        f"PEFT cannot use {folder / PEFT_FILE}: {first_line(error)}; the file is damaged, save the adapter again"
    )


def check_ranks(peft_config: PeftConfig, folder: Path) -> None:
    """Refuse ranks that the weights do not have, before PEFT allocates memory for them.

    Raises:
        InputError: naming the rank.
    """
    values = peft_config.to_dict()
    patterns = values.get("rank_pattern") or {}
    shapes = tensor_shapes(folder / WEIGHTS_FILE)
    lora = {shape[0] for name, shape in shapes.items() if ".lora_A." in name and shape}
    stored = lora if isinstance(peft_config, LoraConfig) else {size for shape in shapes.values() for size in shape}
    has_layers = values.get("target_modules") != DUMMY_TARGET_MODULES
    # With a pattern for each layer, no layer has the common rank.
    rank = values.get("r") if has_layers else None  # 0 for OFT, whose blocks have a size instead
    is_left = bool(rank) and not (patterns and isinstance(rank, int) and rank < max(stored, default=0))
    asked = [*patterns.values(), *([rank] if is_left else [])]
    absent = [rank for rank in asked if type(rank) is not int or rank not in stored]
    if absent:
        raise InputError(
            f"{folder / PEFT_FILE} asks for rank {absent[0]!r}, but the tensors of {WEIGHTS_FILE} have "
            f"{', '.join(map(str, sorted(stored)[:5])) or 'none'}; the files of two adapters are mixed up"
        )
