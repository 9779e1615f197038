"""Whether a run learns: a warning before its first step where it cannot, and a verdict at its end where something is off."""

from collections.abc import Sequence
from typing import NamedTuple

from ..config import TrainConfig
from ..models import LanguageModel
from ..terminal import counted
from .schedule import learning_rate

ENOUGH = 20  # steps at the recommended rate: tiny-rwkv7-gsm8k's held-out loss falls by 8% in 8 of them, by 18% in 14
WANTED = 80  # steps to suggest instead
MOST_EPOCHS = 10  # to suggest; smaller batches before more
TOO_FAST = 20  # times the recommended rate
NEW_MODEL_RATE = 6e-4  # RWKV-LM's for its smaller models

FELL = 0.03  # share by which a loss must fall to count as having fallen
ROSE = 0.01  # share above its lowest by which a held-out loss counts as having risen
DIVERGED = 1.5  # times the first loss


def recommended_rate(model: LanguageModel, config: TrainConfig) -> float:
    """The learning rate to begin with: the model's for the method, or RWKV-LM's for a new model."""
    if not config.load_model:
        return NEW_MODEL_RATE
    return model.recommended_rate("state" if config.train_type == "state" else config.peft)


def worth(steps: int, config: TrainConfig, recommended: float) -> float:
    """How many steps at the recommended rate the run's steps are worth: the sum of their rates, divided by it."""
    some = range(0, steps, max(1, steps // 1000))
    rates = [learning_rate(s, steps, config.lr_schedule, config.lr_init, config.lr_final, config.warmup_steps) for s in some]
    return steps * sum(rates) / len(rates) / recommended


def before(config: TrainConfig, steps_per_epoch: int, samples: int, world: int, recommended: float) -> str:
    """A line where the run's steps are too few or its rate is far too high; "" where nothing is to be said."""
    steps = steps_per_epoch * config.epoch_count
    if config.lr_init > TOO_FAST * recommended:
        return (
            f"warning: --lr_init {config.lr_init:g} is {config.lr_init / recommended:,.0f} times the recommended rate, "
            f"{recommended:g}: the loss may rise"
        )
    if not config.load_model or worth(steps, config, recommended) >= ENOUGH:
        return ""
    advice = []
    a_step = config.accumulate_grad_batches * world  # micro batches
    micro_bsz = config.micro_bsz
    if -(-WANTED // steps_per_epoch) > MOST_EPOCHS and not config.epoch_steps:
        micro_bsz = max(1, min(micro_bsz, samples * MOST_EPOCHS // (WANTED * a_step)))
        steps_per_epoch = -(-samples // (micro_bsz * a_step))
        advice += [f"--micro_bsz {micro_bsz}"] * (micro_bsz < config.micro_bsz)
    if (epochs := -(-WANTED // steps_per_epoch)) > config.epoch_count:
        advice.append(f"--epoch_count {epochs}")
    if config.lr_init < recommended / 2:
        advice.append(f"--lr_init {recommended:g}")
    advised = f": for {counted(samples, 'sample')} try {' '.join(advice)}" if advice else ""
    return f"warning: {counted(steps, 'step')} at {config.lr_init:g} will hardly change the model{advised}"


class Held(NamedTuple):
    """One measure of the held-out loss."""

    step: int  # 0: before the first
    epoch: int  # in which the step is
    loss: float


def verdict(losses: tuple[float, float], held_out: Sequence[Held], enough: bool = True) -> str:
    """What is off with a run that ended, in a line; "" where it learnt.

    losses: the mean of the first and of the last quarter of the steps, NaN where nothing was trained in them
    held_out: all measures, in order. Where one is from before the first step, they decide whether the loss fell
    enough: whether the run's steps were thought enough before the first one
    """
    first, last = losses
    if last > DIVERGED * first:
        return f"diverged: the loss rose from {first:.4f} to {last:.4f} (first and last quarter of the steps); lower --lr_init"
    which = "loss"
    if len(held_out) > 1:
        best, end = min(held_out, key=lambda h: h.loss), held_out[-1]
        if best.step == 0 and end.loss > (1 + ROSE) * best.loss:
            cure = "lower --lr_init, or give more data, and such as the held-out ones"
            return f"the held-out loss rose from {best.loss:.4f} to {end.loss:.4f}: what was learnt does not carry over; {cure}"
        if end.loss > (1 + ROSE) * best.loss:
            since = next(h for h in held_out if h.step > best.step).epoch
            return (f"overfitted from epoch {since} on: the held-out loss was {best.loss:.4f} after step {best.step} and is "
                    f"{end.loss:.4f} now; take rwkv-best.pth, or train for fewer epochs or on more data")  # fmt: skip
        if held_out[0].step == 0:
            which, first, last = "held-out loss", held_out[0].loss, end.loss
    fell = f"from {first:.4f} to {last:.4f}" + " (first and last quarter of the steps)" * (which == "loss")
    if last > (1 + FELL) * first:
        return f"the {which} rose {fell}; lower --lr_init"
    if last > (1 - (FELL if enough else 3 * FELL)) * first:
        return f"the {which} hardly fell, {fell}: train for more steps (--epoch_count), or at a higher --lr_init"
    return ""
