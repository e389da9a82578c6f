"""Validate a model during training."""

from collections.abc import Mapping

from accelerate import Accelerator

from samed_peft.io import Volume
from samed_peft.metrics import score_case, summarise
from samed_peft.models.modeling import config_of
from samed_peft.prediction.inference import Segmenter, predict_volume


def mean_dice(
    model: Segmenter,
    images: Mapping[str, Volume],
    references: Mapping[str, Volume],
    *,
    accelerator: Accelerator,
) -> float:
    """Mean Dice over cases and then classes, absent ones left out; the cases are divided among processes.

    Every process gets the same number; NaN if no reference and no prediction has any label.
    """
    from samed_peft.metrics.gather import gather_scores  # `evaluate` takes seconds to import

    class_names = config_of(model).class_names
    scores = {}
    for case in list(images)[accelerator.process_index :: accelerator.num_processes]:
        with accelerator.autocast():
            mask = predict_volume(model, images[case])
        reference = references[case]
        scores[case] = score_case(
            mask, reference.array, num_classes=len(class_names), ignored_label=reference.ignored_label
        )
    gathered = gather_scores(scores, class_names, accelerator=accelerator)
    return summarise(list(gathered.values()), class_names)["standard"]["mean"]["dice"]
