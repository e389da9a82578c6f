"""Layouts without a dataset.json: volumes, colours, lists of names, a file for each class, TotalSegmentator's."""

import json

import nibabel
import numpy as np
import pytest
from dicom_files import edit, write_series
from PIL import Image

from samed_peft.datasets import CaseVolumes, check_cases, describe_folder, load_slices, open_folder
from samed_peft.datasets.cases import read_pair, read_reference
from samed_peft.errors import InputError
from samed_peft.io import Volume, read_volume, write_mask

LABELS = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]], np.uint8)
COLOURS = {"liver": [255, 0, 0], "spleen": [0, 255, 0], "tumour": [0, 0, 255]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def picture(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def images(root, *cases):
    for case in cases:
        picture(root / "images" / f"{case}.png", np.arange(16, dtype=np.uint8).reshape(4, 4))
    return root


def coloured(labels, **colours):
    palette = np.array([[0, 0, 0], *COLOURS.values(), *colours.values()], np.uint8)
    return palette[labels]


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_volumes_of_any_format(tmp_path, suffix):
    scan = Volume(np.arange(60).reshape(3, 4, 5).astype(np.uint8), np.diag([1.0, 1, 4, 1]))
    for case in "ab":
        write_mask(scan.array, scan, tmp_path / "images" / f"{case}{suffix}")
        write_mask(scan.array % 3, scan, tmp_path / "masks" / f"{case}.nii.gz")
    folder = open_folder(tmp_path)
    described = describe_folder(folder)
    assert (folder.layout, described["class_names"]) == ("pictures", ("class 1", "class 2"))
    assert (described["orientation"], described["window"]) == ("LPS", None)
    _, labels = read_pair(folder.case("b"), num_classes=2)
    np.testing.assert_array_equal(labels.array, scan.array % 3)


def test_dicom_series_with_masks(tmp_path):
    stored = np.arange(60).reshape(3, 4, 5).astype(np.int16)
    for case in ("p.1", "p.2"):
        scan = read_volume(write_series(tmp_path / "images" / case, stored, uid=f"1.2.{case[-1]}"))
        write_mask((stored % 3).astype(np.uint8), scan, tmp_path / "masks" / f"{case}.nii.gz")
    (tmp_path / "images" / "notes").mkdir()
    folder = open_folder(tmp_path)
    assert (folder.cases, folder.modality) == (("p.1", "p.2"), "CT")
    described = describe_folder(folder)
    assert (described["window"], described["orientation"]) == ((-125.0, 275.0), "LPS")
    options = {name: described[name] for name in ("window", "orientation")} | {"num_classes": 2}
    rows = load_slices(folder, ["p.1"], **options)
    np.testing.assert_array_equal(np.stack(rows.with_format("numpy")["label"]), stored % 3)
    scans, references = CaseVolumes.of_folder(folder, ["p.2"])
    np.testing.assert_array_equal(scans["p.2"].affine, references["p.2"].affine)
    # An edited slice is another content.
    write_series(tmp_path / "images" / "p.1", stored + 1, uid="1.2.1")
    assert load_slices(open_folder(tmp_path), ["p.1"], **options).config_name != rows.config_name
    edit(tmp_path / "images" / "p.2" / "IM0000", lambda header: setattr(header, "Modality", "MR"))
    assert open_folder(tmp_path).modality is None


@pytest.mark.parametrize("name", ["colours.json", "masks/colors.json"])
def test_masks_in_colours(tmp_path, name):
    images(tmp_path, "a", "b")
    picture(tmp_path / "masks" / "a.png", coloured(LABELS))
    # A palette says the same.
    (tmp_path / "masks" / "b.png").parent.mkdir(exist_ok=True)
    Image.fromarray(coloured(LABELS)).quantize(4).save(tmp_path / "masks" / "b.png")
    (tmp_path / name).write_text(json.dumps(COLOURS))
    folder = open_folder(tmp_path)
    assert describe_folder(folder)["class_names"] == ("liver", "spleen", "tumour")
    for case in "ab":
        reference = read_reference(folder.case(case))
        np.testing.assert_array_equal(reference.array[0], LABELS)
        assert reference.ignored_label is None
    rows = load_slices(folder, ["a"], num_classes=3, orientation=None, window=(0, 255))
    np.testing.assert_array_equal(rows[0]["label"], LABELS)
    # Swapped colours change no file of the case, but what the names mean.
    (tmp_path / name).write_text(json.dumps(dict(zip(COLOURS, reversed(COLOURS.values()), strict=True))))
    swapped = load_slices(open_folder(tmp_path), ["a"], num_classes=3, orientation=None, window=(0, 255))
    np.testing.assert_array_equal(swapped[0]["label"], np.array([0, 3, 2, 1])[LABELS])
    assert swapped.config_name != rows.config_name


def test_colours_of_background_and_of_what_to_ignore(tmp_path):
    images(tmp_path, "a")
    table = {"background": [9, 9, 9], "ignore": [255, 255, 255], "polyp": [0, 0, 0]}
    (tmp_path / "colours.json").write_text(json.dumps(table))
    palette = np.array([[9, 9, 9], [0, 0, 0], [255, 255, 255]], np.uint8)
    picture(tmp_path / "masks" / "a.png", palette[LABELS % 3])
    folder = open_folder(tmp_path)
    reference = read_reference(folder.case("a"))
    np.testing.assert_array_equal(reference.array[0], np.array([0, 1, 255])[LABELS % 3])
    assert (folder.class_names, reference.ignored_label) == (("polyp",), 255)
    check_cases(folder, ["a"], num_classes=1, window=(0, 255))


def test_a_colour_that_no_name_has(tmp_path):
    images(tmp_path, "a")
    (tmp_path / "colours.json").write_text(json.dumps(COLOURS))
    array = coloured(LABELS)
    array[0, :3], array[1, 1] = [10, 20, 30], [1, 2, 3]
    picture(tmp_path / "masks" / "a.png", array)
    message = r"in .*a\.png, found 3 pixels of \[10, 20, 30\] and 1 more unknown colours, 4 of 16 pixels in all"
    with pytest.raises(InputError, match=message):
        read_reference(open_folder(tmp_path).case("a"))
    (tmp_path / "masks" / "a.png").unlink()
    picture(tmp_path / "masks" / "a.jpg", array)
    with pytest.raises(InputError, match=r"mask without loss, found JPEG in .*a\.jpg"):
        read_reference(open_folder(tmp_path).case("a"))
    (tmp_path / "masks" / "a.jpg").unlink()
    write_mask(LABELS[None], Volume(LABELS[None]), tmp_path / "masks" / "a.nii.gz")
    with pytest.raises(InputError, match=r"expected a picture with a colour for each label, found .*a\.nii\.gz"):
        read_reference(open_folder(tmp_path).case("a"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"expected \{"),
        ({"a": [1, 2]}, r"three whole numbers from 0 to 255 .*found 'a': \[1, 2\]"),
        ({"a": [1, 2, 256]}, r"found 'a': \[1, 2, 256\]"),
        ({"a": [1, 2, True]}, "found 'a'"),
        ({"a": "red"}, "found 'a': 'red'"),
        ({"": [1, 2, 3]}, "found ''"),
        ({"a": [1, 2, 3], "b": [1, 2, 3]}, r"found \[1, 2, 3\] for 'a' and 'b'"),
        ({"background": [0, 0, 0]}, "expected 1 to 254 classes .*found 0"),
        ({str(n): [n, 0, 0] for n in range(1, 256)}, "expected 1 to 254 classes .*found 255"),
    ],
)
def test_colour_tables_that_mean_nothing(tmp_path, content, message):
    images(tmp_path, "a")
    picture(tmp_path / "masks" / "a.png", coloured(LABELS))
    (tmp_path / "colours.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("text", "names", "expected"),
    [
        ("liver\nspleen\ntumour\n", ("liver", "spleen", "tumour"), LABELS),
        ("# of labelme\n__ignore__\n_background_\nliver\n\nspleen\ntumour\n", ("liver", "spleen", "tumour"), LABELS),
        ("background\nliver\nignore\ntumour", ("liver", "tumour"), np.array([0, 1, 255, 2])[LABELS]),
    ],
)
def test_a_list_of_names(tmp_path, text, names, expected):
    images(tmp_path, "a")
    picture(tmp_path / "masks" / "a.png", LABELS)
    (tmp_path / "labels.txt").write_text(text)
    folder = open_folder(tmp_path)
    assert folder.class_names == names
    np.testing.assert_array_equal(read_reference(folder.case("a")).array[0], expected)


def test_labelme_marks_what_nobody_labelled(tmp_path):
    images(tmp_path, "a")
    (tmp_path / "labels.txt").write_text("__ignore__\n_background_\nliver\n")
    mask = np.where(LABELS == 3, 255, LABELS == 1).astype(np.uint8)
    picture(tmp_path / "masks" / "a.png", mask)
    reference = read_reference(open_folder(tmp_path).case("a"))
    assert reference.ignored_label == 255
    np.testing.assert_array_equal(reference.array[0], mask)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"labels.txt": "1 255 0 0 1 1 1 liver"}, "expected one class name a line in .*found '1 255"),
        ({"labels.txt": "# none"}, "expected one class name a line in .*found none"),
        ({"labels.txt": "liver:255,0,0::"}, "found 'liver:255,0,0::'"),
        ({"labels.txt": "a\na"}, "expected different names in .*found 'a' twice"),
        ({"labels.txt": "background"}, "expected labels beside background"),
        ({"labels.txt": "a", "colours.json": "{}"}, "in one file, found .*colours.json and .*labels.txt"),
        ({"masks/labels.txt": "a", "labels.txt": "b"}, "in one file, found .*; remove one of them"),
        ({"colours.json": "{}", "colors.json": "{}"}, "in one file, found .*colours.json and .*colors.json"),
    ],
)
def test_lists_that_mean_nothing(tmp_path, files, message):
    images(tmp_path, "a")
    picture(tmp_path / "masks" / "a.png", LABELS)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        open_folder(tmp_path)


def class_files(root, by_class, cases=("a", "b")):
    """Each class of each case as a mask of 0 and 255; tumours are in the first case alone."""
    images(root, *cases)
    for case in cases:
        for label, name in enumerate(COLOURS, start=1):
            if name != "tumour" or case == cases[0]:
                place = f"{name}/{case}" if by_class else f"{case}/{name}"
                picture(root / "masks" / f"{place}.png", (label == LABELS).astype(np.uint8) * 255)
    return root


@pytest.mark.parametrize("by_class", [True, False])
def test_a_file_for_each_class(tmp_path, by_class):
    folder = open_folder(class_files(tmp_path, by_class))
    assert (folder.class_names, folder.cases) == (("liver", "spleen", "tumour"), ("a", "b"))
    np.testing.assert_array_equal(read_reference(folder.case("a")).array[0], LABELS)
    np.testing.assert_array_equal(read_reference(folder.case("b")).array[0], LABELS % 3)
    rows = load_slices(folder, ["a", "b"], num_classes=3, orientation=None, window=(0, 255))
    np.testing.assert_array_equal(rows[0]["label"], LABELS)
    chosen = open_folder(tmp_path, class_names=("tumour", "liver"))
    assert describe_folder(chosen, class_names=("tumour", "liver"))["class_names"] == ("tumour", "liver")
    np.testing.assert_array_equal(read_reference(chosen.case("a")).array[0], np.array([0, 2, 0, 1])[LABELS])
    alone = open_folder(tmp_path, class_names=("tumour",))
    assert not read_reference(alone.case("b")).array.any()
    with pytest.raises(InputError, match=r"3 classes .*\(liver, spleen, tumour\), found tumor; did you mean tumour\?"):
        open_folder(tmp_path, class_names=("liver", "tumor"))
    with pytest.raises(InputError, match=r"choose different ones .*found liver"):
        open_folder(tmp_path, class_names=("liver", "liver"))


def test_class_files_that_fit_no_image(tmp_path):
    class_files(tmp_path, by_class=False)
    (tmp_path / "images" / "b.png").rename(tmp_path / "images" / "c.png")
    message = r"found folder b and file liver, none of them named as an image \(1 of 2 folders and 3 file names"
    with pytest.raises(InputError, match=message):
        open_folder(tmp_path)
    (tmp_path / "masks" / "b").rename(tmp_path / "masks" / "c")
    images(tmp_path, "d")
    with pytest.raises(InputError, match=r"expected a mask of every image in .*, found none of d \(1 in all\)"):
        open_folder(tmp_path)
    (tmp_path / "labels.txt").write_text("liver")
    with pytest.raises(InputError, match=r"expected no labels\.txt beside a file for each class"):
        open_folder(tmp_path)


def test_names_of_classes_that_are_names_of_cases_too(tmp_path):
    images(tmp_path, "a", "b")
    for one in "ab":
        picture(tmp_path / "masks" / one / "a.png", LABELS)
    with pytest.raises(InputError, match="found both"):
        open_folder(tmp_path)


def overlapping(root, shared):
    """Two classes of 3,000 pixels each, `shared` of them in both."""
    picture(root / "images" / "a.png", np.zeros((1, 9000), np.uint8))
    for name, start in (("left", 0), ("right", 3000 - shared)):
        mask = np.zeros((1, 9000), np.uint8)
        mask[0, start : start + 3000] = 1
        picture(root / "masks" / "a" / f"{name}.png", mask)
    return open_folder(root)


def test_classes_that_overlap(tmp_path):
    with pytest.warns(UserWarning, match=r"share 2 voxels, less than a thousandth of each class"):
        labels = read_reference(overlapping(tmp_path / "few", 2).case("a")).array[0, 0]
    assert np.bincount(labels).tolist() == [3002, 2998, 3000]
    message = r"found 3 voxels both in .*left\.png \(3000 voxels\) and in .*right\.png \(3000\)"
    with pytest.raises(InputError, match=message):
        read_reference(overlapping(tmp_path / "many", 3).case("a"))


def subject(root, name, classes, scan="ct.nii.gz", shape=(5, 4, 3), affine=None):
    folder = root / name
    (folder / "segmentations").mkdir(parents=True)
    affine = np.diag([1.5, 1.5, 1.5, 1]) if affine is None else affine
    image = np.random.default_rng(0).integers(-200, 300, shape).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(image, np.diag([1.5, 1.5, 1.5, 1])), folder / scan)
    for place, class_name in enumerate(classes):
        mask = np.zeros(shape, np.uint8)
        mask[place] = 1
        nibabel.save(nibabel.Nifti1Image(mask, affine), folder / "segmentations" / f"{class_name}.nii.gz")


def test_totalsegmentator(tmp_path):
    for name in ("s0000", "s0001"):
        subject(tmp_path, name, ("liver", "spleen", "aorta"))
    (tmp_path / "meta.csv").write_text("image_id;split\n")
    folder = open_folder(tmp_path, class_names=("spleen", "liver"))
    assert (folder.layout, folder.modality, folder.cases) == ("totalsegmentator", "CT", ("s0000", "s0001"))
    assert describe_folder(folder, class_names=("spleen", "liver"))["window"] == (-125.0, 275.0)
    _, labels = read_pair(folder.case("s0001"), num_classes=2)
    assert labels.array[0, 0].tolist() == [2, 1, 0, 0, 0]
    assert open_folder(tmp_path).class_names == ("aorta", "liver", "spleen")
    rows = load_slices(folder, ["s0000"], num_classes=2, orientation="LPS", window=(-125, 275))
    assert sorted(np.unique(rows[0]["label"]).tolist()) == [0, 1, 2]


def test_totalsegmentators_classes_are_listed_without_opening_them(tmp_path):
    for name in ("s0", "s1"):
        (tmp_path / name / "segmentations").mkdir(parents=True)
        (tmp_path / name / "mri.nii.gz").touch()
        for number in range(104):
            (tmp_path / name / "segmentations" / f"class_{number}.nii.gz").touch()
    folder = open_folder(tmp_path, class_names=["class_7"])
    assert (folder.modality, folder.class_names) == ("MRI", ("class_7",))
    assert folder.labels["s1"] == tmp_path / "s1" / "segmentations" / "class_7.nii.gz"
    assert len(open_folder(tmp_path).case("s0").labels) == 104
    with pytest.raises(InputError, match=r"of the 104 classes .*found class_200; did you mean class_20"):
        open_folder(tmp_path, class_names=["class_200"])
    (tmp_path / "s1" / "segmentations" / "class_7.nii.gz").unlink()
    with pytest.raises(InputError, match=r"found no .*s1/segmentations/class_7\.nii\.gz \(1 of 2 files lack\)"):
        open_folder(tmp_path, class_names=["class_7"])
    (tmp_path / "s1" / "mri.nii.gz").rename(tmp_path / "s1" / "ct.nii.gz")
    with pytest.raises(InputError, match=r"of one modality in .*found 1 of CT \(s1 \.\.\.\) and 1 of MRI"):
        open_folder(tmp_path)
    (tmp_path / "s1" / "ct.nii.gz").unlink()
    with pytest.raises(InputError, match=r"the folder segmentations in .*s1, found no scan"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("options", "value", "message"),
    [
        ({"shape": (5, 4, 2)}, 1, r"on one grid, found \(3, 4, 5\) in .*aorta\.nii\.gz and \(2, 4, 5\) in .*liver"),
        ({"affine": np.diag([2.0, 2, 2, 1])}, 1, r"on one grid, found corners of .*aorta.* and .*liver.* mm apart"),
        ({}, 3, r"expected one class in .*liver\.nii\.gz, 0 and one other number, found 0, 1, 3"),
    ],
)
def test_class_files_that_do_not_fit(tmp_path, options, value, message):
    subject(tmp_path / "d", "s0", ("aorta",))
    subject(tmp_path / "other", "s0", ("liver",), **options)
    path = tmp_path / "other" / "s0" / "segmentations" / "liver.nii.gz"
    stored = nibabel.load(path)
    array = np.asarray(stored.dataobj).copy()
    array[4] = value if value > 1 else 0
    nibabel.save(nibabel.Nifti1Image(array, stored.affine), tmp_path / "d" / "s0" / "segmentations" / "liver.nii.gz")
    with pytest.raises(InputError, match=message):
        read_reference(open_folder(tmp_path / "d").case("s0"))


@pytest.mark.parametrize("text", ["0 background\n1 liver\n", "0: background\n1: liver\n"])
def test_numbers_before_names_are_refused(tmp_path, text):
    """Read as names, they would move every class by one."""
    images(tmp_path, "a", "b")
    for case in "ab":
        picture(tmp_path / "masks" / f"{case}.png", LABELS % 2)
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(InputError, match=r"numbers before the names, such as '0.* background'; leave the numbers"):
        open_folder(tmp_path)


def test_background_is_no_class_however_it_is_spelled(tmp_path):
    images(tmp_path, "a", "b")
    for case in "ab":
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(LABELS == 1).save(tmp_path / "masks" / f"{case}.png")  # of one bit
    (tmp_path / "colours.json").write_text(json.dumps({"Background": [0, 0, 0], "cell": [255, 255, 255]}))
    folder = open_folder(tmp_path)
    assert folder.class_names == ("cell",)
    np.testing.assert_array_equal(read_reference(folder.case("a")).array[0], LABELS == 1)


def test_a_folder_called_segmentations_alone_is_no_subject(tmp_path):
    images(tmp_path, "a", "b")
    for case in "ab":
        picture(tmp_path / "masks" / f"{case}.png", LABELS % 2)
    (tmp_path / "old" / "segmentations").mkdir(parents=True)
    assert open_folder(tmp_path).layout == "pictures"


def test_files_of_macos_are_no_classes(tmp_path):
    for name in ("s1", "s2"):
        subject(tmp_path, name, ("liver",))
        (tmp_path / name / "segmentations" / "._liver.nii.gz").write_bytes(b"x")
    assert open_folder(tmp_path).class_names == ("liver",)


def test_a_file_for_each_object_is_refused(tmp_path):
    images(tmp_path, "a", "b")
    for case, count in (("a", 3), ("b", 2)):
        for number in range(count):
            picture(tmp_path / "masks" / case / f"{number}.png", (number == LABELS) * np.uint8(255))
    with pytest.raises(InputError, match=r"found 3 numbers \(0, 1, 2\), as of one file for each object; each number"):
        open_folder(tmp_path)
    assert open_folder(tmp_path, class_names=("1", "0")).class_names == ("1", "0")
