"""What the tests of the recurrences' kernels share: inputs as models have them, the truth in float64, guarded memory."""

import functools

import torch
import torch.nn.functional as F
from cuda_shim import assert_guards_intact, error, guarded, guarded_nan

from rwkv_bone.ops import wkv6, wkv7
from rwkv_bone.ops.recurrence import names_of

FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
OPS = {"wkv6": wkv6.recurrence, "wkv7": wkv7.recurrence}
LEAST_LOG_W = -0.60653066  # of RWKV-7
# wkv6: ranges of log(-log_w). none: 0; normal: to -0.6; strong: to -20; extreme: to -148; mixed: -150 beside -0.01; cut: -inf
DECAYS = {"none": None, "normal": (-6.0, -0.5), "strong": (-6.0, 3.0), "extreme": (-6.0, 5.0)}
# wkv7: strong and weak: log_w at its bounds; repeat: one token again and again, gate 1 and w 1, where triangular systems are at
# their worst; slow: remembered over hundreds of tokens
REGIMES = {"wkv6": (*DECAYS, "mixed", "cut"), "wkv7": ("random", "strong", "weak", "repeat", "slow")}
USUAL = {"wkv6": "normal", "wkv7": "random"}
WITH_REGIMES = [(name, regime) for name in OPS for regime in REGIMES[name]]
SMOOTH = [case for case in WITH_REGIMES if case[1] not in ("mixed", "cut", "slow")]  # four of each


def log_decays(regime, shape):
    if regime == "mixed":  # next to each other in one channel: sums over tokens must not lose the small ones
        return torch.where(torch.rand(shape) < 0.3, -150.0, -0.01)
    if regime == "cut":  # w = 0 forgets everything
        return torch.where(torch.rand(shape) < 0.2, -torch.inf, -0.1 * torch.rand(shape))
    if DECAYS[regime] is None:
        return torch.zeros(shape)
    low, high = DECAYS[regime]
    return -torch.exp(torch.rand(shape) * (high - low) + low)


def make_inputs(name, B, T, H, N, regime="", dtype=FP32, w_dtype=None, state=True, resets=0.0, seed=0):
    """The inputs of the op `name` in its order, None where one is absent, and the gradients of y and of the final state."""
    torch.manual_seed(seed)
    regime = regime or USUAL[name]
    own, states = dtype, FP64 if dtype == FP64 else FP32
    r, k, v, gy, x, kk = (torch.randn(B, T, H, N) for _ in range(6))
    s, g_final, u, gate = torch.randn(B, H, N, N), torch.randn(B, H, N, N), torch.randn(H, N), torch.rand(B, T, H, N)
    given = {"r": r, "k": k, "v": v}
    if name == "wkv6":
        given |= {"log_w": log_decays(regime, (B, T, H, N)), "u": u}
    else:
        x = {"random": 6 * x, "strong": x.abs() + 12, "weak": -x.abs() - 15, "repeat": -x.abs() - 40, "slow": 4 * x}[regime]
        if regime == "repeat":
            kk, gate = kk[:, :1].expand_as(kk), torch.ones_like(gate)
        kk = F.normalize(kk, dim=-1).to(own)
        given |= {"log_w": LEAST_LOG_W * torch.sigmoid(x) / (50 if regime == "slow" else 1), "a": -kk, "b": kk * gate}
    given = {n: z.to((w_dtype or own) if n == "log_w" else states if n == "u" else own).contiguous() for n, z in given.items()}
    given |= {"state": s.to(states) if state else None, "reset": torch.rand(B, T) < resets if resets else None}
    return [given[n] for n in names_of(OPS[name].inputs)], gy.to(own), g_final.to(states) if state else None


def changed(name, inputs, **others):
    """The inputs with some of them, by name, replaced by what a function makes of them, or by another value."""
    names = names_of(OPS[name].inputs)
    return [others[n](x) if callable(others.get(n)) else others.get(n, x) for n, x in zip(names, inputs)]


def named(name, y, final_state, gradients):
    return {"y": y, "final_state": final_state, **{f"g_{n}": g for n, g in zip(names_of(OPS[name].inputs), gradients)}}


def without_state(name, inputs):
    return [x for n, x in zip(names_of(OPS[name].inputs), inputs) if n != "state"]


def reference(name, inputs, gy, g_final):
    """The definition, step by step in float64: y, the final state, and the gradients by autograd, by name."""
    leaves = [x if x is None or x.dtype == torch.bool else x.double().requires_grad_() for x in inputs]
    y, final_state = OPS[name].reference(*leaves)
    loss = (y * gy.double()).sum() + (0 if g_final is None else (final_state * g_final.double()).sum())
    names = [n for n, x in zip(names_of(OPS[name].inputs), leaves) if x is not None and x.requires_grad]
    found = torch.autograd.grad(loss, [x for x in leaves if x is not None and x.requires_grad])
    return {"y": y.detach(), "final_state": final_state.detach(), **{f"g_{n}": g for n, g in zip(names, found)}}


@functools.cache
def case(name, *sizes, **options):
    """Inputs and gradients of `make_inputs`, and the truth."""
    inputs, gy, g_final = make_inputs(name, *sizes, **options)
    return inputs, gy, g_final, reference(name, inputs, gy, g_final)


def errors(got, want):
    """Relative L2 errors by name. WKV7's gradient of log_w, a sum of terms that may all cancel, counts as a tenth of r's."""
    found = {n: error(got[n], x) for n, x in want.items()}
    size, floor = want["g_log_w"].norm(), 0.1 * want["g_r"].norm()
    return found if "g_u" in want or not 0 < size < floor else found | {"g_log_w": found["g_log_w"] * float(size / floor)}


def assert_close(got, want, limit):
    """limit: of the errors, or a function of what came that gives it."""
    limit_of = limit if callable(limit) else lambda x: limit
    wrong = {n: e for n, e in errors(got, want).items() if not e <= limit_of(got[n])}  # NaN is not <=
    assert not wrong


def assert_same(got, want):
    assert got.keys() == want.keys() and all(torch.equal(got[n], x) for n, x in want.items())


class Guarded:
    """Within it torch.empty and torch.empty_like give tensors of NaN between guards, which must be whole at the end."""

    def __init__(self, monkeypatch):
        self.patch, self.made = monkeypatch, []

    def empty(self, *shape, dtype=FP32, device=None):
        shape = tuple(shape[0]) if shape and not isinstance(shape[0], int) else shape
        self.made.append(guarded_nan(shape, dtype))
        return self.made[-1]

    def __enter__(self):
        self.context = self.patch.context()
        patch = self.context.__enter__()
        patch.setattr(torch, "empty", self.empty)
        patch.setattr(torch, "empty_like", lambda x: self.empty(*x.shape, dtype=x.dtype))
        return self

    def __exit__(self, *error):
        self.context.__exit__(*error)
        assert_guards_intact(*self.made)


def guard(x):
    return x if x is None or x.dtype == torch.bool else guarded(x)
