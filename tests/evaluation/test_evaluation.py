import base64
import csv
import hashlib
import io
import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from samed_peft.datasets.dataset_json import scheme_of_dataset
from samed_peft.datasets.label_scheme import LabelScheme
from samed_peft.errors import InputError
from samed_peft.evaluation import Report, case_picture, evaluate_cases, format_table, write_report
from samed_peft.evaluation.artefacts import csv_text
from samed_peft.evaluation.charts import box_plots
from samed_peft.evaluation.pictures import representative_slices
from samed_peft.evaluation.tables import interval_rows
from samed_peft.io import Volume
from samed_peft.metrics import METRICS, score_case, score_masks

NAMES = ("liver", "spleen")
RAS = np.diag([1.0, 1.0, 5.0, 1.0])


def _labels(*boxes, shape=(6, 8, 8)):
    """Label map with one (label, start_zyx, stop_zyx) box after the other."""
    labels = np.zeros(shape, np.uint8)
    for label, start, stop in boxes:
        labels[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = label
    return labels


LIVER = (1, (1, 1, 1), (5, 5, 5))
LIVER_ONE_SLICE_UP = (1, (2, 1, 1), (6, 5, 5))
SPLEEN = (2, (0, 6, 6), (2, 8, 8))


def _report(**options):
    """Case a: the liver one slice off, no spleen anywhere. Case b: liver found, spleen missed."""
    predictions = {"a": _labels(LIVER_ONE_SLICE_UP), "b": _labels(LIVER)}
    references = {"a": Volume(_labels(LIVER), RAS), "b": Volume(_labels(LIVER, SPLEEN), RAS)}
    return evaluate_cases(predictions, references, class_names=NAMES, **options)


def test_the_report_has_its_agreed_shape_and_scores():
    off = score_masks(_labels(LIVER_ONE_SLICE_UP), _labels(LIVER), spacing_zyx_mm=(5.0, 1.0, 1.0))
    voxels = score_masks(_labels(LIVER_ONE_SLICE_UP), _labels(LIVER), convention="samed")
    right, nothing, missed = ({"dice": d, "hd95": h} for d, h in ((1.0, 0.0), (None, None), (0.0, None)))
    zero = {"dice": 0.0, "hd95": 0.0}
    assert off == {"dice": 0.75, "hd95": 5.0}
    assert _documented(_report(settings={"dataset": "two boxes"}).to_dict()) == {
        "standard": {
            "mean": {"dice": 0.4375, "hd95": 2.5},
            "classes": {
                "liver": {"dice": 0.875, "hd95": 2.5, "n_valid": 2, "n_cases": 2},
                "spleen": {"dice": 0.0, "hd95": None, "n_valid": 1, "n_cases": 2},
            },
        },
        "samed": {
            "mean": {"dice": 0.4375, "hd95": 0.25},
            "classes": {
                "liver": {"dice": 0.875, "hd95": 0.5, "n_valid": 2, "n_cases": 2},
                "spleen": {"dice": 0.0, "hd95": 0.0, "n_valid": 2, "n_cases": 2},
            },
        },
        "cases": [
            {
                "case": "a",
                "classes": {
                    "liver": {"standard": off, "samed": voxels},
                    "spleen": {"standard": nothing, "samed": zero},
                },
            },
            {
                "case": "b",
                "classes": {
                    "liver": {"standard": right, "samed": right},
                    "spleen": {"standard": missed, "samed": zero},
                },
            },
        ],
        "settings": {"dataset": "two boxes", "surface_dice_tolerance_mm": 2.0},
    }


def test_the_report_counts_and_has_further_metrics_and_intervals():
    found = _report(tolerance_mm=5.0).to_dict()
    liver, spleen = (found["standard"]["classes"][name] for name in NAMES)
    # Moved by one of four slices, 48 of 80 voxels overlap; each mask has one slice of 16 five mm from the other's.
    assert found["cases"][0]["classes"]["liver"]["standard"]["iou"] == 0.6
    assert liver["surface_dice"] == 1.0
    assert (liver["n_absent"], liver["n_missed"], liver["n_spurious"]) == (0, 0, 0)
    assert (spleen["n_absent"], spleen["n_missed"], spleen["n_spurious"]) == (1, 1, 0)
    assert liver["ci95"]["dice"] == [0.75, 1.0]  # of two cases, a resample may hold either one twice
    assert spleen["ci95"]["dice"] == [None, None]
    # Both cases: 0.4375. The second twice: (1 + 0) / 2. The first twice: 0.75, as the spleen then has no score.
    assert found["standard"]["mean_ci95"]["dice"] == [0.4375, 0.75]
    assert found["settings"]["surface_dice_tolerance_mm"] == 5.0


def _documented(report):
    """What every version of the report has: Dice and HD95, and how many cases they are of."""
    kept = {"dice", "hd95", "n_valid", "n_cases"}
    for summary in (report["standard"], report["samed"]):
        summary["mean"] = {key: value for key, value in summary["mean"].items() if key in kept}
        del summary["mean_ci95"]
        for scores in summary["classes"].values():
            for key in set(scores) - kept:
                del scores[key]
    for case in report["cases"]:
        del case["presence"]
        case["classes"] = {
            name: {convention: {key: score[key] for key in ("dice", "hd95")} for convention, score in both.items()}
            for name, both in case["classes"].items()
        }
    return report


def _score(dice, hd95):
    return {"dice": dice, "iou": dice / (2 - dice), "hd95": hd95, "assd": hd95, "surface_dice": dice}


def test_mappings_are_read_one_case_at_a_time():
    log = []

    class Lazy(dict):
        def __getitem__(self, case):
            log.append(case)
            return super().__getitem__(case)

    pairs = Lazy({"a": _labels(LIVER), "b": _labels(LIVER), "c": _labels(LIVER)})
    evaluate_cases(pairs, pairs, class_names=NAMES)
    assert log == ["a", "a", "b", "b", "c", "c"]


def test_cases_without_voxel_size_are_named():
    report = evaluate_cases({"a": _labels(LIVER)}, {"a": _labels(LIVER)}, class_names=NAMES)
    assert report.settings["cases_without_spacing"] == ["a"]
    assert "1 of 1 references have no voxel size" in format_table(report)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ({}, {}, "no case to evaluate"),
        ({"a": 0}, {"a": 0, "b": 0}, "no prediction of b, no reference of none"),
        ({"a": 0, "x": 0}, {"a": 0}, "no prediction of none, no reference of x"),
        ({}, dict.fromkeys("abcdefg", 0), "a, b, c, d, e and 2 more"),
    ],
)
def test_cases_without_partner_are_refused(predictions, references, message):
    with pytest.raises(InputError, match=message):
        evaluate_cases(predictions, references, class_names=NAMES)


def test_errors_name_case_and_file(tmp_path):
    reference = Volume(_labels(LIVER), RAS, tmp_path / "label0031.nii.gz")
    with pytest.raises(InputError, match=r"case0031: .*prediction hold 14, but only 0..2 .*\(reference .*label0031"):
        evaluate_cases({"case0031": _labels((14, *LIVER[1:]))}, {"case0031": reference}, class_names=NAMES)
    with pytest.raises(InputError, match=r"case0031: .*\(5, 8, 8\) and \(6, 8, 8\)"):
        evaluate_cases({"case0031": _labels(shape=(5, 8, 8))}, {"case0031": reference}, class_names=NAMES)


def test_grids_that_lie_elsewhere_are_refused():
    moved, rounded = RAS.copy(), RAS.copy()
    moved[0, 3], rounded[0, 3] = 3.0, 1e-5
    reference = {"a": Volume(_labels(LIVER), RAS)}
    evaluate_cases({"a": Volume(_labels(LIVER), rounded)}, reference, class_names=NAMES)
    with pytest.raises(InputError, match=r"a: prediction and reference must lie on one grid.*3 mm apart"):
        evaluate_cases({"a": Volume(_labels(LIVER), moved)}, reference, class_names=NAMES)


@pytest.mark.parametrize("names", [(), ("liver", "liver"), "liver"])
def test_unusable_class_names_are_refused(names):
    with pytest.raises(InputError, match="class_names"):
        evaluate_cases({"a": _labels()}, {"a": _labels()}, class_names=names)


def test_the_written_report(tmp_path):
    report = _report(settings={"note": "Of the tiny base."}, images={"b": Volume(np.zeros((6, 8, 8)), RAS)})
    write_report(report, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report.to_dict()
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| liver | 0.8750 | 2.50 | 2/2 | 2/2 | 0.8750 | 0.50 |" in text
    assert "| spleen | 0.0000 | n/a | 1/2 | 0/2 | 0.0000 | 0.00 |" in text
    assert "| a | 0.7500 / 5.00 | n/a / n/a |" in text
    assert "Of the tiny base." in text
    assert "![b](pictures/b.png)" in text
    assert (tmp_path / "out" / "pictures" / "b.png").read_bytes() == report.pictures["b"]


def test_odd_case_names_make_safe_and_different_files(tmp_path):
    labels = _labels(LIVER)
    cases = {"../up": labels, ".._up": labels, "pipe|d": labels}
    report = evaluate_cases(cases, cases, class_names=NAMES)
    write_report(report, tmp_path / "out", pictures={case: case.encode() for case in cases})
    written = {path.name: path.read_bytes() for path in (tmp_path / "out" / "pictures").iterdir()}
    assert written == {"_up.png": b"../up", "__up.png": b".._up", "pipe_d.png": b"pipe|d"}
    assert "| pipe\\|d | 1.0000 / 0.00 |" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(InputError, match="pictures must be of cases of the report; found other"):
        write_report(report, tmp_path / "out", pictures={"other": b""})


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_table_fits_the_terminal(width):
    scores = [_score(0.5, 123.456), _score(math.nan, math.nan)]
    names = ("a very long name of a structure that nobody would print", "[bold]x")
    table = format_table(
        Report(
            names,
            {"c": {"standard": scores, "samed": scores, "presence": ["both", "absent"]}},
            settings={"note": "word " * 40},
        ),
        width=width,
    )
    assert max(len(line) for line in table.splitlines()) <= max(width, 80)
    assert table.isascii()
    for text in ("0.5000", "123.46", "n/a", "1/1", "[bold]x", "HD95 mm"):
        assert text in table


def test_slices_that_tell_something_are_chosen():
    reference = _labels(
        (1, (2, 0, 0), (3, 4, 4)), (2, (2, 5, 5), (3, 6, 6)), (1, (8, 0, 0), (9, 8, 8)), shape=(20, 8, 8)
    )
    prediction = reference.copy()
    prediction[15, :5, :5] = 1
    assert representative_slices(reference, prediction) == {
        2: "most classes",
        8: "most foreground",
        15: "largest disagreement",
    }
    assert representative_slices(reference[:1], reference[:1]) == {0: "no label in either"}
    assert list(representative_slices(reference[2:3], reference[2:3])) == [0]


def _pixels(png):
    from matplotlib.image import imread

    return imread(io.BytesIO(png))


def _bright_corner(axes_xy):
    """Corner of the first panel at which the voxel (x, y) = (0, 0) of a scan with these axes is shown."""
    image = np.zeros((1, 40, 40), np.float32)
    image[0, :20, :20] = 1
    signs = {"R": 1.0, "L": -1.0, "A": 1.0, "P": -1.0}
    affine = None if axes_xy is None else np.diag([signs[axes_xy[0]], signs[axes_xy[1]], 1.0, 1.0])
    empty = np.zeros(image.shape, np.uint8)
    picture = _pixels(case_picture(Volume(image, affine), empty, empty, class_names=NAMES, window=(0, 1)))
    black = np.argwhere(picture[..., :3].max(axis=-1) < 0.05)
    panel = black[black[:, 1] < picture.shape[1] / 3]
    (top, left), (bottom, right) = panel.min(axis=0), panel.max(axis=0)
    height, width = bottom - top, right - left
    shown = {
        (vertical, horizontal): picture[int(top + height * y), int(left + width * x), 0]
        for vertical, y in (("top", 0.25), ("bottom", 0.75))
        for horizontal, x in (("left", 0.25), ("right", 0.75))
    }
    return max(shown, key=shown.get)


@pytest.mark.parametrize(
    ("axes_xy", "corner"),
    [
        # Voxel (0, 0) lies at the start of both axes: for RA that is left and posterior of the patient,
        # which the radiological view puts on the right and at the bottom.
        ("RA", ("bottom", "right")),
        ("LP", ("top", "left")),
        ("LA", ("bottom", "left")),
        ("RP", ("top", "right")),
        (None, ("top", "left")),
    ],
)
def test_pictures_show_anterior_up_and_the_right_side_on_the_left(axes_xy, corner):
    assert _bright_corner(axes_xy) == corner


def test_pictures_survive_odd_input():
    labels = _labels(LIVER, SPLEEN)
    constant = np.full(labels.shape, 7, np.int16)
    png = case_picture(constant, labels, labels, class_names=("_$x^", "[b]"), spacing_zyx_mm=(1.0, 0.1, 5.0))
    assert png == case_picture(constant, labels, labels, class_names=("_$x^", "[b]"), spacing_zyx_mm=(1.0, 0.1, 5.0))
    assert _pixels(png).shape[2] in (3, 4)
    many = tuple(f"class {k}" for k in range(1, 41))
    case_picture(constant, np.where(labels, 40, 0), labels, class_names=many)
    with pytest.raises(InputError, match=r"\(5, 8, 8\)"):
        case_picture(constant[:5], labels, labels, class_names=NAMES)


def test_a_picture_needs_no_reference():
    labels = _labels(LIVER, SPLEEN)
    scan = Volume(np.random.default_rng(0).normal(size=labels.shape), RAS)
    alone = _pixels(case_picture(scan, None, labels, class_names=NAMES))
    beside = _pixels(case_picture(scan, labels, labels, class_names=NAMES))
    assert alone.shape[1] / beside.shape[1] == pytest.approx(2 / 3, abs=0.02)
    assert representative_slices(None, labels) == {1: "most classes", 2: "most foreground"}
    assert representative_slices(None, np.zeros_like(labels)) == {3: "no label"}
    with pytest.raises(InputError, match=r"image of \(6, 8, 8\), a prediction of \(5, 8, 8\)"):
        case_picture(scan, None, labels[:5], class_names=NAMES)


@pytest.mark.parametrize("scale", [1.0, 255.0, np.uint8])
def test_colour_images_keep_their_colours(scale):
    image = np.zeros((2, 30, 30, 3), np.float32)
    image[..., 0] = 1.0  # red
    image = (image * 255).astype(np.uint8) if scale is np.uint8 else image * scale
    empty = np.zeros((2, 30, 30), np.uint8)
    picture = _pixels(case_picture(image, None, empty, class_names=NAMES))
    height, width = picture.shape[:2]
    np.testing.assert_allclose(picture[height // 2, width // 4, :3], [1, 0, 0], atol=0.02)
    half = _pixels(case_picture(image, None, empty, class_names=NAMES, window=(0, 2 * float(image.max()))))
    np.testing.assert_allclose(half[height // 2, width // 4, :3], [0.5, 0, 0], atol=0.02)
    with pytest.raises(InputError, match=r"\(D, H, W, 3\)"):
        case_picture(image[..., :2], None, empty, class_names=NAMES)


class _Page(HTMLParser):
    """Tags with their attributes, and the text of each table row."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data):
        self.text += data
        if self.rows and data.strip():
            self.rows[-1].append(data.strip())

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


HOSTILE = "<script>alert(1)</script>"


def _hostile_report(**settings):
    labels = _labels(LIVER)
    cases = dict.fromkeys((HOSTILE, '"><img src=x onerror=alert(1)>', "=1+1"), labels)
    return evaluate_cases(cases, cases, class_names=(f"liver {HOSTILE}", "&amp;"), settings=settings)


def test_the_page_keeps_names_from_being_markup(tmp_path):
    report = _hostile_report(
        note=HOSTILE, dataset=HOSTILE, failed_cases={HOSTILE: HOSTILE}, nested={HOSTILE: [HOSTILE]}
    )
    write_report(report, tmp_path, pictures=dict.fromkeys(report.cases, b"png"))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = _Page(text)
    assert len(page.of("script")) == 1
    assert HOSTILE not in text
    assert page.text.count(HOSTILE) >= 10
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.of("img"))
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_markdown_keeps_names_from_being_markup(tmp_path):
    name = "a\\|[b](c)\n# <img src=x>`"
    labels = _labels(LIVER)
    report = evaluate_cases({name: labels}, {name: labels}, class_names=NAMES, settings={"note": name, "of": {name: 1}})
    failed = Report(report.class_names, report.cases, {**report.settings, "failed_cases": {name: name}})
    write_report(failed, tmp_path, pictures={name: b"png"})
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    inert = "a\\\\\\|\\[b\\](c) # \\<img src=x>\\`"
    assert text.count(inert) >= 6  # note, failure twice, case row twice, picture
    assert not re.search(r"(?<!\\)<img", text)
    assert not re.search(r"^# <", text, flags=re.MULTILINE)


def test_a_class_called_mean_keeps_its_interval():
    labels = _labels(LIVER, SPLEEN)
    worse = {"a": _labels(LIVER), "b": labels}
    report = evaluate_cases(worse, dict.fromkeys("ab", labels), class_names=("mean", "spleen"))
    rows = interval_rows(report)
    assert [row[0] for row in rows] == ["mean", "spleen", "mean"]
    assert (rows[0][1], rows[2][1]) == ("1.0000 to 1.0000", "0.5000 to 1.0000")


def test_an_image_on_another_grid_is_not_drawn():
    labels = Volume(_labels(LIVER), RAS)
    moved = RAS.copy()
    moved[0, 0] = -1
    with pytest.raises(InputError, match=r"on the grid of its label maps.* 14 mm apart"):
        case_picture(Volume(np.zeros((6, 8, 8)), moved), labels, labels, class_names=NAMES)


def test_pictures_of_cases_with_long_names(tmp_path):
    cases = {f"{'a' * 240}{end}": _labels(LIVER) for end in "xy"}
    report = evaluate_cases(cases, cases, class_names=NAMES)
    write_report(report, tmp_path, pictures=dict.fromkeys(cases, b"png"))
    assert len(list((tmp_path / "pictures").iterdir())) == 2


def test_the_page_asks_for_nothing_and_names_the_hashes_of_what_it_runs(tmp_path):
    write_report(_report(images={"b": Volume(np.zeros((6, 8, 8)), RAS)}), tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = _Page(text)
    policy = next(meta["content"] for meta in page.of("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; img-src data:;")
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not page.of("link")
    assert "http:" not in text
    assert "https:" not in text
    assert [link["href"] for link in page.of("a")] == ["pictures/b.png"]


def test_the_page_shows_scores_counts_and_intervals(tmp_path):
    write_report(_report(), tmp_path)
    page = _Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.text.index("b, mean Dice 0.5000") < page.text.index("a, mean Dice 0.7500")
    (spleen,) = [row for row in page.rows if row[0] == "spleen"]
    assert spleen[1:4] == ["0.0000", "no interval", "0.0000"]
    assert spleen[-4:] == ["1", "1", "1", "0"]  # scored, in neither, missed, spurious
    (missed,) = [row for row in page.rows if row[:2] == ["b", "spleen"]]
    assert missed[2:7] == ["missed", "0.0000", "0.0000", "n/a", "n/a"]
    # Each sorting button stands over the column it names.
    sortable = [attributes for attributes in page.of("th") if "data-column" in attributes]
    columns = 2 * len(METRICS)  # between a name and four counts, and after three names
    assert [int(attributes["data-column"]) for attributes in sortable] == [*range(columns + 5), *range(columns + 3)]
    assert len(page.of("svg")) == 2


def test_pictures_in_the_page_are_limited_to_the_worst(tmp_path):
    from samed_peft.evaluation.page import MOST_PICTURES

    rng = np.random.default_rng(0)
    references = {f"case{k:02d}": _labels(LIVER) for k in range(MOST_PICTURES + 3)}
    predictions = {case: labels * (rng.random(labels.shape) < 0.8) for case, labels in references.items()}
    report = evaluate_cases(predictions, references, class_names=NAMES)
    write_report(report, tmp_path, pictures={case: case.encode() for case in references})
    page = _Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    worst = report.worst_first()
    shown = [base64.b64decode(image["src"].split(",")[1]).decode() for image in page.of("img")]
    assert shown == worst[:MOST_PICTURES]
    assert [link["href"] for link in page.of("a")] == [f"pictures/{case}.png" for case in worst]


def test_a_page_without_any_score(tmp_path):
    empty = {"a": _labels()}
    write_report(evaluate_cases(empty, empty, class_names=NAMES), tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "no class in either mask" in text
    assert "nan" not in re.sub(r"<(style|script)>.*?</\1>", "", text, flags=re.DOTALL).lower()


def test_the_table_for_spreadsheets(tmp_path):
    write_report(_report(), tmp_path / "out")
    with (tmp_path / "out" / "report.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2
    first = {"case": "a", "class": "liver", "convention": "standard", "presence": "both", "dice": "0.75", "iou": "0.6"}
    assert {key: rows[0][key] for key in first} == first
    spleen = {"case": "b", "class": "spleen", "convention": "standard", "presence": "missed", "dice": "0.0", "hd95": ""}
    assert {key: rows[6][key] for key in spleen} == spleen


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "  =1"])
def test_spreadsheets_take_no_name_for_a_formula(name):
    labels = {name: _labels(LIVER)}
    rows = list(csv.reader(io.StringIO(csv_text(evaluate_cases(labels, labels, class_names=(name,))), newline="")))
    assert [row[:2] for row in rows[1:]] == [[f"'{name}", f"'{name}"]] * 2


def test_box_plots_place_values_on_their_axis():
    values = [(f"case{k}", value) for k, value in enumerate((0.0, 0.25, 0.5, 0.75, 1.0))]
    svg = box_plots({"liver": values, "a name that is far too long": [], "few": values[:2]}, label="Dice", top=1.0)
    root = ElementTree.fromstring(svg)
    left, right = (float(line.get("x1")) for line in (root.findall("line[@class='grid']")[i] for i in (0, -1)))
    dots = [float(dot.get("cx")) for dot in root.findall("circle")]
    np.testing.assert_allclose(dots[:5], np.linspace(left, right, 5), atol=0.1)
    (box,) = root.findall("rect")  # a class of two cases has none
    assert float(box.get("x")) == pytest.approx(dots[1], abs=0.1)
    assert float(box.get("width")) == pytest.approx(dots[3] - dots[1], abs=0.1)
    assert "n = 0" in svg
    for top in (1e-6, 0.3, 7.0, 51.4, 1234.5):
        box_plots({"liver": [("a", top)]}, label="HD95, mm")


def test_dataset_json_names_classes(tmp_path):
    path = tmp_path / "dataset.json"
    for labels in ({"0": "background", "2": "tumour", "1": "liver"}, {"background": 0, "liver": 1, "tumour": 2}):
        path.write_text(json.dumps({"labels": labels}))
        assert scheme_of_dataset(path) == LabelScheme(("liver", "tumour"))
    for content, message in (
        ({}, 'expected "labels"'),
        ([], "expected an object with labels"),
        ({"labels": {"background": 0, "liver": 1, "tumour": 1}}, "one number for each name"),
        ({"labels": {"background": 0}}, "class_names"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(InputError, match=message):
            scheme_of_dataset(path)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_one_slice_is_scored_by_its_outline(axis):
    # In 3-D each voxel of a single slice is on the border, and what overlaps would count as surfaces 0 mm apart.
    one, other = np.zeros((2, 40, 40), np.uint8)
    one[5:25, 5:25] = other[15:35, 5:25] = 1
    spacing = [2.0, 0.5]
    expected = score_case(one, other, num_classes=1, spacing_zyx_mm=spacing)
    spacing.insert(axis, 9.0)
    affine = np.diag([*reversed(spacing), 1.0])
    thin = [Volume(np.expand_dims(mask, axis), affine) for mask in (one, other)]
    report = evaluate_cases({"a": thin[0]}, {"a": thin[1]}, class_names=("square",))
    assert report.cases["a"] == expected
    assert expected["standard"][0]["hd95"] == 20.0
