"""The rules of a plan: one function for each decision, from the situation to a value and its reason.

Rules are asked in the order of `RULES`, each with what was decided before it. What users give replaces the rule's value
alone, and later rules go by it.
"""

import math
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from samed_peft.config import CT_WINDOW_HU, windows_of
from samed_peft.errors import InputError
from samed_peft.training.machine import Machine
from samed_peft.training.situation import CONSTANTS, Situation

Decided = tuple[Any, str]
"""A value and its reason, one line."""

_SIDE = re.compile(r"(?<![a-z])(left|right|lt|rt|l|r)(?![a-z])")

_EACH_SLICE = "the slice itself in all three channels"


def _plane(s: Situation) -> Decided:
    if s.data.plane is None or s.data.spacing_mm is None:
        return None, "slices as they are stored: the files do not record an orientation"
    through, row, column = s.data.spacing_mm
    if through > 1.1 * sorted(s.data.spacing_mm)[1]:
        return s.data.plane, f"across the coarsest axis: slices {through:g} mm apart, pixels of {row:g} x {column:g} mm"
    if s.data.plane == "axial":
        return s.data.plane, "no axis is the coarsest, and labels fill about as many slices in other planes"
    return s.data.plane, "no axis is the coarsest, and labels fill the fewest slices in this plane, each with more"


def _channels(s: Situation) -> Decided | None:
    if not s.data.channels:
        return None
    names = [name or f"channel {number}" for number, name in zip(s.data.channels, s.data.channel_names, strict=True)]
    last = f", {names[1]} in the third too" if len(names) == 2 else ""
    return s.data.channels, f"{', '.join(names[:-1])} and {names[-1]} in the encoder's three channels{last}"


def _window(s: Situation) -> Decided:
    data, (low, high) = s.data, s.data.intensity_range
    if data.modality == "picture":
        if 1 < high <= 255:
            return (0.0, 255.0), f"8-bit pictures, intensities {low:g} to {high:g}"
        return None, f"percentiles of each picture: intensities {low:g} to {high:g} are not those of 8 bits"
    if data.modality != "CT":
        kind = "MR has no fixed scale" if data.modality == "MR" else "nothing says what the intensities mean"
        return None, f"0.5 and 99.5 percentiles of each {'channel of each ' * bool(data.channels)}scan: {kind}"
    if data.normalized or data.foreground is None:
        return CT_WINDOW_HU, "SAMed's, for scans in Hounsfield units; these are scaled to [0, 1] already"
    first, lower, _, upper, last = data.foreground
    inside = min(upper, CT_WINDOW_HU[1]) - max(lower, CT_WINDOW_HU[0])
    if inside >= CONSTANTS.inside_window * (upper - lower):
        return CT_WINDOW_HU, f"SAMed's, for soft tissue: most labelled voxels are {lower:g} to {upper:g} HU"
    margin = max(CONSTANTS.window_margin * (last - first), (CONSTANTS.least_window_hu - (last - first)) / 2)
    wide = (5.0 * math.floor((first - margin) / 5), 5.0 * math.ceil((last + margin) / 5))
    return wide, f"labelled voxels are {first:g} to {last:g} HU, beyond SAMed's window; with a margin"


def _neighbour_mm(s: Situation) -> Decided:
    if s.data.colour:
        return None, "the three channels hold the colours"
    if s.data.channels or len(windows_of(s.chosen["window"])) > 1:
        return None, f"the three channels hold {'those of the scans' if s.data.channels else 'the windows'}"
    if s.data.modality == "picture" or s.data.patient_slices[2] < 3:
        return None, f"{_EACH_SLICE}: pictures have no neighbours"
    if s.data.spacing_mm is None:
        return None, f"{_EACH_SLICE}: the distance of slices is unknown"
    through = s.data.spacing_mm[0]
    if through > CONSTANTS.most_slice_distance_mm:
        return None, f"{_EACH_SLICE}: others are {through:g} mm away, more than {CONSTANTS.most_slice_distance_mm:g}"
    return max(through, CONSTANTS.neighbour_mm), f"slices before and after in the outer channels: {through:g} mm apart"


def _resampling(s: Situation) -> Decided:
    if s.given.get("input_size") is not None:
        return "samed", f"input_size {s.given['input_size']} belongs to SAMed's resampling"
    return "aligned", "one geometry for images, logits and masks; labels are chosen on the scan's own grid"


def _image_size(s: Situation) -> Decided:
    trained, side = s.base.image_size, max(s.data.slice_hw)
    low, high = min(trained, CONSTANTS.least_pixels), min(2 * trained, CONSTANTS.most_pixels)
    step = CONSTANTS.step_in_patches * s.base.patch_size
    sizes = [size for size in range(step, high + 1, step) if size >= low] or [s.base.patch_size]
    wanted = min(sizes, key=lambda size: abs(size - CONSTANTS.enlargement * side))
    fitting = [size for size in sizes if size <= wanted and s.slice_gb(size, checkpointed=True) <= s.free_gb]
    if not fitting:
        raise _no_memory(s, sizes[0])
    if fitting[-1] < wanted:
        return fitting[-1], f"the largest that {s.machine.memory_gb:g} GB hold a slice of; {wanted} would suit the data"
    limits = f"{sizes[0]} to {sizes[-1]} suit a base trained at {trained}"
    if sizes[0] < wanted < sizes[-1]:
        return wanted, f"near {CONSTANTS.enlargement:g} times the {side} pixels of a typical slice; {limits}"
    return wanted, f"typical slices have {side} pixels, and {limits}"


def _no_memory(s: Situation, image_size: int) -> InputError:
    need_gb = (s.base.weights_gb + s.slice_gb(image_size, checkpointed=True)) / CONSTANTS.share_of_memory
    return InputError(
        f"expected memory for one slice of {image_size} pixels, about {need_gb:.1f} GB free with base {s.base.base}, "
        f"found {s.machine.memory_gb:g} GB on {s.machine.device} ({s.machine.name}); free memory, or choose a smaller "
        "--image_size or --base, or a larger machine"
    )


def _gradient_checkpointing(s: Situation) -> Decided:
    size = s.chosen["image_size"]
    plain, checkpointed = (s.slice_gb(size, checkpointed=value) for value in (False, True))
    if checkpointed > s.free_gb:
        raise _no_memory(s, size)
    if plain > s.free_gb:
        return True, f"a slice needs about {plain:.2g} GB, and {checkpointed:.2g} if layers are computed twice"
    return False, f"a slice needs about {plain:.2g} GB of {s.machine.memory_gb:g}"


def best_precision(machine: Machine) -> tuple[str, str]:
    """Accelerate's name of the precision that a machine trains in best, and the reason."""
    name = machine.name
    if machine.bf16:
        return "bf16", f"{name} multiplies bfloat16 in hardware; sums, and the weights that are trained, stay float32"
    if machine.device == "cuda":
        return "fp16", f"as SAMed: {name} does not multiply bfloat16 in hardware"
    return "no", f"float32: {name} does not multiply bfloat16 in hardware"


def _mixed_precision(s: Situation) -> Decided:
    return best_precision(s.machine)


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
        _plane, _channels, _window, _neighbour_mm, _resampling, _image_size, _gradient_checkpointing, _mixed_precision,
        _fold, _folds, _validation_share, _batch_size, _accumulation_steps, _epochs, _stop_epoch, _max_steps,
        _max_minutes, _warmup_steps, _learning_rate, _max_grad_norm, _weight_decay, _schedule, _lora_plus_ratio, _rank,
        _targets, _augmentation, _mirror, _foreground_share, _weight_average, _validate_epochs, _patience,
    )}
)  # fmt: skip
"""Name of a field or option -> its rule, which gives None where nothing has to be decided."""
