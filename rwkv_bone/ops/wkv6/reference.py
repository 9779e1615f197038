"""WKV6 in plain torch: the recurrence, which is the definition, and the same in matrix products.

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
    B, _, H, N = r.shape
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


def wkv6_chunked(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor | None = None, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """wkv6_reference in matrix products over chunks of `chunk` tokens (a power of two), stable for every decay.

    A chunk sees the tokens before it through the state, and its own by halving: the upper half of 2n tokens sees the
    lower half through decays that are split at the border between them, for n = chunk / 2, chunk / 4, ... 1. Decays are
    exponentials of sums of log_w, never of their negatives.
    """
    compute = torch.float64 if r.dtype == torch.float64 else torch.float32
    B, T, H, N = r.shape
    y_dtype = r.dtype
    while chunk >= 2 * T:
        chunk //= 2
    C = -(-T // chunk)

    def chunks(x: Tensor, dtype: torch.dtype) -> Tensor:  # a padding token adds nothing (k = 0) and forgets nothing
        x = torch.nn.functional.pad(x.to(dtype), (0, 0, 0, 0, 0, C * chunk - T))
        return x.view(B, C, chunk, H, N).permute(0, 3, 1, 2, 4).contiguous()  # (B, H, C, chunk, N)

    def exp(x: Tensor) -> Tensor:
        return x.to(compute).exp()

    r, k, v = (chunks(x, compute) for x in (r, k, v))
    # Sums in float64: their differences keep float32's precision however large the sums are. The bound is a decay of
    # exactly 0 in `compute`, and keeps -inf - -inf out of the differences.
    log_w = chunks(log_w.clamp(min=-120.0 if compute == torch.float32 else -800.0), torch.float64)
    until = log_w.cumsum(-2)  # from the chunk's start, this token's decay included
    before = until - log_w  # and without it

    y = (r * u.to(compute).view(H, 1, 1, N) * k).sum(-1, keepdim=True) * v
    n = chunk // 2
    while n:
        halves = (B, H, C, chunk // (2 * n), 2, n, N)
        (k_low, _), (_, r_up), (v_low, _) = (x.view(halves).unbind(-3) for x in (k, r, v))
        if n > 1:
            (until_low, _), (_, before_up) = until.view(halves).unbind(-3), before.view(halves).unbind(-3)
            border = before_up[..., :1, :]
            r_up = r_up * exp(before_up - border)
            k_low = k_low * exp(border - until_low)
        seen = (r_up @ k_low.mT) @ v_low
        y = y + torch.nn.functional.pad(seen.unsqueeze(-3), (0, 0, 0, 0, 1, 0)).view(B, H, C, chunk, N)
        n //= 2

    total = until[..., -1:, :]
    added = ((k * exp(total - until)).mT @ v).unbind(2)
    decays = exp(total).mT.unbind(2)
    state = r.new_zeros(B, H, N, N) if state is None else state.to(compute)
    states = []
    for decay, kv in zip(decays, added):
        states.append(state)
        state = decay * state + kv
    y = y + (r * exp(before)) @ torch.stack(states, 2)
    return y.permute(0, 2, 3, 1, 4).reshape(B, C * chunk, H, N)[:, :T].to(y_dtype), state
