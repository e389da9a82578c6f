"""Artefacts made to run code, read other files, stall or write to the terminal; runs in forked processes."""

import json
import os
import random
import resource
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch

import samed_peft
from samed_peft.datasets import open_folder

sys.path.append(str(Path(__file__).parents[1]))
from scan_files import Payload, scan_array, write_nifti

SECRET = 77
"""Value of all voxels outside the folder that is read."""

_PREDICT = ("predict", "--adapter", "adapter", "--output", "masks", "--input")
_BAD = ("\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\r\x1b[1A", "\u202e")
_NESTED = 200_000
_GIGABYTES = 6


def _edit(file: str, **changes: object) -> None:
    path = Path(file)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _pickled(generator: random.Random) -> tuple[str, ...]:
    payload = Payload(Path("ran").absolute())
    kind = generator.choice(("pth", "old pth", "npz", "bin"))
    if kind in ("pth", "old pth"):
        torch.save({"x": payload}, "x.pth", _use_new_zipfile_serialization=kind == "pth")
        return "convert", "--checkpoint", "x.pth", "--base", "tiny-sam", "--output", "new"
    if kind == "npz":
        np.savez("x.npz", image=np.array([payload], dtype=object))
        return *_PREDICT, "x.npz"
    os.unlink("adapter/adapter_model.safetensors")
    torch.save({"x": payload}, "adapter/adapter_model.bin")
    return *_PREDICT, "s.nii.gz"


def _elsewhere(generator: random.Random) -> tuple[str, ...]:
    place = generator.choice(("../secret/s.raw", str(Path("../secret/s.raw").resolve())))
    kind = generator.choice(("nrrd", "mha", "link", "external", "virtual"))
    if kind == "nrrd":
        header = "NRRD0004\ntype: uint8\ndimension: 3\nsizes: 3 4 5\nencoding: raw\n"
        Path("x.nrrd").write_text(f"{header}space: left-posterior-superior\ndata file: {place}\n")
        return *_PREDICT, "x.nrrd"
    if kind == "mha":
        header = "ObjectType = Image\nNDims = 3\nBinaryData = True\nDimSize = 3 4 5\nElementType = MET_UCHAR\n"
        Path("x.mha").write_text(f"{header}ElementDataFile = {place}\n")
        return *_PREDICT, "x.mha"
    with h5py.File("x.npy.h5", "w") as file:
        if kind == "link":
            file["image"] = h5py.ExternalLink(place.replace("s.raw", "s.npy.h5"), "image")
        elif kind == "external":
            file.create_dataset("image", (5, 4, 3), "u1", external=[(place, 0, 60)])
        else:
            layout = h5py.VirtualLayout((5, 4, 3), "f8")
            layout[:] = h5py.VirtualSource(place.replace("s.raw", "s.npy.h5"), "image", (5, 4, 3))
            file.create_virtual_dataset("image", layout)
    return *_PREDICT, "x.npy.h5"


def _listed(generator: random.Random) -> tuple[str, ...]:
    place = generator.choice(("../secret/s.nii.gz", str(Path("../secret/s.nii.gz").resolve())))
    for name in ("imagesTr", "labelsTr"):
        Path("labelled", name).mkdir(parents=True)
    pair = {"image": place, "label": place}
    content = {"name": "x", "modality": {"0": "CT"}, "labels": {"0": "background", "1": "a"}, "training": [pair]}
    Path("labelled/dataset.json").write_text(json.dumps(content))
    return ("open", "labelled")


def _expression(generator: random.Random) -> tuple[str, ...]:
    pattern = generator.choice((r"(.*)*(.*)*(.*)*!", r"((.|.)*)*!", r"(\w+\.?)+!", r".*.*.*.*.*.*.*.*.*.*.*.*!"))
    name = generator.choice(("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"))
    _edit("adapter/adapter_config.json", **{name: {pattern: 4} if name.endswith("pattern") else pattern})
    return *_PREDICT, "s.nii.gz"


def _huge(generator: random.Random) -> tuple[str, ...]:
    number = generator.choice((2**31 - 1, 2**40, 10**18))
    kind = generator.choice(("r", "alpha", "image_size", "rank", "nii", "npz", "h5", "nrrd", "mha", "weights", "deep"))
    if kind in ("r", "alpha"):
        _edit("adapter/adapter_config.json", **{"r" if kind == "r" else "lora_alpha": number})
    elif kind in ("image_size", "rank"):
        _edit("adapter/samed_config.json", **{kind: number})
    elif kind == "deep":
        Path("adapter", generator.choice(("samed_config.json", "adapter_config.json"))).write_text("[" * _NESTED)
    elif kind == "weights":
        Path("adapter/adapter_model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    elif kind == "nii":
        data = bytearray(write_nifti(Path("x.nii")).read_bytes())
        data[40:56] = struct.pack("<8h", 3, 32767, 32767, 32767, 1, 1, 1, 1)
        Path("x.nii").write_bytes(data)
    elif kind == "npz":
        np.savez("x.npz", image=np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (2**31,), (0,))[:1])
        data = Path("x.npz").read_bytes().replace(b"'shape': (1,), }      ", b"'shape': (%d,), }" % 10**6 + b" " * 0)
        Path("x.npz").write_bytes(data)
    elif kind == "h5":
        with h5py.File("x.npy.h5", "w") as file:
            file.create_dataset("image", (min(number, 2**31 - 1), 512, 512), "f8", chunks=(1, 64, 64))
    elif kind == "nrrd":
        header = f"NRRD0004\ntype: uint8\ndimension: 3\nsizes: {number} 4 5\nencoding: raw\n"
        Path("x.nrrd").write_text(f"{header}space: left-posterior-superior\n\n{'x' * 60}")
    else:
        header = f"ObjectType = Image\nNDims = 3\nBinaryData = True\nDimSize = {number} 4 5\nElementType = MET_UCHAR\n"
        Path("x.mha").write_text(f"{header}ElementDataFile = LOCAL\n{'x' * 60}")
    names = {"nii": "x.nii", "npz": "x.npz", "h5": "x.npy.h5", "nrrd": "x.nrrd", "mha": "x.mha"}
    return *_PREDICT, names.get(kind, "s.nii.gz")


def _escapes(generator: random.Random) -> tuple[str, ...]:
    bad = generator.choice(_BAD)
    kind = generator.choice(("classes", "value", "file name", "labels", "base"))
    if kind == "classes":
        _edit("adapter/samed_config.json", class_names=[f"a{bad}", "b"])
        return "info", "adapter"
    if kind == "value":
        _edit("adapter/samed_config.json", method=f"x{bad}")
        return "info", "adapter"
    if kind == "base":
        _edit("adapter/samed_config.json", base=f"x{bad}")
        return *_PREDICT, "s.nii.gz"
    if kind == "file name":
        Path("scans").mkdir()
        Path("scans", f"x{bad.replace('/', '')}.nii.gz").write_bytes(b"no scan")
        shutil.copy("s.nii.gz", "scans")
        return *_PREDICT, "scans"
    for name in ("predictions", "references"):
        Path(name).mkdir()
        write_nifti(Path(name, "a.nii.gz"), (scan_array() > 0).astype(np.uint8))
    Path("dataset.json").write_text(json.dumps({"labels": {"background": 0, f"a{bad}": 1}}))
    options = ("--references", "references", "--dataset_json", "dataset.json", "--output", "report")
    return "evaluate", "--predictions", "predictions", *options


CASES: dict[str, Callable[[random.Random], tuple[str, ...]]] = {
    "pickle": _pickled,
    "elsewhere": _elsewhere,
    "listed": _listed,
    "expression": _expression,
    "huge": _huge,
    "escapes": _escapes,
}


def attack(name: str, seed: int, index: int, inputs: str) -> None:
    """Make an artefact in `in`, say which, and use it as a user would."""
    Path("in").mkdir()
    Path("secret").mkdir()
    os.chdir("in")
    shutil.copytree(Path(inputs, "adapter"), "adapter")
    shutil.copy(Path(inputs, "scans", "s0.nii.gz"), "s.nii.gz")
    secret = np.full((5, 4, 3), SECRET, np.uint8)
    secret.tofile("../secret/s.raw")
    write_nifti(Path("../secret/s.nii.gz"), secret)
    with h5py.File("../secret/s.npy.h5", "w") as file:
        file["image"] = secret.astype(float) / 100
    command = CASES[name](random.Random(f"{seed}:{name}:{index}"))
    Path("../command.json").write_text(json.dumps(command))
    limit = _GIGABYTES * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if command[0] == "open":
        _open(command[1])
    else:
        samed_peft.cli.main(command)


@samed_peft.exit_on_error
def _open(folder: str) -> None:
    print(open_folder(folder).class_names)
