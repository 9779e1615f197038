"""Learning rate over the steps of a run: a pure function of the step."""

import math

SCHEDULES = ("exp", "cos", "wsd", "linear", "constant")
WSD_DECAY = 0.2  # share of the run in which wsd comes down


def learning_rate(step: int, steps: int, schedule: str, lr_init: float, lr_final: float, warmup_steps: int = 0) -> float:
    """The rate of optimiser step `step`, 0 <= step < steps.

    exp, RWKV-LM's: lr_init to lr_final exponentially, linearly if either is 0. cos: half a cosine. wsd: lr_init, then
    linearly to lr_final over the last fifth. All times RWKV-LM's warm-up, 0.01 + 0.99 * step / warmup_steps.
    """
    progress = step / max(steps - 1, 1)
    match schedule:
        case "exp" if lr_init > 0 and lr_final > 0:
            rate = lr_init * (lr_final / lr_init) ** progress
        case "exp" | "linear":
            rate = lr_init + (lr_final - lr_init) * progress
        case "cos":
            rate = lr_final + (lr_init - lr_final) * 0.5 * (1 + math.cos(math.pi * progress))
        case "wsd":
            rate = lr_init + (lr_final - lr_init) * max(0.0, (progress - 1 + WSD_DECAY) / WSD_DECAY)
        case "constant":
            rate = lr_init
        case _:
            raise ValueError(f"unknown schedule {schedule!r}; there are {', '.join(SCHEDULES)}")
    return rate * (0.01 + 0.99 * step / warmup_steps if step < warmup_steps else 1.0)
