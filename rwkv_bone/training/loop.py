"""The training loop, to be read from top to bottom: set up, resume, then for each step: micro batches, clip, step, log, save.

Every trained token of a step weighs the same over micro batches and devices: losses are sums, divided once by the step's count.
"""

import contextlib
import math
import os
import signal
import time
from dataclasses import dataclass

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
from .resume import Progress
from .samples import Sampler
from .schedule import learning_rate
from .signals import Signals
from .strategies import Engine, device_type, lost_device


@dataclass(frozen=True)
class Run:
    """What every part of the loop below needs. Where the run stands is in `Progress`."""

    model: LanguageModel
    data: TrainingData
    objective: Objective
    config: TrainConfig
    engine: Engine
    folder: RunFolder
    logs: Logs | None  # the first device's


def fit(model: LanguageModel, data: TrainingData, objective: Objective, config: TrainConfig, engine: Engine) -> int:
    """Train what of `model` requires a gradient, and leave the files that outputs.py names in proj_dir.

    `engine` is launched. Returns the exit code: 0 at the run's end, 128 + the signal's number where one stopped it.
    """
    # ---- set up
    world, first, described = engine.world, engine.first, ""
    recommended = verdict.recommended_rate(model, config)
    config = config.with_rate(recommended)
    check_what_trains(model, config)
    sampler = Sampler.of(config, data)
    multiplied_by = set_matmul_backend(engine.device.type, tokens_at_once(data, config), summary.precision(config) == "tf32")
    if first:
        if not config.dry_run:
            check_folder(RunFolder(config.proj_dir), config)
        described = summary.describe(model, data, config, world, recommended, multiplied_by)
        print(described, flush=True)
    if config.dry_run:
        return 0
    engine.barrier()

    # ---- resume
    folder = RunFolder(config.proj_dir)  # the first device may have made it just now
    at, checkpoint = resume.restore(model, data, folder, config, engine)
    data.check_trained(world, at.seed)
    total_steps = data.steps_per_epoch(world) * config.epoch_count
    if at.step >= total_steps or at.worse_for(config.patience):
        if first:
            print(f"resuming   after step {at.step}: nothing to do, the run is complete", flush=True)
        return finish(folder, config, data, recommended, described) if first else 0
    take(folder, config, engine, at)
    engine.setup(Step(model, objective), lambda masters: make_optimiser(model, config, masters))
    with contextlib.ExitStack() as open_until_the_end:
        signals = open_until_the_end.enter_context(Signals())
        logs = Logs(folder, config, at.step, total_steps, checkpoint and checkpoint[0]["log_bytes"]) if first else None
        if logs:
            open_until_the_end.callback(logs.close)
        engine.barrier()
        if checkpoint is not None:
            resume.restore_optimiser(engine, *checkpoint)
        elif engine.rank:  # each device drops other units
            torch.manual_seed(at.seed + engine.rank)
        del checkpoint  # its tensors

        # ---- train
        try:
            stopped = steps(Run(model, data, objective, config, engine, folder, logs), at, sampler, signals)
        except RuntimeError as error:
            if not lost_device(error):
                raise
            what = f"after step {at.step} another device's process ended or cannot be reached"
            raise UserError(f"{what}; --resume auto continues from what was saved") from error
    if not first:  # a launcher takes another device's code for a crash
        return 0
    return 128 + (signals.received or signal.SIGTERM) if stopped else finish(folder, config, data, recommended, described)


def steps(run: Run, at: Progress, sampler: Sampler | None, signals: Signals) -> bool:
    """All that is left of the run's steps; True where a signal on any device ended it before."""
    config, engine, logs = run.config, run.engine, run.logs
    per_epoch = run.data.steps_per_epoch(engine.world)
    total_steps = per_epoch * config.epoch_count
    run.model.train()
    if at.step == 0:
        if config.val_first:
            validate(run, at, config.epoch_begin)
        ask(run, at, sampler)
    saved_at = step_began = time.monotonic()
    save_requested = stopped = False
    for micro_batches in run.data.steps(engine.rank, engine.world, at.seed, at.step, total_steps):
        # ---- micro batches, clip, step
        lr = set_rate(engine, config, at.step, total_steps)
        micro_batches = [{name: t.to(engine.device) for name, t in micro.items()} for micro in micro_batches]
        trained, tokens = engine.sum([sum(map(run.objective.count, micro_batches)), sum(m["tokens"] for m in micro_batches)])
        loss_sum = gradients(engine, micro_batches, trained, config)
        loss_sum, stop, save = engine.sum([loss_sum, signals.received, save_requested])
        loss = loss_sum / max(trained, 1)
        grad_norm = engine.step(config.grad_clip) if math.isfinite(loss) else math.nan
        if not math.isfinite(grad_norm):
            raise diverged(run, at.step + 1, loss, grad_norm, lr, micro_batches)
        epoch, now = config.epoch_begin + at.step // per_epoch, time.monotonic()
        seconds, step_began = now - step_began, now
        record = StepRecord(at.step + 1, epoch, loss if trained else None, lr, grad_norm, int(trained), int(tokens), seconds)
        at.step += 1
        at.epoch_loss += (record.loss or 0.0) * record.trained
        at.epoch_trained += record.trained

        # ---- log
        if logs:
            logs.step(record)
            if at.step == 1 and config.load_model and record.loss is not None:
                warn_if_loss_above_uniform(record.loss, run.model.sizes.vocab_size)

        # ---- validate, sample
        ended = at.step == total_steps
        if ended or at.step % (config.val_every or per_epoch) == 0:
            validate(run, at, epoch)
            if at.worse_for(config.patience) and not ended:
                ended = True
                if logs:
                    say(f"no better for {at.best.since} validations: the run ends here")
        if ended or (config.sample_every and at.step % config.sample_every == 0):
            ask(run, at, sampler)

        # ---- save
        epoch_ended = ended or at.step % per_epoch == 0
        if epoch_ended:
            end_epoch(run, at, record, ended)  # before the checkpoint: a full disk may still hold the adapter
        stopped = stop > 0 and not ended
        if stopped:
            save_adapter(run, INTERRUPTED, at.step)
        due = config.save_every_steps and at.step % config.save_every_steps == 0
        if epoch_ended or due or save > 0 or stopped:
            resume.save(run.folder, run.model, run.data, config, engine, at, logs.lengths() if logs else {})
            saved_at = time.monotonic()
        minutes = (time.monotonic() - saved_at) / 60
        save_requested = bool(logs and config.save_every_minutes and minutes > config.save_every_minutes)
        if stopped and logs:
            say(f"stopped after step {at.step}; saved {run.folder / INTERRUPTED}; --resume auto continues from here")
        if ended or stopped:
            break
    engine.barrier()  # a launcher that sees one device end may end the others, and the first still writes
    return stopped


def set_rate(engine: Engine, config: TrainConfig, step: int, total_steps: int) -> float:
    """The schedule's learning rate, set on every group of parameters by its multiplier."""
    lr = learning_rate(step, total_steps, config.lr_schedule, config.lr_init, config.lr_final, config.warmup_steps)
    for group in engine.optimiser.param_groups:
        group["lr"] = lr * group["lr_multiplier"]
    return lr


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


def validate(run: Run, at: Progress, epoch: int) -> None:
    """Measure the held-out loss, where there are held-out data; the adapter of the lowest one stays."""
    held_out = run.data.held_out(run.engine.rank, run.engine.world)
    if held_out is None:
        return
    loss, count = validation.measure(run.engine, run.objective, held_out, run.config)
    when, note = "before the first step", ""  # of no adapter
    if at.step:
        better = at.best.note(loss)
        if better:
            save_adapter(run, BEST, at.step)
        when = f"after step {at.step}"
        note = f", the best so far ({BEST})" if better else f", best {at.best.loss:.4f}"
    if run.logs:
        run.logs.validation(at.step, epoch, loss, count)
        say(f"validation {when}: loss {loss:.4f} over {count:,} trained tokens{note}")


def ask(run: Run, at: Progress, sampler: Sampler | None) -> None:
    if sampler and run.logs:
        run.logs.samples(sampler.ask(run.model, at.step))


def save_adapter(run: Run, name: str, step: int) -> None:
    trained = run.engine.trained()
    if run.engine.first:
        run.folder.claim(name, str(sidecar(name)))
        save_result(run.folder / name, trained, run.model, run.data, run.config, step)


def end_epoch(run: Run, at: Progress, record: StepRecord, ended: bool) -> None:
    """Log the epoch's loss; save its adapter where one is due, and drop those that are no longer kept."""
    if run.logs:
        run.logs.epoch(record, at.epoch_loss / at.epoch_trained if at.epoch_trained else math.nan)
    at.epoch_loss = at.epoch_trained = 0.0
    if ended or result_due(run.config, record.epoch):
        save_adapter(run, f"rwkv-{record.epoch}.pth", at.step)
        if run.config.keep_adapters and run.engine.first:
            old = numbered(run.folder, run.config)[: -run.config.keep_adapters]
            run.folder.remove([name for pth in old for name in (pth, str(sidecar(pth)))])


def diverged(run: Run, step: int, loss: float, grad_norm: float, lr: float, micro_batches: list) -> UserError:
    cure = "begin anew (--overwrite): nothing is saved"
    if resume.steps_saved(run.folder):
        cure = "resume with --resume auto: what was saved is good"
    where = not_finite_in(run.model, micro_batches)
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


def take(folder: RunFolder, config: TrainConfig, engine: Engine, at: Progress) -> None:
    """Take the folder into use, by the first device; what is beyond the step where the run begins goes."""
    ranks = range(engine.world)
    pids = [int(pid) for pid in engine.sum([os.getpid() if rank == engine.rank else 0 for rank in ranks])]
    if engine.first:
        folder.begin(config, pids, anew=at.step == 0)
        if at.step == 0:
            folder.claim("config.json")
            (folder / "config.json").write_text(config.to_json())
        else:
            resume.clear(folder, at.step)
            print(f"resuming   after step {at.step}", flush=True)
    engine.barrier()


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
