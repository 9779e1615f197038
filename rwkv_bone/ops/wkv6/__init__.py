"""WKV6, the time mixing of RWKV-6 (arXiv 2404.05892, section 4.2): `wkv6`, and its definition `wkv6_reference`.

    S_t = diag(w_t) S_{t-1} + k_t^T v_t          w_t = exp(log_w_t), log_w <= 0
    y_t = r_t (S_{t-1} + diag(u) k_t^T v_t)
"""

from torch import Tensor

from ..cpu import RecurrenceKernels as CPUKernels
from ..cuda import RecurrenceKernels as CUDAKernels
from ..recurrence import OPS, STATE, Input, Recurrence, names_of
from .fla import wkv6_fla
from .reference import wkv6_chunked, wkv6_reference

__all__ = ["OPS", "cpu", "cuda", "describe", "recurrence", "wkv6", "wkv6_chunked", "wkv6_reference"]

INPUTS = (Input("k"), Input("v"), Input("log_w", dtype="r or compute"), Input("u", "HN", "compute"), STATE)
cpu = CPUKernels("wkv6", names_of(INPUTS), checkpoint=128)
cuda = CUDAKernels("wkv6", names_of(INPUTS), checkpoint=(64 * 64 + 16 * 16) // 2)
recurrence = Recurrence("wkv6", INPUTS, wkv6_reference, wkv6_chunked, wkv6_fla, {"cpu": cpu, "cuda": cuda})
describe = recurrence.describe


def wkv6(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor | None = None, op: str = "auto"
) -> tuple[Tensor, Tensor]:
    """WKV6 with gradients for all six inputs and through the final state.

    r, k, v: (B, T, H, N), float32, bfloat16 or float64, contiguous. log_w: the same shape, <= 0 (-inf is w = 0), in
    r's dtype or float32. u: (H, N). state: (B, H, N, N) indexed [key, value], or None for zeros.
    Returns y (B, T, H, N) in r's dtype and the final state (B, H, N, N) in float32 (float64 if r is).
    op: "auto" (on a GPU the fastest that is right there), "cpu", "cuda", "fla" (flash-linear-attention's kernels), or "torch"
    (needs no compiler, any device). On a GPU, UserError where the one asked for cannot be built or is wrong there.
    Relative L2 errors against float64 in float32 on the CPU: 1e-6, at every decay.
    Raises ValueError that names the tensor, what was expected and what came.
    """
    return recurrence((r, k, v, log_w, u, state), op)
