"""Learning rate over the steps of a run: a pure function of the step."""

import math

from ..config import SCHEDULES

WSD_DECAY = 0.2  # share of the run in which wsd comes down


def learning_rate(step: int, steps: int, schedule: str, lr_init: float, lr_final: float, warmup_steps: int = 0) -> float:
    """The rate of optimiser step s = `step`, 0 <= s < S = `steps`, with W = `warmup_steps`.

    exp         RWKV-LM's: lr_init (lr_final / lr_init)^p with p = clip((s - W + 1) / (S - W), 0, 1); linear where either is 0
    linear      lr_init + (lr_final - lr_init) p
    wsd         warm-up, stable, decay: lr_init, then linear to lr_final over the last fifth of p
    cos         RWKV-PEFT's: lr_final + (lr_init - lr_final) (1 + cos(pi q)) / 2 with q = clip((s - W) / (S - W), 0, 1)
    warmup_cos  the same after a linear warm-up from 0 (RWKV-PEFT calls that wsd)
    constant    lr_init

    Nothing decays during the warm-up, in which the rate is multiplied by RWKV-LM's 0.2 + 0.8 s / W, or by s / W (warmup_cos).
    """
    left = max(steps - warmup_steps, 1)
    p = min(max((step - warmup_steps + 1) / left, 0.0), 1.0)
    q = min(max((step - warmup_steps) / left, 0.0), 1.0)
    match schedule:
        case "exp" if lr_init > 0 and lr_final > 0:
            rate = lr_init * (lr_final / lr_init) ** p
        case "exp" | "linear":
            rate = lr_init + (lr_final - lr_init) * p
        case "cos" | "warmup_cos":
            rate = lr_final + (lr_init - lr_final) * 0.5 * (1 + math.cos(math.pi * q))
        case "wsd":
            rate = lr_init + (lr_final - lr_init) * max(0.0, (p - 1 + WSD_DECAY) / WSD_DECAY)
        case "constant":
            rate = lr_init
        case _:
            raise ValueError(f"unknown schedule {schedule!r}; there are {', '.join(SCHEDULES)}")
    if step >= warmup_steps:
        return rate
    return rate * step / warmup_steps if schedule == "warmup_cos" else rate * (0.2 + 0.8 * step / warmup_steps)
