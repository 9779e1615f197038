"""WKV6 on the CPU: every kernel and the chunked torch form against the definition in float64, by output and gradient."""

import functools
import importlib.util
from pathlib import Path

import pytest
import torch

from rwkv_bone.ops import cpu
from rwkv_bone.ops.wkv6 import cpu as wkv6_cpu
from rwkv_bone.ops.wkv6 import wkv6, wkv6_reference

NAMES = ("r", "k", "v", "log_w", "u", "state")
FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
FORMS = ["torch", "portable", "avx2", "avx512"]
REGIMES = ["none", "normal", "strong", "extreme", "mixed", "cut"]
SHAPES = [  # B, T, H, N
    (2, 1, 3, 8), (1, 2, 1, 64), (2, 7, 2, 33), (1, 8, 3, 16), (2, 15, 1, 12), (1, 16, 3, 40), (3, 17, 4, 1),
    (1, 63, 3, 5), (2, 64, 1, 8), (1, 65, 1, 64), (1, 200, 3, 64), (1, 130, 1, 100), (1, 20, 1, 256),
]  # fmt: skip


@pytest.fixture(autouse=True)
def unwritten_results_are_nan():
    torch.use_deterministic_algorithms(True)  # torch.empty then fills with NaN
    yield
    torch.use_deterministic_algorithms(False)


def make_log_w(regime: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Logarithms of decays: -exp(ww), ww uniform from -6 to the regime's strongest; extreme is -150 a step."""
    if regime == "none":
        return torch.zeros(shape)
    if regime == "mixed":  # next to each other in one channel: sums over tokens must not lose the small ones
        return torch.where(torch.rand(shape) < 0.3, -150.0, -0.01)
    if regime == "cut":  # w = 0 forgets everything
        return torch.where(torch.rand(shape) < 0.2, -torch.inf, -0.1 * torch.rand(shape))
    strongest = {"normal": -0.5, "strong": 3.0, "extreme": 5.0}[regime]
    return -torch.exp(-6 + (strongest + 6) * torch.rand(shape))


def make_inputs(regime, B, T, H, N, dtype=FP32, w_dtype=FP32):
    """The six inputs and the gradients of y and of the final state, in the dtypes that the op takes."""
    torch.manual_seed(T * 1000 + N)
    r, k, v, gy = (torch.randn(B, T, H, N).to(dtype) for _ in range(4))
    log_w = make_log_w(regime, (B, T, H, N)).to(w_dtype)
    u, state, gfinal = 0.3 * torch.randn(H, N), torch.randn(B, H, N, N), torch.randn(B, H, N, N)
    return (r, k, v, log_w, u, state), gy, gfinal


def gradients(function, inputs, gy, gfinal):
    """y, the final state and the six gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y, final_state = function(*leaves)
    return y.detach(), final_state.detach(), *torch.autograd.grad((y, final_state), leaves, (gy, gfinal))


@functools.cache
def truth(regime, B, T, H, N, dtype=FP32, w_dtype=FP32):
    inputs, gy, gfinal = make_inputs(regime, B, T, H, N, dtype, w_dtype)
    return gradients(wkv6_reference, [x.double() for x in inputs], gy.double(), gfinal.double())


def run(form, inputs, gy, gfinal, threads=1):
    """The same from the chunked torch form, or from the CPU kernel for one instruction set."""
    if form == "torch":
        return gradients(functools.partial(wkv6, op="torch"), inputs, gy, gfinal)
    if form not in wkv6_cpu.variants:
        pytest.skip(f"this machine has no {form}")
    y, final_state, saved = wkv6_cpu.forward(*inputs, save=True, variant=form, threads=threads)
    return y, final_state, *wkv6_cpu.backward(*inputs[:5], saved, gy, gfinal, variant=form, threads=threads)


def assert_close(got, want, tolerance):
    """Relative L2 errors by name. Results in bf16 carry its rounding: 2^-8 at most, and about 1.7e-3 by this measure."""
    for name, a, b in zip(("y", "final state", *NAMES), got, want, strict=True):
        error = float((a.double() - b).norm() / b.norm().clamp(min=1e-30))
        limit = 2.5e-3 if a.dtype == BF16 else tolerance
        assert error <= limit, f"{name}: error {error:.1e}, at most {limit:.0e}"  # NaN fails too


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_equals_the_definition(form, regime, shape):
    got = run(form, *make_inputs(regime, *shape))
    assert_close(got, truth(regime, *shape), 1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("w_dtype", [BF16, FP32], ids=str)
def test_bfloat16_equals_the_definition(form, regime, w_dtype):
    for shape in ((1, 2, 1, 12), (2, 5, 2, 40), (1, 65, 2, 64), (1, 100, 1, 20)):
        got = run(form, *make_inputs(regime, *shape, BF16, w_dtype))
        assert [x.dtype for x in got] == [BF16, FP32, BF16, BF16, BF16, w_dtype, FP32, FP32]
        assert_close(got, truth(regime, *shape, BF16, w_dtype), 1e-6)


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_large_results_that_go_past_the_caches_are_the_same(form, dtype):
    shape = (32, 16, 8, 64) if dtype == FP32 else (64, 16, 8, 64)  # 1 MiB
    got = run(form, *make_inputs("normal", *shape, dtype), threads=2)
    assert_close(got, truth("normal", *shape, dtype), 1e-6)


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("shape", [(1, 700, 1, 16), (2, 257, 1, 12), (1, 300, 3, 8), (1, 40, 2, 8)], ids=str)
def test_any_number_of_threads_gives_the_same(form, threads, shape):
    """With fewer heads than threads the tokens are cut into segments of whole blocks."""
    for regime in ("normal", "extreme"):
        got = run(form, *make_inputs(regime, *shape), threads=threads)
        assert_close(got, truth(regime, *shape), 1e-6)


def test_threads_of_our_own_do_the_same_as_torchs(monkeypatch):
    shape = (1, 300, 2, 8)
    assert cpu.torch_threads() is not None
    monkeypatch.setattr(cpu, "torch_threads", lambda: None)
    assert_close(run(wkv6_cpu.variants[-1], *make_inputs("normal", *shape), threads=3), truth("normal", *shape), 1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_a_slow_channel_stay_exact_over_many_tokens(form):
    """w is the same at every step, so that an error of its rounding would add up over the 4,000 tokens it remembers."""
    B, T, H, N = 1, 1000, 1, 8
    inputs, gy, gfinal = make_inputs("none", B, T, H, N)
    inputs[3].copy_(-torch.linspace(0.00025, 0.01, N))
    want = gradients(wkv6_reference, [x.double() for x in inputs], gy.double(), gfinal.double())
    assert_close(run(form, inputs, gy, gfinal), want, 2e-6)


def test_where_w_is_0_its_gradient_is_exactly_0():
    inputs, gy, gfinal = make_inputs("cut", 1, 100, 2, 24)
    for form in ("torch", wkv6_cpu.variants[-1]):
        gw = run(form, inputs, gy, gfinal)[5]
        assert torch.all(gw[inputs[3] == -torch.inf] == 0)


def test_large_inputs_stay_finite():
    inputs, gy, gfinal = make_inputs("extreme", 1, 100, 1, 16)
    inputs = [1e4 * x for x in inputs[:3]] + list(inputs[3:])
    for form in ("torch", wkv6_cpu.variants[-1]):
        assert all(torch.all(x.isfinite()) for x in run(form, inputs, gy, gfinal))


def test_definition_equals_the_recurrence_of_flash_linear_attention():
    """An independent program, in float32: its `naive_recurrent_rwkv6` has (B, H, T, N) and a scale."""
    fla = importlib.util.find_spec("fla")
    if fla is None:
        pytest.skip("needs fla-core")
    # the file alone: its package imports triton
    file = Path(fla.submodule_search_locations[0]) / "ops" / "rwkv6" / "recurrent_naive.py"
    spec = importlib.util.spec_from_file_location("recurrent_naive", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def theirs(r, k, v, log_w, u, state):
        heads_first = (x.transpose(1, 2) for x in (r, k, v, log_w))
        y, final_state = module.naive_recurrent_rwkv6(*heads_first, u, 1.0, state, True)
        return y.transpose(1, 2), final_state

    for regime in ("normal", "strong", "extreme"):
        inputs, gy, gfinal = make_inputs(regime, 2, 33, 3, 12)
        want = [x.double() for x in gradients(theirs, inputs, gy, gfinal)]
        assert_close(gradients(wkv6_reference, inputs, gy, gfinal), want, 1e-6)
        assert_close(gradients(wkv6, inputs, gy, gfinal), want, 1e-6)


def test_inputs_at_odd_addresses_are_read_right():
    inputs, gy, gfinal = make_inputs("normal", 1, 50, 2, 16)
    odd = [torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in inputs]
    assert all(x.data_ptr() % 8 == 4 for x in odd)
    assert_close(run(wkv6_cpu.variants[-1], odd, gy, gfinal), truth("normal", 1, 50, 2, 16), 1e-6)


def test_same_input_gives_the_same_bits():
    inputs, gy, gfinal = make_inputs("normal", 2, 200, 3, 16)
    first, second = (run(wkv6_cpu.variants[-1], inputs, gy, gfinal, threads=2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
