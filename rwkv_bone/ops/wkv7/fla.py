"""WKV7 by flash-linear-attention's Triton kernels (package fla-core or rwkv-fla), which need no nvcc."""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor


def wkv7_fla(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """wkv7 with the arguments of wkv7_reference. States are [key, value] there. A reset begins another sequence of their
    "variable length" form, in which all sequences lie in one row."""
    from fla.ops.rwkv7 import chunk_rwkv7

    # rwkv-fla's argument w is log(-log_w), and it has another for log_w
    decay = "log_w" if "log_w" in inspect.signature(chunk_rwkv7).parameters else "w"
    state = None if state is None else state.mT.contiguous()
    more: dict[str, Tensor] = {}
    B, T, H, N = r.shape
    if reset is not None:
        begins = F.pad(reset[:, 1:], (1, 0), value=True)  # (B, T): the rows' first tokens, and where the state is reset
        starts = begins.flatten().nonzero().flatten()
        firsts = begins.sum(1).cumsum(0) - begins.sum(1)  # (B,): the number of each row's first sequence
        given = r.new_zeros(B, H, N, N, dtype=torch.float32) if state is None else state.masked_fill(reset[:, :1, None, None], 0)
        state = given.new_zeros(len(starts), H, N, N).index_copy(0, firsts, given)
        more["cu_seqlens"] = F.pad(starts, (0, 1), value=B * T)
        r, log_w, k, v, a, b = (x.view(1, B * T, H, N) for x in (r, log_w, k, v, a, b))
    y, final = chunk_rwkv7(
        r=r, k=k, v=v, a=a, b=b, scale=1.0, initial_state=state, output_final_state=True, **{decay: log_w}, **more
    )
    if reset is not None:
        final = final[begins.sum(1).cumsum(0) - 1]
    return y.view(B, T, H, N), final.mT.contiguous()
