"""WKV7 in plain torch: the recurrence, which is the definition, and the same in matrix products over chunks.

    S_t = S_{t-1} diag(w_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T          w_t = exp(log_w_t)
    y_t = S_t r_t
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 16  # tokens: the triangular systems of longer ones lose precision where the same token comes again and again


def wkv7_reference(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """WKV7, one step after the other: the truth that every kernel is compared with.

    r, log_w, k, v, a, b: (B, T, H, N); state: (B, H, N, N) indexed [value, key], or None for zeros; reset: (B, T) bool, True at a
    token before which the state becomes zero, or None for nowhere.
    Returns y (B, T, H, N) in r's dtype and the final state (B, H, N, N). Computes in float32, or float64 if r is.
    """
    compute = torch.float64 if r.dtype == torch.float64 else torch.float32
    B, T, H, N = r.shape
    y_dtype = r.dtype
    r, log_w, k, v, a, b = (x.to(compute) for x in (r, log_w, k, v, a, b))
    state = r.new_zeros(B, H, N, N) if state is None else state.to(compute)
    resets = [None] * T if reset is None else reset.view(B, T, 1, 1, 1).unbind(1)
    ys = []
    # unbind once: indexing x[:, t] in the loop makes the backward pass quadratic in T
    for r_t, w_t, k_t, v_t, a_t, b_t, reset_t in zip(*(x.unbind(1) for x in (r, log_w.exp(), k, v, a, b)), resets):
        if reset_t is not None:
            state = state.masked_fill(reset_t, 0)
        removed = state @ a_t.unsqueeze(-1)  # (B, H, N, 1)
        state = state * w_t.unsqueeze(-2) + removed * b_t.unsqueeze(-2) + v_t.unsqueeze(-1) * k_t.unsqueeze(-2)
        ys.append((state @ r_t.unsqueeze(-1)).squeeze(-1))  # (B, H, N)
    return torch.stack(ys, 1).to(y_dtype), state


def wkv7_chunked(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """wkv7_reference in matrix products over chunks of CHUNK tokens, over which log_w may sum to -87 at the least.

    What is removed, u_t = S_{t-1} a_t, depends on what earlier tokens of the chunk removed: a triangular system, solved by
    substitution. With c the sum of log_w up to and with a token, decays within a chunk are products of exp(c) and exp(-c). Pairs
    of tokens of different documents are masked; `document` counts the resets since the chunk's start.
    """
    compute = torch.float64 if r.dtype == torch.float64 else torch.float32
    B, T, H, N = r.shape
    y_dtype, L = r.dtype, CHUNK
    C = -(-T // L)

    def chunks(x: Tensor) -> Tensor:  # a padding token adds nothing and forgets nothing
        x = F.pad(x.to(compute), (0, 0, 0, 0, 0, C * L - T))
        return x.view(B, C, L, H, N).permute(0, 3, 1, 2, 4).contiguous()  # (B, H, C, L, N)

    r, log_w, k, v, a, b = (chunks(x) for x in (r, log_w, k, v, a, b))
    until = log_w.cumsum(-2)  # from the chunk's start, this token's decay included
    total = until[..., -1:, :]
    r, a = r * until.exp(), a * (until - log_w).exp()
    r_in, a_in = r, a  # what reads the state before the chunk
    k_out, b_out = k * (total - until).exp(), b * (total - until).exp()
    k, b = k * (-until).exp(), b * (-until).exp()
    a_pairs, r_pairs = (torch.ones(L, L, dtype=torch.bool, device=r.device).tril(d) for d in (-1, 0))
    kept = total.exp()
    if reset is not None:
        document = F.pad(reset, (0, C * L - T)).view(B, 1, C, L).cumsum(-1)
        same = document.unsqueeze(-1) == document.unsqueeze(-2)  # (B, 1, C, L, L)
        a_pairs, r_pairs = a_pairs & same, r_pairs & same
        first, last = (document == 0).unsqueeze(-1), (document == document[..., -1:]).unsqueeze(-1)  # (B, 1, C, L, 1)
        r_in, a_in, k_out, b_out = r_in * first, a_in * first, k_out * last, b_out * last
        kept = kept * first[..., -1:, :]

    def pairs(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return (x @ y.mT).masked_fill(~mask, 0)

    # u = a_in S^T + (pairs of a and k) v + (pairs of a and b) u, for each chunk's initial state S
    system = torch.eye(L, dtype=compute, device=r.device) - pairs(a, b, a_pairs)
    u_of_state, u_of_v = torch.linalg.solve_triangular(
        system, torch.cat([a_in, pairs(a, k, a_pairs) @ v], -1), upper=False, unitriangular=True
    ).split(N, -1)
    r_b = pairs(r, b, r_pairs)
    y = pairs(r, k, r_pairs) @ v + r_b @ u_of_v
    y_of_state = r_in + r_b @ u_of_state  # (B, H, C, L, N)
    added = v.mT @ k_out + u_of_v.mT @ b_out
    carried = u_of_state.mT @ b_out  # S becomes S diag(kept) + S carried + added
    state = r.new_zeros(B, H, N, N) if state is None else state.to(compute)
    states = []
    for kept_c, carried_c, added_c in zip(kept.unbind(2), carried.unbind(2), added.unbind(2)):
        states.append(state)
        state = state * kept_c + state @ carried_c + added_c
    y = y + y_of_state @ torch.stack(states, 2).mT
    return y.permute(0, 2, 3, 1, 4).reshape(B, C * L, H, N)[:, :T].to(y_dtype), state
