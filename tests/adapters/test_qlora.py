"""LoRA on an encoder in 4 bits: save -> load -> the same logits, merged the same; and without bitsandbytes."""

import dataclasses
import importlib.util
import sys

import pytest
import torch
from test_methods import CONFIG, fresh, logits, trained

from samed_peft.adapters.save_load import load_adapter, save_adapter
from samed_peft.conversion.exports import export_samed
from samed_peft.errors import InputError
from samed_peft.models.precision import cast_frozen_weights

QLORA = dataclasses.replace(CONFIG, method="qlora")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="the extra qlora is not installed"
)


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


@needs_bitsandbytes
def test_saved_loaded_and_merged_logits_are_the_same(pixels, tmp_path):
    model = trained(QLORA)
    expected = logits(model, pixels)
    linear = model.base_model.model.vision_encoder.layers[0].mlp.lin1
    assert linear.weight.numel() * 2 == linear.in_features * linear.out_features
    # 4 bits are not the base: what follows is about them.
    assert (expected - logits(trained(CONFIG), pixels)).abs().max() > 1e-3
    save_adapter(model, tmp_path / "adapter", config=QLORA)
    assert logits(load_adapter(tmp_path / "adapter"), pixels).equal(expected)
    merged = load_adapter(tmp_path / "adapter", merge=True)
    assert all(tensor.is_floating_point() for tensor in merged.state_dict().values())
    torch.testing.assert_close(logits(merged, pixels), expected, atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="found LoraConfig of qlora"):
        export_samed(tmp_path / "adapter", tmp_path / "samed.pth")


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_trainable_weight_gets_a_gradient(dtype, pixels):
    model = trained(QLORA)
    cast_frozen_weights(model, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        model(pixel_values=pixels, labels=torch.ones(2, 32, 32, dtype=torch.long)).loss.backward()
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trainable if "vision_encoder" in name} == {
        name for name, p in fresh().named_parameters() if p.requires_grad and "vision_encoder" in name
    }
    assert [name for name, parameter in trainable.items() if parameter.grad is None] == []


def test_without_bitsandbytes_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r'pip install "samed_peft\[qlora\]"'):
        fresh(QLORA)
