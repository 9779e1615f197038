"""cuda/wkv6_sequential.cu, the file that nvcc compiles, run on the CPU by the shim against the float64 reference."""

import ctypes

import pytest
import torch
from cuda_shim import (
    CUDA,
    DECAYS,
    assert_guards_intact,
    compile_for_cpu,
    error,
    guarded,
    guarded_nan,
    make_inputs,
    pointer,
    reference,
)

FP32, BF16 = torch.float32, torch.bfloat16
CODES = {FP32: 0, BF16: 1}
LENGTHS = [(1, FP32), (2, BF16), (15, FP32), (16, BF16), (63, FP32), (64, BF16), (65, FP32), (200, BF16)]
# float32 sums of a few hundred terms: measured up to 4.1e-7. bf16: rounding to nearest is off by at most 2^-8 an element.
GATES = {FP32: 1e-6, BF16: 2**-8 + 1e-6}


class Sequential:
    """The kernel's C interface on CPU tensors."""

    def __init__(self, library):
        self.lib = ctypes.CDLL(str(library))
        self.lib.wkv6_sequential_scratch.restype = ctypes.c_int64

    def seed(self, seed: int) -> None:
        self.lib.cuda_shim_seed(seed)

    @staticmethod
    def _head(r, log_w):
        return CODES[r.dtype], CODES[log_w.dtype], *map(ctypes.c_int64, r.shape)

    def forward(self, r, k, v, log_w, u, state=None):
        B, _, H, N = r.shape
        y, final_state = guarded_nan(r.shape, r.dtype), guarded_nan((B, H, N, N), FP32)
        inputs = [None if x is None else guarded(x) for x in (r, k, v, log_w, u, state)]
        error = self.lib.wkv6_sequential_forward(
            *self._head(r, log_w), *map(pointer, inputs), pointer(y), pointer(final_state), None
        )
        assert error == 0
        assert_guards_intact(y, final_state)
        return {"y": y, "final_state": final_state}

    def backward(self, r, k, v, log_w, u, state, gy, g_final, want_g_state=True):
        B, T, H, N = r.shape
        g = {name: guarded_nan(x.shape, x.dtype) for name, x in (("r", r), ("k", k), ("v", v), ("log_w", log_w))}
        g["u"] = guarded_nan((B, H, N), FP32)
        g["state"] = guarded_nan((B, H, N, N), FP32) if want_g_state else None
        size = self.lib.wkv6_sequential_scratch(*map(ctypes.c_int64, (B, T, H, N)))
        scratch = guarded_nan((size // 4,), FP32)
        inputs = [None if x is None else guarded(x) for x in (r, k, v, log_w, u, state, gy, g_final)]
        error = self.lib.wkv6_sequential_backward(
            *self._head(r, log_w), *map(pointer, inputs), *map(pointer, g.values()), pointer(scratch), None
        )
        assert error == 0
        outputs = {f"g_{name}": x for name, x in g.items() if x is not None}
        assert_guards_intact(*outputs.values(), scratch)
        outputs["g_u"] = outputs["g_u"].sum(0)
        return outputs


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    return Sequential(compile_for_cpu(CUDA / "wkv6_sequential.cu", tmp_path_factory.mktemp("sequential")))


def assert_equals_reference(kernel, inputs, gy, g_final, gates=GATES):
    got = {**kernel.forward(*inputs), **kernel.backward(*inputs, gy, g_final)}
    errors = {name: error(got[name], want) for name, want in reference(inputs, gy, g_final).items()}
    too_large = {name: x for name, x in errors.items() if not x <= gates[got[name].dtype]}  # NaN is not <=
    assert not too_large


@pytest.mark.parametrize("T, dtype", LENGTHS)
@pytest.mark.parametrize("decay", DECAYS)
def test_output_state_and_gradients_equal_the_reference(kernel, dtype, decay, T):
    assert_equals_reference(kernel, *make_inputs(2, T, 3, 8, decay, dtype))


@pytest.mark.parametrize("N", [1, 5, 16, 17, 40, 64, 65, 128])
@pytest.mark.parametrize("T, dtype, decay", [(33, FP32, "extreme"), (16, BF16, "strong")])
def test_any_head_size(kernel, T, dtype, decay, N):
    assert_equals_reference(kernel, *make_inputs(1, T, 2, N, decay, dtype))


@pytest.mark.parametrize("N, T", [(8, 65), (64, 63)])
def test_log_w_may_be_float32_beside_bf16_and_the_reverse(kernel, N, T):
    assert_equals_reference(kernel, *make_inputs(2, T, 3, N, "normal", BF16, w_dtype=FP32))
    assert_equals_reference(kernel, *make_inputs(2, T, 3, N, "normal", FP32, w_dtype=BF16))


@pytest.mark.parametrize("N, T", [(8, 65), (64, 1), (128, 17)])
def test_without_states_they_are_zeros(kernel, N, T):
    inputs, gy, g_final = make_inputs(2, T, 3, N, state=False)
    assert inputs[-1] is None and g_final is None
    assert_equals_reference(kernel, inputs, gy, g_final)
    zeros = torch.zeros(2, 3, N, N)
    got, want = kernel.forward(*inputs), kernel.forward(*inputs[:5], zeros)
    got |= kernel.backward(*inputs, gy, None, want_g_state=False)
    want |= kernel.backward(*inputs[:5], zeros, gy, zeros)
    assert "g_state" not in got and all(torch.equal(got[name], want[name]) for name in got)


@pytest.mark.parametrize("N", [8, 64])
def test_a_decay_to_exactly_zero_forgets_everything(kernel, N):
    inputs, gy, g_final = make_inputs(2, 40, 2, N)
    log_w = torch.where(torch.rand(inputs[3].shape) < 0.3, -torch.inf, 0.0)
    log_w[:, 20] = -torch.inf
    inputs = (*inputs[:3], log_w, *inputs[4:])
    assert_equals_reference(kernel, inputs, gy, g_final)
    other = (*inputs[:5], torch.full_like(inputs[5], 1e30))
    assert torch.equal(kernel.forward(*other)["y"][:, 21:], kernel.forward(*inputs)["y"][:, 21:])


def test_2000_steps_without_decay_stay_exact(kernel):
    # the rounding errors of 2000 additions to one state, a random walk: measured up to 1.0e-6
    assert_equals_reference(kernel, *make_inputs(1, 2000, 1, 8, "none"), gates={FP32: 3e-6})


@pytest.mark.parametrize("N, T", [(8, 65), (64, 63), (128, 16)])
def test_every_order_of_the_threads_gives_the_same_bits(kernel, N, T):
    inputs, gy, g_final = make_inputs(2, T, 3, N, "strong", BF16)
    results = []
    for seed in range(3):
        kernel.seed(seed)
        results.append({**kernel.forward(*inputs), **kernel.backward(*inputs, gy, g_final)})
    kernel.seed(0)
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


@pytest.mark.parametrize("cut", [16, 37])
def test_two_pieces_with_the_state_carried_equal_the_whole(kernel, cut):
    (r, k, v, log_w, u, state), gy, g_final = make_inputs(2, 65, 3, 8)
    want = {**kernel.forward(r, k, v, log_w, u, state), **kernel.backward(r, k, v, log_w, u, state, gy, g_final)}
    first, second = zip(*((x[:, :cut].contiguous(), x[:, cut:].contiguous()) for x in (r, k, v, log_w, gy)))
    out1 = kernel.forward(*first[:4], u, state)
    out2 = kernel.forward(*second[:4], u, out1["final_state"])
    g2 = kernel.backward(*second[:4], u, out1["final_state"], second[4], g_final)
    g1 = kernel.backward(*first[:4], u, state, first[4], g2["g_state"])
    got = {"final_state": out2["final_state"], "g_state": g1["g_state"], "g_u": g1["g_u"] + g2["g_u"]}
    got["y"] = torch.cat([out1["y"], out2["y"]], 1)
    got |= {name: torch.cat([g1[name], g2[name]], 1) for name in ("g_r", "g_k", "g_v", "g_log_w")}
    assert all(error(got[name], want[name].double()) <= 1e-6 for name in want)


@pytest.mark.parametrize(
    "codes, shape",
    [((2, 0), (1, 1, 1, 8)), ((0, -1), (1, 1, 1, 8))]
    + [((0, 0), shape) for shape in [(0, 1, 1, 8), (1, 0, 1, 8), (1, 1, 0, 8), (1, 1, 1, 0), (1, 1, 1, 129)]],
)
def test_what_it_cannot_do_is_refused_with_an_error_code(kernel, codes, shape):
    head = (*codes, *map(ctypes.c_int64, shape))
    assert kernel.lib.wkv6_sequential_forward(*head, *[None] * 9) == 1
    assert kernel.lib.wkv6_sequential_backward(*head, *[None] * 16) == 1
