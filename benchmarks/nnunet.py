"""How good is nnU-Net after the same minutes on the same cores? Its 2-D configuration on a fold of a folder of scans.

    pip install nnunetv2
    python benchmarks/nnunet.py --data_dir Task04_Hippocampus --work runs/nnunet --minutes 10

The held-out cases are those of `recipes/finetune.py` with the same --folds and --fold. Planning, preprocessing,
network, augmentation, optimizer, deep supervision and mirroring at prediction are nnU-Net v2's own. Its polynomial
decay follows the time that has passed in place of epochs, so that it ends with the minutes, and nothing is validated on
the way; planning, preprocessing and prediction are not counted. Writes one JSON with the scores of all cases.
"""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from measure import facts, options_parser

from samed_peft.datasets import LabelledFolder, choose_splits, open_folder
from samed_peft.datasets.cases import read_reference, read_scan
from samed_peft.evaluation import Report, format_table
from samed_peft.evaluation.folders import evaluate_folders
from samed_peft.io import write_json

NUMBER, NAME = 900, "Dataset900_samed"


def write_raw(folder: LabelledFolder, cases: list[str], held_out: list[str], raw: Path) -> None:
    """Write a folder's cases in nnU-Net's layout; the held-out ones where nnU-Net looks for cases to test."""
    for kind in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (raw / kind).mkdir(parents=True)
    for case in cases:
        part = "Ts" if case in held_out else "Tr"
        scan, label = read_scan(folder.case(case)), read_reference(folder.case(case))
        for array, kind, name in ((scan.array, "images", f"{case}_0000"), (label.array, "labels", case)):
            data = np.asarray(array, np.float32 if kind == "images" else np.uint8).transpose(2, 1, 0)
            nib.save(nib.Nifti1Image(data, scan.affine), raw / f"{kind}{part}" / f"{name}.nii.gz")
    labels = {"background": 0} | {name: number for number, name in enumerate(folder.class_names, start=1)}
    channel = folder.modality or "MRI"
    values = {"channel_names": {"0": channel}, "labels": labels, "file_ending": ".nii.gz"}
    values["numTraining"] = len(cases) - len(held_out)
    (raw / "dataset.json").write_text(json.dumps(values), encoding="utf-8")


def train(preprocessed: Path, args: Any) -> tuple[Any, int]:
    """Train for the minutes; returns nnU-Net's trainer and the number of iterations."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text())
    if args.batch_size:
        plans["configurations"]["2d"]["batch_size"] = args.batch_size
    plans["continue_training"] = False
    dataset = json.loads((preprocessed / "dataset.json").read_text())
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)  # noqa: NPY002  # nnU-Net's augmentation draws from the global state
    trainer = nnUNetTrainer(plans, "2d", "all", dataset, device=torch.device("cpu"))
    trainer.on_train_start()
    trainer.network.train()
    began, count = time.monotonic(), 0
    while (share := (time.monotonic() - began) / (60 * args.minutes)) < 1:
        for group in trainer.optimizer.param_groups:
            group["lr"] = trainer.initial_lr * (1 - share) ** 0.9
        trainer.train_step(next(trainer.dataloader_train))
        count += 1
    for loader in (trainer.dataloader_train, trainer.dataloader_val):
        loader._finish()  # as nnU-Net ends its workers
    return trainer, count


def predict(trainer: Any, source: Path, target: Path) -> None:
    """Segment the held-out cases, mirrored as nnU-Net does."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    trainer.set_deep_supervision_enabled(False)
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        [trainer.network.state_dict()],
        trainer.dataset_json,
        "nnUNetTrainer",
        trainer.inference_allowed_mirroring_axes,
    )
    predictor.predict_from_files_sequential(str(source), str(target))


def refuse(case: str, reason: str) -> None:
    """A case without a score would flatter or harm the mean."""
    raise RuntimeError(f"{case} could not be scored: {reason}")


def scored(folder: LabelledFolder, args: Any, held_out: list[str]) -> tuple[Report, int, int]:
    """Prepare, train, predict and score; returns the report, the iterations and the size of a batch."""
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api

    raw, preprocessed = args.work / "raw" / NAME, args.work / "preprocessed" / NAME
    if not preprocessed.is_dir():
        shutil.rmtree(raw, ignore_errors=True)
        write_raw(folder, list(folder.cases), held_out, raw)
        api.extract_fingerprints([NUMBER], num_processes=2)
        api.plan_experiments([NUMBER])
        api.preprocess([NUMBER], configurations=("2d",), num_processes=(2,))
    trainer, count = train(preprocessed, args)
    masks = args.work / f"masks-{args.minutes:g}-seed{args.seed}"
    shutil.rmtree(masks, ignore_errors=True)
    masks.mkdir(parents=True)
    predict(trainer, raw / "imagesTs", masks)
    for path in masks.glob("*.json"):
        path.unlink()
    report = evaluate_folders(masks, raw / "labelsTs", class_names=folder.class_names, on_failure=refuse)
    return report, count, trainer.batch_size


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--data_dir", type=Path, required=True, help="as the recipe's")
    parser.add_argument("--work", type=Path, required=True, help="for nnU-Net's files; prepared scans are used again")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--batch_size", type=int, help="in place of nnU-Net's own, which is meant for a GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.work = args.work.resolve() / f"fold{args.fold}of{args.folds}"
    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = str(args.work / name)
    os.environ |= {"nnUNet_n_proc_DA": "1", "nnUNet_compile": "f", "nnUNet_def_n_proc": "2"}
    torch.set_num_threads(args.threads)
    folder = open_folder(args.data_dir)
    split = choose_splits(folder.cases, folds=args.folds, fold=args.fold)
    report, count, batch_size = scored(folder, args, list(split.test))
    values = {"minutes": args.minutes, "seed": args.seed, "iterations": count, "batch_size": batch_size}
    values |= {"threads": args.threads, "data": args.data_dir.resolve().name, "fold": args.fold, "folds": args.folds}
    name = f"nnunet-{args.data_dir.resolve().name}-fold{args.fold}-{args.minutes:g}min-seed{args.seed}.json"
    args.results_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.results_dir / name, values | facts() | report.to_dict())
    print(format_table(report), f"{count} iterations of {batch_size} slices in {args.minutes:g} minutes", sep="\n")


if __name__ == "__main__":
    main()
