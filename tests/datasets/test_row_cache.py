"""Prepared rows whose files were damaged, cut or removed, or were written before checksums were recorded."""

import contextlib
import itertools
import multiprocessing
import shutil
import warnings

import numpy as np
import pytest
from PIL import Image

from samed_peft.datasets.builder import load_slices
from samed_peft.datasets.layouts import open_folder

FILES = ["builder-train.arrow", "dataset_info.json", "checksums.json"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Scans, and the cache of their rows."""
    root = tmp_path_factory.mktemp("prepared")
    rng = np.random.default_rng(0)
    for kind, most in (("images", 256), ("masks", 2)):
        (root / "scans" / kind).mkdir(parents=True)
        # One case, whose rows are one file.
        Image.fromarray(rng.integers(0, most, (12, 10), np.uint8)).save(root / "scans" / kind / "a.png")
    with cached_in(root / "cache"):
        rows = read(root / "scans")
    return root, rows


@contextlib.contextmanager
def cached_in(cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
        yield


def read(scans, **options):
    folder = open_folder(scans)
    rows = load_slices(folder, folder.cases, num_classes=1, orientation=None, window=(0.0, 255.0), **options)
    return [(row["case"], row["image"].tobytes(), row["label"].tobytes()) for row in rows]


@pytest.fixture
def cache(prepared, tmp_path):
    """The folder of the prepared rows, a copy; with the scans and the rows."""
    root, rows = prepared
    shutil.copytree(root / "cache", tmp_path / "cache")
    (file,) = (tmp_path / "cache").rglob("*.arrow")
    with cached_in(tmp_path / "cache"):
        yield file.parent, root / "scans", rows


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << at % 8
    path.write_bytes(data)


def damage(path, how):
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        flip(path, int(path.stat().st_size * how))


def test_sound_rows_are_taken_from_the_cache(cache):
    folder, scans, rows = cache
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert read(scans) == rows
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "how"),
    [*itertools.product(FILES, (0, 0.2, 0.5, 0.8, "cut")), *zip(FILES[:2], ["missing"] * 2, strict=True)],
)
def test_damaged_rows_are_prepared_again(cache, name, how):
    folder, scans, rows = cache
    damage(folder / name, how)
    with pytest.warns(UserWarning, match=rf"^prepared scans in {folder} are prepared again: [^\n]+$"):
        assert read(scans) == rows
    assert read(scans) == rows  # without a warning


def test_rows_without_checksums_load_and_get_them(cache):
    folder, scans, rows = cache
    sums = (folder / "checksums.json").read_text()
    (folder / "checksums.json").unlink()
    arrow = (folder / "builder-train.arrow").stat()
    assert read(scans) == rows
    assert (folder / "builder-train.arrow").stat().st_mtime_ns == arrow.st_mtime_ns
    assert (folder / "checksums.json").read_text() == sums
    flip(folder / "builder-train.arrow", 700)
    with pytest.warns(UserWarning, match=r"builder-train\.arrow differs from its checksum"):
        assert read(scans) == rows


@pytest.mark.parametrize(("name", "how"), [(FILES[0], "cut"), (FILES[0], "missing"), (FILES[1], "cut"), (FILES[0], 0)])
def test_unreadable_rows_without_checksums_are_prepared_again(cache, name, how):
    folder, scans, rows = cache
    (folder / "checksums.json").unlink()
    damage(folder / name, how)
    with pytest.warns(UserWarning, match="are prepared again: they cannot be read"):
        assert read(scans) == rows


def test_a_lost_row_is_noticed_without_checksums(cache):
    folder, scans, rows = cache
    (folder / "checksums.json").unlink()
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('"num_examples": 1', '"num_examples": 2'))
    with pytest.warns(UserWarning, match="they are incomplete, 1 of 2 rows are there"):
        assert read(scans) == rows


def test_results_of_map_are_no_part_of_the_rows(cache):
    folder, scans, rows = cache
    shutil.copy(folder / "builder-train.arrow", folder / "cache-0123456789abcdef.arrow")
    assert read(scans) == rows


def test_a_process_may_leave_verifying_to_another(cache):
    folder, scans, rows = cache
    flip(folder / "checksums.json", 70)
    assert read(scans, verify=False) == rows


def _read_at_once(scans, barrier, found):
    barrier.wait()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found.put((read(scans), [str(warning.message) for warning in caught]))


def test_one_of_several_processes_prepares_again(cache):
    folder, scans, rows = cache
    flip(folder / "builder-train.arrow", 700)
    context = multiprocessing.get_context("fork")
    barrier, found = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_read_at_once, args=(scans, barrier, found)) for _ in range(3)]
    for process in processes:
        process.start()
    results = [found.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert [values for values, _ in results] == [rows] * 3
    assert sum(len(messages) for _, messages in results) == 1
