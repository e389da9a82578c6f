"""Decide on the validation cases how an adapter's masks are refined, and record it in the adapter."""

import dataclasses
from pathlib import Path

from accelerate import Accelerator

from samed_peft.adapters.folder import read_config, write_config
from samed_peft.config import SamedConfig
from samed_peft.datasets import CaseVolumes
from samed_peft.errors import printable
from samed_peft.prediction.inference import load_segmenter, segment_cases
from samed_peft.prediction.postprocessing import choose_postprocessing
from samed_peft.prediction.refinement import choose_refinement
from samed_peft.prediction.slices import Segmenter
from samed_peft.training.runs import Run


def record_postprocessing(run: Run, adapter: Path, *, accelerator: Accelerator, refine: bool = True) -> None:
    """Decide on the validation cases how prediction refines masks, and record it in the adapter.

    First test-time augmentation and smoothing across slices are chosen (`choose_refinement`), unless the run's
    plan has one of them as given; then the classes of which the largest part alone is kept (`choose_postprocessing`).

    Args:
        run: its folder gets the masks, in `validation`; without validation cases nothing is done.
        adapter: folder of the adapter that is used.
        accelerator: divides the cases among its processes.
        refine: False to decide nothing, and to record what was given alone.
    """
    if run.validation is None:
        return
    images, references = run.validation
    # As if none was recorded yet, which may be so after an interruption.
    given = {name: vars(run.config)[name] for name in ("tta", "smoothing_mm")}
    config = dataclasses.replace(read_config(adapter), keep_largest=(), **given)
    if not refine:
        accelerator.wait_for_everyone()  # all have read it
        if accelerator.is_main_process:
            write_config(config, adapter)
        accelerator.wait_for_everyone()
        return
    model = load_segmenter(adapter, accelerator=accelerator)
    model.samed_config = config
    if run.plan is None or not given.keys() & run.plan.values.keys():
        model.samed_config = config = _refined(config, model, run, accelerator)
    files = segment_cases(model, images, run.output_dir / "validation", accelerator=accelerator)
    if accelerator.is_main_process:
        masks = CaseVolumes.of_masks(files, label_values=config.label_values)
        chosen = choose_postprocessing(masks, references, config.class_names)
        write_config(dataclasses.replace(config, keep_largest=chosen), adapter)
        if chosen:
            print(printable(f"the largest part alone is kept of {', '.join(chosen)}: better on validation"))
    accelerator.wait_for_everyone()


def _refined(config: SamedConfig, model: Segmenter, run: Run, accelerator: Accelerator) -> SamedConfig:
    """The config with what is best on validation."""
    assert run.validation is not None, "asked for with validation cases alone"
    tried = ["shifts"]
    if run.training.augmentation == "samed" or set(run.training.mirror) == {"rows", "columns"}:
        tried.append("flips")  # the model has seen flipped slices
    with accelerator.autocast():
        best = choose_refinement(model, *run.validation, tried=tried, accelerator=accelerator)
    accelerator.print(
        f"prediction: test-time augmentation {best.tta}, smoothing across slices {best.smoothing_mm:.2g} mm: Dice "
        f"{best.dice_before:.4f} -> {best.dice:.4f} on validation"
    )
    return dataclasses.replace(config, tta=best.tta, smoothing_mm=best.smoothing_mm)
