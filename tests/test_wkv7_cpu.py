"""WKV7 on the CPU: the kernel of every instruction set against the recurrence in float64, by output, state and gradient."""

import functools

import pytest
import torch

from rwkv_bone.ops.wkv7 import cpu, wkv7_reference

NAMES = ("y", "final state", "r", "log_w", "k", "v", "a", "b", "state")
FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
VARIANTS = ["portable", "avx2", "avx512"]
DTYPES = {"fp32": (FP32, FP32), "bf16": (BF16, BF16), "bf16, log_w fp32": (BF16, FP32), "fp64": (FP64, FP64)}
FORMS = [(variant, dtype) for variant in VARIANTS for dtype in DTYPES if dtype != "fp64" or variant == "portable"]


@functools.cache
def make_inputs(B, T, H, N, dtype="fp32", with_state=True, with_resets=False, repeated=False, slow=False):
    """r, log_w, k, v, a, b, state (or None), reset (or None); the gradients of y and of the final state (or None)."""
    torch.manual_seed(1000 * T + N)
    own, w_dtype = DTYPES[dtype]
    r, k, v, gy, kk = (torch.randn(B, T, H, N, dtype=FP64) for _ in range(5))
    log_w, gate = -0.6065 * torch.sigmoid(4 * torch.randn(B, T, H, N, dtype=FP64)), torch.rand(B, T, H, N, dtype=FP64)
    if repeated:  # one removal key throughout, no decay and a full gate: the worst case of the chunked form
        kk = kk[:, :1].expand(kk.shape)
        log_w, gate = torch.zeros_like(log_w), torch.ones_like(gate)
    log_w = log_w / 50 if slow else log_w  # remembered over hundreds of tokens
    kk = torch.nn.functional.normalize(kk, dim=-1)
    tensors = [x.to(w_dtype if i == 1 else own).contiguous() for i, x in enumerate((r, log_w, k, v, -kk, kk * gate))]
    state, gfinal = (torch.randn(B, H, N, N, dtype=FP64 if own == FP64 else FP32) for _ in range(2))
    reset = torch.rand(B, T) < 0.1
    reset[0, 0] = reset[-1, T // 2] = True
    inputs = (*tensors, state if with_state else None, reset if with_resets else None)
    return inputs, gy.to(own), gfinal if with_state else None


@functools.cache
def truth(*case, **options):
    inputs, gy, gfinal = make_inputs(*case, **options)
    *tensors, state, reset = inputs
    B, _, H, N = gy.shape
    leaves = [x.double().requires_grad_() for x in (*tensors, torch.zeros(B, H, N, N) if state is None else state)]
    y, final_state = wkv7_reference(*leaves, reset)
    loss = (y * gy.double()).sum() + (0 if gfinal is None else (final_state * gfinal.double()).sum())
    return y.detach(), final_state.detach(), *torch.autograd.grad(loss, leaves)


def run(variant, inputs, gy, gfinal, threads=1):
    if variant not in cpu.variants:
        pytest.skip(f"this machine has no {variant}")
    y, final_state, saved = cpu.forward(*inputs, save=True, variant=variant, threads=threads)
    gradients = cpu.backward(*inputs[:6], inputs[7], saved, gy, gfinal, variant=variant, threads=threads)
    return y, final_state, *gradients


def errors(got, want):
    """Relative L2 errors. log_w's gradient, a sum of terms that may all cancel, counts as a tenth of r's at least."""
    found = {}
    for name, x, z in zip(NAMES, got, want):
        floor = 0.1 * want[2].norm() if name == "log_w" else 1e-9
        found[name] = float((x.double() - z).norm() / z.norm().clamp(min=floor))
    return found


def assert_close(got, want):
    """Results in bf16 carry its rounding: 1.7e-3 by this measure. NaN fails too."""
    limits = {FP32: 2e-6, BF16: 3e-3, FP64: 1e-13}
    found = errors(got, want)
    wrong = {name: error for (name, error), x in zip(found.items(), got) if not error <= limits[x.dtype]}
    assert not wrong


class Guarded:
    """Gives tensors that lie in larger ones; all of both is NaN at first."""

    MARGIN = 256

    def __init__(self):
        self.whole = []

    def empty(self, *shape, dtype):
        shape = torch.Size(shape[0] if isinstance(shape[0], tuple) else shape)
        self.whole.append((torch.full((shape.numel() + 2 * self.MARGIN,), torch.nan, dtype=dtype), shape.numel()))
        return self.whole[-1][0][self.MARGIN :][: shape.numel()].view(shape)

    def empty_like(self, x):
        return self.empty(*x.shape, dtype=x.dtype)

    def copy(self, x):
        return x if x is None or x.dtype == torch.bool else self.empty_like(x).copy_(x)

    def untouched(self):
        return all(x[: self.MARGIN].isnan().all() and x[self.MARGIN + size :].isnan().all() for x, size in self.whole)


@pytest.mark.parametrize(("variant", "dtype"), FORMS)
@pytest.mark.parametrize(
    ("T", "with_state", "with_resets"),  # chunks of 16, whole and cut; each option with a short and a long sequence
    [(1, True, False), (15, False, True), (16, True, True), (17, False, False), (63, True, False), (130, True, True)],
)
@pytest.mark.parametrize("N", [8, 64, 128])
def test_equals_the_recurrence_and_writes_its_results_only(variant, dtype, T, with_state, with_resets, N, monkeypatch):
    case = ((2 if N == 8 else 1), T, (3 if N == 8 else 1), N, dtype, with_state, with_resets)
    inputs, gy, gfinal = make_inputs(*case)
    guard = Guarded()
    given = [guard.copy(x) for x in inputs], guard.copy(gy), guard.copy(gfinal)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", guard.empty)
        patch.setattr(torch, "empty_like", guard.empty_like)
        got = run(variant, *given, threads=1 + T % 2)
    own, w_dtype = DTYPES[dtype]
    state_dtype = FP64 if own == FP64 else FP32
    assert [x.dtype for x in got] == [own, state_dtype, own, w_dtype, own, own, own, own, state_dtype]
    assert_close(got, truth(*case))
    assert guard.untouched()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("N", [1, 5, 24, 40, 100])
def test_any_head_size(variant, N):
    case = (2, 35, 2, N)
    assert_close(run(variant, *make_inputs(*case)), truth(*case))


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_digits_are_lost_on_a_repeated_token(variant):
    """Here the inverse of the triangle by powers, or a suffix sum over rounded gradients, loses one to all digits."""
    case = (1, 512, 8, 64)  # large enough, too, for stores past the caches
    assert_close(run(variant, *make_inputs(*case, repeated=True), threads=2), truth(*case, repeated=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_on_a_repeated_token(variant):
    case = (1, 512, 2, 64, "bf16")
    found = errors(run(variant, *make_inputs(*case, repeated=True)), truth(*case, repeated=True))
    assert max(found.values()) <= 1.2e-2


@pytest.mark.parametrize(("variant", "dtype"), FORMS)
@pytest.mark.parametrize(
    ("shape", "with_resets"),
    [((1, 600, 1, 24), False), ((2, 257, 1, 12), False), ((1, 300, 3, 8), True), ((1, 150, 1, 64), True)],
)
def test_any_number_of_threads_gives_the_same(variant, dtype, shape, with_resets):
    """Where threads are twice as many as heads, the tokens are cut into segments of whole blocks."""
    case, options = (*shape, dtype, True, with_resets), {"slow": True}
    inputs = make_inputs(*case, **options)
    want = truth(*case, **options)
    for threads in (1, 2, 4, 7, 50):
        got = run(variant, *inputs, threads=threads)
        assert_close(got, want)
        assert all(map(torch.equal, got, run(variant, *inputs, threads=threads)))


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_no_digits_are_lost_where_segments_meet(threads):
    case = (1, 512, 1, 64)
    assert_close(run(cpu.variants[-1], *make_inputs(*case, repeated=True), threads=threads), truth(*case, repeated=True))


@pytest.mark.parametrize(("variant", "dtype"), FORMS)
@pytest.mark.parametrize(("T", "N"), [(1, 8), (1, 64), (8, 24), (8, 64)])
def test_without_backward_nothing_is_kept_and_the_results_are_the_same(variant, dtype, T, N):
    for with_state, with_resets in ((True, False), (True, True), (False, False)):
        case = (2, T, 3, N, dtype, with_state, with_resets)
        if variant not in cpu.variants:
            pytest.skip(f"this machine has no {variant}")
        inputs = make_inputs(*case)[0]
        y, final_state, saved = cpu.forward(*inputs, save=False, variant=variant, threads=2)
        assert saved.numel() == 0
        want = truth(*case)
        assert_close((y, final_state, *want[2:]), want)


def test_half_the_tokens_and_the_state_give_the_whole():
    inputs = make_inputs(1, 130, 2, 64)[0]
    whole = cpu.forward(*inputs, save=False)
    first = cpu.forward(*(x[:, :64].contiguous() for x in inputs[:6]), inputs[6], None, save=False)
    second = cpu.forward(*(x[:, 64:].contiguous() for x in inputs[:6]), first[1], None, save=False)
    assert torch.equal(torch.cat((first[0], second[0]), 1), whole[0])
    assert torch.equal(second[1], whole[1])


def test_threads_of_our_own_where_torch_has_another_kind(monkeypatch):
    monkeypatch.setattr("rwkv_bone.ops.cpu.torch_threads", lambda: None)
    case = (1, 40, 3, 16)
    assert_close(run(cpu.variants[-1], *make_inputs(*case), threads=3), truth(*case))
