"""Add adapters to a SAM through PEFT, save them, and load them after checking their files."""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import set_peft_model_state_dict

from samed_peft.adapters.card import model_card
from samed_peft.adapters.checks import (
    ADAPTER_FOLDER,
    PEFT_ERRORS,
    check_ranks,
    check_tensors,
    read_peft_config,
    require_recorded_base,
    unusable,
)
from samed_peft.adapters.folder import (
    CARD_FILE,
    WEIGHTS_FILE,
    adapter_folder,
    check_adapter_files,
    read_config,
    require_complete,
    write_config,
)
from samed_peft.adapters.methods import adapter_tensors, initial_updates, merged, new_peft_config, save_as_lora
from samed_peft.config import METHODS, SamedConfig, Storage, TrainingConfig
from samed_peft.errors import InputError
from samed_peft.evaluation.report import Report
from samed_peft.io import atomic_dir, load_tensors, read_whole, require_replaceable, save_tensors, write_text
from samed_peft.models.bases import load_sam
from samed_peft.models.modeling import SamForSemanticSegmentation, config_of
from samed_peft.models.precision import DTYPES, quantize_layers

UNUSED_PROMPTS = (
    *(f"prompt_encoder.point_embed.{index}" for index in range(4)),
    "prompt_encoder.not_a_point_embed",
    "prompt_encoder.mask_embed",
)
"""Parts of the prompt encoder that segmentation without prompts does not run, so no loss reaches them."""

_IOU_HEAD = "iou_prediction_head"


def add_lora(model: SamForSemanticSegmentation, config: SamedConfig, *, also_save: Sequence[str] = ()) -> PeftModel:
    """Make a SAM adaptable as SAMed does: LoRA in the encoder, mask decoder and `no_mask_embed` trained in full.

    The rest of the encoder and the IoU head, which no loss reaches, are frozen. With `config.decoder` "lora", as in
    SAMed_s, the decoder's transformer is frozen and has LoRA as well. `config.method` can replace LoRA by any other
    of `METHODS`. The model carries `config`, completed with the base's fingerprint and revision.

    Args:
        model: from `load_sam`; it is changed in place.
        config: method, rank, alpha, targets, layers, decoder and dropout; classes and size must be the model's.
        also_save: frozen parts, of `UNUSED_PROMPTS`, that the adapter stores weights of.

    Raises:
        InputError: the model was loaded with other classes or another image size than `config` names, or does not
            have one of its layers.
    """
    _check_fits(model, config)
    peft_config = new_peft_config(
        config,
        trained_in_full=["no_mask_embed", *_decoder_parts(model, config), *also_save],
        num_layers=model.config.vision_config.num_hidden_layers,
    )
    adapted = _attach(model, peft_config, config)
    model.initial_updates = initial_updates(adapted)
    return adapted


def _decoder_parts(model: SamForSemanticSegmentation, config: SamedConfig) -> list[str]:
    """Parts of the decoder that are trained in full and saved; the IoU head is only saved."""
    if config.decoder == "full":
        return ["mask_decoder"]
    children = [name for name, _ in model.mask_decoder.named_children() if name not in ("transformer", "activation")]
    mlps = "output_hypernetworks_mlps"  # a list, which PEFT takes one by one
    return [n for n in children if n != mlps] + [f"{mlps}.{i}" for i in range(config.num_labels)]


def _attach(model: SamForSemanticSegmentation, peft_config: PeftConfig, config: SamedConfig) -> PeftModel:
    model.samed_config = dataclasses.replace(
        config,
        base_sha256=model.base_sha256,
        base_revision=config.base_revision or model.base_revision,
    )
    if METHODS[config.method].quantized:
        quantize_layers(model.vision_encoder.layers)
    peft_config.base_model_name_or_path = None  # PEFT warns of any name but its own guess
    with warnings.catch_warnings():
        # PEFT 0.21 uses a name that Transformers 5.23 deprecates; users can do nothing about it.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        adapted = get_peft_model(model, peft_config)
    adapted.peft_config["default"].base_model_name_or_path = config.base
    _freeze_unused(adapted)
    return adapted


def _freeze_unused(model: PeftModel) -> None:
    # PEFT unfreezes whole modules_to_save, and with "all" biases those of the originals behind them; a trainable
    # weight without gradient stops data-parallel training.
    unused = [f".{part}." for part in (_IOU_HEAD, "original_module", *UNUSED_PROMPTS)]
    for name, parameter in model.named_parameters():
        if any(part in name for part in unused):
            parameter.requires_grad_(False)


def save_adapter(
    model: PeftModel,
    directory: str | Path,
    *,
    config: SamedConfig | None = None,
    training: TrainingConfig | None = None,
    dtype: str = "float32",
) -> None:
    """Write an adapter directory: PEFT's two files, `samed_config.json` and a model card; never the base.

    The directory appears whole or not at all.

    Args:
        model: from `add_lora` or `load_adapter`.
        directory: where to; an adapter already there is replaced.
        config: in place of the one that the model carries; the fingerprint of the model's base is added.
        training: shown in the model card.
        dtype: of the stored weights; "float16" and "bfloat16" halve the file and round the weights.

    Raises:
        InputError: the directory holds something else than an adapter, or a weight is too large for `dtype`.
    """
    config = dataclasses.replace(config or config_of(model), base_sha256=model.base_sha256)
    require_replaceable(directory, ADAPTER_FOLDER)
    with atomic_dir(Path(directory)) as folder:
        if METHODS[config_of(model).method].storage is Storage.AS_TRAINED:
            own = {name: tensor for name, tensor in model.state_dict().items() if ".original_module." not in name}
            model.save_pretrained(folder, state_dict=own, save_embedding_layers=False)
        else:
            save_as_lora(model, folder)
        if dtype != "float32":
            _store_as(folder / WEIGHTS_FILE, DTYPES[dtype])
        write_config(config, folder)
        write_card(folder, training=training)


def _store_as(file: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_tensors(file).items()}
    overflown = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if overflown:
        raise InputError(f"weight {overflown[0]} is too large for {dtype}; store the adapter as bfloat16 or float32")
    save_tensors(tensors, file, metadata={"format": "pt"})


def write_card(directory: Path, *, report: Report | None = None, training: TrainingConfig | None = None) -> None:
    """Rewrite the model card of an adapter directory, with the scores of a report if given."""
    values = {} if training is None else training.to_dict()
    trained = {name: value for name, value in values.items() if value is not None} or None
    write_text(directory / CARD_FILE, model_card(read_config(directory), report=report, training=trained))


def load_adapter(
    source: str | Path,
    *,
    base: str | None = None,
    merge: bool = False,
    trainable: bool = False,
    device: str | torch.device | None = None,
    revision: str | None = None,
) -> PeftModel | SamForSemanticSegmentation:
    """Load a SAM with a saved adapter, ready for `predict_volume`.

    Args:
        source: adapter directory, or Hub id.
        base: base SAM, if it is not at the recorded location.
        merge: add the low-rank updates to the base's weights and return the plain model.
        trainable: leave the adapter trainable, in training mode.
        device: where to put the model.
        revision: branch, tag or commit of an adapter on the Hub.

    Raises:
        InputError: `source` is not an adapter, a file is damaged, or base, rank, classes or sizes do not match.
    """
    folder = adapter_folder(source, revision=revision)
    config, peft_config, tensors = read_whole(folder, read_adapter)
    if base is None:
        require_recorded_base(config, folder)
    model = load_sam(
        base or config.base,
        class_names=config.class_names,
        image_size=config.image_size,
        revision=config.base_revision if base is None else None,
    )
    if config.base_sha256 is not None and model.base_sha256 != config.base_sha256:
        raise InputError(
            f"the adapter in {folder} was trained on {config.base} with weights {config.base_sha256[:12]}, but "
            f"{base or config.base} has weights {str(model.base_sha256)[:12]}; pass the right one as base"
        )
    peft_config.inference_mode = not trainable
    try:
        adapted = _attach(model, peft_config, config)
    except PEFT_ERRORS as error:
        raise unusable(folder, error) from error
    check_tensors(tensors, adapter_tensors(adapted), folder / WEIGHTS_FILE)
    set_peft_model_state_dict(adapted, tensors)
    if not trainable:
        adapted.requires_grad_(False)
    loaded = merged(adapted) if merge else adapted
    loaded.train(trainable)
    return loaded if device is None else loaded.to(device)


def read_adapter(folder: Path) -> tuple[SamedConfig, PeftConfig, dict[str, torch.Tensor]]:
    """Read and check the files of an adapter: its config, PEFT's config and its tensors."""
    config = read_config(folder)
    require_complete(folder)
    check_adapter_files(folder)
    peft_config = read_peft_config(folder, config)
    check_ranks(peft_config, folder)
    return config, peft_config, load_tensors(folder / WEIGHTS_FILE)


def _check_fits(model: SamForSemanticSegmentation, config: SamedConfig) -> None:
    found = (model.config.mask_decoder_config.num_multimask_outputs, model.config.vision_config.image_size)
    expected = (len(config.class_names), config.image_size)
    if found != expected:
        raise InputError(
            f"the config names {expected[0]} classes at {expected[1]} pixels, but the model was loaded for "
            f"{found[0]} classes at {found[1]}; give load_sam the same class_names and image_size"
        )
