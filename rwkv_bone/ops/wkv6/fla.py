"""WKV6 by flash-linear-attention's Triton kernels (package fla-core or rwkv-fla), which need no nvcc."""

from torch import Tensor

LEAST_LOG_W = -60.0  # a decay of e^-60 leaves nothing in float32, and -inf - -inf would be NaN


def wkv6_fla(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """wkv6 with the arguments of wkv6_reference; states [key, value] there too. Their `fused_recurrent_rwkv6` is no substitute:
    its gradients leave out the final state's."""
    from fla.ops.rwkv6 import chunk_rwkv6

    return chunk_rwkv6(r, k, v, log_w.clamp(min=LEAST_LOG_W), u, scale=1.0, initial_state=state, output_final_state=True)
