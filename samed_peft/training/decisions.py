"""The rules of a plan: one function for each decision, from the situation to a value and its reason.

Rules are asked in the order of `RULES`, each with what was decided before it. What users give replaces the rule's value
alone, and later rules go by it.
"""

import math
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

from samed_peft.training import input_decisions as see
from samed_peft.training.input_decisions import Decided
from samed_peft.training.situation import CONSTANTS, Situation

_SIDE = re.compile(r"(?<![a-z])(left|right|lt|rt|l|r)(?![a-z])")


def _fold(s: Situation) -> Decided | None:
    if s.data.patients > 1:
        return None
    return "all", "all cases are trained on and none is scored: there is 1 patient, none to hold out"


def _folds(s: Situation) -> Decided | None:
    if s.chosen.get("fold") == "all" or s.given.get("test_cases") or s.given.get("split_file"):
        return None
    patients = s.data.patients
    folds = min(CONSTANTS.folds, patients)
    return folds, f"one of {folds} is held out and scored, {math.ceil(patients / folds)} of {patients} patients"


def _validation_share(s: Situation) -> Decided | None:
    if s.given.get("validation_cases"):
        return None
    if s.given.get("validate_epochs") == 0:
        return 0.0, "no validation, as validate_epochs 0 says"
    s.chosen["validation_share"] = CONSTANTS.validation_share
    test, validation = s.held_out_patients
    left = s.data.patients - test
    if not validation:
        least = CONSTANTS.least_patients_to_validate
        return 0.0, f"no validation, the last adapter counts: {left} to train on, fewer than {least} patients"
    return CONSTANTS.validation_share, f"{validation} of {left} patients to train on choose the best adapter"


def _batch_size(s: Situation) -> Decided:
    processes = s.machine.processes
    wanted = max(1, CONSTANTS.slices_per_step // processes)
    of_data = max(1, int(CONSTANTS.most_of_data * s.least_training_slices) // processes)
    each = s.slice_gb(s.chosen["image_size"], checkpointed=s.chosen["gradient_checkpointing"])
    fits = max(1, int(s.free_gb / each))
    size = min(wanted, of_data, fits)
    if size == wanted:
        of_each = f" in each of {processes} processes" if processes > 1 else ""
        return size, f"{size} slices{of_each} need about {size * each:.2g} GB of {s.machine.memory_gb:g}"
    if of_data <= fits:
        return size, f"at most a quarter of the {s.least_training_slices} training slices, so that batches differ"
    return size, f"what {s.machine.memory_gb:g} GB hold at about {each:.2g} GB a slice"


def _accumulation_steps(s: Situation) -> Decided:
    wanted = min(CONSTANTS.slices_per_step, max(1, int(CONSTANTS.most_of_data * s.least_training_slices)))
    batch = s.chosen["batch_size"] * s.machine.processes
    steps = max(1, wanted // batch)
    return steps, f"an optimizer step every {steps * batch} slices"


def _tta(s: Situation) -> Decided | None:
    del s
    return None  # unless it is given, validation cases decide after the training


def _smoothing_mm(s: Situation) -> Decided | None:
    del s
    return None  # as `_tta`


def _num_workers(s: Situation) -> Decided:
    if s.machine.device == "cpu":
        return 0, "all cores compute, and take turns with loading: processes for it would compete with them"
    return CONSTANTS.num_workers, "processes that load slices while the device computes"


def _epochs(s: Situation) -> Decided | None:
    del s
    return None  # unless they are given, steps or minutes decide


def _stop_epoch(s: Situation) -> Decided | None:
    if "epochs" not in s.given:
        return None
    return s.given["epochs"], f"all epochs that are given, {s.given['epochs'] * s.steps_per_epoch} steps"


def _max_steps(s: Situation) -> Decided | None:
    if s.max_minutes is not None or {"epochs", "stop_epoch"} & s.given.keys():
        return None
    steps, passes = s.steps, s.steps / s.steps_per_epoch
    seconds = s.step_seconds
    time = "" if seconds is None else f"; about {_duration(steps * seconds)}, {_source(s)}"
    return steps, f"{passes:.3g} passes over about {s.training_slices} training slices{time}"


def _max_minutes(s: Situation) -> Decided | None:
    if s.max_minutes is None or "max_steps" in s.given:
        return None
    s.require_time()
    if s.step_seconds is None:
        return s.max_minutes, "as given; how many steps that is shows when the first ones are timed"
    return s.max_minutes, f"as given: about {s.steps} steps of {s.step_seconds:.2g} seconds, {_source(s)}"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.2g} minutes" if minutes < 99 else f"{minutes / 60:.3g} hours"


def _source(s: Situation) -> str:
    return "as measured" if s.seconds_per_step is not None else "by estimate"


def _warmup_steps(s: Situation) -> Decided:
    steps = min(CONSTANTS.most_warmup_steps, int(CONSTANTS.warmup_share * s.steps))
    return steps, f"a twentieth of about {s.steps} steps, at most SAMed's {CONSTANTS.most_warmup_steps}"


def _learning_rate(s: Situation) -> Decided:
    share = min(1.0, s.slices_per_step / CONSTANTS.batch_of_rate)
    rate = float(f"{CONSTANTS.learning_rate * math.sqrt(share):.2g}")
    full, batch = CONSTANTS.learning_rate, CONSTANTS.batch_of_rate
    return rate, f"{full:g} at {batch} slices a step, falling with the square root of the batch"


def _max_grad_norm(s: Situation) -> Decided:
    del s
    return CONSTANTS.max_grad_norm, "clips the gradients of rare batches, which can undo a training at these rates"


def _weight_decay(s: Situation) -> Decided:
    del s
    return CONSTANTS.weight_decay, "a tenth of SAMed's, whose trainings take ten times as many steps"


def _schedule(s: Situation) -> Decided:
    if "decay_power" in s.given:
        return "polynomial", "the decay whose exponent, decay_power, is given"
    return "cosine", "reaches zero at the last step, so that the last adapter is a settled one"


def _lora_plus_ratio(s: Situation) -> Decided | None:
    if not s.is_used("lora_plus_ratio"):
        return None
    ratio = CONSTANTS.lora_plus_ratio
    return ratio, f"LoRA's B, which starts at zero, learns {ratio:g} times as fast as the rest"


def _rank(s: Situation) -> Decided | None:
    return (CONSTANTS.rank, "twice SAMed's 4: a little better at next to no cost") if s.is_used("rank") else None


def _targets(s: Situation) -> Decided | None:
    return (CONSTANTS.targets, "attention and MLPs of the encoder") if s.is_used("targets") else None


def _augmentation(s: Situation) -> Decided:
    return "strong", f"turned, scaled, shifted, other intensities and resolutions: {s.training_slices} slices are few"


def _mirror(s: Situation) -> Decided:
    sided = [name for name in s.data.class_voxels if _SIDE.search(name.lower())]
    if sided:
        return (), f"{sided[0]} is told from its counterpart by its side"
    if s.data.modality == "picture":
        return ("rows", "columns"), "pictures have no up or side that must be kept"
    return (), "bodies are not symmetric: a mirrored scan shows anatomy that does not exist"


def _foreground_share(s: Situation) -> Decided:
    by_share = {name: count / s.data.slices for name, count in s.data.class_slices.items() if count}
    rarest = min(by_share, key=by_share.__getitem__)
    shown = f"{rarest} is in {s.data.class_slices[rarest]} of {s.data.slices} slices"
    if by_share[rarest] < CONSTANTS.rare:
        return CONSTANTS.foreground_share, f"this share is drawn by class, since {shown}"
    return 0.0, f"slices as they come: even the rarest class, {shown}"


def _weight_average(s: Situation) -> Decided:
    if s.given.get("method") == "adalora":
        return 0.0, "adalora prunes ranks, which an average would bring back"
    back = int(CONSTANTS.averaged_share * s.steps)
    if back < CONSTANTS.least_averaged_steps:
        return 0.0, f"{s.steps} steps are too few to average"
    decay = min(CONSTANTS.most_average, round(1 - 1 / back, 4))
    return decay, f"an average over about {round(1 / (1 - decay))} steps, less noisy than the last one"


def _validate_epochs(s: Situation) -> Decided:
    if not s.held_out_patients[1]:
        return 0, "no case is left to validate on"
    epochs = math.ceil(s.steps / s.steps_per_epoch)
    every = math.ceil(epochs / CONSTANTS.validations)
    return every, f"about {math.ceil(epochs / every)} validations in {epochs} epochs"


def _patience(s: Situation) -> Decided:
    every = s.chosen["validate_epochs"]
    if every and s.max_minutes is not None and s.step_seconds is None:
        return 0, "how many validations fit into the minutes is not known before the first steps"
    validations = math.ceil(math.ceil(s.steps / s.steps_per_epoch) / every) if every else 0
    if validations < CONSTANTS.least_validations_for_patience:
        return 0, f"{validations} validations are too few to stop early" if every else "nothing is validated"
    return validations // 2, f"stops after {validations // 2} validations without a better Dice, half of all"


RULES: Mapping[str, Callable[[Situation], Decided | None]] = MappingProxyType(
    {rule.__name__.removeprefix("_"): rule for rule in (
        see.plane, see.channels, see.window, see.neighbour_mm, see.resampling, see.image_size,
        see.gradient_checkpointing, see.mixed_precision, _fold, _folds, _validation_share, _batch_size,
        _accumulation_steps, _num_workers, _epochs, _stop_epoch, _max_steps, _max_minutes, _warmup_steps,
        _learning_rate, _max_grad_norm, _weight_decay, _schedule, _lora_plus_ratio, _rank, _targets, _augmentation,
        _mirror, _foreground_share, _weight_average, _validate_epochs, _patience,
        _tta, _smoothing_mm,
    )}
)  # fmt: skip
"""Name of a field or option -> its rule, which gives None where nothing has to be decided."""
