"""The WKV7 CUDA kernels, the files that nvcc compiles, run on the CPU by the shim through their host side, against float64."""

import ctypes
import math

import pytest
import torch
from cuda_shim import CUDA, assert_guards_intact, compile_for_cpu, error, guarded, guarded_nan

from rwkv_bone.ops import cuda
from rwkv_bone.ops.wkv7 import cuda as wkv7_cuda
from rwkv_bone.ops.wkv7 import wkv7_reference

FP32, BF16 = torch.float32, torch.bfloat16
NAMES = ("r", "log_w", "k", "v", "a", "b", "state")
LEAST_LOG_W = -math.exp(-0.5)


def make_inputs(B, T, H, N, regime="random", dtype=FP32, w_dtype=None, state=True, resets=0.0, seed=0):
    """(r, log_w, k, v, a, b, state, reset), and the gradients of y and of the final state, as an RWKV-7 model has them:
    a = -kk, b = kk gate, |kk| = 1. Regimes: random; strong and weak, log_w at its bounds; repeat, one token (one kk) again and
    again, gate 1 and w 1, where the chunk kernel's triangular matrices are at their worst."""
    torch.manual_seed(seed)
    r, k, v, gy, x, kk = (torch.randn(B, T, H, N) for _ in range(6))
    gate = torch.rand(B, T, H, N)
    x = {"random": 6 * x, "strong": x.abs() + 12, "weak": -x.abs() - 15, "repeat": -x.abs() - 40}[regime]
    if regime == "repeat":
        kk, gate = kk[:, :1].expand_as(kk), torch.ones_like(gate)
    kk = torch.nn.functional.normalize(kk, dim=-1).to(dtype)
    r, k, v, gy, b = (z.to(dtype) for z in (r, k, v, gy, kk * gate))
    log_w = (LEAST_LOG_W * torch.sigmoid(x)).to(w_dtype or dtype)
    reset = torch.rand(B, T) < resets if resets else None
    s, g_final = torch.randn(B, H, N, N), torch.randn(B, H, N, N)
    return (r, log_w, k, v, -kk, b, s if state else None, reset), gy, g_final if state else None


def reference(inputs, gy, g_final):
    """The definition, step by step in float64: y, final_state, and the gradients by autograd."""
    *tensors, reset = inputs
    leaves = {name: x.double().requires_grad_() for name, x in zip(NAMES, tensors) if x is not None}
    y, S = wkv7_reference(**leaves, reset=reset)
    loss = (y * gy).sum() + (S * (0 if g_final is None else g_final)).sum()
    grads = torch.autograd.grad(loss, leaves.values())
    return {"y": y.detach(), "final_state": S.detach(), **{f"g_{n}": g for n, g in zip(leaves, grads)}}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wkv7")
    paths = {name: compile_for_cpu(CUDA / f"wkv7_{name}.cu", folder) for name in ("sequential", "chunk")}
    return {name: cuda.declare(ctypes.CDLL(str(path)), wkv7_cuda.functions) for name, path in paths.items()}


@pytest.fixture
def both(libraries, monkeypatch):
    """A function that runs a kernel forward and backward on CPU tensors, between guards, and names what it gives."""
    filled, number = [], 1

    def segments(name, lib, r):
        return empty((lib.wkv7_chunk_scratch_bytes(r.shape[0], r.shape[2], number) // 4,), FP32), number

    def empty(shape, dtype=None, device=None):
        filled.append(guarded_nan(tuple(shape), dtype))
        return filled[-1]

    def run(function, device, *arguments):
        assert function(*(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments), None) == 0

    monkeypatch.setattr(wkv7_cuda, "library", lambda kernel, device: libraries[kernel])
    monkeypatch.setattr(cuda, "run", run)
    monkeypatch.setattr(cuda, "segments", segments)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", lambda x: empty(x.shape, x.dtype))

    def run_both(kernel, inputs, gy, g_final, seed=0, cut=1):
        nonlocal number
        number = cut
        libraries[kernel].cuda_shim_seed(seed)
        *tensors, reset = (x if x is None or x.dtype == torch.bool else guarded(x) for x in inputs)
        y, final_state, saved = wkv7_cuda.forward(*tensors, reset, save=True, kernel=kernel)
        given = guarded(gy), None if g_final is None else guarded(g_final)
        grads = wkv7_cuda.backward(*tensors[:6], reset, saved, *given, kernel=kernel)
        assert_guards_intact(*filled)
        return {"y": y, "final_state": final_state, **{f"g_{name}": g for name, g in zip(NAMES, grads)}}

    return run_both


def gate(kernel, dtype):
    """Relative L2. Rounding a result to bf16 alone gives 1.7e-3; the chunk kernel rounds the factors of its products too."""
    if dtype == FP32:
        return 2e-6
    return 4e-3 if kernel == "sequential" else 6e-3


def assert_equals_reference(both, kernel, inputs, gy, g_final, cut=1):
    got = both(kernel, inputs, gy, g_final, cut=cut)
    errors = {name: error(got[name], want) for name, want in reference(inputs, gy, g_final).items()}
    too_large = {name: x for name, x in errors.items() if not x <= gate(kernel, inputs[0].dtype)}  # NaN is not <=
    assert not too_large
    return got


REGIMES = ("random", "strong", "weak", "repeat")


@pytest.mark.parametrize(
    "T, dtype, w_dtype", [(1, BF16, FP32), (15, FP32, FP32), (17, BF16, BF16), (63, FP32, FP32), (63, BF16, FP32)]
)
@pytest.mark.parametrize("regime", REGIMES)
def test_sequential_equals_the_definition(both, dtype, w_dtype, regime, T):
    assert_equals_reference(both, "sequential", *make_inputs(2, T, 2, 8, regime, dtype, w_dtype))


@pytest.mark.parametrize("N", [1, 5, 16, 17, 64, 65, 128])
def test_sequential_takes_any_head_size(both, N):
    assert_equals_reference(both, "sequential", *make_inputs(1, 33, 2, N, resets=0.1))


@pytest.mark.parametrize("T, w_dtype", [(1, BF16), (15, FP32), (17, BF16), (63, FP32), (130, BF16)])
@pytest.mark.parametrize("regime", REGIMES)
def test_chunk_equals_the_definition(both, w_dtype, regime, T):
    assert_equals_reference(both, "chunk", *make_inputs(1, T, 2, 64, regime, BF16, w_dtype))


@pytest.mark.parametrize("cut", [1, 6])
def test_chunk_stays_exact_where_one_token_comes_again_and_again(both, cut):
    # the state grows and what is removed from it does not: 1.4e-2 after 1,600 tokens with the states rounded to bf16 there
    assert_equals_reference(both, "chunk", *make_inputs(1, 800, 1, 64, "repeat", BF16, FP32), cut)


@pytest.mark.parametrize(
    "B, T, H, w_dtype, cut", [(2, 33, 2, BF16, 3), (1, 65, 1, FP32, 4), (1, 200, 1, BF16, 13), (1, 300, 1, FP32, 4)]
)
@pytest.mark.parametrize("regime", REGIMES)
def test_chunk_in_segments_equals_the_definition(both, regime, B, T, H, w_dtype, cut):
    assert_equals_reference(both, "chunk", *make_inputs(B, T, H, 64, regime, BF16, w_dtype), cut)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_chunk_takes_large_and_small_inputs(both, scale):
    inputs, gy, g_final = make_inputs(1, 40, 1, 64, dtype=BF16)
    scaled = [x * scale if name in ("r", "k", "v", "state") else x for name, x in zip((*NAMES, "reset"), inputs)]
    assert_equals_reference(both, "chunk", scaled, gy, g_final)


KERNELS = [("sequential", FP32, 16, 1), ("chunk", BF16, 64, 1), ("chunk", BF16, 64, 3)]  # in so many segments


@pytest.mark.parametrize("resets, state", [(0.05, True), (0.5, False), (1.0, True)])
@pytest.mark.parametrize("kernel, dtype, N, cut", KERNELS)
def test_no_token_sees_beyond_a_reset(both, kernel, dtype, N, cut, resets, state):
    inputs, gy, g_final = make_inputs(2, 70, 2, N, dtype=dtype, resets=resets, state=state)
    got = assert_equals_reference(both, kernel, inputs, gy, g_final, cut)
    assert (got["g_log_w"][inputs[-1]] == 0).all()
    loud = [x if x is None else x.clone() for x in inputs]
    for b in range(2):  # what comes before the last reset says nothing about what comes after it
        last = inputs[-1][b].nonzero().max()
        loud[2][b, :last] *= 1e3
        after = both(kernel, loud, gy, g_final, cut=cut)
        assert torch.equal(after["y"][b, last:], got["y"][b, last:])
        assert torch.equal(after["final_state"][b], got["final_state"][b])


@pytest.mark.parametrize("kernel, dtype, N, cut", KERNELS)
def test_no_order_of_threads_changes_a_bit(both, kernel, dtype, N, cut):
    inputs, gy, g_final = make_inputs(2, 90, 2, N, dtype=dtype, resets=0.05)
    want = both(kernel, inputs, gy, g_final, cut=cut)
    for seed in range(1, 4):
        got = both(kernel, inputs, gy, g_final, seed, cut)
        assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("kernel, dtype, N, cut", KERNELS)
def test_absent_states_are_zeros(both, kernel, dtype, N, cut):
    inputs, gy, _ = make_inputs(2, 40, 2, N, dtype=dtype, state=False)
    zeros = torch.zeros(2, 2, N, N)
    got, want = both(kernel, inputs, gy, None, cut=cut), both(kernel, (*inputs[:6], zeros, None), gy, zeros, cut=cut)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("w_dtype", [BF16, FP32])
def test_chunk_and_sequential_agree_on_what_they_keep_and_give(both, w_dtype):
    inputs, gy, g_final = make_inputs(2, 70, 3, 64, dtype=BF16, w_dtype=w_dtype, resets=0.03)
    one, other = both("chunk", inputs, gy, g_final), both("sequential", inputs, gy, g_final)
    assert all(one[name].dtype == other[name].dtype and error(one[name], other[name].double()) < 8e-3 for name in one)


@pytest.mark.parametrize("dtype, N, kernel", [(BF16, 64, "chunk"), (BF16, 32, "sequential"), (FP32, 64, "sequential")])
def test_the_kernel_is_chosen_by_dtype_and_head_size(dtype, N, kernel):
    assert wkv7_cuda.choose(dtype, N) == kernel


def test_chunk_takes_tensors_in_the_middle_of_others(both):
    inputs, gy, g_final = make_inputs(1, 20, 1, 64, dtype=BF16)
    want = both("chunk", inputs, gy, g_final)
    shifted = [None if x is None else torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x) for x in inputs]
    assert shifted[0].data_ptr() % 16
    y, final_state, _ = wkv7_cuda.forward(*shifted, save=False, kernel="chunk")
    assert torch.equal(y, want["y"]) and torch.equal(final_state, want["final_state"])


@pytest.mark.parametrize("kernel, dtype, N, cut", KERNELS)
def test_nothing_is_kept_unless_asked(both, kernel, dtype, N, cut):
    inputs, gy, g_final = make_inputs(1, 40, 1, N, dtype=dtype)
    want = both(kernel, inputs, gy, g_final, cut=cut)
    y, final_state, saved = wkv7_cuda.forward(*inputs, save=False, kernel=kernel)
    assert torch.equal(y, want["y"]) and torch.equal(final_state, want["final_state"]) and saved.numel() == 0


@pytest.mark.parametrize("dtype, N", [(torch.float64, 8), (FP32, 129)])
def test_what_no_kernel_takes_is_refused(dtype, N):
    with pytest.raises(ValueError, match=rf"up to 128 channels, not {dtype} and {N}; use op='torch'"):
        wkv7_cuda.choose(dtype, N)


@pytest.mark.parametrize(
    "codes, shape",
    [((2, 0), (1, 1, 1, 8)), ((0, -1), (1, 1, 1, 8))]
    + [((0, 0), shape) for shape in [(0, 1, 1, 8), (1, 0, 1, 8), (1, 1, 0, 8), (1, 1, 1, 0), (1, 1, 1, 129)]],
)
def test_sequential_refuses_what_it_cannot_do_with_an_error_code(libraries, codes, shape):
    lib = libraries["sequential"]
    assert lib.wkv7_sequential_forward(*codes, *shape, *[None] * 11) == 1
    assert lib.wkv7_sequential_backward(*codes, *shape, *[None] * 19) == 1


def test_chunk_refuses_what_it_cannot_do_with_an_error_code(libraries):
    def codes(w_dtype, B, T, H, pointer=None, segments=1):
        head = (w_dtype, B, T, H, pointer)
        return {
            libraries["chunk"].wkv7_chunk_forward(*head, *[None] * 11, segments, None),
            libraries["chunk"].wkv7_chunk_backward(*head, *[None] * 17, segments, None),
        }

    sizes = [(2, 1, 33, 1), (1, 0, 33, 1), (1, 1, 0, 1), (1, 1, 33, 0), (1, 1, 2**31, 1), (1, 2**20, 16, 2**12)]
    assert all(codes(*size) == {1} for size in sizes)
    assert codes(1, 1, 33, 1, 8) == {1}  # copies need 16-byte alignment
    assert codes(1, 1, 33, 1, segments=0) == codes(1, 1, 33, 1, segments=4) == {1}  # three chunks


@pytest.mark.parametrize("B, T, H", [(8, 4096, 64), (1, 4096, 12), (1, 4096, 64), (1, 4096, 1), (1, 17, 1), (32, 512, 32)])
@pytest.mark.parametrize("multiprocessors", [28, 132])
def test_the_recommended_segments_are_long_and_as_many_as_the_gpu_can_run(libraries, B, T, H, multiprocessors):
    segments = libraries["chunk"].wkv7_chunk_segments(B, T, H, multiprocessors)
    assert segments == 1 or (segments >= 3 and T // segments >= 128 and B * H * segments <= 2 * multiprocessors)
    assert (segments > 1) == (2 * multiprocessors >= 3 * B * H and T >= 384)
