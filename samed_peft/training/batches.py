"""Load batches from rows of a dataset; order and augmentation depend on (seed, epoch, index) alone."""

import os
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from samed_peft.datasets.preprocessing import resize_label, slice_to_pixels
from samed_peft.models.losses import IGNORED_LABEL
from samed_peft.training.augmentation import augment

FILLER = -1
"""Index of a slice that no loss counts, for a process that has no slice left in a batch."""

Key = tuple[int, int]
"""(epoch, row index or `FILLER`)."""


class TrainingSlices(Dataset):
    """Training examples by (epoch, index), so that any number of workers yields the same examples.

    Rows have `image` (H, W) or, in colour, (H, W, 3) in [0, 1], and `label` (H, W). Without a seed, none is augmented.
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
        """`pixel_values` (1, S, S) or, in colour, (3, S, S) float32 and `labels` (h, h) int64."""
        epoch, index = key
        row = self.rows[max(index, 0)]
        image, label = row["image"], row["label"]
        if self.seed is not None and index != FILLER:
            image, label = augment(image, label, rng=np.random.default_rng((self.seed, epoch, index)))
        pixels = slice_to_pixels(image, image_size=self.image_size)
        full, low = (self.image_size, self.image_size), (self.label_size, self.label_size)
        label = resize_label(label, low, via=full).astype(np.int64)  # through the full size, as SAMed does
        if index == FILLER:
            label = np.full_like(label, IGNORED_LABEL)
        tensor = torch.from_numpy(np.ascontiguousarray(pixels))
        return {
            "pixel_values": tensor.movedim(-1, 0) if tensor.ndim == 3 else tensor[None],
            "labels": torch.from_numpy(label),
        }


def epoch_batches(
    num_rows: int, *, batch_size: int, seed: int, epoch: int, process: int = 0, num_processes: int = 1
) -> list[list[Key]]:
    """The micro-batches of one process in one epoch.

    All processes share one permutation; together their k-th batches are the k-th batch of a single process with
    `batch_size * num_processes`. The last batch may be smaller. A process without a slice of it gets one `FILLER`,
    which no loss counts, so that collective operations stay in step.
    """
    order = np.random.default_rng((seed, epoch)).permutation(num_rows)
    whole = batch_size * num_processes
    batches = []
    for start in range(0, num_rows, whole):
        mine = order[start : start + whole][process::num_processes]
        batches.append([(epoch, int(index)) for index in mine] or [(epoch, FILLER)])
    return batches


def batch_loader(
    slices: TrainingSlices,
    batches: Iterable[list[Key]],
    *,
    num_workers: int,
    device: torch.device | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """Load `batches` in order and prefetch them.

    The only place that moves batches to the device and expands grey slices to three channels: they are loaded, copied
    and moved as one channel, and expanded on the device, which copies nothing. Without workers, of which there is at
    most one a core, this process loads them.

    Yields:
        `pixel_values` (B, 3, S, S), read-only because channels share memory, and `labels` (B, h, h).
    """
    loader = DataLoader(
        slices,
        batch_sampler=batches,
        num_workers=min(num_workers, available_cores()),
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        # Its own generator: without one, the loader would draw from the global random state.
        generator=torch.Generator(),
        worker_init_fn=_ignore_signals,
    )
    for batch in loader:
        moved = {name: tensor.to(device or tensor.device, non_blocking=True) for name, tensor in batch.items()}
        yield {**moved, "pixel_values": moved["pixel_values"].expand(-1, 3, -1, -1)}


def _ignore_signals(_: int) -> None:
    """Leave Ctrl-C and SIGTERM to the main process, which needs its workers for the step that it ends with.

    Workers leave their loop when it tells them to, and end with it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack examples; grey ones get three channels only in a batch with coloured ones."""
    pixels = torch.broadcast_tensors(*(example["pixel_values"] for example in examples))
    batch: dict[str, torch.Tensor] = default_collate(
        [{**example, "pixel_values": one} for example, one in zip(examples, pixels, strict=True)]
    )
    return batch


def available_cores() -> int:
    """Cores that this process may use; PyTorch warns if there are more workers."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
