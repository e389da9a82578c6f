"""Adapters that go on from the weights of another one."""

import dataclasses
import re

import pytest
import torch
from conftest import edit_adapter

from samed_peft.adapters.continuation import go_on_from
from samed_peft.adapters.methods import adapter_tensors
from samed_peft.adapters.save_load import add_lora, load_adapter, save_adapter
from samed_peft.errors import InputError
from samed_peft.io import file_sha256
from samed_peft.models.bases import load_sam

PREFIX = "base_model.model.mask_decoder."


@pytest.fixture
def saved(golden_model, tmp_path):
    """A trained adapter, and its tensors."""
    save_adapter(golden_model, tmp_path / "adapter")
    return tmp_path / "adapter", {name: tensor.clone() for name, tensor in adapter_tensors(golden_model).items()}


@pytest.fixture
def fresh(golden_config):
    """Function that makes a new adapter on the same base, with some fields of its config replaced."""

    def fresh(seed=3, **changes):
        config = dataclasses.replace(golden_config, **changes)
        torch.manual_seed(seed)
        return add_lora(load_sam(config.base, class_names=config.class_names, image_size=config.image_size), config)

    return fresh


def test_the_same_classes_give_the_same_adapter(saved, fresh, tmp_path):
    folder, tensors = saved
    model = fresh()
    assert go_on_from(model, folder) == file_sha256(folder / "adapter_model.safetensors")
    assert all(tensor.equal(tensors[name]) for name, tensor in adapter_tensors(model).items())
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trainable) == len([p for p in fresh().parameters() if p.requires_grad])


@pytest.mark.parametrize("decoder", ["full", "lora"])
def test_shared_classes_keep_their_tokens_at_their_new_labels(fresh, tmp_path, decoder):
    old = fresh(decoder=decoder, class_names=("spleen", "liver", "aorta"))
    with torch.no_grad():
        for parameter in old.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.rand_like(parameter))
    save_adapter(old, tmp_path / "old")
    before = adapter_tensors(old)
    names = ("tumour", "aorta", "spleen", "vessel")
    model, untouched = (fresh(decoder=decoder, class_names=names) for _ in range(2))
    go_on_from(model, tmp_path / "old")
    save_adapter(model, tmp_path / "new")
    loaded = load_adapter(tmp_path / "new")
    after, new = adapter_tensors(loaded), adapter_tensors(untouched)
    came_from = {0: 0, 2: 3, 3: 1}  # new label -> label in the old adapter
    for label in range(5):
        token = after[f"{PREFIX}mask_tokens.weight"][label]
        source, row = (before, came_from[label]) if label in came_from else (new, label)
        assert token.equal(source[f"{PREFIX}mask_tokens.weight"][row])
        start = f"{PREFIX}output_hypernetworks_mlps."
        for name in (name for name in after if name.startswith(f"{start}{label}.")):
            assert after[name].equal(source[name.replace(f"{start}{label}.", f"{start}{row}.")])
    of_classes = ("mask_tokens", "output_hypernetworks_mlps", "iou_prediction_head")
    others = [name for name in after if not any(part in name for part in of_classes)]
    assert any("lora_A" in name for name in others)
    assert any("no_mask_embed" in name for name in others)
    assert all(after[name].equal(before[name]) for name in others)


def test_an_adapter_whose_weights_mean_something_else_is_refused(saved, fresh):
    for changes, message in (
        ({"rank": 8}, "rank: 8 expected, 4 found"),
        ({"image_size": 64, "input_size": None}, "image_size: 64 expected, 128 found"),
        ({"method": "rslora", "decoder": "lora"}, "method: rslora expected, lora found; decoder: lora expected, full"),
        ({"targets": ("q_proj",)}, r"targets: \('q_proj',\) expected, \('q_proj', 'v_proj'\) found"),
    ):
        model = fresh(**changes)
        before = {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}
        place = re.escape(str(saved[0]))
        with pytest.raises(InputError, match=f"cannot go on from the adapter in {place}, .*{message}"):
            go_on_from(model, saved[0])
        assert all(tensor.equal(before[name]) for name, tensor in adapter_tensors(model).items())


def test_another_base_is_refused_by_its_fingerprint(saved, golden_model):
    edit_adapter(saved[0], base_sha256="0" * 64)
    with pytest.raises(InputError, match=r"base: .*sam_base\.pth \([0-9a-f]{12}\) expected, .* \(000000000000\) found"):
        go_on_from(golden_model, saved[0])


def test_methods_that_are_stored_otherwise_than_trained_are_refused(fresh, tmp_path):
    save_adapter(fresh(method="olora"), tmp_path / "olora")
    with pytest.raises(InputError, match=r"olora is stored as LoRA of twice the rank, .* go on from one of another"):
        go_on_from(fresh(method="olora"), tmp_path / "olora")


def test_a_folder_without_adapter_is_refused(fresh_model, tmp_path):
    with pytest.raises(InputError, match="neither an adapter directory nor a Hub id"):
        go_on_from(fresh_model, tmp_path / "nothing")
