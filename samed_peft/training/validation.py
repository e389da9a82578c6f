"""Validate a model during training."""

import math
import time
from collections.abc import Mapping

from accelerate import Accelerator

from samed_peft.io import Volume
from samed_peft.metrics import score_case, summarise
from samed_peft.models.modeling import config_of
from samed_peft.prediction.inference import Segmenter, predict_volume


def validation_dice(
    model: Segmenter,
    images: Mapping[str, Volume],
    references: Mapping[str, Volume],
    *,
    accelerator: Accelerator,
) -> tuple[float, dict[str, float]]:
    """Dice over cases, absent classes left out; the cases are divided among processes.

    Every process gets the same numbers.

    Returns:
        The mean over cases and then classes, and class -> its mean over cases; NaN if no reference and no prediction
        has the label, or any label.
    """
    class_names = config_of(model).class_names
    scores = {}
    for case in list(images)[accelerator.process_index :: accelerator.num_processes]:
        with accelerator.autocast():
            mask = predict_volume(model, images[case])
        reference = references[case]
        scores[case] = score_case(
            mask, reference.array, num_classes=len(class_names), ignored_label=reference.ignored_label
        )
    if accelerator.num_processes > 1:
        from samed_peft.metrics.gather import gather_scores  # `evaluate` takes seconds to import

        scores = gather_scores(scores, class_names, accelerator=accelerator)
    summary = summarise(list(scores.values()), class_names)["standard"]
    return summary["mean"]["dice"], {name: means["dice"] for name, means in summary["classes"].items()}


def dice_scalars(mean: float, classes: Mapping[str, float]) -> dict[str, float]:
    """Values of a validation for a log; classes without Dice are left out."""
    by_class = {f"validation/dice/{name}": dice for name, dice in classes.items() if not math.isnan(dice)}
    return {"validation/dice": mean, **by_class}


def seconds_to_validate(
    model: Segmenter, images: Mapping[str, Volume], references: Mapping[str, Volume], *, accelerator: Accelerator
) -> float:
    """Time that a validation takes, from that of its first case; all processes have to call."""
    first = next(iter(images))
    seconds = 0.0
    for _ in range(2):  # the first call imports and fills caches
        begun = time.perf_counter()
        validation_dice(model, {first: images[first]}, {first: references[first]}, accelerator=accelerator)
        seconds = time.perf_counter() - begun
    return seconds * math.ceil(len(images) / accelerator.num_processes)
