"""Rows of a dataset -> batches of tensors; order and augmentation depend on (seed, epoch, index) alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from samed_peft.augmentation import augment
from samed_peft.losses import IGNORED_LABEL
from samed_peft.preprocessing import resize_label, slice_to_pixels

FILLER = -1
"""Index of the uncounted slice that stands in where a process has none left."""

Key = tuple[int, int]
"""(epoch, row index or `FILLER`)."""


class TrainingSlices(Dataset):
    """Training examples by (epoch, index), so that any number of workers yields the same ones.

    Args:
        rows: sequence of mappings with `image` (H, W) or, in colour, (H, W, 3) in [0, 1], and `label` (H, W).
        image_size: S, pixels per side of the model.
        label_size: side of the model's logits.
        seed: seed of the augmentation, or None for none.
    """

    def __init__(
        self, rows: Sequence[Mapping[str, Any]], *, image_size: int, label_size: int, seed: int | None
    ) -> None:
        self.rows = rows
        self.image_size = image_size
        self.label_size = label_size
        self.seed = seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Key) -> dict[str, torch.Tensor]:
        """`pixel_values` (3, S, S) float32 and `labels` (h, h) int64."""
        epoch, index = key
        row = self.rows[max(index, 0)]
        image, label = row["image"], row["label"]
        if self.seed is not None and index != FILLER:
            image, label = augment(image, label, rng=np.random.default_rng((self.seed, epoch, index)))
        pixels = slice_to_pixels(image, image_size=self.image_size)
        # By way of the full size, as SAMed does: nearest neighbour twice is not nearest neighbour once.
        label = resize_label(label, (self.image_size, self.image_size))
        label = resize_label(label, (self.label_size, self.label_size)).astype(np.int64)
        if index == FILLER:
            label = np.full_like(label, IGNORED_LABEL)
        tensor = torch.from_numpy(np.ascontiguousarray(pixels))
        return {
            "pixel_values": tensor.movedim(-1, 0) if tensor.ndim == 3 else tensor.expand(3, -1, -1),
            "labels": torch.from_numpy(label),
        }


def epoch_batches(
    num_rows: int, *, batch_size: int, seed: int, epoch: int, process: int = 0, num_processes: int = 1
) -> list[list[Key]]:
    """The micro-batches of one process in one epoch.

    All processes share one permutation; together their k-th batches are the k-th batch of a single process with
    `batch_size * num_processes`. The last batch may be smaller. A process that it leaves empty-handed gets one
    `FILLER`, which counts nowhere, so that collective operations stay in step.
    """
    order = np.random.default_rng((seed, epoch)).permutation(num_rows)
    whole = batch_size * num_processes
    batches = []
    for start in range(0, num_rows, whole):
        mine = order[start : start + whole][process::num_processes]
        batches.append([(epoch, int(index)) for index in mine] or [(epoch, FILLER)])
    return batches


def batch_loader(slices: TrainingSlices, batches: Sequence[list[Key]], *, num_workers: int) -> DataLoader:
    """Load `batches` in order; each is `pixel_values` (B, 3, S, S) and `labels` (B, h, h)."""
    return DataLoader(
        slices,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        # A generator of its own: without one, each epoch would draw from the global random state.
        generator=torch.Generator(),
    )
