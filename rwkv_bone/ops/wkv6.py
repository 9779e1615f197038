"""WKV6, the time mixing of RWKV-6 (arXiv 2404.05892, section 4.2): `wkv6`, and its definition `wkv6_reference`.

    S_t = diag(w_t) S_{t-1} + k_t^T v_t          w_t = exp(log_w_t), log_w <= 0
    y_t = r_t (S_{t-1} + diag(u) k_t^T v_t)
"""

import torch
from torch import Tensor


def wkv6_reference(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """WKV6 in plain torch, one step after the other: the truth that every kernel is compared with.

    r, k, v, log_w: (B, T, H, N); u: (H, N); state: (B, H, N, N) indexed [key, value], or None for zeros.
    Returns y (B, T, H, N) in r's dtype and the final state (B, H, N, N). Computes in float32, or float64 if r is.
    """
    compute = torch.float64 if r.dtype == torch.float64 else torch.float32
    B, T, H, N = r.shape
    y_dtype = r.dtype
    r, k, v, log_w, u = (x.to(compute) for x in (r, k, v, log_w, u))
    state = r.new_zeros(B, H, N, N) if state is None else state.to(compute)
    w = log_w.exp()
    ys = []
    # unbind once: indexing x[:, t] in the loop makes the backward pass quadratic in T
    for r_t, k_t, v_t, w_t in zip(r.unbind(1), k.unbind(1), v.unbind(1), w.unbind(1)):
        kv = k_t.unsqueeze(-1) * v_t.unsqueeze(-2)  # (B, H, N, N)
        ys.append((r_t.unsqueeze(-2) @ (state + u.unsqueeze(-1) * kv)).squeeze(-2))  # (B, H, N)
        state = w_t.unsqueeze(-1) * state + kv
    return torch.stack(ys, 1).to(y_dtype), state


def wkv6(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor | None = None, op: str = "auto"
) -> tuple[Tensor, Tensor]:
    return wkv6_reference(r, k, v, log_w, u, state)
