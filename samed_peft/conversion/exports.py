"""Export adapters for other programs: SAMed, plain SAMs, stock PEFT on the fused projection, ONNX."""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samed_peft.adapters.folder import CONFIG_FILE, PEFT_FILE, WEIGHTS_FILE
from samed_peft.adapters.methods import adapter_tensors, lora_layers, lora_pair, write_lora
from samed_peft.adapters.save_load import load_adapter
from samed_peft.conversion.samed_format import require_plain_lora, write_tensors
from samed_peft.errors import InputError
from samed_peft.io import (
    FolderKind,
    atomic_dir,
    atomic_file,
    read_json,
    require_replaceable,
    require_writable_file,
    save_torch_weights,
    write_json,
)
from samed_peft.models.bases import open_sam
from samed_peft.models.modeling import SamForSemanticSegmentation, config_of

_SAM_FILE = "config.json"
_SAM_FOLDER = FolderKind(
    markers=(_SAM_FILE,), allowed=r"config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
)
_FUSED_FOLDER = FolderKind(
    markers=(_SAM_FILE, PEFT_FILE),  # an adapter of `save_adapter` lacks the SAM's config.json and has a model card
    allowed="|".join(re.escape(name) for name in (WEIGHTS_FILE, PEFT_FILE, CONFIG_FILE, _SAM_FILE)),
)
_MOST_ONNX_BYTES = (2 << 30) - (64 << 20)
"""An ONNX file is one protobuf message of at most 2 GiB, some of which the graph needs."""

_QKV = ("q_proj", "k_proj", "v_proj")


def _require_sam_target(directory: Path) -> None:
    """Refuse to replace anything but a SAM that `save_pretrained` wrote, alone in its folder."""
    require_replaceable(directory, _SAM_FOLDER)
    config = directory / _SAM_FILE
    if config.is_file():
        found = read_json(config)
        kind = found.get("model_type") if isinstance(found, dict) else None
        if kind != "sam":
            raise InputError(
                f"expected the config.json of a SAM at {directory}, found model_type {kind!r}, "
                "which must not be lost; choose an empty or new folder"
            )


def convert_sam(source: str | Path, directory: str | Path, *, image_size: int | None = None) -> None:
    """Write a SAM as a folder that `SamModel.from_pretrained` opens.

    Args:
        source: Meta's `.pth` of any geometry, Hub id or `SamModel` folder.
        directory: where to; a SAM already there is replaced.
        image_size: pixels per side to resize positions for, as SAMed does; None keeps the SAM's own.

    Raises:
        InputError: `source` is not a SAM, the directory holds something else, or `image_size` is not a positive
            multiple of the patch.
    """
    _require_sam_target(Path(directory))
    sam = open_sam(str(source))
    if image_size is not None:
        sam = SamForSemanticSegmentation.from_sam(sam, image_size=image_size).to_sam()
    with atomic_dir(directory) as folder:
        sam.save_pretrained(folder)


def export_merged(source: str | Path, directory: str | Path, *, base: str | None = None) -> None:
    """Write base and adapter as one plain SAM, whose outputs 0..K are the class maps.

    Raises:
        InputError: `source` is not an adapter, or the directory holds something else than a SAM.
    """
    _require_sam_target(Path(directory))
    merged = load_adapter(source, base=base, merge=True)
    with atomic_dir(directory) as folder:
        merged.save_pretrained(folder)


def export_samed(source: str | Path, file: str | Path, *, base: str | None = None) -> None:
    """Write an adapter as SAMed's `.pth`, which its `test.py --lora_ckpt` loads.

    Raises:
        InputError: SAMed's format cannot hold this adapter, or `file` exists.
    """
    require_writable_file(file, replace=False)
    save_torch_weights(write_tensors(source, base=base), file)


def export_peft_fused(source: str | Path, directory: str | Path, *, base: str | None = None) -> None:
    """Write an adapter that stock PEFT attaches to a plain `SamModel`, whose projection is a fused `qkv`.

    The encoder's updates of query and value become one of twice the rank: A stacks both A's, B holds both B's in
    blocks, zeros between. Those of SAMed_s in the decoder stay as they are. `config.json` beside it is the SAM it
    fits: its image size and K + 1 outputs.

        sam = SamModel.from_pretrained(BASE, config=SamConfig.from_pretrained(DIR), ignore_mismatched_sizes=True)
        model = PeftModel.from_pretrained(sam, DIR)

    BASE must have the adapter's image size already; `convert_sam` resizes one.

    Raises:
        InputError: the adapter is not plain LoRA, or the directory holds something else.
    """
    if Path(directory).resolve() == Path(source).resolve():
        raise InputError(f"{directory} is the adapter to be exported, which must not be lost; choose another folder")
    require_replaceable(directory, _FUSED_FOLDER)
    adapted = load_adapter(source, base=base)
    config, sam_config = config_of(adapted), adapted.get_base_model().config
    require_plain_lora(adapted, source, targets=_QKV)
    layers = lora_layers(adapted)
    pairs = {name: lora_pair(layer) for name, layer in layers.items() if ".mask_decoder." in name}
    if len({(*a.shape[:1], layers[name].scaling["default"]) for name, (a, _) in pairs.items()}) > 1:
        raise InputError("the decoder's layers differ in rank or alpha; export the adapter with --format merged")
    for name in dict.fromkeys(name.rpartition(".")[0] for name in layers if ".vision_encoder." in name):
        parts = {part: lora_pair(layers[f"{name}.{part}"]) for part in _QKV if f"{name}.{part}" in layers}
        pairs[f"{name}.qkv"] = _fused(parts, width=sam_config.vision_config.hidden_size)
    numbers = r"\d+" if config.layers is None else f"({'|'.join(map(str, config.layers))})"
    targets = rf"vision_encoder\.layers\.{numbers}\.attn\.qkv"
    if config.decoder == "lora":
        targets += rf"|mask_decoder\.transformer\..+\.({'|'.join(config.targets)})"
    trained_in_full = list(adapted.peft_config["default"].modules_to_save or ())
    with atomic_dir(directory) as folder:
        write_lora(pairs, adapter_tensors(adapted), folder, target_modules=targets, modules_to_save=trained_in_full)
        sam_config.save_pretrained(folder)
        write_json(folder / CONFIG_FILE, config.to_dict())


def _fused(pairs: Mapping[str, tuple[Tensor, Tensor]], *, width: int) -> tuple[Tensor, Tensor]:
    """A (n r, width) and B (3 width, n r) of `qkv` from those of n adapted projections."""
    b = torch.block_diag(*(pairs[name][1] if name in pairs else torch.zeros(width, 0) for name in _QKV))
    return torch.cat([pairs[name][0] for name in _QKV if name in pairs]), b


def export_onnx(source: str | Path, file: str | Path, *, base: str | None = None) -> float:
    """Write base and adapter as one ONNX file: `pixel_values` (B, 3, S, S) in [0, 1] to `logits` (B, K + 1, h, w).

    Class names, sizes and window are in the file's metadata, under `samed_config`. The file is run in onnxruntime
    before it appears.

    Returns:
        The largest difference of its logits from PyTorch's on random pixels.

    Raises:
        InputError: `source` is not an adapter, `file` exists, the extra `onnx` is not installed, the weights exceed
            the 2 GiB of one ONNX file (ViT-H does), or the outputs differ by more than a thousandth of the logits'
            range.
    """
    require_writable_file(file, replace=False)
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f'{error.name} is not installed; pip install "samed_peft[onnx]"') from error
    merged = load_adapter(source, base=base, merge=True)
    config = config_of(merged)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, config.image_size, config.image_size, generator=generator)
    weights = sum(tensor.nbytes for tensor in merged.state_dict().values())
    if weights > _MOST_ONNX_BYTES:
        raise InputError(
            f"expected at most {_MOST_ONNX_BYTES} bytes of weights in one ONNX file, found {weights} "
            f"in {source}; export it with --format merged"
        )
    model = _onnx_model(merged, pixels)
    onnx.helper.set_model_props(model, {"samed_config": json.dumps(config.to_dict())})
    with atomic_file(file) as temporary:
        onnx.save(model, temporary)
        with torch.inference_mode():
            expected = merged(pixel_values=pixels[:1]).logits.numpy()
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
        found = session.run(["logits"], {"pixel_values": pixels[:1].numpy()})[0]
        difference = float(np.abs(found - expected).max())
        if not difference <= 1e-3 * float(np.ptp(expected)):
            raise InputError(
                f"the ONNX model of {source} gives logits that differ by {difference:g}; nothing was written"
            )
    return difference


def _onnx_model(merged: SamForSemanticSegmentation, pixels: Tensor) -> Any:
    """The model in memory, so that the exporter leaves no file behind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program = torch.onnx.export(
            merged,
            (pixels,),
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch", min=1, max=256)}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # PyTorch's exporter through torch.export always returns one
    return program.model_proto


EXPORTS = {"samed": export_samed, "merged": export_merged, "peft-fused": export_peft_fused, "onnx": export_onnx}
"""Formats of `samed export`, each with its function of adapter, output and base."""
