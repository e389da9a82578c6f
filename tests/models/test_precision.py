"""Frozen weights cast to half precision change no result of autocast."""

import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from samed_peft.adapters.save_load import add_lora
from samed_peft.models.bases import load_sam
from samed_peft.models.losses import dice_ce_loss
from samed_peft.models.precision import cast_frozen_weights, product_dtype


def loss_and_gradients(model, pixels, labels):
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(pixel_values=pixels).logits
    loss = dice_ce_loss(logits, labels)
    loss.backward()
    return [logits.detach(), loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def test_logits_loss_and_gradients_stay_as_they_are_to_the_bit(fresh_model):
    size = fresh_model.samed_config.image_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 1, size, size, generator=generator).expand(-1, 3, -1, -1)
    labels = torch.randint(0, 3, (2, size, size), generator=generator)
    with torch.no_grad():  # LoRA starts with zeros, which would hide what goes through it
        for name, parameter in fresh_model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    expected = loss_and_gradients(fresh_model, pixels, labels)
    cast_frozen_weights(fresh_model, torch.bfloat16)
    found = loss_and_gradients(fresh_model, pixels, labels)
    for mine, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, wanted, atol=0, rtol=0)


def test_only_frozen_matrices_of_the_encoder_change_their_type(fresh_model):
    cast_frozen_weights(fresh_model, torch.bfloat16)
    types = {name: parameter.dtype for name, parameter in fresh_model.named_parameters()}
    half = {name for name, dtype in types.items() if dtype == torch.bfloat16}
    layer = "base_model.model.vision_encoder.layers.0"
    assert {f"{layer}.attn.q_proj.base_layer.weight", f"{layer}.mlp.lin1.weight", f"{layer}.attn.proj.bias"} <= half
    assert all("vision_encoder" in name for name in half)
    assert not any(part in name for name in half for part in ("lora_", "norm", "rel_pos", "pos_embed"))


@pytest.mark.parametrize(("precision", "expected"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_the_type_follows_the_accelerator(precision, expected):
    try:
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        assert product_dtype(accelerator) == expected
        assert product_dtype(accelerator, "float16") == torch.float16
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_the_file_of_the_base_is_unmapped(golden_config, tmp_path):
    load_sam(golden_config.base, class_names=golden_config.class_names, image_size=128).save_pretrained(tmp_path)
    model = load_sam(tmp_path, class_names=golden_config.class_names, image_size=128)
    cast_frozen_weights(add_lora(model, golden_config), torch.bfloat16)
    if sys.platform == "linux":
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
