"""Files and folders that appear whole or not at all, and targets that are refused."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from samed_peft import io
from samed_peft.errors import InputError
from samed_peft.io import atomic
from samed_peft.io.temporary import _HOST


def test_json_and_text(tmp_path):
    io.write_json(tmp_path / "deep" / "a.json", {"mean": 1.5, "name": "Gallenblase ä"})
    assert io.read_json(tmp_path / "deep" / "a.json") == {"mean": 1.5, "name": "Gallenblase ä"}
    with pytest.raises(ValueError, match="JSON compliant"):
        io.write_json(tmp_path / "deep" / "a.json", math.nan)
    assert io.read_json(tmp_path / "deep" / "a.json")["mean"] == 1.5
    io.write_text(tmp_path / "a.md", "one\n")
    assert io.read_text(tmp_path / "a.md") == "one\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.md", "deep"]
    for text in ("{", '{"a": NaN}', ""):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InputError, match=r"bad\.json"):
            io.read_json(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        io.read_json(tmp_path / "bad.json")
    with pytest.raises(InputError, match="does not exist"):
        io.read_json(tmp_path / "absent.json")


def test_failed_write_keeps_the_old_file(tmp_path):
    io.write_text(tmp_path / "a", "old")
    with pytest.raises(ZeroDivisionError), io.atomic_file(tmp_path / "a") as temporary:
        temporary.write_text(str(1 // 0))
    assert io.read_text(tmp_path / "a") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def fill(path, text):
    with io.atomic_dir(path) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text(text)


def test_atomic_dir_replaces_as_a_whole(tmp_path):
    path = tmp_path / "parent" / "out"
    fill(path, "old")
    (path / "stale").write_text("stale")
    fill(path, "new")
    assert (path / "sub" / "file").read_text() == "new"
    assert not (path / "stale").exists()
    with pytest.raises(FileNotFoundError), io.atomic_dir(path) as folder:
        (folder / "absent" / "file").write_text("half")
    assert [item.name for item in path.iterdir()] == ["sub"]
    assert [item.name for item in path.parent.iterdir()] == ["out"]
    (tmp_path / "file").write_text("a file")
    with pytest.raises(InputError, match="found a file"), io.atomic_dir(tmp_path / "file"):
        pass


KILLED_BETWEEN_RENAMES = """
import os, signal, sys
from samed_peft import io
from samed_peft.io import atomic
atomic._exchange = lambda one, other: False  # as on file systems that cannot
rename = os.rename
def rename_once(*names):
    rename(*names)
    os.kill(os.getpid(), signal.SIGKILL)
with io.atomic_dir(sys.argv[1]) as folder:
    (folder / "half").write_text("half")
    if sys.argv[2] == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
    os.rename = rename_once
"""


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_killed_atomic_dir_is_repaired(tmp_path, moment):
    path = tmp_path / "out"
    fill(path, "old")
    subprocess.run([sys.executable, "-c", KILLED_BETWEEN_RENAMES, path, moment], check=False)
    assert path.exists() == (moment == "writing")
    assert len(list(tmp_path.iterdir())) == 2
    io.recover_dir(path)
    assert (path / "sub" / "file").read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


def test_backup_beside_a_complete_folder_goes(tmp_path):
    fill(tmp_path / "out", "new")
    atomic._backup_of(tmp_path / "out").mkdir()
    io.recover_dir(tmp_path / "out")
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


def test_live_temporaries_of_others_stay(tmp_path):
    parent, ours = os.getppid(), os.getpid()
    kept = [
        tmp_path / f".tmp-{_HOST}-{parent}-0a0b0c0d",
        tmp_path / ".tmp-00000000-4194399-0a0b0c0d",  # another machine's, where that number may live
        tmp_path / ".tmp-of-somebody",
    ]
    dead = [
        tmp_path / f".tmp-{_HOST}-4194399-0a0b0c0d",  # above the largest process number
        tmp_path / f".tmp-{_HOST}-{ours}-0a0b0c0d",  # older than this process, which has its number now
    ]
    for path in (*kept, *dead):
        path.mkdir()
    (tmp_path / f".tmp-{_HOST}-4194399-0a0b0c0e.json").touch()
    os.utime(dead[1], (0, 0))
    fill(tmp_path / "out", "new")
    assert {item.name for item in tmp_path.iterdir()} == {"out", *(path.name for path in kept)}


def test_a_probe_of_a_killed_process_goes(tmp_path):
    (tmp_path / f".tmp-{_HOST}-4194399-0a0b0c0d").touch()
    io.require_replaceable(tmp_path, FILLED)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a" * 255, "ä" * 127 + "a", "a" * 250 + ".json"])
def test_names_as_long_as_the_system_allows(tmp_path, name):
    io.write_json(tmp_path / name, 1)
    assert io.read_json(tmp_path / name) == 1
    (tmp_path / name).unlink()
    for text in ("old", "new"):
        fill(tmp_path / name, text)
    assert [item.name for item in tmp_path.iterdir()] == [name]
    for text in ("old", "new"):
        fill_in_two_steps(tmp_path / name, text)
    assert [item.name for item in tmp_path.iterdir()] == [name]


def fill_in_two_steps(path, text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic, "_exchange", lambda one, other: False)
        fill(path, text)
    assert (path / "sub" / "file").read_text() == text


REPLACES_OFTEN = """
import sys
from samed_peft import io
for number in range(int(sys.argv[2])):
    with io.atomic_dir(sys.argv[1]) as folder:
        for name in "abc":
            (folder / name).write_text(str(number))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="folders are exchanged at once on Linux alone")
def test_readers_beside_a_replacing_writer(tmp_path):
    path = tmp_path / "out"

    def read(folder):
        return [(folder / name).read_text() for name in "abc"]

    with io.atomic_dir(path) as folder:
        for name in "abc":
            (folder / name).write_text("first")
    writer = subprocess.Popen([sys.executable, "-c", REPLACES_OFTEN, path, "300"])
    versions = set()
    while writer.poll() is None:
        found = io.read_whole(path, read)
        assert len(set(found)) == 1
        versions.add(found[0])
    assert writer.returncode == 0
    assert len(versions) > 1


def test_read_whole_passes_errors_on(tmp_path):
    with pytest.raises(ZeroDivisionError):
        io.read_whole(tmp_path / "absent", lambda folder: 1 // 0)


@pytest.mark.parametrize("existed", [False, True])
def test_the_first_of_two_writers_wins(tmp_path, existed):
    path = tmp_path / "out"
    if existed:
        fill(path, "old")

    def fill_while_another_does():
        with io.atomic_dir(path):
            fill(path, "first")

    with pytest.raises(InputError, match="replaced by another process"):
        fill_while_another_does()
    assert (path / "sub" / "file").read_text() == "first"
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


def test_fingerprint(tmp_path):
    def fingerprint(folder):
        return io.content_fingerprint(sorted(folder.glob("**/*.txt"), reverse=True))

    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "a.txt").write_text("a")
        (tmp_path / name / "sub" / "b.txt").write_text("b")
    first = fingerprint(tmp_path / "one")
    assert fingerprint(tmp_path / "two") == first
    (tmp_path / "two" / "a.txt").write_text("A")
    edited = fingerprint(tmp_path / "two")
    (tmp_path / "two" / "a.txt").rename(tmp_path / "two" / "c.txt")
    assert len({first, edited, fingerprint(tmp_path / "two")}) == 3
    with pytest.raises(InputError, match="absent"):
        io.content_fingerprint([tmp_path / "absent"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (".", "expected a file name, found the folder"),
        ("folder", "expected a file name, found the folder"),
        ("file/out.pth", "file is a file; choose another name"),
        ("file/deeper/out.pth", "file is a file; choose another name"),
    ],
)
def test_a_file_that_cannot_be_there_is_refused(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=message):
        io.write_text(name, "text")
    with pytest.raises(InputError, match=message):
        io.require_writable_file(name)


def test_a_name_that_is_too_long_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be written: File name too long"):
        io.write_text(tmp_path / ("a" * 300), "text")


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is a file"), io.atomic_dir(tmp_path / "file" / "out"):
        pass


def test_a_place_that_may_not_be_written_is_refused_and_left_alone(tmp_path, monkeypatch):
    def denied(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", denied)
    with pytest.raises(InputError, match=r"new/a\.txt cannot be written: Permission denied in"):
        io.write_text(tmp_path / "new" / "a.txt", "text")
    with pytest.raises(InputError, match="Permission denied"), io.atomic_dir(tmp_path / "new"):
        pass
    assert not list(tmp_path.iterdir())


FILLED = io.FolderKind(in_place=True)


def test_a_folder_to_write_into_is_tried_before_it_is_needed(tmp_path):
    (tmp_path / "file").touch()
    for name, message in (
        ("file", "expected a folder or a free name at .*file, found a file"),
        ("file/deeper", "expected a folder above .*deeper, but .*file is a file"),
        ("a" * 300, "cannot be written: File name too long"),
    ):
        with pytest.raises(InputError, match=message):
            io.require_replaceable(tmp_path / name, FILLED)
    io.require_replaceable(tmp_path, FILLED)
    io.require_replaceable(tmp_path / "new" / "deeper", FILLED)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(sys.platform != "linux", reason="a folder that not even root may write")
def test_a_folder_that_takes_no_files_is_refused():
    for name in ("/proc", "/proc/new"):
        with pytest.raises(InputError, match=f"{name} cannot be written: .* in /proc; choose another place"):
            io.require_replaceable(name, FILLED)


def test_a_file_is_no_folder_to_replace(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"expected a folder or a free name at .*file, found a file"):
        io.require_replaceable(tmp_path / "file", io.FolderKind(markers=("mark",)))


def test_an_error_while_writing_stays_what_it_is(tmp_path):
    with pytest.raises(OSError, match="No space left"), io.atomic_file(tmp_path / "a"):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_a_folder_with_more_than_its_own_files_is_not_replaced(tmp_path):
    own, any_with_mark = io.FolderKind(("mark",), allowed="mark|own"), io.FolderKind(("mark",))
    (tmp_path / "mark").touch()
    io.require_replaceable(tmp_path, own)
    (tmp_path / "thesis.txt").touch()
    io.require_replaceable(tmp_path, any_with_mark)
    with pytest.raises(InputError, match=r"other files thesis\.txt, which must not be lost"):
        io.require_replaceable(tmp_path, own)


def test_a_folder_that_lacks_one_of_its_markers_is_not_replaced(tmp_path):
    kind = io.FolderKind(("one", "two"))
    io.require_replaceable(tmp_path, kind)
    (tmp_path / "one").touch()
    with pytest.raises(InputError, match=r"with one and two at .*, found other files, which must not be lost"):
        io.require_replaceable(tmp_path, kind)
    (tmp_path / "two").touch()
    io.require_replaceable(tmp_path, kind)


def test_a_folder_whose_content_may_not_be_listed_is_not_replaced(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(InputError, match="out cannot be read: Permission denied"):
        io.require_replaceable(tmp_path / "out", io.FolderKind(("mark",)))


def test_a_folder_replaced_as_a_whole_needs_the_folder_above(tmp_path, monkeypatch):
    tried, touch = [], Path.touch
    monkeypatch.setattr(Path, "touch", lambda path: tried.append(path.parent) or touch(path))
    (tmp_path / "out").mkdir()
    for in_place in (True, False):
        io.require_replaceable(tmp_path / "out", io.FolderKind(in_place=in_place))
    assert tried == [tmp_path / "out", tmp_path]


def test_the_root_folder_is_not_replaced(monkeypatch):
    monkeypatch.setattr(Path, "touch", lambda path: None)
    monkeypatch.setattr(Path, "unlink", lambda path: None)
    with pytest.raises(InputError, match="found other files, which must not be lost"):
        io.require_replaceable(Path.cwd().anchor, io.FolderKind(("mark",)))
