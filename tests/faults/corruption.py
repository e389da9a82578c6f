"""Damage files and read them; runs in forked processes."""

import json
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator

from samed_peft import InputError, load_adapter, read_volume
from samed_peft.adapters.info import adapter_info
from samed_peft.datasets import load_synapse, open_folder
from samed_peft.training.claims import _claim
from samed_peft.training.state import Progress, load_checkpoint, save_checkpoint

sys.path.append(str(Path(__file__).parents[1]))
from scan_files import WRITERS, write_dicom

_SECONDS = 15
_STEP = "checkpoints/step-00000001"
_BYTES = 512 * 2**20
"""More than any of these small files may need."""


@dataclass(frozen=True)
class Kind:
    """A kind of file: where its files are, how it is read, and where a file shows that its voxels are damaged.

    Attributes:
        files: the files to damage, below the folder of the kind.
        read: reads the folder; returns what would be used.
        checked_from: first byte that a checksum protects; None if there is no checksum.
    """

    files: tuple[str, ...]
    read: Callable[[Path], Any]
    checked_from: Callable[[bytes], int] | None = None


def _scan(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        volume = read_volume(folder / name)
        affine = np.zeros(0) if volume.affine is None else volume.affine
        return [np.asarray(volume.array, np.float64), affine]

    return read


def _whole(_: bytes) -> int:
    return 0


KINDS = {
    "nii": Kind(("s.nii",), _scan("s.nii")),
    "nii.gz": Kind(("s.nii.gz",), _scan("s.nii.gz"), _whole),
    "nrrd": Kind(("s.nrrd",), _scan("s.nrrd"), lambda data: data.index(b"\n\n") + 2),
    "mha": Kind(("s.mha",), _scan("s.mha"), lambda data: data.index(b"LOCAL\n") + 6),
    "npz": Kind(("s.npz",), _scan("s.npz"), _whole),
    "npy.h5": Kind(("s.npy.h5",), _scan("s.npy.h5")),
    "png": Kind(("s.png",), _scan("s.png"), _whole),
    "tif": Kind(("s.tif",), _scan("s.tif")),
    "jpg": Kind(("s.jpg",), _scan("s.jpg")),
    "dicom": Kind(("dicom/1.dcm", "dicom/2.dcm"), _scan("dicom")),
    "adapter": Kind(
        tuple(f"adapter/{name}" for name in ("adapter_model.safetensors", "adapter_config.json", "samed_config.json")),
        lambda folder: _adapter(folder / "adapter"),
        _whole,
    ),
    "checkpoint": Kind(
        tuple(
            f"checkpoints/step-00000001/{name}" for name in ("model.safetensors", "optimizer.safetensors", "state.json")
        ),
        lambda folder: _checkpoint(folder / "checkpoints"),
        _whole,
    ),
    "rows": Kind(("cache",), lambda folder: _rows(folder), _whole),
    "report.json": Kind(("adapter/report.json",), lambda folder: adapter_info(folder / "adapter")["scores"]),
    "dataset.json": Kind(("labelled/dataset.json",), lambda folder: open_folder(folder / "labelled").class_names),
    "run.json": Kind(("run/run.json",), lambda folder: _claim(folder / "run", {"rank": 4, "data": ["a"]}, resume=True)),
}
SCANS = ("nii", "nii.gz", "nrrd", "mha", "npz", "npy.h5", "png", "tif", "jpg", "dicom")
OWN = ("adapter", "checkpoint", "rows", "report.json", "dataset.json", "run.json")


def _adapter(folder: Path) -> list[Any]:
    model = load_adapter(folder)
    # Beside modules that are trained in full, PEFT keeps the ones they replace, whose random weights nothing uses.
    used = [value for name, value in model.state_dict().items() if ".original_module." not in name]
    return [*used, repr(model.get_base_model().samed_config)]


def _checkpoint(folder: Path) -> list[Any]:
    from subjects import new_adapter

    model = new_adapter(1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    progress = load_checkpoint(folder, model, optimizer, accelerator=Accelerator(cpu=True))
    states = [value for state in optimizer.state.values() for _, value in sorted(state.items())]
    return [*model.state_dict().values(), *states, progress]


def _rows(folder: Path) -> list[Any]:
    rows = load_synapse(folder / "data", "train", cases=["0005", "0006"], num_proc=1, cache_dir=folder / "cache")
    return [np.asarray(value) for row in rows for value in (row["image"], row["label"])]


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, list):
        return isinstance(two, list) and len(one) == len(two) and all(map(_same, one, two))
    if isinstance(one, (np.ndarray, torch.Tensor)):
        return one.shape == two.shape and bool((one == two).all())
    return bool(one == two)


def write_samples(kind: str, folder: Path, inputs: Path) -> None:
    """Write sound files of a kind."""
    from subjects import new_adapter

    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 20), dtype=np.uint8))
    if kind in ("png", "tif", "jpg"):
        picture.save(folder / f"s.{kind}")
    elif kind in ("nii", "npz", "npy.h5"):
        WRITERS[f".{kind}"](folder / f"s.{kind}")
    elif kind in SCANS and kind != "dicom":
        source = next((inputs / "scans").glob(f"*.{kind}"))
        shutil.copy(source, folder / f"s.{kind}")
    elif kind == "dicom":
        write_dicom(folder / "dicom")
    elif kind in ("adapter", "report.json"):
        shutil.copytree(inputs / "adapter", folder / "adapter")
        if kind == "report.json":
            shutil.copy(inputs / "report" / "report.json", folder / "adapter")
    elif kind == "checkpoint":
        model = new_adapter(0)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        sum(p.square().sum() for p in model.parameters() if p.requires_grad).backward()
        optimizer.step()
        accelerator = Accelerator(cpu=True)
        save_checkpoint(folder / "checkpoints", model, optimizer, progress=Progress(1), accelerator=accelerator)
    elif kind == "rows":
        shutil.copytree(inputs / "data", folder / "data")
    elif kind == "dataset.json":
        for name in ("imagesTr", "labelsTr"):
            (folder / "labelled" / name).mkdir(parents=True)
            shutil.copy(inputs / "scans" / "s0.nii.gz", folder / "labelled" / name / "a.nii.gz")
        pair = {"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}
        content = {"name": "x", "modality": {"0": "CT"}, "labels": {"0": "background", "1": "a"}, "training": [pair]}
        (folder / "labelled" / "dataset.json").write_text(json.dumps(content))
    elif kind == "run.json":
        (folder / "run").mkdir()
        (folder / "run" / "run.json").write_text(json.dumps({"rank": 4, "data": ["a"]}))


def damage(data: bytes, generator: random.Random, *, how: str | None = None) -> tuple[bytes, int, str]:
    """Damage content in one of five ways; returns it, the first byte that differs, and a description."""
    how = how or generator.choice(("flip", "cut", "insert", "double", "overwrite"))
    size = len(data)
    at = generator.randrange(min(size, 400) if generator.random() < 0.4 else size) if size else 0
    if how == "flip" and size:
        mask = generator.randrange(1, 256)
        return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :], at, f"byte {at} ^ {mask}"
    if how == "cut":
        return data[:at], at, f"cut at {at}"
    length = generator.choice((1, 2, 4, 16, 100))
    if how == "insert":
        return data[:at] + generator.randbytes(length) + data[at:], at, f"{length} bytes inserted at {at}"
    if how == "double":
        return data[: at + length] + data[at:], at, f"{length} bytes doubled at {at}"
    return data[:at] + generator.randbytes(length) + data[at + length :], at, f"{length} bytes overwritten at {at}"


def corrupt(kind_name: str, seed: int, first: int, count: int, inputs: str, how: str | None) -> None:
    """Damage files of a kind `count` times; each trial's number and finding becomes a line of found.txt."""
    kind, root = KINDS[kind_name], Path.cwd()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    write_samples(kind_name, root, Path(inputs))
    expected = kind.read(root)
    if kind.files == ("cache",):
        kind = Kind(
            tuple(
                str(p.relative_to(root))
                for p in sorted((root / "cache").rglob("*"))
                if p.is_file() and p.stat().st_size
            ),
            kind.read,
            kind.checked_from,
        )
    limit = _resident("VmSize") + 4 * _BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for trial in range(first, first + count):
        generator = random.Random(f"{seed}:{kind_name}:{trial}")
        name = generator.choice(kind.files)
        sound = (root / name).read_bytes()
        data, at, what = damage(sound, generator, how=how)
        (root / name).write_bytes(data)
        with open("found.txt", "a", encoding="utf-8") as found:
            found.write(f"\n{trial}\t{name}: {what}\t")
        signal.alarm(_SECONDS)
        finding = _read(kind, root, expected, exact=kind.checked_from is not None and at >= kind.checked_from(sound))
        signal.alarm(0)
        with open("found.txt", "a", encoding="utf-8") as found:
            found.write(finding)
        (root / name).write_bytes(sound)


def _read(kind: Kind, root: Path, expected: Any, *, exact: bool) -> str:
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    try:
        found = kind.read(root)
    except InputError:
        outcome = "held"
    except Exception as error:
        outcome = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    else:
        outcome = "held" if not exact or _same(found, expected) else "used silently"
    return "memory" if outcome == "held" and _resident("VmHWM") - before > _BYTES else outcome


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024
