"""Volume prediction against the original's, on the scan's own grid, in any orientation."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import npz
from peft import LilyConfig, get_peft_model
from torch.nn import functional as F

from samed_peft.adapters.save_load import save_adapter
from samed_peft.config import SYNAPSE_CLASSES
from samed_peft.datasets import CaseVolumes, load_synapse, write_phantom
from samed_peft.datasets.preprocessing import slice_to_pixels
from samed_peft.errors import InputError
from samed_peft.io import Volume, read_label_names, read_labels
from samed_peft.metrics import score_masks
from samed_peft.models.bases import load_sam
from samed_peft.prediction.inference import (
    load_segmenter,
    predict_volume,
    segment_cases,
)
from samed_peft.prediction.slices import resize_on_device, slice_channels, upsampled_argmax


@pytest.fixture
def golden_volume():
    return npz("volume.npz")


def test_volume_inference_reproduces_samed(golden_model, golden_volume):
    scan = Volume(golden_volume["image"], normalized=True)
    prediction = predict_volume(golden_model, scan, batch_size=2)
    assert prediction.dtype == np.uint8
    assert prediction.shape == scan.array.shape
    assert (prediction == golden_volume["prediction"]).mean() >= 0.9999
    for k, expected in enumerate(golden_volume["per_class_dice_hd95"], start=1):
        scores = score_masks(prediction == k, golden_volume["label"] == k, convention="samed")
        assert list(scores.values()) == pytest.approx(expected, abs=1e-3)


def test_aligned_masks_come_straight_from_the_logits(golden_model, golden_config):
    """Slices, logits and masks share one geometry: logits are resized once, to the slice's own size."""
    with torch.no_grad():
        golden_model.base_model.model.samed_config = dataclasses.replace(
            golden_config, input_size=None, resampling="aligned"
        )
        array = npz("volume.npz")["image"][:3, :50, :70]
        inputs = F.interpolate(torch.from_numpy(array)[:, None], (128, 128), mode="bilinear", antialias=True)
        logits = golden_model(pixel_values=inputs.expand(-1, 3, -1, -1)).logits
    expected = F.interpolate(logits, (50, 70), mode="bilinear").argmax(1).numpy()
    assert len(np.unique(expected)) > 2
    np.testing.assert_array_equal(predict_volume(golden_model, Volume(array, normalized=True)), expected)
    golden_model.base_model.model.samed_config = golden_config
    assert (predict_volume(golden_model, Volume(array, normalized=True)) != expected).any()


def test_neighbouring_slices_fill_the_outer_channels():
    array = np.arange(5, dtype=np.float32)[:, None, None] + np.zeros((5, 2, 3), np.float32)
    channels = slice_channels(array, slice(0, 4), 2)
    assert channels.shape == (4, 3, 2, 3)
    assert channels[:, :, 0, 0].tolist() == [[0, 0, 2], [1, 1, 3], [0, 2, 4], [1, 3, 3]]


def test_neighbours_are_found_by_their_distance(golden_model, golden_config, golden_volume):
    """At 5 mm between slices and 9 mm, the neighbours are two slices away, whatever axis the scan is stored along."""
    config = dataclasses.replace(golden_config, orientation="LPS", neighbour_mm=9.0)
    affine = np.diag([-1.0, -1.0, 5.0, 1.0])
    volume = Volume(golden_volume["image"], affine=affine, normalized=True)
    golden_model.samed_config, before = config, golden_model.samed_config
    try:
        mask = predict_volume(golden_model, volume)
        turned = Volume(volume.array.transpose(1, 0, 2), affine=affine[:, [0, 2, 1, 3]], normalized=True)
        turned_mask = predict_volume(golden_model, turned)
        golden_model.samed_config = dataclasses.replace(config, neighbour_mm=None)
        alone = predict_volume(golden_model, volume)
    finally:
        golden_model.samed_config = before
    np.testing.assert_array_equal(turned_mask.transpose(1, 0, 2), mask)
    assert not np.array_equal(mask, alone)


def test_neighbours_need_a_spacing_and_grey_slices(golden_model, golden_config):
    golden_model.samed_config, before = dataclasses.replace(golden_config, neighbour_mm=2.0), golden_model.samed_config
    try:
        with pytest.raises(InputError, match="neighbouring slices at 2 mm; the scan has none"):
            predict_volume(golden_model, Volume(np.zeros((2, 8, 8), np.float32)))
        with pytest.raises(InputError, match="the scan is a colour picture, but the adapter sees neighbouring slices"):
            predict_volume(golden_model, Volume(np.zeros((1, 8, 8, 3), np.float32)))
    finally:
        golden_model.samed_config = before


def test_batch_size_does_not_matter(golden_model, golden_volume):
    scan = Volume(golden_volume["image"], normalized=True)
    one, many = (predict_volume(golden_model, scan, batch_size=size) for size in (1, 8))
    assert (one == many).mean() >= 0.9999


def test_the_mode_is_left_as_it_was(golden_model, golden_volume):
    golden_model.train()
    predict_volume(golden_model, Volume(golden_volume["image"][:1], normalized=True))
    assert golden_model.training


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL"])
def test_a_scan_in_another_orientation_gives_the_same_mask(golden_model, golden_config, golden_volume, codes):
    golden_model.base_model.model.samed_config = golden_config.__class__(
        **{**vars(golden_config), "orientation": "LAS"}
    )
    affine = np.diag([-0.8, 0.8, 3.0, 1.0])
    scan = Volume(golden_volume["image"], affine, normalized=True)
    expected = predict_volume(golden_model, scan)
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("LAS"), nib.orientations.axcodes2ornt(tuple(codes))
    )

    def turned(array):
        return nib.orientations.apply_orientation(array.transpose(2, 1, 0), turn).transpose(2, 1, 0)

    turned_affine = affine @ nib.orientations.inv_ornt_aff(turn, scan.array.shape[::-1])
    other = Volume(np.ascontiguousarray(turned(scan.array)), turned_affine, normalized=True)
    assert other.orientation == codes
    np.testing.assert_array_equal(predict_volume(golden_model, other), turned(expected))


def test_segment_cases_writes_masks_on_the_scans_grid(golden_model, golden_volume, tmp_path):
    affine = np.array([[-0.8, 0, 0, 100], [0, 0.8, 0, -50], [0, 0, 3.0, 7], [0, 0, 0, 1]])
    images = {"a": Volume(golden_volume["image"][:2], affine, normalized=True)}
    files = segment_cases(golden_model, images, tmp_path, accelerator=Accelerator(cpu=True))
    mask = read_labels(files["a"])
    np.testing.assert_array_equal(mask.array, predict_volume(golden_model, images["a"]))
    np.testing.assert_allclose(mask.affine, affine, atol=1e-6)
    assert read_label_names(files["a"]) == dict(enumerate(SYNAPSE_CLASSES, start=1))


def test_scans_of_another_kind_are_told(golden_model, golden_volume):
    scaled = golden_volume["image"]
    predict_volume(golden_model, Volume(scaled * 400 - 125))  # in Hounsfield units
    for volume, message in (
        (Volume(scaled), r"the scan holds 0\.\d+ to 0\.\d+ .* hardly fit the adapter's window, -125 to 275"),
        (Volume((scaled > 0.5).astype(np.float32), normalized=True), r"hardly fit the \[0, 1\] that it was scaled to"),
    ):
        with pytest.warns(UserWarning, match=message) as told:
            predict_volume(golden_model, volume)
        assert told[0].filename == __file__


@pytest.fixture
def split_of_volumes(tmp_path):
    """Three phantoms as a prepared split, which Datasets maps from disk."""
    data = write_phantom(tmp_path / "btcv", cases=(1, 2, 3), seed=0, shape_dhw=(4, 32, 32))
    return load_synapse(data, "test", cases=(1, 2, 3), cache_dir=tmp_path / "cache", num_proc=1)


def test_cases_of_a_prepared_split_are_read_in_a_thread(golden_model, split_of_volumes, tmp_path):
    images, references = CaseVolumes.pairs(split_of_volumes)
    expected = {case: predict_volume(golden_model, image) for case, image in images.items()}
    files = segment_cases(golden_model, images, tmp_path / "masks", accelerator=Accelerator(cpu=True))
    assert list(files) == list(expected)
    for case, file in files.items():
        np.testing.assert_array_equal(read_labels(file).array, expected[case])
    with ThreadPoolExecutor(8) as pool:  # two columns of one split at once, as often as it takes
        found = list(pool.map(lambda number: (images, references)[number % 2]["case0002"].array, range(64)))
    for number, array in enumerate(found):
        np.testing.assert_array_equal(array, (images, references)[number % 2]["case0002"].array)


def test_a_case_that_cannot_be_read_or_written_ends_it(golden_model, golden_volume, tmp_path):
    scan = Volume(golden_volume["image"][:1], normalized=True)

    def unreadable():
        raise InputError("c.nii.gz cannot be read: no gzip")

    images = CaseVolumes({"a": lambda: scan, "b": lambda: scan, "c": unreadable, "d": lambda: scan})
    with pytest.raises(InputError, match=r"^c\.nii\.gz cannot be read: no gzip$"):
        segment_cases(golden_model, images, tmp_path / "out", accelerator=Accelerator(cpu=True))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.nii.gz", "b.nii.gz"]
    (tmp_path / "other" / "a.nii.gz").mkdir(parents=True)
    with pytest.raises(InputError, match="found the folder"):
        segment_cases(golden_model, {"a": scan, "b": scan}, tmp_path / "other", accelerator=Accelerator(cpu=True))


@pytest.fixture
def saved(golden_model, golden_config, tmp_path):
    save_adapter(golden_model, tmp_path / "adapter", config=golden_config)
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("precision", "dtype", "is_merged"),
    [("no", None, True), ("no", "bfloat16", False), ("bf16", None, False), ("bf16", "float32", True)],
)
def test_adapters_are_merged_in_float32_alone(saved, golden_model, golden_volume, precision, dtype, is_merged):
    AcceleratorState._reset_state(reset_partial_state=True)  # precision is the process's, not the accelerator's
    try:
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        model = load_segmenter(saved, accelerator=accelerator, dtype=dtype)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert any("lora" in name for name in model.state_dict()) != is_merged
    scan = Volume(golden_volume["image"], normalized=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not is_merged):
        masks, expected = predict_volume(model, scan), predict_volume(golden_model, scan)
    assert (masks != expected).mean() < (1e-4 if is_merged else 1e-9)  # in half precision: to the bit


def test_an_adapter_that_cannot_be_merged_predicts_all_the_same(golden_config, golden_volume, tmp_path):
    sam = load_sam(golden_config.base, class_names=golden_config.class_names, image_size=128)
    sam.samed_config = golden_config
    layers, parts = r".*vision_encoder\.layers\.\d+\.attn\.(q_proj|v_proj)", ["mask_decoder", "no_mask_embed"]
    lily = get_peft_model(sam, LilyConfig(r=4, target_modules=layers, modules_to_save=parts))
    torch.nn.init.normal_(next(p for name, p in lily.named_parameters() if "lily_B" in name))
    save_adapter(lily, tmp_path / "lily", config=golden_config)
    scan = Volume(golden_volume["image"][:2], normalized=True)
    loaded = load_segmenter(tmp_path / "lily", accelerator=Accelerator(cpu=True))
    np.testing.assert_array_equal(predict_volume(loaded, scan), predict_volume(lily, scan))


def test_no_gradient_is_kept(golden_model, golden_volume):
    predict_volume(golden_model, Volume(golden_volume["image"][:1], normalized=True))
    assert all(p.grad is None for p in golden_model.parameters())
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(("old", "sizes"), [((60, 50), (64,)), ((60, 50), (28, 64)), ((64, 64), (64,))])
def test_slices_are_resized_together_as_one_by_one(old, sizes):
    slices = np.random.default_rng(0).random((3, *old), dtype=np.float32)
    bottleneck = sizes[0] if len(sizes) > 1 else None
    expected = np.stack([slice_to_pixels(one, image_size=64, input_size=bottleneck) for one in slices])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = resize_on_device(torch.from_numpy(slices)[:, None], sizes)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got[:, 0], expected, rtol=0, atol=1e-6)


def test_the_first_of_equal_classes_wins():
    logits = torch.tensor([0.0, 2.0, 1.0, 2.0]).reshape(1, 4, 1, 1).expand(2, 4, 3, 3)
    assert (upsampled_argmax(logits, 5) == 1).all()
    random = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    resized = torch.nn.functional.interpolate(random, size=(32, 32), mode="bilinear", align_corners=False)
    assert upsampled_argmax(random, 32).equal(resized.argmax(1).to(torch.uint8))
