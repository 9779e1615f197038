"""cuda/wkv6_chunk.cu, the file that nvcc compiles, run on the CPU by the shim against the float64 reference."""

import ctypes

import cuda_shim
import pytest
import torch
from cuda_shim import CUDA, DECAYS, assert_guards_intact, compile_for_cpu, error, guarded, guarded_nan, pointer, reference

FP32, BF16 = torch.float32, torch.bfloat16
N = 64
GATE = 5e-3  # rounding the result to bf16 alone gives 1.7e-3, rounding the factors of every product up to 3.7e-3
MIN_LOG_W = -16.625
LENGTHS = [(1, BF16), (2, FP32), (15, BF16), (16, FP32), (17, BF16), (63, FP32), (64, BF16), (65, FP32), (200, BF16)]


class Chunk:
    """The kernels' C interface on CPU tensors."""

    def __init__(self, library):
        self.lib = ctypes.CDLL(str(library))
        self.lib.wkv6_chunk_checkpoint_bytes.restype = ctypes.c_int64
        self.lib.wkv6_chunk_scratch_bytes.restype = ctypes.c_int64

    def seed(self, seed: int) -> None:
        self.lib.cuda_shim_seed(seed)

    def segments(self, *sizes: int) -> int:
        B, T, H, multiprocessors = sizes
        return self.lib.wkv6_chunk_segments(*map(ctypes.c_int64, (B, T, H)), multiprocessors)

    @staticmethod
    def head(r, log_w):
        return {FP32: 0, BF16: 1}[log_w.dtype], *map(ctypes.c_int64, r.shape[:3])

    def scratch(self, r, segments):
        B, _, H, _ = r.shape
        size = self.lib.wkv6_chunk_scratch_bytes(ctypes.c_int64(B), ctypes.c_int64(H), segments)
        return guarded_nan((size // 4,), FP32)

    def forward(self, r, k, v, log_w, u, state=None, segments=1, keep=True):
        """y, the final state and, with `keep`, what the backward pass needs."""
        B, T, H, _ = r.shape
        y, final_state = guarded_nan(r.shape, BF16), guarded_nan((B, H, N, N), FP32)
        size = self.lib.wkv6_chunk_checkpoint_bytes(*map(ctypes.c_int64, (B, T, H)))
        checkpoints = guarded_nan((size // 2,), BF16) if keep else None
        scratch = self.scratch(r, segments)
        inputs = [None if x is None else guarded(x) for x in (r, k, v, log_w, u, state)]
        outputs = [y, final_state, checkpoints, scratch]
        assert not self.lib.wkv6_chunk_forward(
            *self.head(r, log_w), *map(pointer, inputs), *map(pointer, outputs), segments, None
        )
        assert_guards_intact(*(x for x in outputs if x is not None))
        return {"y": y, "final_state": final_state}, checkpoints

    def backward(self, r, k, v, log_w, u, checkpoints, gy, g_final=None, segments=1, want_g_state=True):
        B, _, H, _ = r.shape
        g = {name: guarded_nan(x.shape, x.dtype) for name, x in (("r", r), ("k", k), ("v", v), ("log_w", log_w))}
        g["u"] = guarded_nan((B, H, N), FP32)
        g["state"] = guarded_nan((B, H, N, N), FP32) if want_g_state else None
        scratch = self.scratch(r, segments)
        inputs = [None if x is None else guarded(x) for x in (r, k, v, log_w, u, checkpoints, gy, g_final)]
        assert not self.lib.wkv6_chunk_backward(
            *self.head(r, log_w), *map(pointer, inputs), *map(pointer, g.values()), pointer(scratch), segments, None
        )
        outputs = {f"g_{name}": x for name, x in g.items() if x is not None}
        assert_guards_intact(*outputs.values(), scratch)
        outputs["g_u"] = outputs["g_u"].sum(0)
        return outputs

    def both(self, inputs, gy, g_final, segments=1):
        outputs, checkpoints = self.forward(*inputs, segments=segments)
        return outputs | self.backward(*inputs[:5], checkpoints, gy, g_final, segments)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    return Chunk(compile_for_cpu(CUDA / "wkv6_chunk.cu", tmp_path_factory.mktemp("chunk")))


def make_inputs(B, T, H, decay="normal", w_dtype=BF16, states=True):
    return cuda_shim.make_inputs(B, T, H, N, decay, BF16, w_dtype, states)


def assert_equals_reference(got, inputs, gy, g_final):
    want = reference(inputs, gy, g_final)
    errors = {name: error(got[name], x) for name, x in want.items()}
    # what trains log_w = -exp(x) is the gradient of x: small gradients of strong decays count more
    log_w = inputs[3].double()
    errors["g_x"] = error(got["g_log_w"] * log_w, want["g_log_w"] * log_w)
    too_large = {name: x for name, x in errors.items() if not x <= GATE}  # NaN is not <=
    assert not too_large


@pytest.mark.parametrize("T, w_dtype", LENGTHS)
@pytest.mark.parametrize("decay", DECAYS)
def test_output_state_and_gradients_equal_the_reference(kernel, w_dtype, decay, T):
    inputs, gy, g_final = make_inputs(1, T, 1, decay, w_dtype)
    assert_equals_reference(kernel.both(inputs, gy, g_final), inputs, gy, g_final)


@pytest.mark.parametrize("states", [True, False], ids=["states", "no_states"])
@pytest.mark.parametrize("segments", [1, 2, 3])
def test_batches_heads_and_segments(kernel, segments, states):
    inputs, gy, g_final = make_inputs(2, 65, 3, "strong" if states else "none", states=states)
    assert_equals_reference(kernel.both(inputs, gy, g_final, segments), inputs, gy, g_final)


@pytest.mark.parametrize("T, segments, w_dtype", [(33, 3, BF16), (200, 2, FP32), (200, 13, BF16), (512, 3, FP32)])
def test_segments_of_any_length(kernel, T, segments, w_dtype):
    inputs, gy, g_final = make_inputs(1, T, 2, "normal", w_dtype)
    assert_equals_reference(kernel.both(inputs, gy, g_final, segments), inputs, gy, g_final)


@pytest.mark.parametrize("segments, w_dtype", [(1, FP32), (3, BF16)])
def test_no_order_of_threads_changes_a_bit(kernel, segments, w_dtype):
    inputs, gy, g_final = make_inputs(2, 90, 2, "strong", w_dtype)
    want = kernel.both(inputs, gy, g_final, segments)
    try:
        for seed in range(1, 5):
            kernel.seed(seed)
            got = kernel.both(inputs, gy, g_final, segments)
            assert all(torch.equal(got[name], want[name]) for name in want)
    finally:
        kernel.seed(0)


def test_what_is_not_asked_for_changes_nothing(kernel):
    inputs, gy, g_final = make_inputs(2, 40, 1)
    outputs, checkpoints = kernel.forward(*inputs)
    without, nothing = kernel.forward(*inputs, keep=False)
    assert nothing is None and all(torch.equal(without[name], outputs[name]) for name in outputs)
    want = kernel.backward(*inputs[:5], checkpoints, gy, g_final)
    got = kernel.backward(*inputs[:5], checkpoints, gy, g_final, want_g_state=False)
    assert "g_state" not in got and all(torch.equal(got[name], want[name]) for name in got)


def test_absent_states_are_zeros(kernel):
    inputs, gy, _ = make_inputs(2, 40, 2, states=False)
    zeros = torch.zeros(2, 2, N, N)
    got, want = kernel.both(inputs, gy, None), kernel.both((*inputs[:5], zeros), gy, zeros)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("decay", DECAYS)
def test_large_r_and_k_stay_exact(kernel, decay, scale=1e4):
    inputs, gy, g_final = make_inputs(1, 70, 1, decay)
    inputs = ((inputs[0] * scale).to(BF16), (inputs[1] * scale).to(BF16), *inputs[2:])
    assert_equals_reference(kernel.both(inputs, gy, g_final), inputs, gy, g_final)


@pytest.mark.parametrize("w_dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_log_w_beyond_the_bound_is_the_bound_and_has_no_gradient(kernel, w_dtype):
    inputs, gy, g_final = make_inputs(1, 70, 2, "normal", w_dtype)
    beyond = torch.rand(inputs[3].shape) < 0.3
    beyond[:, 32:48] = True  # a chunk that forgets everything
    for value in (-17.0, -torch.inf):
        clamped = (*inputs[:3], inputs[3].masked_fill(beyond, value), *inputs[4:])
        got = kernel.both(clamped, gy, g_final)
        want = kernel.both((*inputs[:3], clamped[3].clamp(min=MIN_LOG_W), *inputs[4:]), gy, g_final)
        assert all(torch.equal(got[name], want[name]) for name in want)
        assert (got["g_log_w"][beyond] == 0).all() and (got["g_log_w"][~beyond] != 0).any()
        # -exp(x) at the bound is 6e-8: against the true decay nothing is lost
        got["g_log_w"] = torch.where(beyond, 0, got["g_log_w"])
        exact = (*clamped[:3], clamped[3].double(), *clamped[4:])
        errors = {name: error(got[name], x) for name, x in reference(exact, gy, g_final).items()}
        assert max(errors.values()) <= GATE


def test_zeros_give_zeros(kernel):
    (r, k, v, *rest), gy, _ = make_inputs(1, 20, 1, states=False)
    got = kernel.both((*map(torch.zeros_like, (r, k, v)), *rest), torch.zeros_like(gy), None)
    assert all((x == 0).all() for x in got.values())


def test_what_the_kernels_cannot_do_is_refused(kernel):
    def run(code, B, T, H, segments):
        return kernel.lib.wkv6_chunk_forward(code, *map(ctypes.c_int64, (B, T, H)), *[None] * 10, segments, None)

    assert all(run(*sizes) == 1 for sizes in [(2, 1, 33, 1, 1), (1, 0, 33, 1, 1), (1, 1, 0, 1, 1), (1, 1, 33, 0, 1)])
    assert run(1, 1, 33, 1, 4) == 1 and run(1, 1, 33, 1, 0) == 1  # three chunks
    assert run(1, 1, 2**31, 1, 1) == 1 and run(1, 2**20, 16, 2**12, 1) == 1
    inputs, gy, g_final = make_inputs(1, 16, 1)
    _, checkpoints = kernel.forward(*inputs)
    shifted = torch.cat([gy.new_zeros(1), gy.flatten()])[1:].view_as(gy)  # 2 bytes off the 16 that copies need
    pointers = [*map(pointer, (*inputs[:5], checkpoints, shifted, g_final)), *[None] * 7]
    assert kernel.lib.wkv6_chunk_backward(*kernel.head(gy, inputs[3]), *pointers, 1, None) == 1


@pytest.mark.parametrize("B, T, H", [(8, 4096, 64), (1, 4096, 64), (1, 4096, 1), (1, 17, 1), (32, 512, 32), (1, 10**6, 2)])
@pytest.mark.parametrize("multiprocessors", [28, 132])
def test_the_recommended_segments_fill_the_gpu_and_are_long(kernel, B, T, H, multiprocessors):
    segments = kernel.segments(B, T, H, multiprocessors)
    assert 1 <= segments <= -(-T // 16)
    assert segments == 1 or T // segments >= 256
    assert B * H * (segments - 1) < 2 * multiprocessors  # no more than needed
