"""Bases that come from anyone: nothing in their folders may run code, read other files or take all memory."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from samed_peft.errors import InputError
from samed_peft.models.bases import TINY_SAM_DIR, open_sam


@pytest.fixture
def base(tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(TINY_SAM_DIR / name, tmp_path / name)
    return tmp_path


def edit(base, section=None, **changes):
    values = json.loads((base / "config.json").read_text())
    (values if section is None else values[section]).update(changes)
    (base / "config.json").write_text(json.dumps(values))


class Payload:
    def __reduce__(self):
        return (open, ("RAN", "w"))


@pytest.mark.parametrize("section", [None, "vision_config", "mask_decoder_config"])
@pytest.mark.parametrize("field", ["_attn_implementation", "_attn_implementation_internal", "attn_implementation"])
@pytest.mark.parametrize("kernel", ["someone/kernel", "someone/kernel@main:forward", {"vision_config": "a/b"}, "sage"])
def test_cve_2026_4372_kernels_of_a_config_are_never_fetched(base, section, field, kernel):
    edit(base, section, **{field: kernel})
    with pytest.raises(InputError, match=rf"expected eager or sdpa as .*{field} in .*config\.json, found"):
        open_sam(str(base))


def test_attentions_of_transformers_may_be_recorded(base):
    edit(base, _attn_implementation="eager", _attn_implementation_autoset=True)
    assert open_sam(str(base)) is not None


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        (None, {"auto_map": {"AutoConfig": "code.Config"}}, "found auto_map"),
        ("vision_config", {"auto_map": {"AutoModel": "code.Model"}}, r"found vision_config\.auto_map"),
        (None, {"custom_pipelines": {"x": {"impl": "code.Pipe"}}}, "found custom_pipelines"),
        (None, {"quantization_config": {"quant_method": "bitsandbytes"}}, "found quantization_config"),
        (None, {"transformers_weights": "../x.safetensors"}, "found transformers_weights"),
        ("vision_config", {"image_size": 10**9}, r"as vision_config\.image_size"),
        ("vision_config", {"num_hidden_layers": 10**6}, r"as vision_config\.num_hidden_layers"),
        ("vision_config", {"num_hidden_layers": -1}, r"as vision_config\.num_hidden_layers"),
        ("vision_config", {"num_hidden_layers": 1}, "weights that its config.json leaves out"),
        ("vision_config", {"hidden_size": 10**6}, "weights at most"),
        ("vision_config", {"num_hidden_layers": "x"}, "cannot be opened as a SAM"),
        ("vision_config", {"patch_size": 0}, "cannot be opened as a SAM"),
        ("vision_config", {"hidden_act": "evil"}, "cannot be opened as a SAM"),
        (None, {"vision_config": [1]}, "cannot be opened as a SAM"),
        (None, {"dtype": "evil"}, "cannot be opened as a SAM"),
    ],
)
def test_settings_that_no_sam_has_are_named(base, section, changes, message):
    edit(base, section, **changes)
    with pytest.raises(InputError, match=message) as error:
        open_sam(str(base))
    assert "\n" not in str(error.value)


def test_cve_2025_58756_pickles_of_a_base_are_never_opened(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    assert open_sam(str(base)) is not None  # model.safetensors is taken
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"found pytorch_model\.bin: a pickle, which can run any code; .*save it anew"):
        open_sam(str(base))
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../x.safetensors", r"beside .*index\.json, found '\.\./x"),
        ("/etc/x.safetensors", "found '/etc/x"),
        ("..\\x.safetensors", "do not trust its source"),
        ("pytorch_model.bin", r"expected names of \.safetensors files"),
        (5, r"expected names of \.safetensors files"),
        ("gone.safetensors", r"names gone\.safetensors, which is not there"),
    ],
)
def test_shards_lie_beside_their_index(base, name, message):
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    save_file(weights, base.parent / "x.safetensors", {"format": "pt"})
    save_file(weights, base / "part-1.safetensors", {"format": "pt"})
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, "part-1.safetensors")}))
    assert open_sam(str(base)) is not None
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, name)}))
    with pytest.raises(InputError, match=message):
        open_sam(str(base))


@pytest.mark.parametrize("content", ["[1]", "{}", '{"weight_map": [1]}', "{"])
def test_a_damaged_index_is_named(base, content):
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match=r"index\.json"):
        open_sam(str(base))


def test_an_adapter_is_no_base(base):
    (base / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "someone/else"}')
    with pytest.raises(InputError, match=r"is an adapter .*, not a SAM; give the SAM it adapts"):
        open_sam(str(base))


@pytest.mark.parametrize("content", ["[1]", "3", "null"])
def test_settings_that_are_no_object_are_named(base, content):
    (base / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"expected a SAM's settings in .*config\.json, found"):
        open_sam(str(base))
