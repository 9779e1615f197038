"""What one process, DDP and DeepSpeed do differently. The loop and all else in training/ know only the class `Engine`.

One process and DDP hold everything on each device. ZeRO divides it among the devices: stage 1 the optimiser's state, 2 the
gradients too, 3 all weights too. A run of one process imports no Lightning: that takes longer than importing torch.
"""

import functools
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..errors import UserError
from ..peft import adapter_tensors

BUCKET = 2 * 10**7  # elements that devices exchange at once; DeepSpeed keeps two such buffers


def device_type(config: TrainConfig) -> str:
    """cuda or cpu, by `--accelerator` and what is there."""
    there = torch.cuda.is_available()
    if config.accelerator == "cpu" or (config.accelerator == "auto" and not there):
        return "cpu"
    if not there:
        raise UserError(f"--accelerator {config.accelerator}: this torch sees no GPU; use --accelerator cpu or auto")
    return "cuda"


def device_count(config: TrainConfig) -> int:
    """Devices on this machine."""
    if config.devices != "auto":
        return int(config.devices)
    return torch.cuda.device_count() if device_type(config) == "cuda" else 1


def make_engine(config: TrainConfig, deepspeed: type | None = None) -> "Engine":
    """The engine for `--strategy`, `--devices` and `--num_nodes`. `deepspeed` replaces Fabric's DeepSpeedStrategy."""
    if config.strategy.startswith("deepspeed"):
        if deepspeed is None and device_type(config) == "cpu":
            raise UserError(f"--strategy {config.strategy} needs a GPU, and this run is on the CPU; there it is ddp or auto")
        return DeepSpeedEngine(config, deepspeed)
    if config.strategy == "ddp" or device_count(config) * config.num_nodes > 1:
        return DDPEngine(config)
    return Engine(config)


class Engine:
    """One process on one device."""

    sharded = False  # whether each device's optimiser state is another
    rank, world = 0, 1
    model: nn.Module
    module: Any
    optimiser: Any

    def __init__(self, config: TrainConfig):
        self.config = config
        self.device = torch.device(device_type(config))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def launch(self) -> None:
        """Start the other processes, unless a launcher has done it."""

    def setup(self, module: nn.Module, make_optimiser: Callable[[bool], torch.optim.Optimizer]) -> None:
        """Take a module with the attribute `model` into use. `make_optimiser(masters)`: see optimiser.py."""
        self.module, self.model = module.to(self.device), module.get_submodule("model")
        self.optimiser = make_optimiser(True)

    # ------------------------------------------------ one step

    def forward(self, *args):
        """The module's forward."""
        return self.module(*args)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of `loss`; `last` is the last call of the step, at which devices exchange them."""
        loss.backward()

    def step(self, clip: float) -> float:
        """Clip to the norm `clip` (0: not), step, drop the gradients. Returns the norm before; if that is not finite, no step."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        norm = float(torch.nn.utils.clip_grad_norm_(trained, clip or math.inf))
        if math.isfinite(norm):
            self.optimiser.step()
        self.optimiser.zero_grad()
        return norm

    # ------------------------------------------------ among devices

    def sum(self, values: list[float | Tensor]) -> list[float]:
        """Sums over all devices; one exchange."""
        return [float(v) for v in values]

    def max(self, values: Tensor) -> Tensor:
        """Largest values over all devices."""
        return values

    def broadcast(self, value: Any) -> Any:
        """The first device's value."""
        return value

    def barrier(self) -> None:
        """Wait until all devices are here."""

    # ------------------------------------------------ what is saved

    def trained(self) -> dict[str, Tensor]:
        """What a file needs beside the base, whole. All devices must ask; the first gets it."""
        return adapter_tensors(self.model)

    def optimiser_state(self) -> dict[str, Any]:
        return self.optimiser.state_dict()

    def load_optimiser_state(self, state: dict[str, Any]) -> None:
        self.optimiser.load_state_dict(state)


class DDPEngine(Engine):
    """Several processes by Lightning Fabric, each with the whole model: they average their gradients once a step."""

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        self.fabric = import_fabric()(
            accelerator="cuda" if self.device.type == "cuda" else "cpu",
            devices=device_count(config),
            num_nodes=config.num_nodes,
            strategy=self.strategy(),
        )
        self.world = device_count(config) * config.num_nodes

    def strategy(self) -> Any:
        return "ddp"

    def launch(self) -> None:
        self.fabric.launch()
        self.rank, self.world, self.device = self.fabric.global_rank, self.fabric.world_size, self.fabric.device

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()
        if last:
            self.average_gradients()

    def average_gradients(self) -> None:
        """Over the devices, once a step, whatever number of forward passes each of them took (torch's DDP counts these)."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for p in trained:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        for bucket in buckets([p.grad for p in trained if p.grad is not None]):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            flat = self.fabric.all_reduce(flat, reduce_op="mean")
            for gradient, averaged in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(averaged.view_as(gradient))

    def sum(self, values: list[float | Tensor]) -> list[float]:
        tensor = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values])
        return self.fabric.all_reduce(tensor, reduce_op="sum").tolist()

    def max(self, values: Tensor) -> Tensor:
        return self.fabric.all_reduce(values.to(self.device), reduce_op="max")

    def broadcast(self, value: Any) -> Any:
        return self.fabric.broadcast(value)

    def barrier(self) -> None:
        self.fabric.barrier()


class DeepSpeedEngine(DDPEngine):
    """ZeRO. DeepSpeed averages, clips and steps, on float32 masters of its own."""

    sharded = True

    def __init__(self, config: TrainConfig, strategy: type | None = None):
        self.strategy_class = strategy
        super().__init__(config)

    def strategy(self) -> Any:
        import_fabric()
        from lightning.fabric.strategies import DeepSpeedStrategy

        match = re.fullmatch(r"deepspeed_stage_(\d)(_offload)?", self.config.strategy)
        assert match is not None  # config.py has checked it
        offload: dict[str, Any] = {"offload_optimizer": {"device": "cpu", "pin_memory": True}} if match[2] else {}
        if match[2] and match[1] == "3":
            offload["offload_param"] = {"device": "cpu", "pin_memory": True}
        zero = {"stage": int(match[1]), "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET, **offload}
        return (self.strategy_class or DeepSpeedStrategy)(
            config={
                "zero_optimization": zero,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,  # torch's AdamW steps on the CPU as well, and needs no compiler
                "gradient_clipping": self.config.grad_clip,
                "train_micro_batch_size_per_gpu": 1,
            }
        )

    def setup(self, module, make_optimiser) -> None:
        precision = self.fabric.strategy.precision  # dtypes are the model's own: nothing is cast
        precision.convert_module = precision.convert_input = precision.convert_output = lambda value: value
        self.model = module.get_submodule("model")
        self.module, _ = self.fabric.setup(module, make_optimiser(False))
        self.deepspeed = self.fabric.strategy.model  # DeepSpeed's engine, which Fabric's module wraps
        self.optimiser = self.deepspeed.optimizer

    def backward(self, loss: Tensor, last: bool) -> None:
        # DeepSpeed would divide by its count of micro batches, which stays 1: the boundary is ours to set
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.fabric.backward(loss, model=self.module)

    def step(self, clip: float) -> float:
        self.deepspeed.step()
        skipped = getattr(self.deepspeed.optimizer, "overflow", False)  # it does not step on what is not finite
        return math.nan if skipped else float(self.deepspeed.get_global_grad_norm())

    def trained(self) -> dict[str, Tensor]:
        import deepspeed

        places = dict([*self.model.named_parameters(), *self.model.named_buffers()])
        whole = {}
        for name in adapter_tensors(self.model):
            with deepspeed.zero.GatheredParameters([places[name]]):  # one at a time; of stages 1 and 2 it does nothing
                if self.first:
                    whole[name] = places[name].detach().cpu().clone()
        return whole

    @property
    def masters(self) -> list[Tensor]:
        """This device's float32 part of each group of what trains."""
        optimiser = self.deepspeed.optimizer
        return getattr(optimiser, "fp32_partitioned_groups_flat", None) or optimiser.single_partition_of_fp32_groups

    def optimiser_state(self) -> dict[str, Any]:
        state = self.deepspeed.optimizer.optimizer.state
        return {"parts": [{"master": master.detach(), **state[master]} for master in self.masters]}

    @torch.no_grad()
    def load_optimiser_state(self, state: dict[str, Any]) -> None:
        into = self.deepspeed.optimizer.optimizer.state
        for master, part in zip(self.masters, state["parts"], strict=True):
            master.copy_(part.pop("master"))
            into[master] = {name: t.to(master.device) for name, t in part.items()}


def buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype at a time, of BUCKET elements together at the most where one alone has no more."""
    size, bucket = 0, list[Tensor]()
    for t in sorted(tensors, key=lambda t: str(t.dtype)):
        if bucket and (size + t.numel() > BUCKET or t.dtype != bucket[0].dtype):
            yield bucket
            size, bucket = 0, []
        bucket.append(t)
        size += t.numel()
    if bucket:
        yield bucket


@functools.cache
def import_fabric() -> Any:
    """lightning.fabric.Fabric, silent: its hints speak to programmers, and what users need we print."""
    for name in ("lightning.fabric", "lightning.fabric.utilities.rank_zero", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    from lightning.fabric import Fabric

    return Fabric


def lost_device(error: RuntimeError) -> bool:
    """Whether torch.distributed says that it cannot reach a device: gloo by its text, NCCL by its type."""
    import torch.distributed as dist

    return isinstance(error, getattr(dist, "DistError", ())) or "gloo/transport" in str(error)
