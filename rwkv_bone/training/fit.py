"""From a model with its adapters, data and a configuration to a finished run: what is said before, the engine, resuming."""

import logging
import math
import signal
import warnings
from pathlib import Path

import torch
from torch import nn

from ..config import TrainConfig
from ..errors import UserError
from ..models.x060 import RWKV
from ..ops import wkv6
from ..ops.float32 import set_matmul_backend
from ..peft import METHODS, adapters
from ..peft.adapter import QuantisedWeight
from ..terminal import counted, in_bytes
from . import resume
from .engines import make_strategy
from .memory import estimate


def device_type(config: TrainConfig) -> str:
    """cuda or cpu, by `--accelerator` and what is there."""
    there = torch.cuda.is_available()
    if config.accelerator == "cpu" or (config.accelerator == "auto" and not there):
        return "cpu"
    if not there:
        raise UserError(f"--accelerator {config.accelerator}: this torch sees no GPU; use --accelerator cpu or auto")
    return "cuda"


def check_device(config: TrainConfig) -> None:
    """Refuse a kernel or an engine that the device does not have."""
    device = device_type(config)
    if config.op not in ("auto", "torch", device):
        raise UserError(f"--op {config.op} is no kernel for this run, which is on {device}; leave the flag out")
    if device == "cpu" and config.strategy.startswith("deepspeed"):
        raise UserError(f"--strategy {config.strategy} needs a GPU, and this run is on the CPU; there it is ddp or auto")


def precision(config: TrainConfig) -> str:
    """bf16, tf32 or fp32."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if device_type(config) == "cuda" else "fp32"


def base_dtype(config: TrainConfig) -> torch.dtype:
    """The dtype in which the base is kept and activations flow; adapters are float32 in any case."""
    return torch.bfloat16 if precision(config) == "bf16" else torch.float32


def tokens_at_once(data, config: TrainConfig) -> int:
    longest = data.longest_row()
    return config.micro_bsz * (min(longest, config.chunk_ctx) if config.train_type == "infctx" else longest)


def trained_by_part(model: nn.Module) -> dict[str, tuple[int, int]]:
    """What trains: part (`att.key`, `emb`, `time`, ...) -> (tensors, parameters)."""
    parts: dict[str, tuple[int, int]] = {}
    layers = adapters(model)
    for name, p in model.named_parameters():
        if p.requires_grad:
            path = name.split(".")
            owner = name.rpartition(".")[0]
            part = ".".join(owner.split(".")[2:]) if owner in layers and path[0] == "blocks" else name_of_part(path)
            count, size = parts.get(part, (0, 0))
            parts[part] = (count + 1, size + p.numel())
    return parts


def name_of_part(path: list[str]) -> str:
    """`att.key` of blocks.3.att.key.weight, `time` of its time_* parameters, `ln` of its norms, else the first component."""
    if path[0] != "blocks":
        return "ln" if path[0].startswith("ln") else path[0]
    if path[2].startswith("ln") or path[3].startswith("ln"):
        return "ln"
    return "time" if path[3].startswith("time_") else ".".join(path[2:4])


def describe(model: RWKV, data, config: TrainConfig, world: int, multiply: str = "") -> str:
    """All that a person wants to know before the first step."""
    c = model.config
    quantised = [math.prod(m.shape) for m in model.modules() if isinstance(m, QuantisedWeight)]
    total = sum(p.numel() for p in model.parameters()) + sum(quantised)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    added = sum(p.numel() for a in adapters(model).values() for name, p in a.named_parameters() if name != "weight")
    if config.train_type == "state":
        added = trained
    steps = data.steps_per_epoch(world)
    device = device_type(config)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {counted(torch.get_num_threads(), 'thread')}"
    lines = [
        f"model      {config.load_model or 'new'}: RWKV-6 (x060), {c.n_layer} layers, n_embd {c.n_embd}, dim_att {c.dim_att}, "
        f"{c.n_head} heads of {c.head_size}, dim_ffn {c.dim_ffn}, vocabulary {c.vocab_size}, {total - added:,} parameters",
        *(f"data       {line}" for line in data.describe(world)),
        f"steps      {steps * config.epoch_count:,} = {counted(config.epoch_count, 'epoch')} of {steps:,}; a step takes "
        f"{counted(config.micro_bsz, 'sample')} x {counted(config.accumulate_grad_batches, 'micro batch', 'es')} x "
        f"{counted(world, 'device')}",
    ]
    if config.peft == "none":
        state = "state tuning: each layer's initial state trains"
        lines.append(f"method     {state if config.train_type == 'state' else 'none: the whole model trains'}")
    else:
        lines.append(f"method     {config.peft}: {METHODS[config.peft].formula}; {options_text(config)}")
    of = "" if config.peft == "none" and not added else f": {total - added:,} of the base and {added:,} beside it"
    lines.append(f"trains     {trained:,} parameters, {100 * trained / total:.2f}% of {total:,}{of}")  # as peft counts
    lines += [f"           {part:16} {counted(n, 'tensor'):>12} {size:14,}" for part, (n, size) in trained_by_part(model).items()]
    schedule = f"{config.lr_schedule}, {config.lr_init:g} to {config.lr_final:g}"
    if config.lr_init == config.lr_final:
        schedule = f"{config.lr_init:g}, constant"
    lines.append(f"rate       {schedule}, {counted(config.warmup_steps, 'warm-up step')}")
    engine = config.strategy if config.strategy != "auto" else "ddp" if world > 1 else "one process"
    kernel = wkv6.describe(device, base_dtype(config), c.head_size, config.op)
    by = f" by {multiply}" if multiply and base_dtype(config) == torch.float32 else ""
    lines.append(f"device     {world} x {name}, {precision(config)}{by}, engine: {engine}, WKV6: {kernel}")
    parts = estimate(model, config.micro_bsz, data.longest_row(), config, world, device == "cuda")
    detail = ", ".join(f"{name} {in_bytes(size)}" for name, size in parts.items())
    lines.append(f"memory     about {in_bytes(sum(parts.values()))} a device: {detail}")
    last = config.epoch_begin + config.epoch_count - 1
    often = "epoch" if config.epoch_save == 1 else f"{config.epoch_save} epochs"
    earlier = f" and before it one every {often}" if config.epoch_save < config.epoch_count else ""
    lines.append(f"files      {Path(config.proj_dir) / f'rwkv-{last}.pth'}{earlier}; "
                 f"checkpoints, train_log.txt, loss_data.jsonl and metrics beside it")  # fmt: skip
    return "\n".join(lines)


def options_text(config: TrainConfig) -> str:
    layer = METHODS[config.peft]
    return ", ".join(f"{k}={v}" for k, v in vars(layer.config_from(config.peft_options, config.peft)).items())


def prepare_folder(config: TrainConfig) -> None:
    """Refuse to mix two runs in one folder; make it."""
    folder = Path(config.proj_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--proj_dir {folder}: cannot be written ({error.strerror})") from None
    saved, results = resume.steps_saved(folder), sorted(folder.glob("rwkv-*.pth"))
    if config.resume:  # the best so far may be older than the first checkpoint
        results = [path for path in results if path.name != "rwkv-best.pth"]
    if config.overwrite or (config.resume and (saved or not results)):
        return
    if saved:
        raise UserError(f"{folder} holds a run ({saved[0]} steps): --resume auto goes on with it, --overwrite replaces it")
    if results:
        raise UserError(f"{folder} holds {results[0].name} and no checkpoint to go on from: --overwrite replaces it")


def fit(model: RWKV, data, config: TrainConfig, deepspeed: type | None = None) -> int:
    """Train what of `model` requires a gradient on `data`, and leave the files that records.py names in proj_dir.

    `deepspeed` replaces Lightning's DeepSpeedStrategy.
    Returns the exit code: 0 at the run's end, 128 + the signal's number where one stopped it.
    """
    import lightning as L

    from .module import FineTune
    from .records import Records
    from .validation import Validation

    if deepspeed is None:
        check_device(config)
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    if not dtypes:
        raise UserError("nothing trains: no adapter was put on the model and no part of it is trained in full")
    if len(dtypes) > 1 and config.strategy.startswith("deepspeed_stage_3"):
        raise UserError("--strategy deepspeed_stage_3 takes no --train_parts of a bf16 base beside fp32 adapters; stage 2 does")
    quiet_lightning()
    multiply = set_matmul_backend(device_type(config), tokens_at_once(data, config), precision(config) == "tf32")
    model.grad_cp = config.grad_cp
    model.op = config.op
    records = Records(config)
    trainer = L.Trainer(
        callbacks=[*([Validation(config)] if data.validation is not None else []), records],
        accelerator="gpu" if device_type(config) == "cuda" else "cpu",
        devices=device_count(config),
        num_nodes=config.num_nodes,
        strategy=make_strategy(config, device_count(config) * config.num_nodes, deepspeed),
        precision="32-true",  # dtypes are the model's own: base in base_dtype, adapters float32
        max_epochs=1,  # the loader runs through all epochs
        logger=make_loggers(config),
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    module = FineTune(model, data, config)
    records.geometry = geometry(model, data, config, trainer.world_size)
    first = trainer.is_global_zero
    if first:
        prepare_folder(config)
        print(describe(model, data, config, trainer.world_size, multiply), flush=True)
    if config.dry_run:
        return 0
    if config.resume:
        go_on(module, trainer.global_rank, records.geometry)
    if first:
        begin(module, records)
    if module.step >= data.steps_per_epoch(trainer.world_size) * config.epoch_count:
        return 0
    model.train()
    try:
        trainer.fit(module)
    except RuntimeError as error:
        if not lost_device(error):
            raise
        what = f"after step {module.step} another device's process ended or cannot be reached"
        raise UserError(f"{what}; --resume auto goes on from what was saved") from error
    except BrokenPipeError:  # what is printed, nobody reads
        raise
    except OSError as error:  # a log that cannot be written
        raise UserError(f"{config.proj_dir}: cannot be written ({error.strerror or error}); --resume auto goes on") from error
    if not first:  # a launcher takes another device's code for a crash
        return 0
    if records.interrupted:
        return 128 + (module.stop_requested or signal.SIGTERM)
    draw(config)
    print(what_now(config, module.step), flush=True)
    return 0


def what_now(config: TrainConfig, step: int) -> str:
    """At a run's end: the file to take, and what to do with it."""
    folder = Path(config.proj_dir)
    last = max(folder.glob("rwkv-[0-9]*.pth"), key=lambda path: int(path.stem[5:]), default=None)
    best = folder / "rwkv-best.pth"
    lines = [f"done       after step {step:,}; {last} is what came out"] if last else [f"done       after step {step:,}"]
    if best.exists():
        lines[0] += f", {best} the best by validation"
    take = best if best.exists() else last
    if config.peft == "none" and config.train_type != "state":
        lines.append(f"next       python -m rwkv_bone.generate --model {take} --prompt ...")
    else:
        lines.append(f"next       python merge.py --base_model {config.load_model} --peft_checkpoint {take} --output tuned.pth")
    return "\n".join(lines)


def make_loggers(config: TrainConfig) -> list:
    """Lightning's CSV log, and what was asked for beside it."""
    from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

    loggers: list[Logger] = [CSVLogger(config.proj_dir, name="metrics")]
    wanted = {
        "tensorboard": config.tensorboard and (lambda: TensorBoardLogger(config.proj_dir, name="tensorboard")),
        "wandb": config.wandb and (lambda: WandbLogger(project=config.wandb, save_dir=config.proj_dir)),
    }
    for name, make in wanted.items():
        try:
            loggers += [make()] if make else []
        except ModuleNotFoundError:  # the community's scripts pass --wandb: no reason not to train
            print(f"warning: --{name}: the package {name} is missing (pip install {name}); logging goes on without", flush=True)
    return loggers


def draw(config: TrainConfig) -> None:
    """The run's curves as a picture beside its logs; where that cannot be, a line that says why."""
    from ..plot import plot_runs

    try:
        plot_runs([config.proj_dir], Path(config.proj_dir) / "loss.png")
    except UserError as error:
        print(f"no picture {error}", flush=True)


def lost_device(error: RuntimeError) -> bool:
    """Whether torch.distributed says that it cannot reach a device: gloo by its text, NCCL by its type."""
    import torch.distributed as dist

    return isinstance(error, getattr(dist, "DistError", ())) or "gloo/transport" in str(error)


# what decides which samples a step holds: a run can only go on with the same
GEOMETRY = ("quant", "micro_bsz", "accumulate_grad_batches", "ctx_len", "dataload", "data_shuffle", "random_seed", "epoch_steps")


def geometry(model: RWKV, data, config: TrainConfig, world: int) -> dict:
    sharded = config.strategy if config.strategy.startswith("deepspeed") else "auto"
    of_data = {"samples": data.samples, "tokens": data.documents.total_tokens}
    flags = {name: getattr(config, name) for name in GEOMETRY}
    return {"devices": world, "strategy": sharded, "base": getattr(model, "fingerprint", "new"), **of_data, **flags}


def go_on(module, rank: int, now: dict) -> None:
    """Put the newest checkpoint's state into the run, if there is one."""
    module.restored = resume.newest(module.config.proj_dir, rank)
    if module.restored is None:
        return
    run, _ = module.restored
    for name, value in run["geometry"].items():
        if now[name] != value:
            raise UserError(f"--resume: the run was begun with {name} {value}, not {now[name]}; give what it began with")
    resume.restore_trained(module.model, run["trained"])
    module.step, module.seed = run["step"], run["seed"]


def begin(module, records) -> None:
    """Leave in proj_dir what belongs to the run up to here, and nothing else."""
    config, step, folder = module.config, module.step, Path(module.config.proj_dir)
    resume.clear(folder, step)
    if step == 0:
        for path in (*folder.glob("rwkv-*.*"), *(folder / name for name in ("loss_data.jsonl", "train_log.txt"))):
            path.unlink(missing_ok=True)
        (folder / "config.json").write_text(config.to_json())
        return
    print(f"resuming   after step {step}", flush=True)
    per_epoch = module.data.steps_per_epoch(records.geometry["devices"])
    if step == per_epoch * config.epoch_count:
        print("resuming   nothing to do: the run is complete", flush=True)
    if step % per_epoch == 0:  # stopped between the checkpoint and the result?
        records.complete_epoch(module, config.epoch_begin + step // per_epoch - 1, step)


def device_count(config: TrainConfig) -> int:
    if config.devices != "auto":
        return int(config.devices)
    return torch.cuda.device_count() if device_type(config) == "cuda" else 1


def quiet_lightning() -> None:
    """Lightning's hints speak to its programmers; what our users need we print."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
