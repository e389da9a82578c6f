"""Segment many scans, in one process or several."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from samed_peft.errors import InputError, InterruptedBySignalError, StopSignal, reason_of
from samed_peft.io import (
    SharedFlag,
    Volume,
    read_channels,
    read_series,
    read_volume,
)
from samed_peft.models.modeling import config_of
from samed_peft.models.precision import DTYPES
from samed_peft.prediction.averaging import PROBABILITY_BITS, Segmenters, as_models
from samed_peft.prediction.compiled import CompiledSegmenter
from samed_peft.prediction.inference import predict_probabilities, predict_volume
from samed_peft.prediction.overwriting import forget_new_masks, note_old_masks, with_old_masks
from samed_peft.prediction.pipeline import process_in_order
from samed_peft.prediction.records import AdapterSource, record_adapters
from samed_peft.prediction.scans import Scan
from samed_peft.prediction.slices import Segmenter, unrefined
from samed_peft.prediction.writing import write_overlay, write_results


@dataclass(frozen=True)
class PredictionOptions:
    """Options of segmenting and writing.

    Attributes:
        batch_size: slices per forward pass.
        dtype: "float32", "bfloat16" or "float16" for autocast; None for Accelerate's precision.
        flips: average over flips of each slice (`predict_volume`).
        keep_largest: keep the largest connected part of each class (`predict_volume`).
        postprocess: average, smooth and clean up as the adapter records; False for none of it.
        save_probabilities: also write the probabilities of all classes (`io.write_probabilities`).
        probability_bits: 8 or 16 for each of them; None for 8.
        overlay: also write a picture of each mask over its scan.
        overwrite: segment finished scans again; earlier probabilities are replaced or removed with their mask.
        compile: compile the model first, which takes a minute or more.

    Raises:
        InputError: a value is out of range.
    """

    batch_size: int = 8
    dtype: str | None = None
    flips: bool = False
    keep_largest: bool = False
    postprocess: bool = True
    save_probabilities: bool = False
    probability_bits: int | None = None
    overlay: bool = False
    overwrite: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch_size must be at least 1; found {self.batch_size}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}; found {self.dtype!r}")
        if self.probability_bits is not None and self.probability_bits not in PROBABILITY_BITS:
            raise InputError(f"probability_bits must be 8 or 16; found {self.probability_bits}")
        if self.probability_bits is not None and not self.save_probabilities:
            raise InputError("probability_bits means nothing without save_probabilities; give both, or leave it out")

    def segment(self, model: Segmenters, image: Volume) -> tuple[np.ndarray, np.ndarray | None]:
        """The mask of a scan, and its probabilities if they are wanted."""
        if not self.postprocess:
            model = [unrefined(one) for one in as_models(model)]
        parts = True if self.keep_largest else None
        if not self.save_probabilities:
            mask = predict_volume(model, image, batch_size=self.batch_size, flips=self.flips, keep_largest=parts)
            return mask, None
        return predict_probabilities(
            model,
            image,
            bits=self.probability_bits or 8,
            batch_size=self.batch_size,
            flips=self.flips,
            keep_largest=parts,
        )


@dataclass(frozen=True)
class Outcome:
    """Result of each case.

    Attributes:
        written: cases whose masks were written.
        skipped: cases that were finished before.
        failed: case -> reason.
    """

    written: tuple[str, ...]
    skipped: tuple[str, ...]
    failed: dict[str, str]


def predict_files(
    model: Segmenters,
    scans: Sequence[Scan],
    *,
    options: PredictionOptions,
    accelerator: Accelerator,
    adapters: Sequence[AdapterSource] = (),
) -> Outcome:
    """Segment scans, divided among processes; every mask appears whole or not at all, after its probabilities.

    A scan that cannot be read or segmented fails alone. Finished scans are skipped, so that an interrupted run resumes
    at the scan where it stopped; old masks that `options.overwrite` had not replaced by then do not count as
    finished.

    Args:
        model: as for `predict_volume`; the same on every process.
        scans: from `plan_masks`.
        options: of segmenting and writing.
        accelerator: processes, and default of the precision.
        adapters: of the models, to be recorded beside the masks; none for no record.

    Returns:
        The same on every process, once all are done.

    Raises:
        InputError: `options.compile` is set, and nothing can be compiled on this machine; or a record beside the masks
            is damaged or cannot be written.
        InterruptedBySignalError: Ctrl-C or SIGTERM reached a process before its last scan was done; each
            has finished its current scan.
    """
    pending, flag = _pending(scans, adapters, options=options, accelerator=accelerator)
    mine = pending[accelerator.process_index :: accelerator.num_processes]
    models = as_models(model)
    if options.compile and mine:
        models = tuple(CompiledSegmenter(one, options.batch_size) for one in models)
    with StopSignal() as stop, contextlib.ExitStack() as cleanup:
        if flag is not None and accelerator.is_main_process:
            cleanup.callback(flag.remove)
        stopped = partial(_is_stopped, stop, flag)
        written, failed = _predict_all(models, mine, options=options, accelerator=accelerator, stopped=stopped)
        # Within the block: a signal must not end a process before the others' turn.
        written, failed, received = _gathered(written, failed, stop.received or 0, accelerator=accelerator)
    if accelerator.is_main_process:
        forget_new_masks(scans, written=set(written))
    pending_cases = [scan.case for scan in pending]
    if any(received) and (left := len(set(pending_cases).difference(written, failed))):
        raise InterruptedBySignalError(_what_is_left(written, failed, left, pending[0].mask.parent), max(received))
    return Outcome(
        written=tuple(case for case in pending_cases if case in set(written)),
        skipped=tuple(scan.case for scan in scans if scan.case not in set(pending_cases)),
        failed={case: failed[case] for case in pending_cases if case in failed},
    )


def _pending(
    scans: Sequence[Scan],
    adapters: Sequence[AdapterSource],
    *,
    options: PredictionOptions,
    accelerator: Accelerator,
) -> tuple[list[Scan], SharedFlag | None]:
    """The scans to segment, and the flag of a signal if several processes do.

    Decided by one process before any writes: others might see its first masks and divide another list.
    """
    agreed: list[Any] = [[], None, None]
    if accelerator.is_main_process:
        try:
            old = {scan.case for scan in with_old_masks(scans)}
            is_due = [options.overwrite or scan.case in old or not _is_finished(scan, options) for scan in scans]
            pending = list(itertools.compress(scans, is_due))
            # In this order: a kill in between must leave no old masks under a new record.
            if options.overwrite:
                note_old_masks(pending)
            if adapters:
                record_adapters(scans[0].mask.parent, adapters)
            several = pending and accelerator.num_processes > 1
            agreed = [pending, SharedFlag.new_in(pending[0].mask.parent) if several else None, None]
        except InputError as error:
            agreed[2] = str(error)
    pending, flag, refusal = broadcast_object_list(agreed)
    if refusal is not None:
        raise InputError(refusal)
    return pending, flag


def _gathered(
    written: list[str], failed: dict[str, str], received: int, *, accelerator: Accelerator
) -> tuple[list[str], dict[str, str], list[int]]:
    """The results of all processes, and the signal that each got, 0 for none."""
    if accelerator.num_processes == 1:
        return written, failed, [received]
    return gather_object(written), dict(gather_object(list(failed.items()))), gather_object([received])


def _is_stopped(stop: StopSignal, flag: SharedFlag | None) -> bool:
    """Whether this process got a signal, which it then tells the others, or one of them did."""
    if flag is None:
        return stop.received is not None
    if stop.received is not None:
        flag.raise_()
    return stop.received is not None or flag.is_raised()


def _what_is_left(written: Sequence[str], failed: dict[str, str], left: int, folder: Path) -> str:
    bad = "".join(f"; {case} failed: {reason}" for case, reason in failed.items())
    masks, scans = ("mask" + "s" * (len(written) != 1), "scans are" if left > 1 else "scan is")
    return (
        f"stopped by a signal: {len(written)} {masks} written to {folder}{bad}; {left} {scans} left, the same command "
        "without --overwrite goes on with them"
    )


def _is_finished(scan: Scan, options: PredictionOptions) -> bool:
    wanted = [(options.overlay, scan.overlay), (options.save_probabilities, scan.probabilities)]
    return scan.mask.is_file() and all(file.is_file() for is_wanted, file in wanted if is_wanted)


def _predict_all(
    models: Sequence[Segmenter],
    scans: Sequence[Scan],
    *,
    options: PredictionOptions,
    accelerator: Accelerator,
    stopped: Callable[[], bool],
) -> tuple[list[str], dict[str, str]]:
    """Segment scan after scan while others are read and written; returns the cases written, and case -> failure."""
    written: list[str] = []
    failed: dict[str, str] = {}

    def read(scan: Scan) -> Volume:
        if scan.series is not None:
            return read_series(scan.source, scan.series)
        if scan.further:
            return read_channels([scan.source, *scan.further])
        return read_volume(scan.source, channel=scan.channel)

    def compute(scan: Scan, reading: Callable[[], Volume]) -> Callable[[], None] | None:
        with _failures_noted(failed, scan, options):
            image = reading()
            with _precision(models[0], options.dtype, accelerator):
                mask, probabilities = options.segment(models, image)
            return partial(write, scan, image, mask, probabilities)
        return None

    def write(scan: Scan, image: Volume, mask: np.ndarray, probabilities: np.ndarray | None) -> None:
        with _failures_noted(failed, scan, options):
            if options.overlay:
                write_overlay(scan, image, mask, config_of(models[0]))
            if probabilities is None:
                scan.probabilities.unlink(missing_ok=True)  # of the mask that is replaced now
            write_results(scan, image, mask, probabilities, config=config_of(models[0]))
            written.append(scan.case)

    hidden = None if accelerator.is_main_process else True  # None: shown in terminals only
    progress = tqdm(total=len(scans), desc="segmenting", unit="scan", disable=hidden)
    process_in_order(scans, read, compute, progress=progress, stopped=stopped)
    stopped()  # tells the other processes of a signal during the last scan
    return written, failed


@contextlib.contextmanager
def _failures_noted(failed: dict[str, str], scan: Scan, options: PredictionOptions) -> Iterator[None]:
    """Note any error as the failure of one scan: libraries raise errors of many kinds for bad files."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        failed[scan.case] = (
            f"{scan.source} does not fit into memory; choose a smaller batch_size than {options.batch_size}"
            + (", 8 probability_bits, or no save_probabilities" if options.save_probabilities else "")
        )
    except Exception as error:
        failed[scan.case] = _one_line(scan, error)


def _one_line(scan: Scan, error: Exception) -> str:
    """The reason, with the file where a library's error does not name it."""
    return reason_of(error) if isinstance(error, (InputError, OSError)) else f"{scan.source}: {reason_of(error)}"


def _precision(
    model: Segmenter, dtype: str | None, accelerator: Accelerator
) -> contextlib.AbstractContextManager[object]:
    if dtype is None:
        return accelerator.autocast()
    device = next(model.parameters()).device.type
    return torch.autocast(device, dtype=None if dtype == "float32" else DTYPES[dtype], enabled=dtype != "float32")
