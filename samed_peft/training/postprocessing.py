"""Decide on the validation cases how masks of an adapter are cleaned up, and record it in the adapter."""

import dataclasses
from pathlib import Path

from accelerate import Accelerator

from samed_peft.adapters.folder import read_config, write_config
from samed_peft.datasets import CaseVolumes
from samed_peft.errors import printable
from samed_peft.prediction.inference import load_segmenter, segment_cases
from samed_peft.prediction.postprocessing import choose_postprocessing
from samed_peft.training.runs import Run


def record_postprocessing(run: Run, adapter: Path, *, accelerator: Accelerator) -> None:
    """Segment the validation cases, and record the classes of which the largest part alone is kept.

    Args:
        run: its folder gets the masks, in `validation`; without validation cases nothing is done.
        adapter: folder of the adapter that is used.
        accelerator: divides the cases among its processes.
    """
    if run.validation is None:
        return
    images, references = run.validation
    model = load_segmenter(adapter, accelerator=accelerator)
    # As if none was recorded yet, which may be so after an interruption.
    model.samed_config = config = dataclasses.replace(read_config(adapter), keep_largest=())
    files = segment_cases(model, images, run.output_dir / "validation", accelerator=accelerator)
    if accelerator.is_main_process:
        masks = CaseVolumes.of_masks(files, label_values=config.label_values)
        chosen = choose_postprocessing(masks, references, config.class_names)
        write_config(dataclasses.replace(config, keep_largest=chosen), adapter)
        if chosen:
            print(printable(f"the largest part alone is kept of {', '.join(chosen)}: better on validation"))
    accelerator.wait_for_everyone()
