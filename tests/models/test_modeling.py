"""The model against the original's numbers, and as a Transformers model."""

import copy
import dataclasses
import io

import numpy as np
import pytest
import torch
from conftest import GOLDEN, npz
from transformers import BertConfig, SamModel

from samed_peft.adapters.save_load import add_lora
from samed_peft.config import SYNAPSE_CLASSES
from samed_peft.errors import InputError
from samed_peft.io import load_torch_weights
from samed_peft.models.attention import SamSplitAttention
from samed_peft.models.bases import load_sam
from samed_peft.models.checkpoints import fuse_qkv, load_meta_checkpoint, split_qkv
from samed_peft.models.modeling import SamForSemanticSegmentation
from samed_peft.prediction.slices import upsampled_argmax

BASE = GOLDEN / "sam_base.pth"


@pytest.fixture
def pixels():
    return torch.from_numpy(npz("forward.npz")["pixel_values"]).expand(-1, 3, -1, -1)


def test_forward_reproduces_samed(golden_model, pixels):
    with torch.inference_mode():
        logits = golden_model(pixel_values=pixels).logits
    expected = npz("forward.npz")
    assert logits.shape == (2, 9, 32, 32)
    np.testing.assert_allclose(logits, expected["low_res_logits"], atol=2e-6, rtol=0)
    np.testing.assert_array_equal(upsampled_argmax(logits, 128), expected["masks_argmax"])


def test_attention_equals_transformers_layer_by_layer():
    sam = load_meta_checkpoint(BASE)
    ours = SamForSemanticSegmentation.from_sam(sam)
    hidden = torch.randn(2, 16, 16, 48, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for mine, theirs in zip(ours.vision_encoder.layers, sam.vision_encoder.layers, strict=True):
            assert isinstance(mine.attn, SamSplitAttention)
            torch.testing.assert_close(mine(hidden), theirs(hidden), atol=2e-5, rtol=0)


def written_out(decoder, embeddings, positions, no_mask):
    """Maps as SAM's decoder makes them: a kernel for each class, the features' sum weighted with it."""
    batch, channels, height, width = embeddings.shape
    tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).expand(batch, 1, -1, -1)
    tokens, keys = decoder.transformer(tokens, embeddings + no_mask.expand(1, -1, height, width), positions, None)
    image = keys.transpose(2, 3).reshape(batch, channels, height, width).contiguous()
    features = decoder.activation(decoder.upscale_layer_norm(decoder.upscale_conv1(image)))
    features = decoder.activation(decoder.upscale_conv2(features))
    kernels = [mlp(tokens[:, 0, i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps, start=1)]
    return torch.stack([torch.einsum("bc,bchw->bhw", kernel, features) for kernel in kernels], dim=1)


@pytest.mark.parametrize("channels_last", [True, False])
def test_class_maps_and_gradients_are_those_written_out(channels_last):
    model = load_sam(BASE, class_names=["a", "b"], image_size=128)
    decoder = model.mask_decoder.double()
    random = torch.Generator().manual_seed(0)
    embeddings, positions = torch.randn(2, 2, 32, 8, 8, generator=random, dtype=torch.float64)
    if channels_last:
        embeddings = embeddings.contiguous(memory_format=torch.channels_last)
    no_mask = torch.randn(1, 32, 1, 1, generator=random, dtype=torch.float64, requires_grad=True)
    trained = [no_mask, *(p for n, p in decoder.named_parameters() if "iou_prediction_head" not in n)]
    results = []
    for run in (decoder, lambda *inputs: written_out(decoder, *inputs)):
        maps = run(embeddings, positions, no_mask)
        results.append((maps, *torch.autograd.grad((maps * torch.arange(3).view(3, 1, 1)).square().mean(), trained)))
    assert results[0][0].shape == (2, 3, 32, 32)
    assert results[0][0].is_contiguous()
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-9)


def test_hypernetworks_of_an_adapter_with_lora_in_the_decoder_are_its_own(golden_config, pixels):
    torch.manual_seed(7)
    base = load_sam(BASE, class_names=golden_config.class_names, image_size=128)
    model = add_lora(base, dataclasses.replace(golden_config, decoder="lora")).eval()
    mlp = "base_model.model.mask_decoder.output_hypernetworks_mlps.3.modules_to_save.default.proj_out"
    with torch.no_grad():
        model.get_parameter(f"{mlp}.weight").zero_()
        model.get_parameter(f"{mlp}.bias").zero_()
        changed = model(pixel_values=pixels).logits
        with model.disable_adapter():
            original = model(pixel_values=pixels).logits
    assert not changed[:, 3].any()
    assert original[:, 3].any()
    torch.testing.assert_close(changed[:, [0, 1, 2, 4]], original[:, [0, 1, 2, 4]], atol=0, rtol=0)
    model(pixel_values=pixels).logits.square().mean().backward()
    mlps = [p for n, p in model.named_parameters() if "output_hypernetworks_mlps" in n and "modules_to_save" in n]
    assert len(mlps) == 9 * 6
    assert all(parameter.grad is not None for parameter in mlps)


def test_a_model_that_has_predicted_can_be_trained(fresh_model, pixels):
    labels = torch.zeros(2, 32, 32, dtype=torch.long)
    untouched = copy.deepcopy(fresh_model)
    with torch.inference_mode():
        fresh_model(pixel_values=pixels)
    for model in (fresh_model, untouched):
        model(pixel_values=pixels, labels=labels).loss.backward()
    name = "base_model.model.mask_decoder.modules_to_save.default.mask_tokens.weight"
    assert fresh_model.get_parameter(name).grad.equal(untouched.get_parameter(name).grad)


def test_positions_follow_the_weights():
    model = load_sam(BASE, class_names=["a"], image_size=128)
    pixels = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(pixels).logits
        model.shared_image_embedding.positional_embedding.data.zero_()
        assert not model(pixels).logits.equal(before)
        torch.testing.assert_close(model.double()(pixels.double()).logits.float(), model.float()(pixels).logits)


def test_merged_model_is_a_plain_sam(golden_model, pixels, tmp_path):
    with torch.inference_mode():
        expected = golden_model(pixel_values=pixels).logits
        merged = golden_model.merge_and_unload()
        merged.save_pretrained(tmp_path)
        plain, info = SamModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        maps = [plain(pixel_values=pixels, multimask_output=many).pred_masks[:, 0] for many in (False, True)]
        torch.testing.assert_close(torch.cat(maps, dim=1), expected, atol=1e-5, rtol=0)
        again = SamForSemanticSegmentation.from_pretrained(tmp_path)
        torch.testing.assert_close(again(pixels).logits, merged(pixels).logits, atol=0, rtol=0)


def test_load_sam_keeps_everything_but_the_fresh_parts():
    sam = load_meta_checkpoint(BASE)
    torch.manual_seed(0)
    model = load_sam(BASE, class_names=["a", "b"], image_size=256)
    mine, theirs = fuse_qkv(model.state_dict()), sam.state_dict()
    changed = {k.split(".")[1] for k in theirs if k not in mine or not mine[k].equal(theirs[k])}
    assert changed == {"mask_tokens", "output_hypernetworks_mlps", "iou_prediction_head"}
    assert model(torch.rand(1, 3, 256, 256)).logits.shape == (1, 3, 64, 64)
    assert model.mask_decoder.mask_tokens.weight.std() > 0.5


def test_positions_are_resized_bilinearly():
    model = load_sam(BASE, class_names=["a"], image_size=128)
    original = load_torch_weights(BASE)
    # Half the size, no antialiasing: each new position is the mean of the two old ones around it.
    absolute = original["image_encoder.pos_embed"]
    pairs = absolute.reshape(1, 8, 2, 8, 2, -1).mean(dim=(2, 4))
    torch.testing.assert_close(model.vision_encoder.pos_embed.data, pairs)
    assert model.vision_encoder.layers[2].attn.rel_pos_h.shape[0] == 15
    windowed = model.vision_encoder.layers[0].attn.rel_pos_h
    assert windowed.equal(original["image_encoder.blocks.0.attn.rel_pos_h"])


def test_split_and_fuse_are_inverse():
    state = {"vision_encoder.layers.0.attn.qkv.weight": torch.randn(12, 4), "mask_decoder.x": torch.ones(1)}
    again = fuse_qkv(split_qkv(state))
    assert again.keys() == state.keys()
    assert all(again[k].equal(state[k]) for k in state)


def test_labels_give_the_loss(golden_model, pixels):
    labels = torch.zeros(2, 32, 32, dtype=torch.long)
    output = golden_model(pixel_values=pixels, labels=labels)
    assert output.loss.ndim == 0
    assert torch.isfinite(output.loss)


def test_gradient_checkpointing_gives_the_same_gradients(fresh_model, pixels):
    checkpointed = copy.deepcopy(fresh_model)
    checkpointed.base_model.model.activation_checkpointing_enable()
    labels = torch.randint(0, 9, (2, 32, 32), generator=torch.Generator().manual_seed(0))
    for model in (fresh_model, checkpointed):
        model.train()(pixel_values=pixels, labels=labels).loss.backward()
    assert any(layer.gradient_checkpointing for layer in checkpointed.base_model.model.vision_encoder.layers)
    pairs = zip(fresh_model.named_parameters(), checkpointed.named_parameters(), strict=True)
    trainable = [(a, b) for (_, a), (_, b) in pairs if a.requires_grad]
    assert trainable
    for a, b in trainable:
        assert a.grad.abs().max() > 0 or a.grad.equal(b.grad)
        torch.testing.assert_close(a.grad, b.grad, atol=1e-7, rtol=0)


def test_a_model_that_is_no_sam_is_refused(tmp_path):
    BertConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is a bert model, not a SAM"):
        load_sam(tmp_path, class_names=["a"])


def test_code_that_a_folder_brings_is_never_run(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "foo", "auto_map": {"AutoConfig": "code.Config"}}')
    (tmp_path / "code.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\n"
        "from transformers import PretrainedConfig\n"
        "class Config(PretrainedConfig):\n    model_type = 'foo'\n"
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    with pytest.raises(InputError, match="cannot be opened as a SAM"):
        load_sam(tmp_path, class_names=["a"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("base", ["no such folder", "./nowhere/at/all", "missing.pth"])
def test_a_base_that_does_not_exist_is_refused(base):
    with pytest.raises(InputError, match="neither a file, nor a folder, nor a Hub id"):
        load_sam(base, class_names=["a"])


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be opened"):
        load_sam(tmp_path, class_names=["a"])


def test_a_base_whose_weights_do_not_fit_its_config_is_refused(tmp_path):
    load_meta_checkpoint(BASE).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"mlp_dim": 64', '"mlp_dim": 32'), encoding="utf-8")
    with pytest.raises(InputError, match="lacks weights of a SAM"):
        load_sam(tmp_path, class_names=["a"])


def test_size_must_fit_the_patches():
    with pytest.raises(InputError, match="multiple of the patch size 16"):
        load_sam(BASE, class_names=SYNAPSE_CLASSES, image_size=100)


def test_the_same_base_has_the_same_fingerprint_in_any_format(tmp_path):
    load_meta_checkpoint(BASE).save_pretrained(tmp_path)
    one = load_sam(BASE, class_names=["a"], image_size=128)
    two = load_sam(tmp_path, class_names=["a", "b"], image_size=256)
    assert one.base_sha256 == two.base_sha256
