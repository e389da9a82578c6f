"""SAMed's and Meta's formats in, SAMed's, plain SAM's, PEFT's and ONNX out; golden logits and equal bits."""

import dataclasses
import json
import pickle
import re
import shutil
import tracemalloc
import zipfile

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import GOLDEN, edit_adapter, npz
from peft import PeftModel
from segment_anything import sam_model_registry
from transformers import SamConfig, SamModel

from samed_peft import SamedConfig, load_adapter, save_adapter
from samed_peft.adapters.folder import read_config, write_config
from samed_peft.adapters.info import adapter_info
from samed_peft.adapters.save_load import add_lora
from samed_peft.cli import main
from samed_peft.config import SYNAPSE_CLASSES
from samed_peft.config.presets import PRESETS
from samed_peft.conversion import (
    convert_sam,
    convert_samed,
    export_merged,
    export_onnx,
    export_peft_fused,
    export_samed,
    exports,
)
from samed_peft.conversion.samed_format import preset_name
from samed_peft.errors import InputError
from samed_peft.io import load_torch_weights
from samed_peft.models.bases import load_sam
from samed_peft.models.checkpoints import infer_config, rename_meta_keys
from samed_peft.models.modeling import SamForSemanticSegmentation
from samed_peft.prediction.scans import warn_of_storage_order

BASE = str(GOLDEN / "sam_base.pth")
SIZES = {"image_size": 128, "input_size": 56}
FILES = {"samed": "samed_adapter.pth", "samed_s": "samed_s_adapter.pth"}


@pytest.fixture(scope="module", params=FILES)
def converted(request, tmp_path_factory):
    """(preset, adapter directory) of a golden checkpoint."""
    directory = tmp_path_factory.mktemp(request.param) / "adapter"
    convert_samed(GOLDEN / FILES[request.param], BASE, directory, **SIZES)
    return request.param, directory


@pytest.fixture(scope="module")
def samed_adapter(tmp_path_factory):
    directory = tmp_path_factory.mktemp("samed") / "adapter"
    convert_samed(GOLDEN / FILES["samed"], BASE, directory, **SIZES)
    return directory


def golden_pixels(name="forward.npz"):
    return torch.from_numpy(npz(name)["pixel_values"]).expand(-1, 3, -1, -1)


@torch.no_grad()
def plain_logits(sam, pixels):
    """What a plain SAM without prompts gives: map 0 alone, then the others."""
    embeddings = sam.get_image_embeddings(pixels)
    maps = [sam(image_embeddings=embeddings, multimask_output=several).pred_masks[:, 0] for several in (False, True)]
    return torch.cat(maps, dim=1)


def test_logits_are_those_of_the_original(converted):
    preset, directory = converted
    name = {"samed": "forward.npz", "samed_s": "forward_s.npz"}[preset]
    expected = npz(name)["low_res_logits"]
    model = load_adapter(directory)
    with torch.no_grad():
        found = model(pixel_values=golden_pixels(name)).logits.numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_the_config_is_read_from_the_file(converted):
    preset, directory = converted
    config = load_adapter(directory).samed_config
    assert (config.preset, config.rank, config.class_names) == (preset, 4, SYNAPSE_CLASSES)
    assert config.decoder == PRESETS[preset].decoder
    assert (config.image_size, config.input_size, config.orientation) == (128, 56, "LAS")


def test_round_trip_to_samed_is_equal_to_the_bit(converted, tmp_path):
    preset, directory = converted
    export_samed(directory, tmp_path / "out.pth")
    before, after = load_torch_weights(GOLDEN / FILES[preset]), load_torch_weights(tmp_path / "out.pth")
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_equal_adapters_are_exported_as_equal_files(samed_adapter, tmp_path):
    export_samed(samed_adapter, tmp_path / "one.pth")
    export_samed(shutil.copytree(samed_adapter, tmp_path / "copy"), tmp_path / "two.pth")
    assert (tmp_path / "one.pth").read_bytes() == (tmp_path / "two.pth").read_bytes()


def test_what_is_converted_can_be_trained_on(converted):
    model = load_adapter(converted[1], trainable=True)
    model(pixel_values=golden_pixels()).logits.square().mean().backward()
    without = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    assert not without
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert any("transformer" in name and "lora_" not in name for name in trained) == (converted[0] == "samed")


def test_alpha_is_multiplied_into_b(tmp_path):
    torch.manual_seed(0)
    config = SamedConfig(BASE, ("one", "two"), image_size=128, rank=4, alpha=8)
    model = add_lora(load_sam(BASE, class_names=config.class_names, image_size=128), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    save_adapter(model, tmp_path / "a", config=config)
    export_samed(tmp_path / "a", tmp_path / "samed.pth")
    convert_samed(tmp_path / "samed.pth", BASE, tmp_path / "b", image_size=128)
    one, two = load_adapter(tmp_path / "a"), load_adapter(tmp_path / "b")
    with torch.no_grad():
        torch.testing.assert_close(one(golden_pixels()).logits, two(golden_pixels()).logits, rtol=0, atol=1e-5)
    assert two.samed_config.class_names == ("class 1", "class 2")


def test_a_merged_model_is_a_plain_sam(converted, tmp_path):
    export_merged(converted[1], tmp_path / "sam")
    found = plain_logits(SamModel.from_pretrained(tmp_path / "sam").eval(), golden_pixels())
    with torch.no_grad():
        expected = load_adapter(converted[1])(golden_pixels()).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_stock_peft_attaches_the_fused_adapter_to_a_plain_sam(converted, tmp_path):
    adapter = converted[1]
    convert_sam(BASE, tmp_path / "base", image_size=128)
    export_peft_fused(adapter, tmp_path / "fused")
    config = SamConfig.from_pretrained(tmp_path / "fused")
    sam = SamModel.from_pretrained(tmp_path / "base", config=config, ignore_mismatched_sizes=True)
    model = PeftModel.from_pretrained(sam, tmp_path / "fused").eval()
    with torch.no_grad():
        expected = load_adapter(adapter)(golden_pixels()).logits
    torch.testing.assert_close(plain_logits(model.base_model.model, golden_pixels()), expected, rtol=0, atol=1e-5)
    lora = model.base_model.model.vision_encoder.layers[0].attn.qkv.lora_B["default"].weight
    assert lora.shape == (3 * 48, 8)
    assert not lora[48:96].any()


def test_the_readmes_snippet_loads_both_exports(samed_adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert_sam(BASE, "sam-512", image_size=128)
    export_merged(samed_adapter, "merged")
    export_peft_fused(samed_adapter, "fused")
    readme = (GOLDEN.parents[1] / "README.md").read_text(encoding="utf-8")
    (snippet,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "PeftModel" in block]
    names = {"pixel_values": golden_pixels()}
    exec(snippet, names)  # the project's own document
    with torch.no_grad():
        expected = load_adapter(samed_adapter)(golden_pixels()).logits
    for sam in ("merged", "fused"):
        torch.testing.assert_close(names["class_maps"](names[sam], golden_pixels()), expected, rtol=0, atol=1e-5)
    assert names["mask"].equal(expected.argmax(1))


@pytest.mark.slow
def test_onnx_gives_the_same_logits_for_any_batch(samed_adapter, tmp_path, capsys):
    main(["export", "--adapter", str(samed_adapter), "--output", str(tmp_path / "model.onnx"), "--format", "onnx"])
    assert re.search(r"onnx written to .*model\.onnx; logits differ from PyTorch's by .*e-", capsys.readouterr().out)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert '"spleen"' in session.get_modelmeta().custom_metadata_map["samed_config"]
    pixels = golden_pixels().repeat(2, 1, 1, 1)[:3]
    with torch.no_grad():
        expected = load_adapter(samed_adapter, merge=True)(pixels).logits.numpy()
    found = session.run(None, {"pixel_values": pixels.numpy()})[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_halves_the_file(samed_adapter, tmp_path, dtype):
    convert_samed(GOLDEN / FILES["samed"], BASE, tmp_path / "half", dtype=dtype, **SIZES)
    sizes = [(folder / "adapter_model.safetensors").stat().st_size for folder in (samed_adapter, tmp_path / "half")]
    assert sizes[1] < 0.6 * sizes[0]
    one, two = load_adapter(samed_adapter), load_adapter(tmp_path / "half")
    assert {weight.dtype for weight in two.parameters()} == {torch.float32}
    with torch.no_grad():
        difference = (one(golden_pixels()).logits - two(golden_pixels()).logits).abs().max()
    assert 0 < difference < (0.01 if dtype == "float16" else 0.08)


def test_a_weight_beyond_float16_is_not_stored_as_infinity(samed_adapter, tmp_path):
    model = load_adapter(samed_adapter)
    with torch.no_grad():
        model.get_parameter("base_model.model.mask_decoder.modules_to_save.default.iou_token.weight")[0, 0] = 1e6
    with pytest.raises(InputError, match=r"iou_token\.weight is too large for torch.float16"):
        save_adapter(model, tmp_path / "half", config=model.samed_config, dtype="float16")
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_checkpoints_of_other_precision_are_converted(tmp_path, dtype):
    def change(state):
        state.update({key: value.to(dtype) for key, value in state.items()})

    convert_samed(spoilt(tmp_path, change), BASE, tmp_path / "out", **SIZES)
    assert load_adapter(tmp_path / "out").samed_config.rank == 4


def spoilt(tmp_path, change):
    state = load_torch_weights(GOLDEN / FILES["samed"])
    change(state)
    torch.save(state, tmp_path / "spoilt.pth")
    return tmp_path / "spoilt.pth"


def more_layers(state):
    state["w_a_012"] = state["w_a_000"]


def other_encoding(state):
    state["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"] += 1


def without_token(state):
    del state["mask_decoder.iou_token.weight"]


def other_shape(state):
    state["w_b_003"] = state["w_b_003"][:, :2].clone()


def unknown(state):
    state["w_c_000"] = torch.zeros(1)


def not_finite(state):
    state["w_b_001"] = state["w_b_001"] / 0


def flat(state):
    state["w_a_000"] = torch.zeros(48)


def flat_tokens(state):
    state["mask_decoder.mask_tokens.weight"] = torch.tensor(1.0)


def without_classes(state):
    state["mask_decoder.mask_tokens.weight"] = torch.zeros(1, 32)


def too_many_classes(state):
    state["mask_decoder.mask_tokens.weight"] = torch.zeros(300, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flat, r"expected two dimensions in w_a_000, found shape \(48,\)"),
        (flat_tokens, r"expected two dimensions in mask_decoder\.mask_tokens\.weight, found shape \(\)"),
        (without_classes, "expected 2 to 256 rows in .*found 1"),
        (too_many_classes, "expected 2 to 256 rows in .*found 300"),
        (more_layers, "7 layers and width 48, but the base has 6 layers"),
        (other_encoding, "another positional encoding than the base"),
        (without_token, "lacks weights .*iou_token"),
        (other_shape, r"layers.1.attn.v_proj.lora_B.weight should be \(48, 4\) .* but is \(48, 2\)"),
        (unknown, "has unknown weights .*w_c_000"),
        (not_finite, "NaN or infinity in tensor 'w_b_001'"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        convert_samed(spoilt(tmp_path, change), BASE, tmp_path / "out", image_size=128)
    assert not (tmp_path / "out").exists()


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_a_payload_is_refused_and_never_run(tmp_path, zipped):
    file, trace = tmp_path / "evil.pth", tmp_path / "ran"
    if zipped:
        torch.save({"w_a_000": Payload(trace)}, file)
    else:
        file.write_bytes(pickle.dumps({"w_a_000": Payload(trace)}))
    with pytest.raises(InputError, match="cannot be loaded safely") as refused:
        convert_samed(file, BASE, tmp_path / "out")
    assert "weights_only" not in str(refused.value)
    with pytest.raises(InputError, match="cannot be loaded safely"):
        convert_sam(file, tmp_path / "out")
    assert not trace.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_larger_than_their_file_are_refused_before_they_are_made(tmp_path, zipped):
    torch.save(
        {"w_a_000": torch.zeros(1).expand(10**6, 10**6)},
        tmp_path / "bomb.pth",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(InputError, match="claims 4000000000000 bytes of tensors"):
        convert_samed(tmp_path / "bomb.pth", BASE, tmp_path / "out")


def test_class_names_must_be_as_many_as_the_classes(tmp_path):
    with pytest.raises(InputError, match="expected 8 class names"):
        convert_samed(GOLDEN / FILES["samed"], BASE, tmp_path / "out", class_names=("liver",), image_size=128)


@pytest.mark.parametrize("kind", ["vit_b", "vit_l", "vit_h"])
def test_geometry_of_metas_models_is_read_from_their_weights(kind):
    with torch.device("meta"):
        state = sam_model_registry[kind]().state_dict()
    config = infer_config(rename_meta_keys(state))
    width, depth, heads = {"vit_b": (768, 12, 12), "vit_l": (1024, 24, 16), "vit_h": (1280, 32, 16)}[kind]
    vision = config.vision_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (width, depth, heads)
    assert (vision.window_size, vision.image_size, vision.patch_size) == (14, 1024, 16)
    assert vision.global_attn_indexes == [depth // 4 * k - 1 for k in (1, 2, 3, 4)]
    with torch.device("meta"):
        expected = SamModel(config).state_dict()
    found = rename_meta_keys(state)
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in expected.items()}


@pytest.mark.parametrize(("preset", "count"), [("samed", 147456), ("samed_s", 147456 + 2 * (4096 + 2 * 3072) + 3072)])
def test_lora_weights_are_as_many_as_in_the_paper(preset, count):
    with torch.device("meta"):
        config = infer_config(rename_meta_keys(sam_model_registry["vit_b"]().state_dict()))
        config.mask_decoder_config.num_multimask_outputs = 8
        model = SamForSemanticSegmentation(config)
    settings = SamedConfig("base", SYNAPSE_CLASSES, image_size=1024, decoder=PRESETS[preset].decoder)
    adapted = add_lora(model, settings)
    assert sum(weight.numel() for name, weight in adapted.named_parameters() if "lora_" in name) == count


@pytest.mark.slow
def test_a_converted_vit_b_computes_what_segment_anything_computes(tmp_path):
    torch.manual_seed(0)
    meta = sam_model_registry["vit_b"]().eval()
    for name, weight in meta.named_parameters():  # segment-anything leaves positions at zero
        if "pos" in name:
            torch.nn.init.normal_(weight, std=0.02)
    torch.save(meta.state_dict(), tmp_path / "sam.pth")
    convert_sam(tmp_path / "sam.pth", tmp_path / "sam")
    sam = SamModel.from_pretrained(tmp_path / "sam").eval()
    pixels = torch.rand(1, 3, 1024, 1024)
    with torch.no_grad():
        torch.testing.assert_close(sam.get_image_embeddings(pixels), meta.image_encoder(pixels), rtol=0, atol=1e-4)


def test_the_orientation_of_synapse_is_raw_btcvs_and_others_are_told(tmp_path, capsys):
    checkpoint, sizes = str(GOLDEN / FILES["samed_s"]), ["--image_size", "128"]
    for names, codes in ((None, "LAS"), ("a,b,c,d,e,f,g,h", None), ("a,b,c,d,e,f,g,h", "LPS"), (None, "LPS")):
        options = [*(["--class_names", names] if names else []), *(["--orientation", codes] if codes == "LPS" else [])]
        main(["convert", "--checkpoint", checkpoint, "--base", BASE, "--output", str(tmp_path), *sizes, *options])
        assert adapter_info(tmp_path)["config"]["orientation"] == codes
        assert ("orientation is unknown, so slices" in capsys.readouterr().out) == (codes is None)
    scans = [tmp_path / "a.nii.gz", tmp_path / "b.png"]
    with pytest.warns(UserWarning, match="slices follow the order in which each scan is stored"):
        warn_of_storage_order(scans, None)
    warn_of_storage_order(scans, "LAS")
    warn_of_storage_order(scans[1:], None)


def test_the_command_line_converts_and_exports(tmp_path, capsys):
    checkpoint, adapter = str(GOLDEN / FILES["samed_s"]), str(tmp_path / "adapter")
    sizes = ["--image_size", "128", "--input_size", "56", "--orientation", "LAS"]
    main(["convert", "--checkpoint", checkpoint, "--base", BASE, "--output", adapter, *sizes])
    assert load_adapter(adapter).samed_config.orientation == "LAS"
    main(["export", "--adapter", adapter, "--output", str(tmp_path / "back.pth"), "--format", "samed"])
    assert list(load_torch_weights(tmp_path / "back.pth")) == list(load_torch_weights(checkpoint))
    main(["convert", "--checkpoint", BASE, "--output", str(tmp_path / "sam")])
    assert SamModel.from_pretrained(tmp_path / "sam").config.vision_config.image_size == 256
    with pytest.raises(SystemExit) as ended:
        main(["convert", "--checkpoint", checkpoint, "--output", str(tmp_path / "other")])
    assert ended.value.code == 2
    assert "give --base" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["export", "--adapter", BASE, "--output", str(tmp_path / "f"), "--format", "peft-fused"])
    assert ended.value.code == 2
    assert "adapter" in capsys.readouterr().err


def repacked(source, target, *, compression=zipfile.ZIP_STORED, data_pkl=None):
    """A zip of `torch.save` with other compression, or another pickle."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, data_pkl if data_pkl and name.endswith("data.pkl") else old.read(name))
    return target


def test_a_compressed_checkpoint_is_refused(tmp_path):
    file = repacked(BASE, tmp_path / "deflated.pth", compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match=r"found .*data\.pkl compressed in .*save it again with torch\.save"):
        convert_sam(file, tmp_path / "out")


def test_a_checkpoint_zipped_again_without_compression_is_the_same(tmp_path):
    one, two = load_torch_weights(BASE), load_torch_weights(repacked(BASE, tmp_path / "stored.pth"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_asks_for_memory_is_refused_before_it_gets_any(tmp_path, zipped):
    bomb = b"\x80\x02c__builtin__\nbytearray\n\x8a\x05" + (1500 << 20).to_bytes(5, "little") + b"\x85R."
    if zipped:
        file = repacked(BASE, tmp_path / "bomb.pth", data_pkl=bomb)
    else:
        file = tmp_path / "bomb.pth"
        file.write_bytes(bomb)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"cannot be loaded safely.*__builtin__\.bytearray"):
        convert_sam(file, tmp_path / "out")
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


def test_a_pickle_too_large_to_name_weights_is_refused(tmp_path):
    file = repacked(BASE, tmp_path / "large.pth", data_pkl=b"\x80\x02}." + bytes(5 << 20))
    with pytest.raises(InputError, match="5242884 bytes, too many"):
        convert_sam(file, tmp_path / "out")


def test_the_preset_of_a_vit_h_is_its_own():
    assert preset_name("full", width=1280, layers=32) == "samed_h"
    assert preset_name("full", width=768, layers=12) == "samed"
    assert preset_name("lora", width=1280, layers=32) == "samed_s"


@pytest.mark.parametrize("content", ["{}", '{"model_type": "llama"}', '{"model_type": "sam"}', "[1]"])
@pytest.mark.parametrize("extra", [True, False])
def test_a_folder_that_is_not_a_sam_alone_is_not_replaced(samed_adapter, tmp_path, content, extra):
    project = tmp_path / "project"
    project.mkdir()
    (project / "config.json").write_text(content)
    if extra:
        (project / "thesis.txt").touch()
    if extra or '"sam"' not in content:
        for export in (lambda: convert_sam(BASE, project), lambda: export_merged(samed_adapter, project)):
            with pytest.raises(InputError, match="must not be lost"):
                export()
        assert (project / "config.json").read_text() == content
    else:
        convert_sam(BASE, project)
        convert_sam(BASE, project, image_size=128)
        assert SamModel.from_pretrained(project).config.vision_config.image_size == 128


def test_a_fused_adapter_is_called_what_it_is(samed_adapter, tmp_path):
    export_peft_fused(samed_adapter, tmp_path / "fused")
    with pytest.raises(InputError, match=r"fused .*peft-fused.* PeftModel\.from_pretrained.* it was exported from"):
        load_adapter(tmp_path / "fused")


@pytest.mark.parametrize("folder", [False, True])
def test_a_relative_base_is_recorded_so_that_it_is_found_from_anywhere(tmp_path, monkeypatch, folder):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copy(BASE, "sam.pth")
    if folder:
        convert_sam("sam.pth", "sam")
    convert_samed(GOLDEN / FILES["samed"], "sam" if folder else "sam.pth", "adapter", **SIZES)
    monkeypatch.chdir(tmp_path / "there")
    base = load_adapter(tmp_path / "here" / "adapter").samed_config.base
    assert base == str(tmp_path / "here" / ("sam" if folder else "sam.pth"))
    recorded = json.loads((tmp_path / "here" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert recorded["base_model_name_or_path"] == base


def test_a_fused_adapter_replaces_only_another(samed_adapter, tmp_path):
    other, stranger = tmp_path / "other", tmp_path / "stranger"
    shutil.copytree(samed_adapter, other)
    stranger.mkdir()
    (stranger / "adapter_config.json").write_text("{}")
    (stranger / "thesis.txt").touch()
    for folder in (samed_adapter, other, stranger):
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        with pytest.raises(InputError, match="must not be lost"):
            export_peft_fused(samed_adapter, folder)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    export_peft_fused(samed_adapter, tmp_path / "fused")
    export_peft_fused(samed_adapter, tmp_path / "fused")


@pytest.mark.parametrize("export", [export_samed, export_onnx])
def test_a_file_is_never_replaced(samed_adapter, tmp_path, export):
    (tmp_path / "thesis.pth").write_text("years of work")
    with pytest.raises(InputError, match="found a file; remove it or choose another name"):
        export(samed_adapter, tmp_path / "thesis.pth")
    with pytest.raises(InputError, match="found the folder"):
        export("no/adapter", tmp_path)
    assert (tmp_path / "thesis.pth").read_text() == "years of work"


def test_weights_beyond_what_onnx_holds_are_refused(samed_adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "_MOST_ONNX_BYTES", 1 << 20)
    with pytest.raises(InputError, match=r"at most 1048576 bytes of weights.*--format merged"):
        export_onnx(samed_adapter, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_the_scaling_of_rslora_survives_fusing(tmp_path):
    convert_samed(GOLDEN / FILES["samed_s"], BASE, tmp_path / "adapter", **SIZES)
    edit_adapter(tmp_path / "adapter", method="rslora")
    edit_adapter(tmp_path / "adapter", "adapter_config.json", use_rslora=True)
    convert_sam(BASE, tmp_path / "base", image_size=128)
    export_peft_fused(tmp_path / "adapter", tmp_path / "fused")
    config = SamConfig.from_pretrained(tmp_path / "fused")
    sam = SamModel.from_pretrained(tmp_path / "base", config=config, ignore_mismatched_sizes=True)
    model = PeftModel.from_pretrained(sam, tmp_path / "fused").eval()
    with torch.no_grad():
        expected = load_adapter(tmp_path / "adapter")(golden_pixels()).logits
    torch.testing.assert_close(plain_logits(model.base_model.model, golden_pixels()), expected, rtol=0, atol=1e-5)


def test_options_of_adapters_are_refused_without_a_base(tmp_path, capsys):
    options = ["--dtype", "float16", "--class_names", "a", "--input_size", "224", "--orientation", "LAS"]
    with pytest.raises(SystemExit) as ended:
        main(["convert", "--checkpoint", BASE, "--output", str(tmp_path / "sam"), *options])
    assert ended.value.code == 2
    assert "--input_size, --class_names, --orientation, --dtype belong to an adapter" in capsys.readouterr().err
    assert not (tmp_path / "sam").exists()


def test_a_mistyped_checkpoint_is_called_one(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--checkpoint", "sam_vit_c.pth", "--output", str(tmp_path / "sam")])
    assert "error: checkpoint sam_vit_c.pth is neither a file" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0", "-16", "100"])
def test_sizes_that_cannot_be_are_refused(tmp_path, capsys, size):
    with pytest.raises(SystemExit) as ended:
        main(["convert", "--checkpoint", BASE, "--output", str(tmp_path / "sam"), "--image_size", size])
    assert ended.value.code == 2
    assert f"positive multiple of the patch size 16; found {size}" in capsys.readouterr().err


def test_each_command_says_what_it_wrote(samed_adapter, tmp_path, capsys):
    sam, adapter, samed = (str(tmp_path / name) for name in ("sam", "adapter", "samed.pth"))
    main(["convert", "--checkpoint", BASE, "--output", sam])
    main(["convert", "--checkpoint", str(GOLDEN / FILES["samed"]), "--base", BASE, "--output", adapter])
    main(["export", "--adapter", adapter, "--output", samed, "--format", "samed"])
    lines = [f"SAM written to {sam}", f"adapter written to {adapter}", f"samed written to {samed}"]
    assert capsys.readouterr().out.splitlines() == lines


def test_what_samed_s_format_cannot_record_is_told_or_refused(samed_adapter, tmp_path):
    def changed(name, **values):
        folder = shutil.copytree(samed_adapter, tmp_path / name)
        write_config(dataclasses.replace(read_config(folder), **values), folder)
        return folder

    classes = read_config(samed_adapter).class_names
    numbers = tuple(range(2, 2 + len(classes)))
    with pytest.warns(
        UserWarning, match=rf"labels 1 to {len(classes)} in place of \[2, .*all parts of {classes[0]}, not"
    ):
        export_samed(changed("one", label_values=numbers, keep_largest=classes[:1]), tmp_path / "one.pth")
    for name, values in (
        ("two", {"neighbour_mm": 2.0}),
        ("three", {"resampling": "aligned", "input_size": None}),
        ("four", {"window": ((0.0, 1.0), (0.0, 2.0))}),
        ("five", {"channels": (0, 1)}),
    ):
        with pytest.raises(InputError, match="its masks would differ there; export it with --format merged"):
            export_samed(changed(name, **values), tmp_path / f"{name}.pth")
