"""Learning rate over the steps of a run: a pure function of the step."""

import math

SCHEDULES = ("exp", "cos", "wsd", "linear", "constant")
WSD_DECAY = 0.2  # share of the run in which wsd comes down


def learning_rate(step: int, steps: int, schedule: str, lr_init: float, lr_final: float, warmup_steps: int = 0) -> float:
    """The rate of optimizer step `step`, 0 <= step < steps, with W = warmup_steps.

    progress p = clip((step - W + 1) / (steps - W), 0, 1), RWKV-LM's: nothing decays during the warm-up.
    exp, RWKV-LM's: lr_init (lr_final / lr_init)^p, linear where either is 0. linear: lr_init + (lr_final - lr_init) p.
    cos: half a cosine from lr_init to lr_final. wsd (warm-up, stable, decay): lr_init, then linear to lr_final over the last
    fifth. In the warm-up the rate is multiplied by RWKV-LM's 0.2 + 0.8 step / W.
    """
    progress = min(max((step - warmup_steps + 1) / max(steps - warmup_steps, 1), 0.0), 1.0)
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
    return rate * (0.2 + 0.8 * step / warmup_steps if step < warmup_steps else 1.0)
