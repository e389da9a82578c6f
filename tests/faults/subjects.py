"""What forked processes run: the package's commands, and the files that attacks start from."""

import io
import json
import os
import runpy
import sys
import threading
from pathlib import Path

import accelerate.utils.memory  # noqa: F401
import datasets
import h5py  # noqa: F401
import matplotlib
import matplotlib.pyplot
import nibabel
import numpy as np
import PIL.Image
import SimpleITK
import torch
import torch.utils.data
import torch.utils.tensorboard
import tqdm
import transformers  # noqa: F401
from corruption import corrupt  # noqa: F401
from malice import attack  # noqa: F401

import samed_peft
import samed_peft.cli
import samed_peft.conversion
import samed_peft.evaluation.page
import samed_peft.evaluation.pictures
import samed_peft.prediction.held_out
import samed_peft.training
from samed_peft import SamedConfig, add_lora, load_adapter, load_sam, save_adapter, write_mask
from samed_peft.adapters.info import adapter_info
from samed_peft.datasets import load_synapse, write_phantom
from samed_peft.io import read_volume
from samed_peft.models.modeling import config_of

torch.set_num_threads(1)
matplotlib.use("agg")

RECIPES = Path(__file__).parents[2] / "recipes"
CLASSES = ("liver", "spleen")


def prepare_process(root: Path) -> None:
    """Give a process its own cache of prepared rows, and standard streams as a new one has."""
    datasets.config.HF_DATASETS_CACHE = root / "cache"
    tqdm.tqdm.set_lock(threading.RLock())  # its own is a semaphore, shared with all that are forked from the zygote
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), encoding="utf-8")
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), encoding="utf-8", write_through=True)


def samed(*arguments: str) -> None:
    """The `samed` command."""
    sys.argv = ["samed", *arguments]
    samed_peft.cli.main(arguments)


def recipe(name: str, *arguments: str) -> None:
    """A recipe."""
    sys.argv = [str(RECIPES / name), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def new_adapter(seed: int, classes: tuple[str, ...] = CLASSES):
    """An adapter of the tiny SAM with random weights, whose masks have every class."""
    torch.manual_seed(seed)
    config = SamedConfig("tiny-sam", class_names=classes, image_size=64)
    model = add_lora(load_sam("tiny-sam", class_names=classes, image_size=64), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.eval()


def warm_up() -> None:
    """Fill caches that every process would fill anew: fonts, expressions, conversions of weights."""
    figure = matplotlib.pyplot.figure(layout="constrained")
    figure.subplots(2, 2)[0, 0].imshow([[0.0]])
    figure.savefig(io.BytesIO(), format="png")
    matplotlib.pyplot.close(figure)
    new_adapter(0)


@samed_peft.exit_on_error
def write_adapter(folder: str, seed: int) -> None:
    """Save an adapter in place of the one that may be there."""
    save_adapter(new_adapter(seed), folder)


@samed_peft.exit_on_error
def prepare_rows(data_dir: str) -> None:
    """Cut scans into training rows, and write their digest."""
    rows = load_synapse(data_dir, "train", cases=["0005", "0006"], num_proc=2)
    samed_peft.io.write_json("rows.json", [str(np.asarray(row["image"]).sum()) for row in rows])


@samed_peft.exit_on_error
def phantom(folder: str, seed: int) -> None:
    """Write synthetic scans in place of those that may be there."""
    write_phantom(folder, cases=(5, 6), seed=seed, shape_dhw=(5, 32, 32))


def write_inputs(folder: str) -> None:
    """Write what all attacks start from: scans, masks, an adapter, a checkpoint of SAMed."""
    root = Path(folder)
    data = write_phantom(root / "data", cases=(5, 6, 1, 2), seed=0, shape_dhw=(6, 32, 32))
    save_adapter(new_adapter(0), root / "adapter")
    scans = sorted((data / "Training" / "img").iterdir())
    for kind in ("scans", "references", "predictions"):
        (root / kind).mkdir()
    for number, (scan, suffix) in enumerate(zip(scans, (".nii.gz", ".mha", ".nrrd", ".nii.gz"), strict=True)):
        volume = read_volume(scan)
        if suffix == ".nii.gz":
            nibabel.save(nibabel.load(scan), root / "scans" / f"s{number}{suffix}")
        else:
            SimpleITK.WriteImage(SimpleITK.ReadImage(str(scan)), str(root / "scans" / f"s{number}{suffix}"), True)
        mask = (volume.array > 0).astype(np.uint8) + (volume.array > 60)
        write_mask(mask, volume, root / "references" / f"s{number}.nii.gz")
        write_mask(np.roll(mask, 1, axis=1), volume, root / "predictions" / f"s{number}.nii.gz")
    picture = np.random.default_rng(0).integers(0, 255, (40, 44), dtype=np.uint8)
    PIL.Image.fromarray(picture).save(root / "scans" / "s4.png")
    samed("export", "--adapter", str(root / "adapter"), "--output", str(root / "samed.pth"), "--format", "samed")
    report = ("--predictions", str(root / "predictions"), "--references", str(root / "references"))
    samed("evaluate", *report, "--class_names", ",".join(CLASSES), "--output", str(root / "report"))
    (root / "done").write_text(json.dumps("written last"))


def read_beside_writer(count: int, seed: int, every: int) -> None:
    """Read an adapter `count` times, one time in `every` with its weights, while a forked process replaces it."""
    models = {names: new_adapter(seed, names) for names in (("a", "b"), ("c", "d", "e"))}
    weights = {names: adapter_weight(model) for names, model in models.items()}
    save_adapter(models["a", "b"], "adapter")
    writer = os.fork()
    if writer == 0:
        while os.getppid() != 1:
            for model in models.values():
                save_adapter(model, "adapter")
        os._exit(0)
    found = []
    for number in range(count):
        try:
            if not every or number % every:
                names = tuple(adapter_info("adapter")["classes"].values())
                wrong = names not in models
            else:
                model = load_adapter("adapter")
                names = config_of(model).class_names
                wrong = not torch.equal(adapter_weight(model), weights[names])
            if wrong:
                found.append(f"mixed\tread {number}: {names}")
        except Exception as error:
            found.append(f"{type(error).__name__}\tread {number}: {error!s:.200}")
    os.kill(writer, 9)
    os.waitpid(writer, 0)
    Path("found.txt").write_text("\n".join(found))


def adapter_weight(model) -> torch.Tensor:
    """One of an adapter's own weights."""
    return next(value for name, value in model.state_dict().items() if "lora_B" in name)
