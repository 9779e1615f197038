"""The training loop, to be read from top to bottom: set up, resume, then for each step: micro batches, clip, step, log, save.

Every trained token of a step weighs the same over micro batches and devices: losses are sums, divided once by the step's count.
"""

import math
import os
import secrets
import signal
import time
from typing import Any

import torch
from torch import Tensor

from ..config import TrainConfig
from ..errors import UserError
from ..files.adapters import sidecar
from ..models import LanguageModel
from ..ops.float32 import set_matmul_backend
from ..terminal import counted
from . import ending, report, resume, summary, validation, verdict
from .infctx import backward_in_chunks, equal_lengths
from .loader import TrainingData
from .logs import Logs, StepRecord, say
from .objectives import Objective, Step, not_finite_in
from .optimiser import make_optimiser
from .outputs import BEST, INTERRUPTED, RECORD, RunFolder, numbered, result_due, save_result
from .samples import Sampler
from .schedule import learning_rate
from .strategies import Engine, device_type, lost_device

ECHO_SECONDS = 0.2  # within which a second signal is the first one's echo
LAUNCHER_SECONDS = 2.0  # the same under a launcher, which passes a signal on that the key has sent already
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_PROCID", "LOCAL_RANK")  # in the environment of their processes
# SIGUSR1: what a SLURM job asks to be sent before its time is up
STOP = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]


def fit(model: LanguageModel, data: TrainingData, objective: Objective, config: TrainConfig, engine: Engine) -> int:
    """Train what of `model` requires a gradient, and leave the files that outputs.py names in proj_dir.

    `engine` is launched. Returns the exit code: 0 at the run's end, 128 + the signal's number where one stopped it.
    """
    # ---- set up
    world, first = engine.world, engine.first
    recommended = verdict.recommended_rate(model, config)
    config = config.with_rate(recommended)
    per_epoch = data.steps_per_epoch(world)
    total_steps = per_epoch * config.epoch_count
    folder = RunFolder(config.proj_dir)
    check_what_trains(model, config)
    sampler = Sampler.of(config, data)
    multiplied_by = set_matmul_backend(engine.device.type, tokens_at_once(data, config), summary.precision(config) == "tf32")
    if first:
        if not config.dry_run:
            check_folder(folder, config)
        described = summary.describe(model, data, config, world, recommended, multiplied_by)
        print(described, flush=True)
    if config.dry_run:
        return 0
    engine.barrier()
    folder = RunFolder(config.proj_dir)  # the first device may have made it just now
    seed = config.random_seed if config.random_seed >= 0 else secrets.randbelow(2**31)

    # ---- resume
    restored = resume.newest(folder, engine.rank) if config.resume else None
    invariants = resume.invariants(model, data, config, world)
    step, ended, best = 0, False, validation.Best()
    if restored is not None:
        run, _ = restored
        resume.check_invariants(run["invariants"], invariants)
        resume.restore_trained(model, run["trained"])
        step, seed = run["step"], run["seed"]
        best = validation.Best.of_log(folder, step)
        ended = step >= total_steps or 0 < config.patience <= best.since
    agreed, seed = engine.broadcast((step, seed))
    if agreed != step:
        raise UserError(f"--resume: device {engine.rank} finds step {step} in --proj_dir, the first device step {agreed}; "
                        "all machines must see the same folder")  # fmt: skip
    data.check_trained(world, seed)
    if ended:
        if first:
            print(f"resuming   after step {step}: nothing to do, the run is complete", flush=True)
        return finish(folder, config, data, recommended, described) if first else 0
    pids = [int(pid) for pid in engine.sum([os.getpid() if rank == engine.rank else 0 for rank in range(world)])]
    if first:
        folder.begin(config, pids, anew=restored is None)
        if restored is None:
            folder.claim("config.json")
            (folder / "config.json").write_text(config.to_json())
        else:
            resume.clear(folder, step)
            print(f"resuming   after step {step}", flush=True)
    engine.barrier()

    # ---- the model on its device, the optimiser, the logs
    engine.setup(Step(model, objective), lambda masters: make_optimiser(model, config, masters))
    signals = Signals()
    logs = Logs(folder, config, step, total_steps, run["log_bytes"] if restored else None) if first else None
    epoch_loss, epoch_trained = run["epoch_sums"] if restored else (0.0, 0.0)
    engine.barrier()
    if restored is not None:
        run, own = restored
        resume.restore_optimiser(engine, run, own)
    elif engine.rank:  # each device drops other units
        torch.manual_seed(seed + engine.rank)
    del restored  # tensors of the checkpoint
    run = {}
    model.train()

    def save_checkpoint() -> None:
        trained = engine.trained()
        own: dict[str, Any] = {"random": resume.random_state()}
        if engine.sharded or first:
            own["optimiser"] = engine.optimiser_state()
        run = {
            "step": step,
            "invariants": invariants,
            "trained": trained,
            "log_bytes": logs.lengths() if logs else {},
            "epoch_sums": [epoch_loss, epoch_trained],
            "seed": seed,
        }
        resume.save(folder, engine, step, run, own, config.keep_last)

    def save_adapter(name: str) -> None:
        trained = engine.trained()
        if first:
            folder.claim(name, str(sidecar(name)))
            save_result(folder / name, trained, model, data, config, step)

    def ask() -> None:
        if sampler and logs:
            logs.samples(sampler.ask(model, step))

    # ---- before the first step
    if step == 0:
        held_out = data.held_out(engine.rank, world) if config.val_first else None
        if held_out:
            base_loss, count = validation.measure(engine, objective, held_out, config)
            if logs:
                logs.validation(0, config.epoch_begin, base_loss, count)
                say(f"validation before the first step: loss {base_loss:.4f} over {count:,} trained tokens")
        ask()

    # ---- steps
    saved_at = step_began = time.monotonic()
    save_requested = stopped = False
    try:
        for micro_batches in data.steps(engine.rank, world, seed, step, total_steps):
            lr = learning_rate(step, total_steps, config.lr_schedule, config.lr_init, config.lr_final, config.warmup_steps)
            for group in engine.optimiser.param_groups:
                group["lr"] = lr * group["lr_multiplier"]
            micro_batches = [{name: t.to(engine.device) for name, t in micro.items()} for micro in micro_batches]
            trained, tokens = engine.sum([sum(map(objective.count, micro_batches)), sum(m["tokens"] for m in micro_batches)])
            loss_sum = gradients(engine, micro_batches, trained, config)
            loss_sum, stop, save = engine.sum([loss_sum, signals.received, save_requested])
            loss = loss_sum / max(trained, 1)
            grad_norm = engine.step(config.grad_clip) if math.isfinite(loss) else math.nan
            if not math.isfinite(grad_norm):
                raise diverged(step + 1, loss, grad_norm, lr, model, micro_batches, folder)
            step, now = step + 1, time.monotonic()
            epoch = config.epoch_begin + (step - 1) // per_epoch
            seconds, step_began = now - step_began, now
            record = StepRecord(step, epoch, loss if trained else None, lr, grad_norm, int(trained), int(tokens), seconds)
            epoch_loss += (record.loss or 0.0) * record.trained
            epoch_trained += record.trained

            # ---- log
            if logs:
                logs.step(record)
                if step == 1 and config.load_model and record.loss is not None:
                    warn_if_loss_above_uniform(record.loss, model.sizes.vocab_size)

            # ---- validate
            ended = step == total_steps
            held_out = data.held_out(engine.rank, world)
            if held_out and (step % (config.val_every or per_epoch) == 0 or ended):
                val_loss, count = validation.measure(engine, objective, held_out, config)
                better = best.note(val_loss)
                if better:
                    save_adapter(BEST)
                if logs:
                    logs.validation(step, epoch, val_loss, count)
                    note = f"the best so far ({BEST})" if better else f"best {best.loss:.4f}"
                    say(f"validation after step {step}: loss {val_loss:.4f} over {count:,} trained tokens, {note}")
                if config.patience and best.since >= config.patience and not ended:
                    ended = True
                    if first:
                        say(f"no better for {best.since} validations: the run ends here")

            # ---- sample
            if ended or (config.sample_every and step % config.sample_every == 0):
                ask()

            # ---- save
            epoch_ended = ended or step % per_epoch == 0
            if epoch_ended:
                if logs:
                    logs.epoch(record, epoch_loss / epoch_trained if epoch_trained else math.nan)
                epoch_loss = epoch_trained = 0.0
                if ended or result_due(config, epoch):  # before the checkpoint: a full disk may still hold it
                    save_adapter(f"rwkv-{epoch}.pth")
                    if config.keep_adapters and first:
                        old = numbered(folder, config)[: -config.keep_adapters]
                        folder.remove([name for pth in old for name in (pth, str(sidecar(pth)))])
            due = config.save_every_steps and step % config.save_every_steps == 0
            stopped = stop > 0 and not ended
            if stopped:
                save_adapter(INTERRUPTED)
            if epoch_ended or due or save > 0 or stopped:
                save_checkpoint()
                saved_at = time.monotonic()
            minutes = (time.monotonic() - saved_at) / 60
            save_requested = bool(first and config.save_every_minutes and minutes > config.save_every_minutes)
            if stopped and first:
                say(f"stopped after step {step}; saved {folder / INTERRUPTED}; --resume auto continues from here")
            if ended or stopped:
                break
        engine.barrier()  # a launcher that sees one device end may end the others, and the first still writes
    except RuntimeError as error:
        if not lost_device(error):
            raise
        what = f"after step {step} another device's process ended or cannot be reached"
        raise UserError(f"{what}; --resume auto continues from what was saved") from error
    finally:
        signals.restore()
        if logs:
            logs.close()
    if not first:  # a launcher takes another device's code for a crash
        return 0
    return 128 + (signals.received or signal.SIGTERM) if stopped else finish(folder, config, data, recommended, described)


def gradients(engine: Engine, micro_batches: list[dict[str, Tensor]], trained: float, config: TrainConfig) -> float | Tensor:
    """Add a step's gradients, those of its summed loss divided by `trained`; returns this device's summed loss."""
    infctx = config.train_type == "infctx"
    if infctx and engine.sharded:
        micro_batches = equal_lengths(micro_batches, engine.max)
    loss_sum: float | Tensor = 0.0
    for i, micro in enumerate(micro_batches):

        def backward(loss: Tensor, last: bool, last_micro: bool = i == len(micro_batches) - 1) -> None:
            # devices average their gradients: times their number gives the sum
            engine.backward(loss * (engine.world / max(trained, 1)), last and last_micro)

        if infctx:
            loss_sum += backward_in_chunks(engine.forward, micro, config.chunk_ctx, config.truncate, backward)
        else:
            loss = engine.forward(micro)[0]
            backward(loss, True)
            loss_sum += loss.detach()
    return loss_sum


def diverged(
    step: int, loss: float, grad_norm: float, lr: float, model: LanguageModel, micro_batches: list, folder: RunFolder
) -> UserError:
    cure = "begin anew (--overwrite): nothing is saved"
    if resume.steps_saved(folder):
        cure = "resume with --resume auto: what was saved is good"
    where = not_finite_in(model, micro_batches)
    return UserError(f"step {step}: loss {loss}, gradient norm {grad_norm}, at learning rate {lr:.3g}{where}; "
                     f"lower --lr_init or --grad_clip and {cure}")  # fmt: skip


def warn_if_loss_above_uniform(loss: float, vocab_size: int) -> None:
    """A trained model that does worse than one that knows nothing reads tokens that are not its own."""
    uniform = math.log(vocab_size)
    if loss > 1.1 * uniform:
        say(f"warning: the first loss, {loss:.2f}, is above that of guessing, {uniform:.2f}: was the model trained "
            "with another tokenizer? (--tokenizer, --vocab_file, --encoding)")  # fmt: skip


def check_what_trains(model: LanguageModel, config: TrainConfig) -> None:
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    if not dtypes:
        raise UserError("nothing trains: no adapter was put on the model and no part of it is trained in full")
    if len(dtypes) > 1 and config.strategy.startswith("deepspeed_stage_3"):
        raise UserError("--strategy deepspeed_stage_3 takes no --train_parts of a bf16 base beside fp32 adapters; stage 2 does")


def check_folder(folder: RunFolder, config: TrainConfig) -> None:
    """Refuse to mix two runs in one folder; make it."""
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        if not (folder / RECORD).exists():
            folder.save()
    except (OSError, UserError) as error:
        why = getattr(error, "strerror", None) or getattr(error.__cause__, "strerror", None) or error
        raise UserError(f"--proj_dir {folder.path}: cannot be written ({why})") from None
    if config.overwrite:
        return
    saved = resume.steps_saved(folder)
    results = sorted(name for name in folder.files if name.endswith(".pth") and (folder / name).exists())
    if saved and not config.resume:
        cure = "--resume auto continues it, --overwrite replaces it"
        raise UserError(f"{folder.path} holds a run ({counted(saved[0], 'step')}): {cure}")
    if not saved and results and (folder.finished or not config.resume):
        raise UserError(f"{folder.path} holds {results[-1]} and no checkpoint to resume from: --overwrite replaces it")


class Signals:
    """Asks for an end after the current step. A second signal, unless it is the first one's echo, ends the run at once."""

    def __init__(self):
        self.received, self.at = 0, 0.0
        self.echo = LAUNCHER_SECONDS if any(name in os.environ for name in LAUNCHERS) else ECHO_SECONDS
        ignored = [s for s in STOP if signal.getsignal(s) is signal.SIG_IGN]  # nohup
        self.handlers = {s: signal.signal(s, self.handle) for s in STOP if s not in ignored}

    def handle(self, number: int, frame) -> None:
        if not self.received:
            self.received, self.at = number, time.monotonic()
            print(f"\n{signal.Signals(number).name}: saving after this step (a second one ends it without)", flush=True)
        elif time.monotonic() - self.at > self.echo:
            print("ended without saving; --resume auto continues from the last checkpoint", flush=True)
            raise SystemExit(128 + number)

    def restore(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def finish(folder: RunFolder, config: TrainConfig, data: TrainingData, recommended: float, described: str) -> int:
    """At a run's end: drop what an earlier, interrupted part of it left, draw its curves, say how it went and what to do next."""
    folder.remove([INTERRUPTED, str(sidecar(INTERRUPTED))])
    folder.finish()
    course = ending.Course.of(folder, config)
    if not course.steps:  # somebody has removed the logs of a run that was complete
        return 0
    off = ending.verdict_of(course, config, recommended)
    commands = ending.next_commands(folder, config, data.asks, course)
    files = [*(["loss.png"] if summary.draw(folder) else []), report.FILE]
    report.write(folder, config, course, described, off, commands)
    print(ending.describe(folder, config, course, off, commands, device_type(config), files), flush=True)
    return 0


def tokens_at_once(data: TrainingData, config: TrainConfig) -> int:
    longest = data.longest_row()
    return config.micro_bsz * (min(longest, config.chunk_ctx) if config.train_type == "infctx" else longest)
