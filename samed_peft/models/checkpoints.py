"""Convert weights: Meta's SAM checkpoints -> `SamModel`, positions for other sizes, fused and split projections."""

import copy
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from torch.nn import functional as F
from transformers import SamConfig, SamModel

from samed_peft.errors import InputError
from samed_peft.io import load_torch_weights

POSITIONS = "shared_image_embedding.positional_embedding"
"""Name of the Fourier frequencies of positions, which no training changes."""

_QKV = ("q_proj", "k_proj", "v_proj")
_TIED_POSITIONS = "prompt_encoder.shared_embedding.positional_embedding"

# Pairs (Meta's name, Transformers' name), applied in order to a whole key.
_RENAMES = (
    (r"^image_encoder\.patch_embed\.proj\.", "vision_encoder.patch_embed.projection."),
    (r"^image_encoder\.blocks\.(\d+)\.norm(\d)\.", r"vision_encoder.layers.\1.layer_norm\2."),
    (r"^image_encoder\.blocks\.", "vision_encoder.layers."),
    (r"^image_encoder\.neck\.0\.", "vision_encoder.neck.conv1."),
    (r"^image_encoder\.neck\.1\.", "vision_encoder.neck.layer_norm1."),
    (r"^image_encoder\.neck\.2\.", "vision_encoder.neck.conv2."),
    (r"^image_encoder\.neck\.3\.", "vision_encoder.neck.layer_norm2."),
    (r"^image_encoder\.", "vision_encoder."),
    (r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$", POSITIONS),
    (r"^prompt_encoder\.point_embeddings\.", "prompt_encoder.point_embed."),
    (r"^prompt_encoder\.mask_downscaling\.0\.", "prompt_encoder.mask_embed.conv1."),
    (r"^prompt_encoder\.mask_downscaling\.1\.", "prompt_encoder.mask_embed.layer_norm1."),
    (r"^prompt_encoder\.mask_downscaling\.3\.", "prompt_encoder.mask_embed.conv2."),
    (r"^prompt_encoder\.mask_downscaling\.4\.", "prompt_encoder.mask_embed.layer_norm2."),
    (r"^prompt_encoder\.mask_downscaling\.6\.", "prompt_encoder.mask_embed.conv3."),
    (r"^mask_decoder\.transformer\.(.*)norm(\d)\.", r"mask_decoder.transformer.\1layer_norm\2."),
    (r"\.norm_final_attn\.", ".layer_norm_final_attn."),
    (r"\.output_upscaling\.0\.", ".upscale_conv1."),
    (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
    (r"\.output_upscaling\.3\.", ".upscale_conv2."),
)
_MLP_LAYER = re.compile(
    r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.layers\.(\d+)\.(.*)$"
)
MOST_OUTPUTS = 256
"""Largest number of mask tokens: labels are uint8."""

DECODER_NORM_EPS = 1e-5
"""Epsilon of the layer norms in Meta's and SAMed's mask decoder: PyTorch's default."""


def rename_meta_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights from Meta's names to Transformers'; the tensors are shared.

    Works for whole checkpoints and for parts of one, such as the decoder in SAMed's files.
    """
    last_layers = dict(sorted((match[1], int(match[2])) for match in map(_MLP_LAYER.match, state) if match))
    renamed = {}
    for old, tensor in state.items():
        key = old
        if match := _MLP_LAYER.match(key):
            index, last = int(match[2]), last_layers[match[1]]
            layer = "proj_in" if index == 0 else "proj_out" if index == last else f"layers.{index - 1}"
            key = f"{match[1]}.{layer}.{match[3]}"
        for pattern, replacement in _RENAMES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = tensor
    if POSITIONS in renamed:
        renamed[_TIED_POSITIONS] = renamed[POSITIONS]
    return renamed


def infer_config(state: Mapping[str, Tensor]) -> SamConfig:
    """Read the geometry of a SAM from its weights under Transformers' names.

    Weights do not show the number of decoder heads; it is 8 in every published SAM. Raises KeyError, IndexError or
    ValueError for weights that are missing, misshapen or too many.
    """
    vision, decoder = _vision_config(state), _decoder_config(state)
    shared = {"hidden_size": vision["output_channels"]}
    prompt = {name: vision[name] for name in ("image_size", "patch_size")}
    prompt["mask_input_channels"] = state["prompt_encoder.mask_embed.conv2.weight"].shape[0]
    return SamConfig(vision_config=vision, prompt_encoder_config=shared | prompt, mask_decoder_config=shared | decoder)


def _vision_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    embedding = state["vision_encoder.patch_embed.projection.weight"]
    width, patch = embedding.shape[0], embedding.shape[2]
    grid = state["vision_encoder.pos_embed"].shape[1]
    layers = "vision_encoder.layers."
    depth = _number_of_layers(state, layers)
    spans = [(state[f"{layers}{i}.attn.rel_pos_h"].shape[0] + 1) // 2 for i in range(depth)]
    mlp_dim = state[f"{layers}0.mlp.lin1.weight"].shape[0]
    return {
        "hidden_size": width,
        "output_channels": state["vision_encoder.neck.conv1.weight"].shape[0],
        "num_hidden_layers": depth,
        "num_attention_heads": width // state[f"{layers}0.attn.rel_pos_h"].shape[1],
        "image_size": grid * patch,
        "patch_size": patch,
        "mlp_dim": mlp_dim,
        "mlp_ratio": mlp_dim / width,
        "window_size": min(spans),
        "global_attn_indexes": [i for i, span in enumerate(spans) if span == grid],
        "num_pos_feats": state[POSITIONS].shape[1],
    }


def _decoder_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    layers, iou_head = "mask_decoder.transformer.layers.", "mask_decoder.iou_prediction_head."
    cross = state[f"{layers}0.cross_attn_token_to_image.q_proj.weight"]
    tokens = state["mask_decoder.mask_tokens.weight"].shape[0]
    if tokens > MOST_OUTPUTS:
        raise ValueError(f"{tokens} mask tokens, more than {MOST_OUTPUTS}")
    return {
        "mlp_dim": state[f"{layers}0.mlp.lin1.weight"].shape[0],
        "num_hidden_layers": _number_of_layers(state, layers),
        "layer_norm_eps": DECODER_NORM_EPS,
        "attention_downsample_rate": cross.shape[1] // cross.shape[0],
        "num_multimask_outputs": tokens - 1,
        "iou_head_depth": len({key.rsplit(".", 1)[0] for key in state if key.startswith(iou_head)}),
        "iou_head_hidden_dim": state[f"{iou_head}proj_in.weight"].shape[0],
    }


def _number_of_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    numbers = {int(key[len(prefix) :].split(".")[0]) for key in state if key.startswith(prefix)}
    if numbers != set(range(len(numbers))):  # otherwise a single name could ask for millions of layers
        raise ValueError(f"{prefix} are numbered up to {max(numbers)}, but there are only {len(numbers)}")
    return len(numbers)


def load_meta_checkpoint(path: Path) -> SamModel:
    """Load a SAM of any geometry in Meta's `.pth` format as a `SamModel` in float32.

    Raises:
        InputError: the file is not a SAM checkpoint; missing, unexpected or misshapen weights are named.
    """
    state = rename_meta_keys(load_torch_weights(path))
    try:
        config = infer_config(state)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")  # reported below
            model = SamModel(config)
    except (LookupError, ValueError, ArithmeticError, RuntimeError, TypeError, StrictDataclassError) as error:
        raise InputError(
            f"{path} is not a SAM checkpoint in Meta's format: its geometry cannot be read ({error}). "
            "Expected sam_vit_b_01ec64.pth, sam_vit_l_0b3195.pth, sam_vit_h_4b8939.pth or one shaped like them; "
            "a checkpoint of SAMed needs its SAM: give --base"
        ) from error
    expected = model.state_dict()
    misshapen = {key for key in expected.keys() & state.keys() if expected[key].shape != state[key].shape}
    lacking, unknown = expected.keys() - state.keys(), state.keys() - expected.keys()
    for problem, keys in (("lacks", lacking), ("has unknown", unknown), ("has misshapen", misshapen)):
        if keys:
            raise InputError(f"{path} {problem} weights: {', '.join(sorted(keys)[:5])} ({len(keys)} in all)")
    model.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
    model.tie_weights()
    return model.eval()


def semantic_config(config: SamConfig, *, num_labels: int | None, image_size: int | None) -> SamConfig:
    """Copy a SAM's config for other classes, another size (a multiple of the patch's), or both; None keeps its own."""
    config = copy.deepcopy(config)
    # Meta's decoder was trained with it; Transformers' 1e-6 moves logits a hundred times more than rounding does.
    config.mask_decoder_config.layer_norm_eps = DECODER_NORM_EPS
    if num_labels is not None:
        config.mask_decoder_config.num_multimask_outputs = num_labels - 1
    if image_size is not None:
        patch = config.vision_config.patch_size
        if image_size <= 0 or image_size % patch:
            raise InputError(f"image_size must be a positive multiple of the patch size {patch}; found {image_size}")
        config.vision_config.image_size = image_size
        config.prompt_encoder_config.image_size = image_size
        config.prompt_encoder_config.image_embedding_size = image_size // patch
    return config


def resize_positions(state: Mapping[str, Tensor], config: SamConfig) -> dict[str, Tensor]:
    """Resize absolute and global relative positions bilinearly for `config`'s image size, as in SAMed."""
    vision = config.vision_config
    grid = vision.image_size // vision.patch_size
    resized = dict(state)
    absolute = state.get("vision_encoder.pos_embed")
    if absolute is not None and absolute.shape[1] != grid:
        image = F.interpolate(absolute.movedim(-1, 1), size=(grid, grid), mode="bilinear", align_corners=False)
        resized["vision_encoder.pos_embed"] = image.movedim(1, -1).contiguous()
    for index in vision.global_attn_indexes if vision.use_rel_pos else ():
        for axis in "hw":
            key = f"vision_encoder.layers.{index}.attn.rel_pos_{axis}"
            table = state[key]
            if len(table) != 2 * grid - 1:
                size = (2 * grid - 1, table.shape[1])
                resized[key] = F.interpolate(table[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    return resized


def split_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split the encoder's fused `qkv` weights into `q_proj`, `k_proj`, `v_proj`; keep all others."""
    split = dict(state)
    for key in [key for key in state if ".attn.qkv." in key]:
        for name, part in zip(_QKV, split.pop(key).chunk(3), strict=True):
            split[key.replace(".qkv.", f".{name}.")] = part
    return split


def fuse_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `split_qkv`."""
    fused = dict(state)
    for key in [key for key in state if key.startswith("vision_encoder.") and ".attn.q_proj." in key]:
        parts = [fused.pop(key.replace(".q_proj.", f".{name}.")) for name in _QKV]
        fused[key.replace(".q_proj.", ".qkv.")] = torch.cat(parts)
    return fused
