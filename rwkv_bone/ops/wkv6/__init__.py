"""WKV6, the time mixing of RWKV-6 (arXiv 2404.05892, section 4.2): `wkv6`, and its definition `wkv6_reference`.

    S_t = diag(w_t) S_{t-1} + k_t^T v_t          w_t = exp(log_w_t), log_w <= 0
    y_t = r_t (S_{t-1} + diag(u) k_t^T v_t)
"""

import functools
from typing import NoReturn

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


OPS = ("auto", "torch", "cpu", "cuda")
COMPUTE = {torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}


def wkv6(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor | None = None, op: str = "auto"
) -> tuple[Tensor, Tensor]:
    """WKV6 with gradients for all six inputs and through the final state.

    r, k, v: (B, T, H, N), float32, bfloat16 or float64, contiguous. log_w: the same shape, <= 0 (-inf is w = 0), in
    r's dtype or float32. u: (H, N). state: (B, H, N, N) indexed [key, value], or None for zeros.
    Returns y (B, T, H, N) in r's dtype and the final state (B, H, N, N) in float32 (float64 if r is).
    op: "auto" (the kernel of r's device), "cpu", "cuda", or "torch" (needs no compiler, any device).
    Relative L2 errors against float64 in float32 on the CPU: 1e-6, at every decay.
    Raises ValueError that names the tensor, what was expected and what came.
    """
    compute = _check(r, k, v, log_w, u, state, op)
    u = u if u.dtype == compute else u.to(compute)
    if state is not None and state.dtype != compute:
        state = state.to(compute)
    if op == "torch":  # a chunk costs as much as 16 steps: sampling takes one at a time
        return (wkv6_chunked if r.shape[1] > 16 else wkv6_reference)(r, k, v, log_w, u, state)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (r, k, v, log_w, u, state))
    if save or torch.compiler.is_compiling() or type(r) is not Tensor:
        return _wkv6(r, k, v, log_w, u, state, save)[:2]
    return _kernels(r.device.type).forward(r, k, v, log_w, u, state, False)[:2]  # the op's own cost is above a step's


def describe(device: str, dtype: torch.dtype, N: int, op: str = "auto") -> str:
    """What wkv6 runs for r, k, v of `dtype` on `device` ("cpu", "cuda") with heads of N channels, in words."""
    return "chunked, in plain torch" if op == "torch" else _kernels(device).describe(dtype, N)


@functools.cache
def _kernels(device: str):
    """The one place that chooses a kernel: the module whose forward, backward, saved_shape and describe serve `device`."""
    if device == "cuda":
        from . import cuda

        return cuda
    from . import cpu

    return cpu


def _check(r, k, v, log_w, u, state, op: str) -> torch.dtype:
    """The dtype that wkv6 computes in for these arguments; a ValueError if they are not what it takes."""
    shape, dtype, device = r.shape, r.dtype, r.device
    compute = COMPUTE.get(dtype)
    good = (
        len(shape) == 4
        and 0 not in shape
        and compute is not None
        and shape == k.shape == v.shape == log_w.shape
        and u.shape == shape[2:]
        and dtype == k.dtype == v.dtype
        and log_w.dtype in (dtype, compute)
        and device == k.device == v.device == log_w.device == u.device
        and r.is_contiguous()
        and k.is_contiguous()
        and v.is_contiguous()
        and log_w.is_contiguous()
        and u.is_contiguous()
        and u.is_floating_point()
        and (op == device.type or (op == "auto" and device.type in ("cpu", "cuda")) or op == "torch")
    )
    if good and state is not None:
        good = (
            state.shape == (shape[0], shape[2], shape[3], shape[3])
            and state.device == device
            and state.is_contiguous()
            and state.is_floating_point()
        )
    if not good or compute is None:
        _refuse(r, k, v, log_w, u, state, op)
    return compute


def _refuse(r, k, v, log_w, u, state, op: str) -> NoReturn:
    """Raise the ValueError that says why _check does not take these arguments."""
    if op not in OPS:
        raise ValueError(f"wkv6: op must be one of {', '.join(OPS)}, not {op!r}")
    if r.dim() != 4 or 0 in r.shape:
        raise ValueError(f"wkv6: r must have shape (B, T, H, N), none of them 0, not {tuple(r.shape)}")
    B, _, H, N = r.shape
    if r.dtype not in COMPUTE:
        raise ValueError(f"wkv6: r must be float32, bfloat16 or float64, not {r.dtype}")
    expected = {"k": r.shape, "v": r.shape, "log_w": r.shape, "u": (H, N), "state": (B, H, N, N)}
    inputs = {"r": r, "k": k, "v": v, "log_w": log_w, "u": u, "state": state}
    if state is None:
        del inputs["state"]
    for name, x in inputs.items():
        if name != "r" and x.shape != expected[name]:
            raise ValueError(f"wkv6: {name} must have shape {tuple(expected[name])} as r has, not {tuple(x.shape)}")
        if x.device != r.device:
            raise ValueError(f"wkv6: {name} must be on {r.device} as r is, not on {x.device}")
        if name in ("k", "v") and x.dtype != r.dtype:
            raise ValueError(f"wkv6: {name} must be {r.dtype} as r is, not {x.dtype}")
        if name == "log_w" and x.dtype not in (r.dtype, COMPUTE[r.dtype]):
            raise ValueError(f"wkv6: log_w must be {r.dtype} as r is, or {COMPUTE[r.dtype]}, not {x.dtype}")
        if not x.is_floating_point():
            raise ValueError(f"wkv6: {name} must be floating-point, not {x.dtype}")
        if not x.is_contiguous():
            raise ValueError(f"wkv6: {name} must be contiguous, and has strides {x.stride()}; call .contiguous()")
    if op in ("cpu", "cuda"):
        raise ValueError(f"wkv6: op={op!r} takes tensors on {op}, and r is on {r.device}")
    raise ValueError(f"wkv6: there is no kernel for {r.device.type}; use op='torch'")


@torch.library.custom_op("rwkv_bone::wkv6", mutates_args=())
def _wkv6(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels(r.device.type).forward(r, k, v, log_w, u, state, save)


@_wkv6.register_fake
def _(r, k, v, log_w, u, state, save):
    B, _, H, N = r.shape
    saved = _kernels(r.device.type).saved_shape(r) if save else (0,)
    return torch.empty_like(r), u.new_empty(B, H, N, N), u.new_empty(saved)


@torch.library.custom_op("rwkv_bone::wkv6_backward", mutates_args=())
def _wkv6_backward(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, saved: Tensor, gy: Tensor, gfinal: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _kernels(r.device.type).backward(r, k, v, log_w, u, saved, gy, gfinal)


@_wkv6_backward.register_fake
def _(r, k, v, log_w, u, saved, gy, gfinal):
    B, _, H, N = r.shape
    return (*map(torch.empty_like, (r, k, v, log_w, u)), u.new_empty(B, H, N, N))


def _setup_context(ctx, inputs, output) -> None:
    r, k, v, log_w, u, state, _save = inputs
    ctx.set_materialize_grads(False)
    ctx.has_state = state is not None
    ctx.save_for_backward(r, k, v, log_w, u, output[2])


def _autograd(ctx, gy: Tensor | None, gfinal: Tensor | None, _gsaved):
    r, k, v, log_w, u, saved = ctx.saved_tensors
    gy = torch.zeros_like(r) if gy is None else gy.contiguous()
    gfinal = None if gfinal is None else gfinal.contiguous()
    *grads, gstate = _wkv6_backward(r, k, v, log_w, u, saved, gy, gfinal)
    return *grads, gstate if ctx.has_state else None, None


_wkv6.register_autograd(_autograd, setup_context=_setup_context)
