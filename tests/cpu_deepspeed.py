"""DeepSpeed on CPUs over gloo: Fabric's strategy without its guard. Import before deepspeed."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from lightning.fabric.strategies import DeepSpeedStrategy
from lightning.fabric.strategies.strategy import Strategy


class CpuDeepSpeed(DeepSpeedStrategy):
    def setup_environment(self) -> None:
        self._setup_distributed()
        Strategy.setup_environment(self)

    def _setup_distributed(self) -> None:
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False  # else it is built, for a minute
        self.parallel_devices = [torch.device("cpu", i) for i in range(len(self.parallel_devices))]
        super()._setup_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", self.local_rank)
