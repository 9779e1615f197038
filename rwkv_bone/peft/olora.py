"""OLoRA (arXiv 2406.01775): a LoRA that starts at the first r columns and rows of W = Q R, B0 = Q_r and A0 = R_r."""

import torch

from .adapter import dense
from .shifted import ShiftedLoraLinear


class OloraLinear(ShiftedLoraLinear):
    @torch.no_grad()
    def start(self) -> None:
        Q, R = torch.linalg.qr(dense(self.weight).to(self.dtype))
        self.start_at(R[: self.config.r], Q[:, : self.config.r])
