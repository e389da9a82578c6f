"""Load batches from rows of a dataset; order and augmentation depend on (seed, epoch, index) alone."""

import os
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, default_collate

from samed_peft.config import SamedConfig, TrainingConfig
from samed_peft.datasets.preprocessing import resize_label, slice_to_pixels
from samed_peft.errors import InputError
from samed_peft.io import IGNORED
from samed_peft.models.losses import IGNORED_LABEL
from samed_peft.models.resizing import pad_to, resize_aligned
from samed_peft.training.augmentation import augment
from samed_peft.training.sampling import ClassBalance, neighbour_rows
from samed_peft.training.strong_augmentation import augment_strongly

FILLER = -1
"""Index of a slice that no loss counts, for a process that has no slice left in a batch."""

Key = tuple[int, int]
"""(epoch, row index or `FILLER`)."""


@dataclass(frozen=True)
class SlicePreparation:
    """How a row becomes an example; the defaults are SAMed's.

    Attributes:
        image_size: S, pixels per side that the encoder sees.
        label_size: of the labels in SAMed's geometry, that of the logits.
        aligned: resize image and labels to S x S in one geometry, and keep the labels at that size.
        tile: with `aligned`, cut S x S pixels out at random in place of resizing.
        augmentation: None, "samed" or "strong".
        mirror: axes that the strong augmentation mirrors.
        seed: of the augmentation.
        ignored: label of pixels that the loss leaves out; None if that is a class.
    """

    image_size: int
    label_size: int
    aligned: bool = False
    tile: bool = False
    augmentation: str | None = None
    mirror: tuple[str, ...] = ()
    seed: int = 0
    ignored: int | None = IGNORED

    def example(self, image: np.ndarray, label: np.ndarray, *, draw: Key | None) -> tuple[Tensor, Tensor]:
        """Pixels (1, S, S) or (3, S, S) float32 and labels (S, S) or (h, h) uint8 of a slice (H, W) or (H, W, 3).

        Args:
            image: in [0, 1].
            label: (H, W) uint8.
            draw: epoch and row, on which the augmentation depends; None for none.
        """
        rng = np.random.default_rng((self.seed, *draw)) if draw and self.augmentation else None
        full, low = (self.image_size, self.image_size), (self.label_size, self.label_size)
        aspect = 1.0 if self.tile else image.shape[1] / image.shape[0]  # of the part that is made square
        if rng is not None and self.augmentation == "samed":
            image, label = augment(image, label, rng=rng)
        if self.tile:
            places = None if draw is None else np.random.default_rng((self.seed, *draw, 1))
            pixels, labels = cut_tile(image, label, self.image_size, rng=places)
        elif self.aligned:
            pixels, labels = aligned_slice(image, label, self.image_size)
        else:
            pixels = _channels_first(slice_to_pixels(image, image_size=self.image_size))
            labels = torch.from_numpy(np.ascontiguousarray(resize_label(label, full)))
        if rng is not None and self.augmentation == "strong":
            pixels, labels = augment_strongly(pixels, labels, rng=rng, mirror=self.mirror, aspect=aspect)
        if not self.aligned:  # through the full size, as SAMed does
            labels = torch.from_numpy(resize_label(labels.numpy(), low))
        return pixels, labels


def aligned_slice(image: np.ndarray, label: np.ndarray, size: int) -> tuple[Tensor, Tensor]:
    """Resize a slice (H, W) or (H, W, 3) and its labels (H, W) to squares, in one geometry: by areas of pixels."""
    pixels = resize_aligned(_channels_first(image)[None], size)[0]
    labels = torch.from_numpy(np.ascontiguousarray(label))[None, None]
    return pixels, F.interpolate(labels.float(), size=(size, size), mode="nearest-exact")[0, 0].to(labels.dtype)


def cut_tile(
    image: np.ndarray, label: np.ndarray, size: int, *, rng: np.random.Generator | None
) -> tuple[Tensor, Tensor]:
    """Cut a square out of a slice (H, W) or (H, W, 3) and its labels, padded with zeros if smaller.

    It lies anywhere within the slice, or without `rng` in the middle.
    """
    pixels = pad_to(_channels_first(image), size)
    labels = pad_to(torch.from_numpy(np.ascontiguousarray(label))[None], size)[0]
    rooms = [side - size for side in labels.shape]
    top, left = (room // 2 if rng is None else int(rng.integers(room + 1)) for room in rooms)
    window = slice(top, top + size), slice(left, left + size)
    return pixels[:, *window].contiguous(), labels[window].contiguous()


def _channels_first(array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.movedim(-1, 0) if tensor.ndim == 3 else tensor[None]


class TrainingSlices(Dataset):
    """Training examples by (epoch, index), so that any number of workers yields the same examples.

    Args:
        rows: with `image` (H, W) or, in colour, (H, W, 3) in [0, 1], and `label` (H, W).
        preparation: sizes and augmentation.
        neighbours: (N, 2) rows whose images become the first and third channel, from `neighbour_rows`; None for none.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        preparation: SlicePreparation,
        *,
        neighbours: np.ndarray | None = None,
    ) -> None:
        self.rows = rows
        self._preparation = preparation
        self._neighbours = neighbours

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Key) -> dict[str, Tensor]:
        """`pixel_values` (1, S, S), or (3, S, S) in colour or with neighbours, and `labels` (h, h) int64."""
        epoch, index = key
        row = self.rows[max(index, 0)]
        image = row["image"]
        if self._neighbours is not None:
            if image.ndim == 3:
                raise InputError(
                    f"{row['case']} is in colour, so its channels have no room for neighbours; leave neighbour_mm out"
                )
            before, after = (self.rows[int(place)]["image"] for place in self._neighbours[max(index, 0)])
            image = np.stack([before, image, after], axis=-1)
        pixels, labels = self._preparation.example(
            image, row["label"], draw=None if index == FILLER else (epoch, index)
        )
        labels = labels.long()
        if self._preparation.ignored is not None:
            labels[labels == self._preparation.ignored] = IGNORED_LABEL
        if index == FILLER:
            labels = torch.full_like(labels, IGNORED_LABEL)
        return {"pixel_values": pixels, "labels": labels}


def training_slices(rows: Any, config: SamedConfig, training: TrainingConfig, *, label_size: int) -> TrainingSlices:
    """Training examples as two configs say; `label_size` is that of the model's logits.

    Raises:
        InputError: neighbouring slices are wanted of scans without a spacing, or of colour pictures.
    """
    preparation = SlicePreparation(
        config.image_size,
        label_size,
        aligned=config.resampling == "aligned",
        tile=config.tile,
        augmentation=training.augmentation if training.augment else None,
        mirror=training.mirror,
        seed=training.seed,
        ignored=IGNORED if len(config.class_names) < IGNORED else None,
    )
    neighbours = None if config.neighbour_mm is None else neighbour_rows(rows, config.neighbour_mm)
    return TrainingSlices(rows, preparation, neighbours=neighbours)


def epoch_batches(
    num_rows: int,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    process: int = 0,
    num_processes: int = 1,
    balance: ClassBalance | None = None,
) -> list[list[Key]]:
    """The micro-batches of one process in one epoch.

    All processes share one order: a permutation, or with `balance` one that shows rare classes more often. Together
    their k-th batches are the k-th batch of a single process with `batch_size * num_processes`. The last batch may be
    smaller. A process without a slice of it gets one `FILLER`, which no loss counts, so that collective operations stay
    in step.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(num_rows) if balance is None else balance.order(num_rows, rng)
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
