"""SAMed's checkpoints (`epoch_159.pth`) <-> adapters, without loss in either direction.

The format is that of `LoRA_Sam.save_lora_parameters` in the original code (arXiv 2304.13785): numbered LoRA matrices,
then the prompt encoder and the mask decoder under Meta's names. SAMed_s leaves the decoder's transformer out and adds
LoRA matrices for it.
"""

import itertools
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import set_peft_model_state_dict
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor
from transformers import SamConfig

from samed_peft.adapters.checks import ADAPTER_FOLDER, check_tensors
from samed_peft.adapters.methods import PEFT_PREFIX, adapter_tensors, lora_layers, lora_pair
from samed_peft.adapters.save_load import UNUSED_PROMPTS, add_lora, load_adapter, save_adapter
from samed_peft.config import BTCV_ORIENTATION, METHODS, SYNAPSE_CLASSES, SamedConfig
from samed_peft.errors import InputError
from samed_peft.io import load_torch_weights, require_replaceable
from samed_peft.models.bases import load_sam, recorded_base
from samed_peft.models.checkpoints import MOST_OUTPUTS, POSITIONS, rename_meta_keys
from samed_peft.models.modeling import SamForSemanticSegmentation, config_of

_DECODER_ATTENTIONS = {"sa": "self_attn", "cti": "cross_attn_token_to_image", "cit": "cross_attn_image_to_token"}
_TRANSFORMER = "mask_decoder.transformer"
_FIRST_A, _TOKENS = "w_a_000", "mask_decoder.mask_tokens.weight"


def _lora_keys(config: SamConfig, decoder: str) -> dict[str, tuple[str, str]]:
    """SAMed's name of a matrix -> the linear layer it belongs to, and "A" or "B"; in SAMed's order."""
    attentions = {"w": [f"vision_encoder.layers.{i}.attn" for i in range(config.vision_config.num_hidden_layers)]}
    if decoder == "lora":
        blocks = [f"{_TRANSFORMER}.layers.{i}" for i in range(config.mask_decoder_config.num_hidden_layers)]
        for prefix, name in _DECODER_ATTENTIONS.items():
            attentions[prefix] = [f"{block}.{name}" for block in blocks]
    keys: dict[str, tuple[str, str]] = {}
    for (prefix, names), letter in itertools.product(attentions.items(), "ab"):
        modules = [f"{name}.{p}_proj" for name in names for p in "qv"]
        keys |= {f"{prefix}_{letter}_{n:03d}": (module, letter.upper()) for n, module in enumerate(modules)}
    if decoder == "lora":
        final = f"{_TRANSFORMER}.final_attn_token_to_image"
        keys |= {f"fati_{p}{letter}": (f"{final}.{p}_proj", letter.upper()) for p in "qv" for letter in "ab"}
    return keys


def _meta_names(config: SamConfig, *, decoder: str) -> dict[str, str]:
    """Meta's -> Transformers' names of prompt encoder and mask decoder, in the order that SAMed saves them."""
    part, prompt = config.mask_decoder_config, config.prompt_encoder_config
    sizes = [(side, side) for side in (prompt.image_embedding_size, prompt.image_size)]
    heads = {name: vars(part)[name] for name in ("num_multimask_outputs", "iou_head_depth", "iou_head_hidden_dim")}
    with torch.device("meta"):
        transformer = TwoWayTransformer(
            part.num_hidden_layers, part.hidden_size, part.num_attention_heads, part.mlp_dim
        )
        prompts = PromptEncoder(part.hidden_size, *sizes, prompt.mask_input_channels)
        masks = MaskDecoder(transformer_dim=part.hidden_size, transformer=transformer, **heads)
    state = {f"prompt_encoder.{key}": value for key, value in prompts.state_dict().items()}
    state |= {f"mask_decoder.{key}": value for key, value in masks.state_dict().items()}
    # Renaming keeps the order, and adds the second name of a tied weight at the end.
    names = zip(state, rename_meta_keys(state), strict=False)
    return {key: name for key, name in names if decoder == "full" or "transformer" not in key}


def read_samed(
    path: str | Path,
    base: str,
    *,
    image_size: int = 512,
    input_size: int | None = None,
    class_names: Sequence[str] | None = None,
    orientation: str | None = None,
) -> PeftModel:
    """Load SAMed's or SAMed_s' `.pth` onto a base, in evaluation mode.

    Rank, classes, layers and width are read from the file, which does not record the sizes in pixels.

    Args:
        path: the checkpoint.
        base: Hub id, `SamModel` folder or Meta `.pth` of the SAM it was trained on.
        image_size: pixels per side that the encoder sees.
        input_size: SAMed's bottleneck at prediction, 224 in its test, or None.
        class_names: names of labels 1..K; by default Synapse's organs if there are eight.
        orientation: axis codes of the scans it was trained on; by default those of raw BTCV if the classes are
            Synapse's, else unknown.

    Raises:
        InputError: the file is damaged, holds Python objects or is not SAMed's; it belongs to a base of other depth,
            width or positional encoding; the numbers of `class_names` and of its classes differ.
    """
    path = Path(path)
    state = load_torch_weights(path)
    _check_samed(state, path)
    decoder = "lora" if "fati_qa" in state else "full"
    names = _named(class_names, len(state[_TOKENS]) - 1, path)
    config = SamedConfig(
        recorded_base(base),
        names,
        image_size=image_size,
        input_size=input_size,
        orientation=orientation or (BTCV_ORIENTATION if names == SYNAPSE_CLASSES else None),
        preset=preset_name(decoder, width=state[_FIRST_A].shape[1], layers=_encoder_layers(state)),
        rank=state[_FIRST_A].shape[0],
        decoder=decoder,
    )
    sam = load_sam(base, class_names=config.class_names, image_size=image_size)
    _check_base(state, sam, path)
    tensors = _adapter_tensors(state, sam.config, decoder)
    own_prompts = _own_prompts(tensors, sam)
    adapted = add_lora(sam, config, also_save=own_prompts)
    expected = adapter_tensors(adapted)
    of_base = {key for key in tensors.keys() - expected.keys() if key.startswith(f"{PEFT_PREFIX}prompt_encoder.")}
    tensors = {key: tensor for key, tensor in tensors.items() if key not in of_base}
    check_tensors(tensors, expected, path)
    set_peft_model_state_dict(adapted, tensors)
    return adapted.eval()


def convert_samed(
    path: str | Path, base: str, directory: str | Path, *, dtype: str = "float32", **options: Any
) -> SamedConfig:
    """Write SAMed's or SAMed_s' `.pth` as an adapter directory.

    Args:
        path: the checkpoint.
        base: the SAM it was trained on.
        directory: where to; an adapter already there is replaced.
        dtype: of the stored weights; "float16" and "bfloat16" halve the file.
        options: as for `read_samed`.

    Returns:
        What was read from the file and recorded.

    Raises:
        InputError: as `read_samed` and `save_adapter`.
    """
    require_replaceable(directory, ADAPTER_FOLDER)
    adapted = read_samed(path, base, **options)
    save_adapter(adapted, directory, dtype=dtype)
    return config_of(adapted)


def _check_samed(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse files without the tensors that rank and classes are read from."""
    if _FIRST_A not in state or _TOKENS not in state:
        raise InputError(
            f"expected SAMed's checkpoint with {_FIRST_A} and {_TOKENS} in {path}, found "
            f"{', '.join(list(state)[:3])}; Meta's checkpoints are converted without --base"
        )
    for key in (_FIRST_A, _TOKENS):
        if state[key].ndim != 2 or not state[key].numel():
            raise InputError(
                f"expected two dimensions in {key}, found shape {tuple(state[key].shape)} in {path}; the file is not "
                "a checkpoint of SAMed, or damaged"
            )
    tokens = len(state[_TOKENS])
    if not 2 <= tokens <= MOST_OUTPUTS:
        raise InputError(
            f"expected 2 to {MOST_OUTPUTS} rows in {_TOKENS}, background and a class at least, found {tokens} in "
            f"{path}; masks hold labels up to {MOST_OUTPUTS - 1}"
        )


def _encoder_layers(state: Mapping[str, Tensor]) -> int:
    numbers = [int(match[1]) for key in state if (match := re.fullmatch(r"w_a_(\d{3,9})", key))]
    return (max(numbers) + 2) // 2


def preset_name(decoder: str, *, width: int, layers: int) -> str:
    """The published recipe that trained a checkpoint of this shape; SAMed_h adapts ViT-H."""
    if decoder == "lora":
        return "samed_s"
    return "samed_h" if (width, layers) == (1280, 32) else "samed"


def _named(class_names: Sequence[str] | None, number: int, path: Path) -> tuple[str, ...]:
    if class_names is None:
        if number == len(SYNAPSE_CLASSES):
            return SYNAPSE_CLASSES
        return tuple(f"class {label}" for label in range(1, number + 1))
    if len(class_names) != number:
        raise InputError(
            f"expected {number} class names, as many as {path} has besides background, found {len(class_names)}: "
            f"{', '.join(class_names)}"
        )
    return tuple(class_names)


def _check_base(state: Mapping[str, Tensor], sam: SamForSemanticSegmentation, path: Path) -> None:
    """Refuse a base of another depth, width or positional encoding."""
    vision = sam.config.vision_config
    found = {"layers": _encoder_layers(state), "width": state[_FIRST_A].shape[-1]}
    expected = {"layers": vision.num_hidden_layers, "width": vision.hidden_size}
    if found != expected:
        raise InputError(
            f"{path} adapts an encoder of {found['layers']} layers and width {found['width']}, but the base has "
            f"{expected['layers']} layers and width {expected['width']}; give the SAM it was trained on"
        )
    key = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    own = sam.shared_image_embedding.positional_embedding
    # A file in half precision holds the base's matrix rounded.
    if key not in state or not torch.equal(state[key], own.detach().to(state[key].dtype)):
        raise InputError(
            f"{path} has another positional encoding than the base ({key}), which no training changes; "
            "give the SAM it was trained on"
        )


def _adapter_tensors(state: Mapping[str, Tensor], config: SamConfig, decoder: str) -> dict[str, Tensor]:
    """SAMed's tensors under PEFT's names; unknown ones keep their names, which the caller reports."""
    names = {key: f"{module}.lora_{letter}.weight" for key, (module, letter) in _lora_keys(config, decoder).items()}
    tensors = {names[key]: tensor for key, tensor in state.items() if key in names}
    renamed = rename_meta_keys({key: tensor for key, tensor in state.items() if key not in names})
    tensors |= {key: value for key, value in renamed.items() if key != POSITIONS and "shared_embedding" not in key}
    return {f"{PEFT_PREFIX}{key}": value.float() for key, value in tensors.items()}


def _own_prompts(tensors: Mapping[str, Tensor], sam: SamForSemanticSegmentation) -> list[str]:
    """Parts of the prompt encoder that differ from the base's; no loss of SAMed reaches them, so none should."""
    base = {f"{PEFT_PREFIX}{key}": value for key, value in sam.state_dict().items()}
    differing = [key for key in tensors if key in base and not torch.equal(tensors[key], base[key])]
    return [part for part in UNUSED_PROMPTS if any(f"{part}." in key for key in differing)]


def write_tensors(source: str | Path, *, base: str | None = None) -> dict[str, Tensor]:
    """The tensors that SAMed's code would have saved of an adapter, in its order: the inverse of `read_samed`.

    Adapters that SAMed's format cannot hold are refused.
    """
    adapted = load_adapter(source, base=base)
    config, sam_config = config_of(adapted), adapted.get_base_model().config
    require_plain_lora(adapted, source, targets=("q_proj", "v_proj"))
    if set(config.targets) != {"q_proj", "v_proj"} or config.layers is not None:
        raise InputError(
            f"SAMed's format holds LoRA on q_proj and v_proj of all layers, found {', '.join(config.targets)} of "
            f"{'all' if config.layers is None else list(config.layers)} in {source}; export it with --format merged"
        )
    if config.resampling != "samed" or config.fillings:
        seen = next(iter(config.fillings), f"{config.resampling} resampling")
        raise InputError(
            f"SAMed's code resizes from corner to corner and shows each slice alone, but the adapter in {source} was "
            f"trained with {seen}, so its masks would differ there; export it with --format merged"
        )
    _warn_of_lost(config)
    # SAMed's code has no scaling: it is multiplied into B.
    pairs = {name: dict(zip("AB", lora_pair(layer), strict=True)) for name, layer in lora_layers(adapted).items()}
    keys = _lora_keys(sam_config, config.decoder)
    lora = {key: pairs[f"{PEFT_PREFIX}{module}"][letter] for key, (module, letter) in keys.items()}
    last = {key: lora.pop(key) for key in keys if key.startswith("fati")}
    whole = dict(adapted.get_base_model().state_dict())
    whole |= {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in adapter_tensors(adapted).items()}
    rest = {key: whole[name] for key, name in _meta_names(sam_config, decoder=config.decoder).items()}
    return {key: tensor.float().clone().contiguous() for key, tensor in (lora | rest | last).items()}


def require_plain_lora(adapted: PeftModel, source: str | Path, *, targets: Sequence[str]) -> None:
    """Refuse adapters whose encoder has no LoRA, another kind of it, on other layers, or of several ranks."""
    lora, method = adapted.peft_config["default"], config_of(adapted).method
    layers = {name: layer for name, layer in lora_layers(adapted).items() if ".vision_encoder." in name}
    is_plain = isinstance(lora, LoraConfig) and not lora.use_dora and lora.bias == "none" and METHODS[method].plain_lora
    if not is_plain or not layers:
        kind = f"{type(lora).__name__} of {method}" if layers else f"none ({method})"
        raise InputError(
            f"this format holds plain LoRA alone, found {kind} in {source}; export it with --format merged"
        )
    others = {name.rpartition(".")[2] for name in layers} - set(targets)
    ranks = {layer.r["default"] for layer in layers.values()}
    if others or len(ranks) > 1:
        found = f"some on {', '.join(sorted(others))}" if others else f"ranks {', '.join(map(str, sorted(ranks)))}"
        raise InputError(
            f"this format holds LoRA of one rank on {', '.join(targets)}, found {found} in {source}; "
            "export it with --format merged"
        )


def _warn_of_lost(config: SamedConfig) -> None:
    """Warn of what SAMed's format cannot record, so that masks differ there."""
    lost = []
    if config.label_values is not None:
        lost.append(f"labels 1 to {len(config.class_names)} in place of {list(config.label_values)}")
    if config.keep_largest:
        lost.append(f"all parts of {', '.join(config.keep_largest)}, not the largest alone")
    if config.tta != "none" or config.smoothing_mm:
        lost.append("masks without test-time augmentation and smoothing")
    if lost:
        warnings.warn(f"SAMed's code will write {' and '.join(lost)}: its format does not record it", stacklevel=4)
