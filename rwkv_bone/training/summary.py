"""What a person reads before a run's first step and at its end."""

import math
from pathlib import Path

import torch
from torch import nn

from ..config import TrainConfig
from ..errors import UserError
from ..models import LanguageModel
from ..peft import METHODS, adapters
from ..peft.adapter import QuantisedWeight
from ..terminal import counted, fitted, in_bytes
from . import verdict
from .loader import TrainingData
from .memory import estimate
from .outputs import RunFolder
from .strategies import device_type


def precision(config: TrainConfig) -> str:
    """bf16, tf32 or fp32."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if device_type(config) == "cuda" else "fp32"


def base_dtype(config: TrainConfig) -> torch.dtype:
    """The dtype in which the base is kept and activations flow; adapters are float32 in any case."""
    return torch.bfloat16 if precision(config) == "bf16" else torch.float32


def native_bf16() -> bool:
    """Whether the current GPU computes in bf16 itself (NVIDIA's from compute capability 8.0 on)."""
    return torch.version.hip is not None or torch.cuda.get_device_capability() >= (8, 0)


def trained_by_part(model: LanguageModel) -> dict[str, tuple[int, int]]:
    """What trains: part (`att.key`, `emb`, `time`, ...) -> (tensors, parameters)."""
    parts: dict[str, tuple[int, int]] = {}
    layers = adapters(model)
    for name, p in model.named_parameters():
        if p.requires_grad:
            owner, _, last = name.rpartition(".")
            of_adapter = owner in layers and last not in ("weight", "bias")
            part = model.part_of(f"{owner}.weight" if of_adapter else name)
            count, size = parts.get(part, (0, 0))
            parts[part] = (count + 1, size + p.numel())
    return parts


def describe(
    model: LanguageModel, data: TrainingData, config: TrainConfig, world: int, recommended: float, multiplied_by: str = ""
) -> str:
    """All that a person wants to know before the first step. `multiplied_by`: the library of float32 products."""
    quantised = [math.prod(m.shape) for m in model.modules() if isinstance(m, QuantisedWeight)]
    total = sum(p.numel() for p in model.parameters()) + sum(quantised)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    added = sum(parameters_of(a) for a in adapters(model).values())
    if config.train_type == "state":
        added = trained
    steps = data.steps_per_epoch(world)
    device = device_type(config)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {counted(torch.get_num_threads(), 'thread')}"
    lines = [f"note       {note}" for note in config.notes]
    lines += [
        f"model      {config.load_model or 'new'}: {model.describe()}, {total - added:,} parameters",
        *(f"data       {line}" for line in data.describe(world)),
    ]
    above = [*map(fitted, lines), *(f"data       {line}" for line in (data.first_document() if config.dry_run else []))]
    lines = [
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
    why = f"; recommended for {config.peft if config.peft != 'none' else 'this'}, --lr_init sets another"
    warm_up = counted(config.warmup_steps, "warm-up step")
    lines.append(f"rate       {schedule}, {warm_up}{why * config.lr_recommended}")
    if warning := verdict.before(config, steps, len(data.samples), world, recommended):
        lines.append(f"           {warning}")
    engine = config.strategy if config.strategy != "auto" else "ddp" if world > 1 else "one process"
    kernels = [model.kernels(device, base_dtype(config))]
    kernels += [METHODS[config.peft].kernels(device, base_dtype(config))] if config.peft != "none" else []
    by = f" by {multiplied_by}" if multiplied_by and base_dtype(config) == torch.float32 else ""
    lines.append(f"device     {world} x {name}, {precision(config)}{by}, engine: {', '.join(filter(None, [engine, *kernels]))}")
    if device == "cuda" and base_dtype(config) == torch.bfloat16 and not native_bf16():
        cure = "--precision fp32 takes more memory and may be faster"
        lines.append(f"note       this GPU has no arithmetic in bf16: torch emulates it, which is slow; {cure}")
    rows = min(config.micro_bsz, -(-len(data.samples) // world))  # no device has more
    parts = estimate(model, rows, data.longest_row(), config, world, device == "cuda")
    detail = ", ".join(f"{name} {in_bytes(size)}" for name, size in parts.items())
    lines.append(f"memory     about {in_bytes(sum(parts.values()))} a device: {detail}")
    last = config.epoch_begin + config.epoch_count - 1
    often = "epoch" if config.epoch_save == 1 else f"{config.epoch_save} epochs"
    earlier = f" at the end, and before it one after every {often}" if config.epoch_save < config.epoch_count else ""
    lines.append(f"files      {Path(config.proj_dir) / f'rwkv-{last}.pth'}{earlier}; "
                 f"checkpoints, train_log.txt, loss_data.jsonl and metrics.csv beside it")  # fmt: skip
    return "\n".join([*above, *map(fitted, lines)])


def parameters_of(layer: nn.Module) -> int:
    return sum(p.numel() for name, p in layer.named_parameters() if name not in ("weight", "bias"))


def options_text(config: TrainConfig) -> str:
    layer = METHODS[config.peft]
    return ", ".join(f"{k}={v}" for k, v in vars(layer.config_from(config.peft_options, config.peft)).items())


def draw(folder: RunFolder) -> bool:
    """The run's curves as a picture beside its logs; where that cannot be, a line that says why. Whether it is there."""
    from ..plot import plot_runs

    try:
        folder.claim("loss.png")
        plot_runs([folder.path], folder / "loss.png")
    except UserError as error:
        print(f"no picture {error}", flush=True)
        return False
    return True
