"""Write the files of a segmented scan: mask, probabilities and picture."""

import contextlib

import numpy as np

from samed_peft.config import SamedConfig, first_window
from samed_peft.evaluation.pictures import case_picture, scan_window
from samed_peft.io import (
    DICOM_SEG_SUFFIX,
    Volume,
    first_channel,
    stored_mask,
    stored_names,
    write_bytes,
    write_dicom_seg,
    write_mask,
    writing_probabilities,
)
from samed_peft.prediction.scans import Scan


def write_overlay(scan: Scan, image: Volume, mask: np.ndarray, config: SamedConfig) -> None:
    """Write a picture of a mask over its scan."""
    shown = image if config.channels is None else first_channel(image)
    window = scan_window(shown, first_window(config.window))
    picture = case_picture(shown, None, mask, class_names=config.class_names, window=window)
    write_bytes(scan.overlay, picture)


def write_results(
    scan: Scan, image: Volume, mask: np.ndarray, probabilities: np.ndarray | None, *, config: SamedConfig
) -> None:
    """Write mask and probabilities so that no mask ever lies beside those of another one.

    Old probabilities go before the mask appears. What is killed in between leaves a mask without them, and that scan is
    segmented again.
    """
    with contextlib.ExitStack() as both:
        if probabilities is not None:
            both.enter_context(writing_probabilities(probabilities, image, scan.probabilities))
            scan.probabilities.unlink(missing_ok=True)
        if scan.mask.suffix.lower() == DICOM_SEG_SUFFIX:
            # Its segments are numbered from 1 on without gaps.
            names = stored_names(config.class_names, None)
            write_dicom_seg(mask, image, scan.mask, label_names=names, series=scan.series)
        else:
            names = stored_names(config.class_names, config.label_values)
            write_mask(stored_mask(mask, config.label_values), image, scan.mask, label_names=names)
