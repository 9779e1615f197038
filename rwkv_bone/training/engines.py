"""What one device, DDP and DeepSpeed do differently in a step and in a checkpoint. All else in training/ knows only this.

One device and DDP hold everything on each device. ZeRO shares out over the devices: stage 1 the optimiser's state, 2 the
gradients too, 3 all weights too.
"""

import contextlib
import math
import re
from typing import Any

import torch
from torch import Tensor

from ..config import TrainConfig
from ..peft import adapter_tensors

BUCKET = 2 * 10**7  # elements that devices exchange at once; DeepSpeed keeps two such buffers


class Engine:
    """One device, or DDP, which averages whole gradients once a step."""

    sharded = False  # whether each device's optimiser state is another

    def __init__(self, module):
        self.module, self.trainer = module, module.trainer

    def forward(self, *args):
        """The module's forward, by way of the engine."""
        return self.module(*args)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of `loss`; `last` is the last call of the step, at which devices exchange them."""
        alone = self.trainer.world_size > 1 and not last
        with self.trainer.strategy.block_backward_sync() if alone else contextlib.nullcontext():
            self.module.manual_backward(loss)

    def step(self, clip: float) -> float:
        """Clip to the norm `clip` (0: not), step, drop the gradients. Returns the norm before; if that is not finite, no step."""
        optimiser = self.module.optimizers()
        trained = [p for p in self.module.model.parameters() if p.requires_grad]
        norm = float(torch.nn.utils.clip_grad_norm_(trained, clip or math.inf))
        if math.isfinite(norm):
            optimiser.step()
        optimiser.zero_grad()
        return norm

    def trained(self) -> dict[str, Tensor]:
        """What a file needs beside the base, whole. All devices must ask; the first gets it."""
        return adapter_tensors(self.module.model)

    def optimiser_state(self) -> dict[str, Any]:
        return self.module.optimizers().optimizer.state_dict()

    def load_optimiser_state(self, state: dict[str, Any]) -> None:
        self.module.optimizers().optimizer.load_state_dict(state)


class DeepSpeedEngine(Engine):
    """ZeRO. DeepSpeed averages, clips and steps, on float32 masters of its own."""

    sharded = True

    @property
    def deepspeed(self):
        return self.trainer.strategy.deepspeed_engine

    def forward(self, *args):
        return self.deepspeed(*args)

    def backward(self, loss: Tensor, last: bool) -> None:
        # the boundary is ours to say, and DeepSpeed's count of micro batches stays 1: it would divide by it
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.module.manual_backward(loss)

    def step(self, clip: float) -> float:
        self.module.optimizers().step()
        skipped = getattr(self.deepspeed.optimizer, "overflow", False)  # it does not step on what is not finite
        return math.nan if skipped else float(self.deepspeed.get_global_grad_norm())

    def trained(self) -> dict[str, Tensor]:
        import deepspeed

        model, first = self.module.model, self.trainer.is_global_zero
        places = dict([*model.named_parameters(), *model.named_buffers()])
        whole = {}
        for name in adapter_tensors(model):
            with deepspeed.zero.GatheredParameters([places[name]]):  # one at a time; of stages 1 and 2 it does nothing
                if first:
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


def make_strategy(config: TrainConfig, devices: int, deepspeed: type | None = None):
    """Lightning's strategy for `--strategy`; `deepspeed` replaces its DeepSpeedStrategy."""
    stage = re.fullmatch(r"deepspeed_stage_(\d)(_offload)?", config.strategy)
    if stage is None:
        return "ddp" if config.strategy == "auto" and devices > 1 else config.strategy
    if deepspeed is None:
        from lightning.pytorch.strategies import DeepSpeedStrategy as deepspeed
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": True}} if stage[2] else {}
    if stage[2] and stage[1] == "3":
        offload["offload_param"] = {"device": "cpu", "pin_memory": True}
    zero = {"stage": int(stage[1]), "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET, **offload}

    class Strategy(deepspeed):  # type: ignore[valid-type, misc]  # the base is known at run time alone
        def setup(self, trainer):
            self.precision_plugin.convert_module = lambda module: module  # dtypes are the model's own
            super().setup(trainer)

        def training_step(self, *args):  # Lightning's makes one forward of DeepSpeed of it; each micro batch must be one
            return self.lightning_module.training_step(*args)

    return Strategy(
        config={
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's AdamW steps on the CPU as well, and needs no compiler
            "gradient_clipping": config.grad_clip,
            "train_micro_batch_size_per_gpu": 1,
        }
    )
