"""Archives whose entries have names of other places: they are read in memory, and never unpacked to the disk.

CVE-2026-21851 is a "zip slip" of MONAI: models were unpacked where the names of an archive's entries said.
"""

import ast
import contextlib
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import samed_peft
from samed_peft.errors import InputError
from samed_peft.io import load_torch_weights, read_volume

NAMES = [
    "../slipped.npy",
    "../../slipped.npy",
    "{root}/slipped.npy",
    "..\\slipped.npy",
    "a/../../slipped.npy",
    "~/slipped.npy",
]


def entry(name, root):
    return name.format(root=root)


def contents(root):
    return {path: path.stat().st_mtime_ns for path in sorted(root.rglob("*"))}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, deep enough for entries to climb out of it."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    return tmp_path


def array_bytes():
    buffer = io.BytesIO()
    np.save(buffer, np.full((2, 4, 4), 0.5, np.float32))
    return buffer.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_cve_2026_21851_entries_of_an_npz_are_not_unpacked(place, name):
    with zipfile.ZipFile("s.npz", "w") as archive:
        archive.writestr("image.npy", array_bytes())
        archive.writestr(entry(name, place), b"slipped")
    before = contents(place)
    assert read_volume("s.npz").array.shape == (2, 4, 4)
    assert contents(place) == before


@pytest.mark.parametrize("name", NAMES)
def test_cve_2026_21851_entries_of_weights_are_not_unpacked(place, name):
    torch.save({"weight": torch.ones(3)}, "x.pth")
    with zipfile.ZipFile("x.pth", "a") as archive:
        archive.writestr(entry(name, place), b"slipped")
    before = contents(place)
    with contextlib.suppress(InputError):
        assert load_torch_weights("x.pth").keys() == {"weight"}
    assert contents(place) == before


@pytest.mark.skipif(os.name == "nt", reason="makes a link")
def test_cve_2026_21851_links_in_an_archive_are_not_followed(place):
    (place / "secret.npy").write_bytes(array_bytes())
    with zipfile.ZipFile("s.npz", "w") as archive:
        link = zipfile.ZipInfo("image.npy")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "../../secret.npy")
    with pytest.raises(InputError, match=r"s\.npz"):
        read_volume("s.npz")


def test_cve_2026_21851_nothing_unpacks_archives():
    package = Path(samed_peft.__file__).parent
    unpacking = {"extract", "extractall", "unpack_archive", "tarfile"}
    for path in [*package.rglob("*.py"), *(package.parent / "recipes").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = {node.attr} if isinstance(node, ast.Attribute) else set()
            if isinstance(node, ast.Import | ast.ImportFrom):
                names |= {alias.name for alias in node.names}
            assert not names & unpacking, f"{path}:{node.lineno}"
