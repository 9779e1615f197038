"""An adapter of any method as a LoRA, for programs that know nothing else: W' = W + B A, that is alpha = r.

MiSS and the LoRA family are LoRAs exactly. Any other update, and a smaller rank, is cut to the largest singular directions, by a
randomised SVD (Halko, Martinsson, Tropp 2011) with so much oversampling that it comes within a percent of the best.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..files.adapters import Adapter
from ..peft import AdapterLinear
from ..peft.adapter import dense
from ..peft.dora import DoraLinear
from ..peft.lora import LoraLinear
from ..peft.miss import MissLinear


def exact_factors(layer: AdapterLinear) -> tuple[Tensor, Tensor] | None:
    """A (k, in) and B (out, k) with W' = W + B A; None where the update has no such form."""
    if isinstance(layer, MissLinear):
        in_, r = layer.weight.shape[1], layer.config.r
        return torch.eye(r, device=layer.weight.device)[:, torch.arange(in_) % r], layer.D().T
    if isinstance(layer, LoraLinear) and not isinstance(layer, DoraLinear):
        A, B = layer.factors()
        return A, layer.scale * B
    return None


def best_factors(update: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (k, in) and B (out, k), k at most rank, with B A close to the best of that rank."""
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same adapter gives the same file
        U, S, V = torch.svd_lowrank(update, q=min(2 * rank + 16, *update.shape), niter=4)
    root = S[:rank].sqrt()
    return root.unsqueeze(1) * V[:, :rank].T, U[:, :rank] * root


@torch.no_grad()
def as_lora(
    adapter: Adapter, base: Mapping[str, Tensor], rank: int = 0, device: str = "cpu"
) -> tuple[dict[str, Tensor], int, dict[str, tuple[float, float]]]:
    """The LoRA's tensors, its rank, and for each projection the size (Frobenius) of the update and of what is missing from it.

    `rank` 0 is the adapter's own: all of a LoRA, and r otherwise.
    """
    if not adapter.layers:
        raise UserError(f"{adapter.path}: holds no adapter, only parts of the base; there is nothing to make a LoRA of")
    tensors: dict[str, Tensor] = {name: adapter.tensors[name].clone() for name in adapter.parts}
    sizes = {}
    for name in adapter.layers:
        layer = adapter.layer(name, base[f"{name}.weight"].to(device))
        exact = exact_factors(layer)
        rank = rank or (len(exact[0]) if exact else layer.config.r)
        update = layer.merged_weight() - dense(layer.weight).to(layer.dtype)
        if not all(x.isfinite() for x in update.aminmax()):
            raise UserError(f"{adapter.path}: the update of {name} holds NaN or infinity; the training diverged")
        A, B = exact if exact and len(exact[0]) <= rank else best_factors(update, rank)
        sizes[name] = update.norm().item(), (update - B @ A).norm().item()
        missing = rank - len(A)  # a smaller projection than the rank, or a LoRA of less
        tensors[f"{name}.lora_A"] = F.pad(A, (0, 0, 0, missing)).cpu()
        tensors[f"{name}.lora_B"] = F.pad(B, (0, missing)).cpu()
    return tensors, rank, sizes
