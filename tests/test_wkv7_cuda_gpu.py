"""Both WKV7 CUDA kernels on a GPU against float64. The same kernels run on any CPU in test_wkv7_cuda.py; here are real tensor
cores, real memory and real concurrency.

Under NVIDIA's checkers: compute-sanitizer --tool memcheck (or racecheck) python -m pytest THIS_FILE -k sanitizer
"""

import pytest
import torch
from cuda_shim import error
from test_wkv7_cuda import BF16, FP32, NAMES, REGIMES, gate, make_inputs, reference

from rwkv_bone.ops.wkv7 import cuda

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

DEVICE = torch.device("cuda:0")
# kernel, dtype of r, k, v, a, b, dtype of log_w
SEQUENTIAL = [("sequential", FP32, FP32), ("sequential", BF16, BF16), ("sequential", BF16, FP32)]
CHUNK = [("chunk", BF16, BF16), ("chunk", BF16, FP32)]


def run(kernel, inputs, gy, g_final):
    """y, the final state and all gradients, on the CPU, by name."""
    *tensors, reset, gy, g_final = (x if x is None else x.to(DEVICE) for x in (*inputs, gy, g_final))
    y, final_state, saved = cuda.forward(*tensors, reset, save=True, kernel=kernel)
    grads = cuda.backward(*tensors[:6], reset, saved, gy, g_final, kernel=kernel)
    return {"y": y.cpu(), "final_state": final_state.cpu(), **{f"g_{name}": g.cpu() for name, g in zip(NAMES, grads)}}


def assert_equals_reference(kernel, inputs, gy, g_final):
    got = run(kernel, inputs, gy, g_final)
    errors = {name: error(got[name], want) for name, want in reference(inputs, gy, g_final).items()}
    too_large = {name: x for name, x in errors.items() if not x <= gate(kernel, inputs[0].dtype)}  # NaN is not <=
    assert not too_large


@pytest.mark.parametrize("T", [1, 15, 16, 17, 63, 64, 65, 200, 600])  # 600: chunk in four segments
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("kernel, dtype, w_dtype", [*SEQUENTIAL, *CHUNK])
def test_kernels_equal_the_definition(kernel, dtype, w_dtype, regime, T):
    assert_equals_reference(kernel, *make_inputs(2, T, 2, 64, regime, dtype, w_dtype))


@pytest.mark.parametrize("N", [1, 5, 16, 17, 65, 128])
@pytest.mark.parametrize("kernel, dtype, w_dtype", SEQUENTIAL)
def test_sequential_takes_any_head_size(kernel, dtype, w_dtype, N):
    assert_equals_reference(kernel, *make_inputs(1, 33, 2, N, "random", dtype, w_dtype))


@pytest.mark.parametrize("state", [True, False], ids=["state", "no_state"])
@pytest.mark.parametrize("kernel, dtype, w_dtype", [*SEQUENTIAL, *CHUNK])
def test_sanitizer_case(kernel, dtype, w_dtype, state):
    assert_equals_reference(kernel, *make_inputs(2, 600, 2, 64, "weak", dtype, w_dtype, resets=0.005, state=state))


@pytest.mark.parametrize("kernel, dtype, w_dtype", [*SEQUENTIAL, *CHUNK])
def test_every_run_gives_the_same_bits(kernel, dtype, w_dtype):
    inputs, gy, g_final = make_inputs(4, 512, 40, 64, "random", dtype, w_dtype, resets=0.01)
    want = run(kernel, inputs, gy, g_final)
    for _ in range(5):
        got = run(kernel, inputs, gy, g_final)
        assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("w_dtype", [BF16, FP32])
@pytest.mark.parametrize(
    "regime", ["random", "strong", "weak"]
)  # one token again and again, never forgotten: S grows, S a does not
def test_the_kernels_agree_over_4096_tokens(regime, w_dtype):
    inputs, gy, g_final = make_inputs(1, 4096, 4, 64, regime, BF16, w_dtype)
    chunk, sequential = (run(kernel, inputs, gy, g_final) for kernel in ("chunk", "sequential"))
    errors = {name: error(chunk[name], sequential[name].double()) for name in chunk}
    too_large = {name: x for name, x in errors.items() if not x <= 1.2 * gate("chunk", BF16)}  # both are rounded
    assert not too_large


@pytest.mark.parametrize("dtype, N", [(FP32, 128), (BF16, 64)])
def test_a_cuda_graph_captures_forward_and_backward(dtype, N):
    inputs, gy, g_final = make_inputs(1, 600, 3, N, dtype=dtype, resets=0.01)
    *tensors, reset, gy, g_final = (x.to(DEVICE) for x in (*inputs, gy, g_final))

    def both():
        y, final_state, saved = cuda.forward(*tensors, reset, True)
        return y, final_state, *cuda.backward(*tensors[:6], reset, saved, gy, g_final)

    want = both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = both()
    for x in got:
        x.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("kernel", ["sequential", "chunk"])
def test_offsets_beyond_32_bits(kernel):
    B, T, H, N = 9, 4096, 1024, 64  # 2.4e9 elements, 4.8e9 bytes a tensor
    free, _ = torch.cuda.mem_get_info()
    if free < 45e9:
        pytest.skip(f"needs 45 GB of GPU memory, {free / 1e9:.0f} GB are free")
    r, log_w, k, v, a, b = (0.1 * torch.randn(1, T, H, N, device=DEVICE).to(BF16) for _ in range(6))
    row = (r, -log_w.abs(), k, v, a, b)
    y_row, final_row, _ = cuda.forward(*row, None, None, False, kernel)
    y, final_state, _ = cuda.forward(*(x.expand(B, -1, -1, -1).contiguous() for x in row), None, None, False, kernel)
    assert torch.equal(y[-1], y_row[0]) and torch.equal(final_state[-1], final_row[0])
