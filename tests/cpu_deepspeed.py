"""DeepSpeed on CPUs over gloo: Lightning's strategy without its guard. Import before deepspeed."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DeepSpeedStrategy, ParallelStrategy


class CpuDeepSpeed(DeepSpeedStrategy):
    def setup_environment(self) -> None:
        ParallelStrategy.setup_environment(self)
        self.setup_distributed()

    def setup_distributed(self) -> None:
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False  # else it is built, for a minute
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", self.local_rank)
