"""Bases that come from anyone: nothing in their folders may run code, read other files or take all memory."""

import json
import pickle
import shutil

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from samed_peft.adapters.save_load import save_adapter
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


ELSEWHERE = [
    ("../x.safetensors", r"beside .*index\.json, found '\.\./x"),
    ("../../../x.safetensors", r"beside .*index\.json, found '\.\./\.\./\.\./x"),
    ("/etc/x.safetensors", "found '/etc/x"),
    ("..\\x.safetensors", "do not trust its source"),
    ("pytorch_model.bin", r"expected names of \.safetensors files"),
    ("a\0.safetensors", r"expected names of \.safetensors files"),
    ("x" * 300 + ".safetensors", r"expected names of \.safetensors files"),
    (5, r"found 5; do not"),
    (None, r"found None; do not"),
    (["x.safetensors"], r"found \['x\.safetensors'\]; do not"),
]


def sharded(folder, name):
    """Replace the weights of a base by a shard, and an index that names some file."""
    weights = load_file(TINY_SAM_DIR / "model.safetensors")
    (folder / "model.safetensors").unlink(missing_ok=True)
    for file in (folder.parent / "x.safetensors", folder / "part-1.safetensors"):
        shutil.copyfile(TINY_SAM_DIR / "model.safetensors", file)
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("name", "message"), [*ELSEWHERE, ("gone.safetensors", r"names gone\.safetensors, which is not")]
)
def test_shards_lie_beside_their_index(base, name, message):
    sharded(base, "part-1.safetensors")
    assert open_sam(str(base)) is not None
    sharded(base, name)
    with pytest.raises(InputError, match=message):
        open_sam(str(base))


def test_shards_are_no_links_to_other_folders(base):
    sharded(base, "part-1.safetensors")
    (base / "part-1.safetensors").unlink()
    (base / "part-1.safetensors").symlink_to(base.parent / "x.safetensors")
    with pytest.raises(InputError, match=r"found part-1\.safetensors, a link to .*/x\.safetensors; copy that file"):
        open_sam(str(base))


@pytest.fixture
def hub_base(tmp_path, monkeypatch):
    """The files of a base in the Hub's cache, as links to their content; without a connection."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--someone--sam", "a" * 40
    for folder in ("refs", "blobs", f"snapshots/{commit}"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copyfile(TINY_SAM_DIR / "config.json", repository / "snapshots" / commit / "config.json")
    return repository / "snapshots" / commit


@pytest.mark.parametrize(("name", "message"), ELSEWHERE)
def test_shards_of_the_hub_lie_beside_their_index(hub_base, name, message):
    sharded(hub_base, name)
    with pytest.raises(InputError, match=message):
        open_sam("someone/sam")


def test_shards_of_the_hub_are_links_in_its_cache(hub_base):
    sharded(hub_base, "part-1.safetensors")
    (hub_base / "part-1.safetensors").rename(hub_base.parents[1] / "blobs" / "0123")
    (hub_base / "part-1.safetensors").symlink_to("../../blobs/0123")
    assert open_sam("someone/sam") is not None
    assert open_sam(str(hub_base)) is not None


@pytest.mark.parametrize("content", ["[1]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": "x.safetensors"}}', "{"])
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


def test_an_adapter_of_this_package_is_named_as_what_it_is(golden_model, tmp_path):
    save_adapter(golden_model, tmp_path / "adapter")
    with pytest.raises(InputError, match=r"is an adapter .*, not a SAM; give the SAM it adapts"):
        open_sam(str(tmp_path / "adapter"))
