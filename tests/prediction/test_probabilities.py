"""Probabilities on the scan's own grid, of one adapter or the mean of several, and their files."""

import dataclasses
import functools
import json
import shutil

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from accelerate import Accelerator
from conftest import edit_adapter, npz
from scan_files import AFFINE, write_dicom

from samed_peft import io
from samed_peft.adapters.save_load import add_lora, load_adapter, save_adapter
from samed_peft.cli import main
from samed_peft.config import SamedConfig
from samed_peft.errors import InputError
from samed_peft.io import Volume
from samed_peft.models.bases import load_sam
from samed_peft.prediction import PredictionOptions, list_scans, plan_masks, predict_files, with_tiles
from samed_peft.prediction.inference import predict_probabilities, predict_volume
from samed_peft.prediction.postprocessing import largest_parts
from samed_peft.prediction.writing import write_results

NAMES = ("liver", "spleen")
SHAPE = (3, 12, 10)


def scan_array(seed=0):
    coarse = np.random.default_rng(seed).uniform(0, 100, (3, 3, 2))
    return coarse.repeat(4, axis=1).repeat(5, axis=2).astype(np.float32)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Adapters that differ in size, window, orientation and resampling; one of other classes, one of a channel."""
    folder = tmp_path_factory.mktemp("adapters")
    first = SamedConfig("tiny-sam", NAMES, image_size=64, window=(0.0, 100.0), orientation="LAS")
    second = dataclasses.replace(
        first, image_size=32, window=(-10.0, 120.0), orientation="PIR", resampling="aligned", keep_largest=("spleen",)
    )
    configs = {"first": dataclasses.replace(first, keep_largest=("liver", "spleen")), "second": second}
    for seed, (name, config) in enumerate(configs.items()):
        torch.manual_seed(5 + seed)
        model = add_lora(load_sam("tiny-sam", class_names=config.class_names, image_size=config.image_size), config)
        save_adapter(model, folder / name, config=config)
    for name, changes in {"others": {"class_names": NAMES[::-1]}, "channel": {"channel": 1}}.items():
        edit_adapter(shutil.copytree(folder / "second", folder / name), **changes)
    return folder


@pytest.fixture(scope="module")
def models(adapters):
    return [load_adapter(adapters / name) for name in ("first", "second")]


@pytest.fixture(scope="module")
def loaded():
    """`load_segmenter` that loads each adapter once."""
    load = functools.cache(functools.partial(load_adapter, merge=True))
    return lambda source, **_: load(source)


@pytest.fixture
def predict(adapters, loaded, tmp_path, monkeypatch):
    """Runs the command on paths below `tmp_path` with some of the adapters; returns its exit code."""
    monkeypatch.setattr("samed_peft.prediction.inference.load_segmenter", loaded)

    def run(names, *options, source="scans", output="masks"):
        arguments = ["--input", tmp_path / source, "--output", tmp_path / output, *options]
        try:
            main(["predict", "--adapter", *(str(adapters / name) for name in names), *map(str, arguments)])
        except SystemExit as end:
            return end.code
        return 0

    return run


def write_scan(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(scan_array(seed).T, AFFINE), path)
    return path


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def largest_is_of_the_mask(probabilities, mask):
    """Whether each label's probability is the largest of its voxel, or shares that place."""
    chosen = np.take_along_axis(probabilities, mask[None].astype(int), axis=0)[0]
    return (chosen == probabilities.max(axis=0)).all()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("changes", [{}, {"input_size": None, "resampling": "aligned"}])
def test_probabilities_of_one_model(golden_model, golden_config, bits, changes):
    golden_model.base_model.model.samed_config = dataclasses.replace(golden_config, orientation="RAS", **changes)
    scan = Volume(npz("volume.npz")["image"][:3, :50, :70], np.diag([-1.0, 1, 1, 1]), normalized=True)
    mask, probabilities = predict_probabilities(golden_model, scan, bits=bits, batch_size=2)
    np.testing.assert_array_equal(mask, predict_volume(golden_model, scan, batch_size=2))
    assert len(np.unique(mask)) > 2
    assert (probabilities.shape, probabilities.dtype.itemsize) == ((9, 3, 50, 70), bits // 8)
    assert largest_is_of_the_mask(probabilities, mask)
    sums = probabilities.sum(axis=0, dtype=np.int64)
    assert np.abs(sums - (2**bits - 1)).max() <= 9 / 2
    with pytest.raises(InputError, match="bits must be 8 or 16; found 12"):
        predict_probabilities(golden_model, scan, bits=12)


def test_probabilities_are_the_softmax_of_the_logits(golden_model, golden_config):
    golden_model.base_model.model.samed_config = dataclasses.replace(
        golden_config, input_size=None, resampling="aligned"
    )
    array = npz("volume.npz")["image"][:1, :128, :128]
    with torch.no_grad():
        logits = golden_model(pixel_values=torch.from_numpy(array)[:, None].expand(-1, 3, -1, -1)).logits
    expected = torch.nn.functional.interpolate(logits, (128, 128), mode="bilinear").softmax(1)[0]
    _, got = predict_probabilities(golden_model, Volume(array, normalized=True), bits=16)
    np.testing.assert_allclose(got[:, 0] / 65535, expected, rtol=0, atol=0.6 / 65535)


def test_the_mean_of_several_models(models):
    scan = Volume(scan_array(), AFFINE)
    single = [predict_probabilities(model, scan, bits=16)[1] / 65535 for model in models]
    mean = np.mean(single, axis=0)
    mask, probabilities = predict_probabilities(models, scan, bits=16, keep_largest=False)
    np.testing.assert_allclose(probabilities / 65535, mean, rtol=0, atol=2 / 65535)
    assert largest_is_of_the_mask(probabilities, mask)
    assert any((mask != predict_volume(model, scan, keep_largest=False)).any() for model in models)
    coarse_mask, coarse = predict_probabilities(models, scan, bits=8, keep_largest=False)
    np.testing.assert_allclose(coarse / 255, mean, rtol=0, atol=0.6 / 255)
    for other in (coarse_mask, predict_volume(models, scan, keep_largest=False)):
        np.testing.assert_array_equal(other, mask)


def test_classes_that_all_adapters_record_keep_their_largest_part(models):
    scan = Volume(np.random.default_rng(0).uniform(0, 100, (2, 40, 40)).astype(np.float32), AFFINE)
    for model, labels in ((models[0], (1, 2)), (models[1], (2,)), (models, (2,))):
        whole = predict_volume(model, scan, keep_largest=False)
        expected = largest_parts(whole, labels)
        np.testing.assert_array_equal(predict_volume(model, scan), expected)
        np.testing.assert_array_equal(predict_volume(model, scan, keep_largest=True), largest_parts(whole))


def test_models_of_other_classes_are_refused(models, adapters):
    scan = Volume(scan_array(), AFFINE)
    with pytest.raises(InputError, match=r"found liver, spleen in the first and spleen, liver in model 2; average"):
        predict_volume([models[0], load_adapter(adapters / "others")], scan)
    with pytest.raises(InputError, match="expected at least one model, found none"):
        predict_volume([], scan)


def test_files_of_probabilities(predict, models, tmp_path):
    scan = write_scan(tmp_path / "scans" / "a.nii.gz")
    assert predict(["first"], "--save_probabilities", "--probability_bits", 16) == 0
    assert files_of(tmp_path / "masks") == ["a.nii.gz", "probabilities/a.nii.gz"]
    file = tmp_path / "masks" / "probabilities" / "a.nii.gz"
    mask, probabilities = predict_probabilities(models[0], io.read_volume(scan), bits=16)
    image = nibabel.load(file)
    assert image.get_data_dtype() == np.uint16
    np.testing.assert_allclose(image.get_fdata().T, probabilities / 65535, rtol=0, atol=1e-7)
    np.testing.assert_array_equal(image.affine, nibabel.load(scan).affine)
    np.testing.assert_array_equal(io.read_labels(tmp_path / "masks" / "a.nii.gz").array, mask)
    itk = sitk.ReadImage(str(file))
    np.testing.assert_allclose(sitk.GetArrayFromImage(itk), probabilities / 65535, rtol=0, atol=1e-6)
    np.testing.assert_allclose(itk.GetSpacing()[:3], sitk.ReadImage(str(scan)).GetSpacing())
    for number in range(3):
        one = io.read_volume(file, channel=number)
        np.testing.assert_allclose(one.array, probabilities[number] / 65535, rtol=0, atol=1e-7)


def test_probabilities_lie_on_the_grids_of_all_kinds_of_scans(predict, tmp_path):
    (tmp_path / "scans").mkdir()
    write_dicom(tmp_path / "scans" / "series")
    np.savez(tmp_path / "scans" / "plain.npz", image=scan_array() / 100)
    assert predict(["second"], "--save_probabilities") == 0
    for case in ("series", "plain"):
        image = nibabel.load(tmp_path / "masks" / "probabilities" / f"{case}.nii.gz")
        mask = nibabel.load(tmp_path / "masks" / f"{case}.nii.gz")
        assert image.shape == (*mask.shape, 3)
        np.testing.assert_array_equal(image.affine, mask.affine)


def test_mask_and_probabilities_are_one_result(predict, tmp_path, capsys):
    for case in "ab":
        write_scan(tmp_path / "scans" / f"{case}.nii.gz", ord(case))
    assert predict(["first"]) == 0
    assert files_of(tmp_path / "masks") == ["a.nii.gz", "b.nii.gz"]
    assert predict(["first"], "--save_probabilities") == 0
    assert "2 masks written" in capsys.readouterr().out
    (tmp_path / "masks" / "probabilities" / "a.nii.gz").unlink()
    assert predict(["first"], "--save_probabilities") == 0
    assert "1 mask written" in (printed := capsys.readouterr().out)
    assert "1 finished earlier" in printed
    assert predict(["first"], "--overwrite") == 0
    assert files_of(tmp_path / "masks") == ["a.nii.gz", "b.nii.gz"]  # those of earlier masks are gone
    assert predict(["first"], "--save_probabilities") == 0  # not again: the masks are there
    (tmp_path / "masks" / "a.nii.gz").unlink()
    assert predict(["first"]) == 0  # of a mask that was removed, probabilities go with the new one
    assert not (tmp_path / "masks" / "probabilities" / "a.nii.gz").exists()
    capsys.readouterr()
    assert predict(["first"], "--probability_bits", 16) == 2
    assert "probability_bits means nothing without save_probabilities" in capsys.readouterr().err


@pytest.mark.parametrize("blocked", ["mask", "probabilities"])
def test_where_one_cannot_be_written_both_are_missing(models, tmp_path, blocked):
    for case in "ab":
        write_scan(tmp_path / "scans" / f"{case}.nii.gz", ord(case))
    scans = plan_masks(list_scans(tmp_path / "scans"), tmp_path / "masks")
    {"mask": scans[0].mask, "probabilities": scans[0].probabilities}[blocked].mkdir(parents=True)  # in the way
    options = PredictionOptions(save_probabilities=True)
    outcome = predict_files(models[0], scans, options=options, accelerator=Accelerator(cpu=True))
    assert outcome.failed.keys() == {"a"}
    assert files_of(tmp_path / "masks") == ["b.nii.gz", "probabilities/b.nii.gz"]


def test_old_probabilities_never_lie_beside_another_mask(models, tmp_path, monkeypatch):
    """A replaced result that is ended halfway counts as unfinished, and is segmented again."""
    write_scan(tmp_path / "scans" / "a.nii.gz")
    scans = plan_masks(list_scans(tmp_path / "scans"), tmp_path / "masks")
    accelerator = Accelerator(cpu=True)
    options = PredictionOptions(save_probabilities=True)
    predict_files(models[0], scans, options=options, accelerator=accelerator)
    probabilities = scans[0].probabilities.read_bytes()

    def fail(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("samed_peft.prediction.writing.write_mask", fail)
        overwrite = dataclasses.replace(options, overwrite=True)
        with pytest.raises(KeyboardInterrupt):
            predict_files(models[1], scans, options=overwrite, accelerator=accelerator)
    assert files_of(tmp_path / "masks") == ["a.nii.gz", "overwriting.json"]
    outcome = predict_files(models[0], scans, options=options, accelerator=accelerator)
    assert outcome.written == ("a",)
    assert files_of(tmp_path / "masks") == ["a.nii.gz", "probabilities/a.nii.gz"]
    assert scans[0].probabilities.read_bytes() == probabilities


def test_too_little_memory_for_probabilities_is_told(models, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr("samed_peft.prediction.files.predict_probabilities", fail)
    write_scan(tmp_path / "scans" / "a.nii.gz")
    scans = plan_masks(list_scans(tmp_path / "scans"), tmp_path / "masks")
    options = PredictionOptions(save_probabilities=True, probability_bits=16)
    outcome = predict_files(models[0], scans, options=options, accelerator=Accelerator(cpu=True))
    assert "batch_size than 8, 8 probability_bits, or no save_probabilities" in outcome.failed["a"]


def test_averaged_adapters_are_told_and_recorded(predict, models, adapters, tmp_path, capsys):
    for case in "ab":
        write_scan(tmp_path / "scans" / f"{case}.nii.gz", ord(case))
    names = ["first", "second"]
    assert predict(names) == 0
    assert f"averaging 2 adapters: {adapters / 'first'}, {adapters / 'second'}" in capsys.readouterr().out
    scan = io.read_volume(tmp_path / "scans" / "b.nii.gz")
    found = io.read_labels(tmp_path / "masks" / "b.nii.gz").array
    np.testing.assert_array_equal(found, predict_volume(models, scan))
    record = json.loads((tmp_path / "masks" / "adapters.json").read_text())["averaged"]
    assert [entry["adapter"] for entry in record] == [str(adapters / name) for name in names]
    assert record[1]["weights_sha256"] == io.file_sha256(adapters / "second" / "adapter_model.safetensors")
    (tmp_path / "masks" / "b.nii.gz").unlink()
    assert predict(reversed(names)) == 0  # the same adapters go on
    assert "1 mask written" in capsys.readouterr().out
    assert predict(["first"]) == 2
    error = capsys.readouterr().err
    assert f"were made with {adapters / 'second'}, {adapters / 'first'}, found {adapters / 'first'} now" in error
    assert predict(["first"], "--overwrite") == 0
    assert predict(["first"]) == 0
    assert predict(names) == 2
    assert "choose another output, or segment all again" in capsys.readouterr().err


@pytest.mark.parametrize("names", [["first", "second"], ["second"]])
def test_an_overwriting_run_that_is_stopped_goes_on_with_the_old_masks(
    predict, models, tmp_path, monkeypatch, names, capsys
):
    for case in "abc":
        write_scan(tmp_path / "scans" / f"{case}.nii.gz", ord(case))
    assert predict(["first"]) == 0
    old = {case: (tmp_path / "masks" / f"{case}.nii.gz").read_bytes() for case in "abc"}

    def killed(scan, *given, **options):
        if scan.case == "b":
            raise KeyboardInterrupt  # as a kill: no code of the package goes on
        write_results(scan, *given, **options)

    with monkeypatch.context() as patch:
        patch.setattr("samed_peft.prediction.files.write_results", killed)
        predict(names, "--overwrite")
    assert (tmp_path / "masks" / "a.nii.gz").read_bytes() != old["a"]
    assert (tmp_path / "masks" / "c.nii.gz").read_bytes() == old["c"]
    capsys.readouterr()
    assert predict(names) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"2 masks written to {tmp_path / 'masks'}; 1 finished")
    for case in "abc":
        scan = io.read_volume(tmp_path / "scans" / f"{case}.nii.gz")
        found = io.read_labels(tmp_path / "masks" / f"{case}.nii.gz").array
        np.testing.assert_array_equal(found, predict_volume(models[2 - len(names) :], scan))
    assert not (tmp_path / "masks" / "overwriting.json").exists()
    assert predict(names) == 0
    assert "0 masks written" in capsys.readouterr().out


def test_a_scan_that_fails_keeps_its_old_mask_which_is_not_taken_for_a_new_one(predict, tmp_path, capsys):
    for case in "ab":
        write_scan(tmp_path / "scans" / f"{case}.nii.gz", ord(case))
    assert predict(["first"]) == 0
    whole = (tmp_path / "scans" / "b.nii.gz").read_bytes()
    (tmp_path / "scans" / "b.nii.gz").write_text("no scan")
    assert predict(["second"], "--overwrite") == 1
    note = tmp_path / "masks" / "overwriting.json"
    assert json.loads(note.read_text()).keys() == {"b.nii.gz"}
    (tmp_path / "scans" / "b.nii.gz").write_bytes(whole)
    capsys.readouterr()
    assert predict(["second"]) == 0
    assert "1 mask written" in capsys.readouterr().out
    assert not note.exists()
    note.write_text("[]")
    assert predict(["second"]) == 2
    assert "expected names and fingerprints of masks to replace" in capsys.readouterr().err


def test_masks_of_unknown_adapters_are_not_mixed_with_a_mean(predict, tmp_path, capsys):
    write_scan(tmp_path / "scans" / "a.nii.gz")
    assert predict(["first"]) == 0
    assert predict(["first", "second"]) == 2
    assert "made with an adapter that adapters.json does not name" in capsys.readouterr().err
    (tmp_path / "masks" / "adapters.json").write_text("[]")
    assert predict(["first", "second"]) == 2
    assert "expected a record of adapters in" in capsys.readouterr().err


def test_adapters_that_cannot_be_averaged_are_refused_with_names(predict, adapters, tmp_path, capsys):
    write_scan(tmp_path / "scans" / "a.nii.gz")
    for names, messages in (
        (["first", "others"], [f"liver, spleen in {adapters / 'first'} and spleen, liver in {adapters / 'others'}"]),
        (["first", "second", "first"], ["the same weights in", str(adapters / "first"), "give each adapter once"]),
        (["first", "channel"], ["expected adapters of one channel, found None in", f"1 in {adapters / 'channel'}"]),
        (["first", "none"], ["is neither an adapter directory nor a Hub id"]),
    ):
        assert predict(names) == 2
        error = capsys.readouterr().err
        assert all(message in error for message in messages), error
    assert not (tmp_path / "masks").exists()


def test_postprocessing_is_a_choice(predict, models, tmp_path):
    array = np.random.default_rng(0).uniform(0, 100, (1, 40, 40)).astype(np.float32)
    (tmp_path / "scans").mkdir()
    nibabel.save(nibabel.Nifti1Image(array.T, AFFINE), tmp_path / "scans" / "a.nii.gz")
    scan, found = io.read_volume(tmp_path / "scans" / "a.nii.gz"), {}
    for output, options in {"default": [], "without": ["--no-postprocess"], "all": ["--keep_largest"]}.items():
        assert predict(["second"], *options, output=output) == 0
        found[output] = io.read_labels(tmp_path / output / "a.nii.gz").array
    for output, keep in {"default": None, "without": False, "all": True}.items():
        np.testing.assert_array_equal(found[output], predict_volume(models[1], scan, keep_largest=keep))
    assert (found["without"] != found["all"]).any()


def test_tiles_on_the_command_line(predict, models, tmp_path):
    scan = write_scan(tmp_path / "scans" / "a.nii.gz")
    with pytest.warns(UserWarning, match="trained on whole slices resized to 32 pixels"):
        assert predict(["second"], "--tile") == 0
    with pytest.warns(UserWarning, match="trained on whole slices"):
        expected = predict_volume(with_tiles(models[1]), io.read_volume(scan))
    np.testing.assert_array_equal(io.read_labels(tmp_path / "masks" / "a.nii.gz").array, expected)
