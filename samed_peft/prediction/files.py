"""Many scans segmented, by one process or several."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from samed_peft.errors import InputError
from samed_peft.evaluation.pictures import case_picture
from samed_peft.io import DICOM_SEG_SUFFIX, Volume, read_volume, write_bytes, write_dicom_seg, write_mask
from samed_peft.models.precision import DTYPES
from samed_peft.prediction.compiled import CompiledSegmenter
from samed_peft.prediction.inference import Segmenter, predict_volume, settings_of
from samed_peft.prediction.pipeline import overlap
from samed_peft.prediction.scans import Scan


@dataclass(frozen=True)
class PredictionOptions:
    """How scans are segmented and what is written.

    Attributes:
        batch_size: slices per forward pass.
        dtype: "float32", "bfloat16" or "float16" for autocast; None for Accelerate's setting.
        flips: average over flips of each slice (`predict_volume`).
        keep_largest: keep the largest connected part of each class (`predict_volume`).
        overlay: write a picture of each mask over its scan too.
        overwrite: segment scans again whose files are there.
        compile: compile the model first, which takes a minute or more.

    Raises:
        InputError: a value is out of range.
    """

    batch_size: int = 8
    dtype: str | None = None
    flips: bool = False
    keep_largest: bool = False
    overlay: bool = False
    overwrite: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch_size must be at least 1; found {self.batch_size}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}; found {self.dtype!r}")


@dataclass(frozen=True)
class Outcome:
    """What became of each case.

    Attributes:
        written: cases whose masks were written.
        skipped: cases that were finished before.
        failed: case -> reason.
    """

    written: tuple[str, ...]
    skipped: tuple[str, ...]
    failed: dict[str, str]


def predict_files(
    model: Segmenter, scans: Sequence[Scan], *, options: PredictionOptions, accelerator: Accelerator
) -> Outcome:
    """Segment scans, shared out among processes; every mask appears whole or not at all.

    A scan that cannot be read or segmented fails alone. One whose files are there is skipped, so that an
    interrupted run goes on where it stopped.

    Args:
        model: as for `predict_volume`; the same on every process.
        scans: from `plan_masks`.
        options: how to segment and what to write.
        accelerator: processes, and precision where `options` names none.

    Returns:
        The same on every process, once all are done.

    Raises:
        InputError: the model shall be compiled, and nothing can be compiled here.
    """
    # One process looks, before any writes: others might see the first masks already, and share out another list.
    pending = [scan for scan in scans if options.overwrite or not _is_finished(scan, options)]
    (pending,) = broadcast_object_list([pending])
    mine = pending[accelerator.process_index :: accelerator.num_processes]
    if options.compile and mine:
        model = CompiledSegmenter(model, options.batch_size)
    failed = _predict_all(model, mine, options=options, accelerator=accelerator)
    if accelerator.num_processes > 1:
        failed = dict(gather_object(list(failed.items())))
    pending_cases = [scan.case for scan in pending]
    return Outcome(
        written=tuple(case for case in pending_cases if case not in failed),
        skipped=tuple(scan.case for scan in scans if scan.case not in set(pending_cases)),
        failed={case: failed[case] for case in pending_cases if case in failed},
    )


def _is_finished(scan: Scan, options: PredictionOptions) -> bool:
    return scan.mask.is_file() and (not options.overlay or scan.overlay.is_file())


def _predict_all(
    model: Segmenter, scans: Sequence[Scan], *, options: PredictionOptions, accelerator: Accelerator
) -> dict[str, str]:
    """Segment scan after scan while others are read and written; returns case -> why it failed."""
    failed: dict[str, str] = {}

    def read(scan: Scan) -> Volume:
        return read_volume(scan.source, channel=scan.channel)

    def compute(scan: Scan, image: Callable[[], Volume]) -> Callable[[], None] | None:
        with _failures_noted(failed, scan, options):
            finish = _segment_file(model, image(), scan, options=options, accelerator=accelerator)
            return partial(_write_files, finish, failed, scan, options)
        return None

    hidden = None if accelerator.is_main_process else True  # None: shown in terminals only
    overlap(scans, read, compute, progress=tqdm(total=len(scans), desc="segmenting", unit="scan", disable=hidden))
    return failed


@contextlib.contextmanager
def _failures_noted(failed: dict[str, str], scan: Scan, options: PredictionOptions) -> Iterator[None]:
    """Let a scan fail alone."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        failed[scan.case] = (
            f"{scan.source} does not fit into memory; choose a smaller batch_size than {options.batch_size}"
        )
    except (InputError, OSError) as error:
        failed[scan.case] = str(error)


def _segment_file(
    model: Segmenter, image: Volume, scan: Scan, *, options: PredictionOptions, accelerator: Accelerator
) -> Callable[[], None]:
    """Segment a scan; returns what is left to do, which another thread may do."""
    with _precision(model, options.dtype, accelerator):
        mask = predict_volume(
            model, image, batch_size=options.batch_size, flips=options.flips, keep_largest=options.keep_largest
        )

    def finish() -> None:
        if options.overlay:
            write_bytes(scan.overlay, _overlay(model, image, mask))
        names = dict(enumerate(settings_of(model).class_names, start=1))
        write = write_dicom_seg if scan.mask.suffix.lower() == DICOM_SEG_SUFFIX else write_mask
        write(mask, image, scan.mask, label_names=names)

    return finish


def _write_files(finish: Callable[[], None], failed: dict[str, str], scan: Scan, options: PredictionOptions) -> None:
    with _failures_noted(failed, scan, options):
        finish()


def _precision(
    model: Segmenter, dtype: str | None, accelerator: Accelerator
) -> contextlib.AbstractContextManager[object]:
    if dtype is None:
        return accelerator.autocast()
    device = next(model.parameters()).device.type
    return torch.autocast(device, dtype=None if dtype == "float32" else DTYPES[dtype], enabled=dtype != "float32")


def _overlay(model: Segmenter, image: Volume, mask: np.ndarray) -> bytes:
    config = settings_of(model)
    window = None if image.normalized or image.array.ndim == 4 else config.window
    return case_picture(image, None, mask, class_names=config.class_names, window=window)
