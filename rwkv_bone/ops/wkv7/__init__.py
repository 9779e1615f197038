"""WKV7, the time mixing of RWKV-7 (arXiv 2503.14456): `wkv7`, and its definition `wkv7_reference`.

    S_t = S_{t-1} diag(w_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T          w_t = exp(log_w_t), log_w <= 0
    y_t = S_t r_t
"""

from torch import Tensor

from ..cpu import RecurrenceKernels as CPUKernels
from ..cuda import RecurrenceKernels as CUDAKernels
from ..recurrence import OPS, STATE, Input, Recurrence, names_of
from .fla import wkv7_fla
from .reference import wkv7_chunked, wkv7_reference

__all__ = ["OPS", "cpu", "cuda", "describe", "recurrence", "wkv7", "wkv7_chunked", "wkv7_reference"]

INPUTS = (Input("log_w", dtype="r or compute"), Input("k"), Input("v"), Input("a"), Input("b"), STATE,
          Input("reset", "BT", "bool", optional=True))  # fmt: skip
cpu = CPUKernels("wkv7", names_of(INPUTS), checkpoint=64, widest=128, float64="portable")
cuda = CUDAKernels("wkv7", names_of(INPUTS), checkpoint=(64 * 64 + 16 * 64) // 2)
recurrence = Recurrence("wkv7", INPUTS, wkv7_reference, wkv7_chunked, wkv7_fla, {"cpu": cpu, "cuda": cuda})
describe = recurrence.describe


def wkv7(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None = None,
    reset: Tensor | None = None, op: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """WKV7 with gradients for r, log_w, k, v, a, b and state, and through the final state.

    r, k, v, a, b: (B, T, H, N), N at most 128, float32, bfloat16 or float64, contiguous. log_w: the same shape, in r's dtype or
    float32, <= 0, and over any 16 tokens at least -87 together (the model's is at least -0.607 a token; what cuts off the past
    is `reset`). state: (B, H, N, N) indexed [value, key], or None for zeros. reset: (B, T) bool, True at a token before which
    the state becomes zero, or None for nowhere.
    Returns y (B, T, H, N) in r's dtype and the final state (B, H, N, N) in float32 (float64 if r is).
    op: "auto" (on a GPU the fastest that is right there), "cpu", "cuda", "fla" (flash-linear-attention's kernels), or "torch"
    (needs no compiler, any device). On a GPU, UserError where the one asked for cannot be built or is wrong there.
    Raises ValueError that names the tensor, what was expected and what came.
    """
    return recurrence((r, log_w, k, v, a, b, state, reset), op)
