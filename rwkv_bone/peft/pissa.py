"""PiSSA (arXiv 2404.02948): a LoRA that starts at the r largest singular directions of W, s B0 A0 = U_r S_r V_r^T."""

from dataclasses import dataclass

import torch

from ..errors import UserError
from .adapter import dense, option
from .lora import RankConfig
from .shifted import ShiftedLoraLinear


@dataclass(frozen=True)
class PissaConfig(RankConfig):
    svd_niter: int = option(4, "power iterations of the randomised SVD; 0: exact SVD, slower")

    def __post_init__(self):
        super().__post_init__()
        if self.svd_niter < 0:
            raise UserError(f"svd_niter must be at least 0, not {self.svd_niter}")


class PissaLinear(ShiftedLoraLinear):
    Config = PissaConfig
    config: PissaConfig

    @torch.no_grad()
    def start(self) -> None:
        r, niter = self.config.r, self.config.svd_niter
        w = dense(self.weight).to(self.dtype)
        if niter:
            U, S, V = torch.svd_lowrank(w, q=r, niter=niter)
        else:
            U, S, Vh = torch.linalg.svd(w, full_matrices=False)
            U, S, V = U[:, :r], S[:r], Vh[:r].T
        root = (S / self.scale).sqrt()
        self.start_at(root.unsqueeze(1) * V.T, U * root)
