"""Small sources of the data sets of zero_flags.py: hippocampi and a CT."""

import json

import nibabel
import numpy as np

CT_AFFINE = np.array([[-0.5, 0, 0, 10], [0, 0.5, 0, 20], [0, 0, 2.0, -30], [0, 0, 0, 1]])


def save(array, path, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)


def write_hippocampi(root, number=60):
    """Boxes of two labels in noise, in the Decathlon's layout; x, y, z have 6, 8 and 5 voxels."""
    pairs = []
    for case in range(number):
        rng = np.random.default_rng(case)
        labels = np.zeros((6, 8, 5), np.uint8)
        labels[1:4, 2:5, 1:4], labels[1:4, 5:7, 1:4] = 1, 2
        labels[1 + case % 3, 1, 2] = 1  # the sagittal slice with the most voxels
        scan = (1000 * (labels + rng.random(labels.shape))).astype(np.float32)
        pair = {kind: f"./{kind}sTr/hippocampus_{case:03d}.nii.gz" for kind in ("image", "label")}
        save(scan, root / pair["image"])
        save(labels, root / pair["label"])
        pairs.append(pair)
    labels_of = {"0": "background", "1": "Anterior", "2": "Posterior"}
    described = {"name": "Hippocampus", "modality": {"0": "MRI"}, "labels": labels_of, "training": pairs}
    (root / "dataset.json").write_text(json.dumps({**described, "numTraining": number, "numTest": 0, "test": []}))
    return root


def write_ct(root, depth=20):
    """Spleen, liver, aorta and, from slice 17 on, a duodenum, which is not one of the eight organs."""
    labels = np.zeros((16, 12, depth), np.uint8)
    labels[1:4, 1:4], labels[6:10, 1:6], labels[12:14, 8:10] = 1, 6, 8
    labels[6:8, 8:10, 17:] = 13
    scan = (np.arange(labels.size).reshape(labels.shape) % 500 - 1000 + 100 * labels.astype(int)).astype(np.int16)
    save(scan, root / "Training" / "img" / "img0001.nii.gz", CT_AFFINE)
    save(labels, root / "Training" / "label" / "label0001.nii.gz", CT_AFFINE)
    return root
