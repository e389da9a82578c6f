"""Adapters: trainable and saved weights, save -> load -> the same logits, refused files."""

import dataclasses
import json
import shutil
import time

import pytest
import torch
from conftest import GOLDEN, edit_adapter, load_samed_weights
from huggingface_hub import constants
from peft import PeftModel
from safetensors.torch import load_file, save_file

from samed_peft.adapters.folder import read_config
from samed_peft.adapters.save_load import add_lora, load_adapter, save_adapter
from samed_peft.config import SYNAPSE_CLASSES, SamedConfig
from samed_peft.errors import InputError
from samed_peft.models.bases import load_sam
from samed_peft.models.checkpoints import load_meta_checkpoint
from samed_peft.models.modeling import config_of


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def saved(golden_model, golden_config, tmp_path):
    save_adapter(golden_model, tmp_path / "adapter", config=golden_config)
    return tmp_path / "adapter"


def logits(model, pixels):
    with torch.inference_mode():
        return model(pixel_values=pixels).logits


def test_what_is_trained_is_what_samed_trains(fresh_model):
    trainable = {name for name, p in fresh_model.named_parameters() if p.requires_grad}
    lora = {name for name in trainable if ".lora_" in name}
    assert len(lora) == 6 * 2 * 2
    assert all(".attn.q_proj." in name or ".attn.v_proj." in name for name in lora)
    rest = trainable - lora
    assert all("mask_decoder" in name or "no_mask_embed" in name for name in rest)
    assert not any("iou_prediction_head" in name for name in trainable)
    assert any("no_mask_embed" in name for name in rest)


def test_every_trainable_weight_gets_a_gradient(fresh_model, pixels):
    fresh_model(pixel_values=pixels, labels=torch.ones(2, 32, 32, dtype=torch.long)).loss.backward()
    without = [name for name, p in fresh_model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_a_fresh_adapter_changes_nothing_of_the_encoder(golden_config, pixels):
    torch.manual_seed(7)
    plain = load_sam(golden_config.base, class_names=SYNAPSE_CLASSES, image_size=128)
    expected = logits(plain, pixels)
    assert logits(add_lora(plain, golden_config), pixels).equal(expected)


def test_vit_b_has_the_papers_number_of_lora_weights():
    # 12 layers x (query, value) x (A, B) x rank 4 x 768
    from transformers import SamConfig, SamModel

    from samed_peft.models.modeling import SamForSemanticSegmentation

    with torch.device("meta"):
        sam = SamForSemanticSegmentation(SamModel(SamConfig()).config)
        config = SamedConfig(base="x", class_names=("a", "b", "c"), image_size=1024)
        model = add_lora(sam, config)
    assert sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n) == 147_456


def test_only_adapter_files_are_saved(saved, golden_model):
    names = {"adapter_model.safetensors", "adapter_config.json", "samed_config.json", "README.md"}
    assert {p.name for p in saved.iterdir()} == names
    weights = load_file(saved / "adapter_model.safetensors")
    assert all("lora_" in key or "mask_decoder" in key or "no_mask_embed" in key for key in weights)
    config = json.loads((saved / "samed_config.json").read_text())
    assert config["class_names"] == list(SYNAPSE_CLASSES)
    assert config["base_sha256"] == golden_model.base_sha256


def test_a_model_carries_the_config_that_is_saved(fresh_model, golden_config, tmp_path):
    save_adapter(fresh_model, tmp_path / "adapter")
    saved = read_config(tmp_path / "adapter")
    assert saved == config_of(fresh_model) == config_of(fresh_model.get_base_model())
    assert saved == dataclasses.replace(golden_config, base_sha256=fresh_model.base_sha256)
    assert saved.base_sha256 is not None
    fresh_model.get_base_model().samed_config = None
    with pytest.raises(InputError, match="has no samed_config; get it from load_sam, add_lora or load_adapter"):
        save_adapter(fresh_model, tmp_path / "other")


@pytest.mark.parametrize("trainable", [False, True])
def test_loaded_logits_are_bit_equal(saved, golden_model, pixels, trainable):
    loaded = load_adapter(saved, trainable=trainable)
    assert isinstance(loaded, PeftModel)
    assert loaded.training is trainable
    assert any(p.requires_grad for p in loaded.parameters()) is trainable
    assert logits(loaded.eval(), pixels).equal(logits(golden_model, pixels))


def test_a_loaded_adapter_trains_what_a_new_one_trains(saved, fresh_model):
    loaded = load_adapter(saved, trainable=True)
    assert [n for n, p in loaded.named_parameters() if p.requires_grad] == [
        n for n, p in fresh_model.named_parameters() if p.requires_grad
    ]


def test_merged_logits_are_the_adapters(saved, golden_model, pixels):
    merged = load_adapter(saved, merge=True)
    assert not any("lora" in name for name in merged.state_dict())
    torch.testing.assert_close(logits(merged, pixels), logits(golden_model, pixels), atol=1e-5, rtol=0)


def test_plain_peft_opens_the_folder(saved, golden_config, golden_model, pixels):
    base = load_sam(golden_config.base, class_names=SYNAPSE_CLASSES, image_size=128)
    assert logits(PeftModel.from_pretrained(base, saved).eval(), pixels).equal(logits(golden_model, pixels))


def test_weights_are_as_readable_as_any_file(saved, tmp_path):
    (tmp_path / "any").touch()
    modes = {path.stat().st_mode for path in (*saved.iterdir(), tmp_path / "any")}
    assert len(modes) == 1


def test_saving_again_replaces_the_adapter(saved, fresh_model, golden_config, pixels):
    load_samed_weights(fresh_model, GOLDEN / "train_end.pth")
    save_adapter(fresh_model, saved, config=golden_config)
    assert logits(load_adapter(saved), pixels).equal(logits(fresh_model.eval(), pixels))
    assert [p.name for p in saved.parent.iterdir()] == ["adapter"]


def test_a_folder_of_other_files_is_not_replaced(golden_model, golden_config, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="which must not be lost"):
        save_adapter(golden_model, tmp_path, config=golden_config)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("name", ["thesis.txt", ".git", "run.json", "config.json"])
def test_an_adapter_with_other_files_beside_it_is_not_replaced(saved, golden_model, golden_config, name):
    before = (saved / "README.md").read_bytes()
    (saved / name).write_text("mine")
    with pytest.raises(InputError, match=f"found other files {name}, which must not be lost"):
        save_adapter(golden_model, saved, config=golden_config)
    assert (saved / name).read_text() == "mine"
    assert (saved / "README.md").read_bytes() == before


def test_reports_and_what_systems_leave_are_no_other_files(saved, golden_model, golden_config):
    for name in ("report.json", "report.html", ".DS_Store", ".nfs00001", ".ipynb_checkpoints"):
        (saved / name).touch()
    (saved / "pictures").mkdir()
    save_adapter(golden_model, saved, config=golden_config)
    assert len(list(saved.iterdir())) == 4


def test_another_base_is_refused(saved, tmp_path):
    sam = load_meta_checkpoint(GOLDEN / "sam_base.pth")
    with torch.no_grad():
        sam.vision_encoder.pos_embed.add_(1e-6)
    sam.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"was trained on .* with weights [0-9a-f]{12}, but"):
        load_adapter(saved, base=str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": ["liver", "spleen"]}, r"unknown weights|should be"),
        ({"rank": 8}, "says rank 8, adapter_config.json says 4"),
        ({"image_size": 130}, "multiple of the patch size"),
        ({"colour": "red"}, "has no field colour"),
        ({"window": [3, 1]}, "low < high"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(saved, changes, message):
    edit_adapter(saved, **changes)
    with pytest.raises(InputError, match=message):
        load_adapter(saved)


def test_weights_of_another_rank_are_refused(saved):
    path = saved / "adapter_model.safetensors"
    weights = load_file(path)
    key = next(key for key in weights if "lora_A" in key)
    save_file(weights | {key: weights[key][:2].clone()}, path)
    edit_adapter(saved)
    with pytest.raises(InputError, match=r"should be \(4, 48\).* but is \(2, 48\)"):
        load_adapter(saved)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "samed_config.json"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(InputError, match=name):
        load_adapter(saved)


def test_damaged_weights_are_named(saved):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match="adapter_model"):
        load_adapter(saved)


def test_neither_folder_nor_hub_id():
    with pytest.raises(InputError, match="neither an adapter directory nor a Hub id"):
        load_adapter("no/such/folder")


def test_a_model_for_other_classes_is_refused(golden_config):
    model = load_sam(golden_config.base, class_names=["one"], image_size=128)
    with pytest.raises(InputError, match="names 8 classes at 128 pixels, but the model was loaded for 1"):
        add_lora(model, golden_config)


def test_the_adapter_is_found_where_the_base_has_moved(saved, tmp_path):
    shutil.copy(GOLDEN / "sam_base.pth", tmp_path / "moved.pth")
    edit_adapter(saved, base="gone/elsewhere/sam.pth")
    recorded = r"gone/elsewhere/sam\.pth is neither .*; .*samed_config\.json records it: .* base, or --base"
    with pytest.raises(InputError, match=recorded):
        load_adapter(saved)
    with pytest.raises(InputError, match=r"base moved\.pth is neither .*sam-vit-base$"):
        load_adapter(saved, base="moved.pth")
    assert load_adapter(saved, base=str(tmp_path / "moved.pth")) is not None


def test_config_survives_the_journey(saved, golden_config, golden_model):
    expected = dataclasses.replace(golden_config, base_sha256=golden_model.base_sha256)
    assert load_adapter(saved).samed_config == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected JSON in"),
        ("[1]", "with a peft_type, LORA for example, in .* found 'list'"),
        ("{}", "found None"),
        ('{"r": 4}', "found None"),
        ('{"peft_type": "FOO"}', "found 'FOO'"),
        ('{"peft_type": ["LORA"]}', "found .'LORA'."),
    ],
)
def test_files_without_a_config_of_peft_are_refused(saved, content, message):
    edit_adapter(saved)
    (saved / "adapter_config.json").write_text(content)
    with pytest.raises(InputError, match=message):
        load_adapter(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_pattern": {"q_proj": 3}}, "asks for rank 3, but the tensors of .* have 4"),
        ({"rank_pattern": {"q_proj": 30_000_000}}, "ranks by names of layers.* as rank_pattern .*30000000"),
        ({"rank_pattern": {"q_proj": "4"}}, "ranks by names of layers.* as rank_pattern .*'4'"),
        ({"rank_pattern": [4]}, "an object with ranks"),
        ({"alpha_pattern": "x"}, "an object with numbers"),
        ({"alpha_pattern": {"q_proj": "x"}}, "an object with numbers"),
        ({"megatron_config": {"a": 1}, "megatron_core": "this"}, "asks for Megatron"),
        ({"r": "4"}, "a whole number up to 65536 as r .* found '4'"),
        ({"target_modules": "(("}, "names of layers"),
        ({"target_modules": "nothing"}, "PEFT cannot use"),
        ({"target_modules": 5}, "names of layers"),
        ({"init_lora_weights": "junk"}, "expected True as init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "expected True as init_lora_weights"),
        ({"init_lora_weights": "pissa"}, "expected True as init_lora_weights"),
        ({"init_lora_weights": "olora"}, "expected True as init_lora_weights"),
        ({"init_lora_weights": False}, "expected True as init_lora_weights"),
        ({"lora_alpha": "x"}, "a number above 0 .* as lora_alpha"),
        ({"lora_alpha": 0}, "a number above 0 .* as lora_alpha"),
        ({"lora_alpha": 1e300}, "a number above 0 .* as lora_alpha"),
        ({"lora_alpha": float("inf")}, "expected JSON in"),
        ({"modules_to_save": None}, "has unknown weights"),
        ({"modules_to_save": 5}, "null or a list of names as modules_to_save"),
        ({"modules_to_save": ["(a+)+"]}, "null or a list of names as modules_to_save"),
        ({"lora_dropout": "x"}, "at least 0 and below 1 as lora_dropout"),
        ({"peft_type": "IA3"}, "expected LORA, that of the method lora as peft_type"),
        ({"use_dora": True}, "expected False as use_dora"),
        ({"use_rslora": True}, "expected False as use_rslora"),
        ({"bias": "all"}, "expected 'none' as bias"),
        ({"fan_in_fan_out": True}, "expected False as fan_in_fan_out"),
        ({"layer_replication": [[0, 2]]}, "expected None as layer_replication"),
        ({"layers_to_transform": [0], "layers_pattern": "(a+)+"}, "expected None as layers_"),
        ({"exclude_modules": "(a+)+"}, "expected None as exclude_modules"),
        ({"target_parameters": ["x"]}, "expected None as target_parameters"),
        ({"trainable_token_indices": [1]}, "expected None as trainable_token_indices"),
        ({"loftq_config": {"loftq_bits": 4}}, "expected {} as loftq_config"),
        ({"eva_config": {"rho": 2.0}}, "expected None as eva_config"),
        ({"corda_config": {"cache_file": "/etc/passwd"}}, "expected None as corda_config"),
        ({"revision": "main"}, "expected None as revision"),
        ({"auto_mapping": {"base_model_class": "Popen", "parent_library": "subprocess"}}, "as auto_mapping"),
    ],
)
def test_values_that_peft_cannot_use_are_refused(saved, changes, message):
    edit_adapter(saved, "adapter_config.json", **changes)
    with pytest.raises(InputError, match=message):
        load_adapter(saved)


@pytest.mark.parametrize(
    "pattern",
    [
        "(.*a)*b",
        "((v|v)(i|i)(s|s))+x",
        r"(\w+\.?)+x",
        "(v|vi)(ision|sion)x",
        r".*.*.*.*.*.*.*.*x",
        "(?P<a>.)x",
        "(?=x)",
        "x{1,9999}",
        "v" * 5000,
        "",
    ],
)
@pytest.mark.parametrize("field", ["target_modules", "rank_pattern", "alpha_pattern"])
def test_expressions_that_take_for_ever_are_refused_before_they_are_tried(saved, field, pattern):
    edit_adapter(saved, "adapter_config.json", **{field: pattern if field == "target_modules" else {pattern: 4}})
    started = time.perf_counter()
    with pytest.raises(InputError, match=rf"layers.* as {field} in .*adapter_config\.json"):
        load_adapter(saved)
    assert time.perf_counter() - started < 5


def test_an_adapter_that_cannot_be_fetched_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="the adapter someone/liver cannot be fetched from the Hub: "):
        load_adapter("someone/liver")
