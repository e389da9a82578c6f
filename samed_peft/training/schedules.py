"""SAMed's learning rate as a pure function of the step, so that a resumed run needs no schedule state."""


def learning_rate(step: int, *, peak: float, warmup_steps: int, max_steps: int, power: float = 0.9) -> float:
    """Rate in force at optimizer step `step` (0, 1, ...).

    The original sets the rate after each step, from the number of the step just done, so the rate in force lags by
    one: steps 0 and 1 share the first warm-up value, and the decay counts from the end of the warm-up
    (SAMed's trainer, commit e351840).

    Args:
        step: optimizer steps done so far.
        peak: largest rate.
        warmup_steps: steps of linear warm-up; 0 for none.
        max_steps: horizon of the polynomial decay (1 - s / max_steps) ** power.
        power: exponent of the decay.
    """
    previous = step - 1
    if warmup_steps and previous < warmup_steps:
        return peak * (max(previous, 0) + 1) / warmup_steps
    decayed = max(previous - warmup_steps, 0)
    return peak * max(1 - decayed / max_steps, 0.0) ** power
