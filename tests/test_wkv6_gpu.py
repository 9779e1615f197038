"""Both WKV6 CUDA kernels on a GPU against the float64 reference. The same kernels run on any CPU in test_wkv6_cuda_shim.py and
test_wkv6_chunk.py; here are real tensor cores, real memory and real concurrency.

Under NVIDIA's checkers: compute-sanitizer --tool memcheck (or racecheck) python -m pytest tests/test_wkv6_gpu.py -k sanitizer
"""

import pytest
import torch
from cuda_shim import DECAYS, error, make_inputs, reference

from rwkv_bone.ops import cuda
from rwkv_bone.ops.wkv6 import cuda as wkv6_cuda
from rwkv_bone.ops.wkv6 import wkv6

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

DEVICE = torch.device("cuda:0")
FP32, BF16 = torch.float32, torch.bfloat16
LENGTHS = (1, 2, 15, 16, 63, 64, 65, 200)
# kernel, dtype of r, k, v, dtype of log_w, relative L2 error allowed. Rounding to bf16 is off by at most 2^-8 an element.
SEQUENTIAL = [("sequential", FP32, FP32, 2e-6), ("sequential", BF16, BF16, 2**-8), ("sequential", BF16, FP32, 2**-8)]
CHUNK = [("chunk", BF16, BF16, 5e-3), ("chunk", BF16, FP32, 5e-3)]
IDS = ["fp32", "bf16", "bf16-fp32"]


def to_gpu(tensors):
    return [None if x is None else x.to(DEVICE) for x in tensors]


def run(kernel, inputs, gy, g_final):
    """y, the final state and all gradients, on the CPU, by name."""
    inputs, (gy, g_final) = to_gpu(inputs), to_gpu((gy, g_final))
    y, final_state, saved = wkv6_cuda.forward(*inputs, save=True, kernel=kernel)
    grads = wkv6_cuda.backward(*inputs[:5], saved, gy, g_final, kernel=kernel)
    names = ["y", "final_state", "g_r", "g_k", "g_v", "g_log_w", "g_u", "g_state"]
    return {name: x.cpu() for name, x in zip(names, (y, final_state, *grads))}


def assert_equals_reference(kernel, gate, inputs, gy, g_final):
    got = run(kernel, inputs, gy, g_final)
    errors = {name: error(got[name], want) for name, want in reference(inputs, gy, g_final).items()}
    too_large = {name: x for name, x in errors.items() if not x <= gate}  # NaN is not <=
    assert not too_large


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("H, N", [(3, 8), (1, 64)])
@pytest.mark.parametrize("kernel, dtype, w_dtype, gate", SEQUENTIAL, ids=IDS)
def test_sequential_equals_the_reference(kernel, dtype, w_dtype, gate, H, N, decay, T):
    assert_equals_reference(kernel, gate, *make_inputs(2, T, H, N, decay, dtype, w_dtype))


@pytest.mark.parametrize("N", [1, 5, 16, 17, 40, 65, 128])
@pytest.mark.parametrize("kernel, dtype, w_dtype, gate", SEQUENTIAL, ids=IDS)
def test_sequential_takes_any_head_size(kernel, dtype, w_dtype, gate, N):
    assert_equals_reference(kernel, gate, *make_inputs(1, 33, 2, N, "strong", dtype, w_dtype))


@pytest.mark.parametrize("T", [*LENGTHS, 600])  # 600: in two segments
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("B, H", [(1, 1), (2, 3)])
@pytest.mark.parametrize("kernel, dtype, w_dtype, gate", CHUNK, ids=IDS[1:])
def test_chunk_equals_the_reference(kernel, dtype, w_dtype, gate, B, H, decay, T):
    assert_equals_reference(kernel, gate, *make_inputs(B, T, H, 64, decay, dtype, w_dtype))


@pytest.mark.parametrize("kernel, dtype, w_dtype, gate", [*SEQUENTIAL, *CHUNK])
def test_without_states_they_are_zeros(kernel, dtype, w_dtype, gate):
    inputs, gy, g_final = make_inputs(2, 65, 3, 64, "normal", dtype, w_dtype, state=False)
    assert_equals_reference(kernel, gate, inputs, gy, g_final)


@pytest.mark.parametrize("kernel, dtype, w_dtype, gate", [*SEQUENTIAL, *CHUNK])
def test_sanitizer_case(kernel, dtype, w_dtype, gate):
    inputs = make_inputs(2, 600, 2, 64, "normal", dtype, w_dtype)  # in two segments, the last chunk half full
    assert_equals_reference(kernel, gate, *inputs)


@pytest.mark.parametrize("kernel, dtype, w_dtype, gate", [*SEQUENTIAL, *CHUNK])
def test_every_run_gives_the_same_bits(kernel, dtype, w_dtype, gate):
    inputs, gy, g_final = make_inputs(4, 512, 40, 64, "normal", dtype, w_dtype)
    want = run(kernel, inputs, gy, g_final)
    for _ in range(5):
        got = run(kernel, inputs, gy, g_final)
        assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("w_dtype", [BF16, FP32])
@pytest.mark.parametrize("decay", DECAYS)
def test_the_kernels_agree_over_4096_tokens(decay, w_dtype):
    inputs, gy, g_final = make_inputs(1, 4096, 4, 64, decay, BF16, w_dtype)
    chunk, sequential = (run(kernel, inputs, gy, g_final) for kernel in ("chunk", "sequential"))
    errors = {name: error(chunk[name], sequential[name].double()) for name in chunk}
    too_large = {name: x for name, x in errors.items() if not x <= 6e-3}  # both are rounded to bf16
    assert not too_large


@pytest.mark.parametrize("dtype, N", [(FP32, 8), (BF16, 64)])
def test_the_op_runs_on_the_current_stream(dtype, N):
    inputs, gy, g_final = make_inputs(2, 100, 3, N, dtype=dtype)
    leaves = [x.detach().requires_grad_() for x in to_gpu(inputs)]
    want = wkv6(*leaves)
    want += torch.autograd.grad([*want], leaves, to_gpu([gy, g_final]))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what comes before on this stream is late: a kernel on another would overtake it
        late = [x.detach().clone().requires_grad_() for x in leaves]
        got = wkv6(*late)
        got += torch.autograd.grad([*got], late, to_gpu([gy, g_final]))
    torch.cuda.synchronize()
    assert all(map(torch.equal, got, want))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("dtype, N", [(FP32, 128), (BF16, 64)])
def test_the_op_runs_on_the_device_of_its_tensors(dtype, N):
    """While another is the current one; both kernels ask for more than 48 KB of shared memory, which each device grants."""
    inputs, gy, g_final = make_inputs(2, 100, 3, N, dtype=dtype)
    results = []
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        leaves = [x.to(device).requires_grad_() for x in inputs]
        y, final_state = wkv6(*leaves)
        grads = torch.autograd.grad((y, final_state), leaves, (gy.to(device), g_final.to(device)))
        assert torch.cuda.current_device() == 0 and y.device == grads[0].device == torch.device(device)
        results.append([x.cpu() for x in (y, final_state, *grads)])
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


@pytest.mark.parametrize("dtype, N", [(FP32, 128), (BF16, 64)])
def test_a_cuda_graph_captures_the_op(dtype, N):
    inputs, gy, g_final = make_inputs(1, 600, 3, N, dtype=dtype)
    inputs, gy, g_final = to_gpu(inputs), *to_gpu((gy, g_final))

    def both():
        y, final_state, saved = wkv6_cuda.forward(*inputs, save=True)
        return y, final_state, *wkv6_cuda.backward(*inputs[:5], saved, gy, g_final)

    want = both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = both()
    for x in got:
        x.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("dtype, N", [(FP32, 8), (BF16, 64)])
@pytest.mark.parametrize("cut", [1, 16, 37])
def test_two_pieces_with_the_state_carried_equal_the_whole(dtype, N, cut):
    inputs, gy, g_final = make_inputs(2, 65, 3, N, dtype=dtype)
    r, k, v, log_w, u, state = (x.detach().requires_grad_() for x in to_gpu(inputs))
    gy, g_final = to_gpu((gy, g_final))
    first, second = zip(*((x[:, :cut].contiguous(), x[:, cut:].contiguous()) for x in (r, k, v, log_w)))
    y1, middle = wkv6(*first, u, state)
    y2, final_state = wkv6(*second, u, middle)
    pieces = torch.cat([y1, y2], 1), final_state
    whole = wkv6(r, k, v, log_w, u, state)
    leaves = (r, k, v, log_w, u, state)
    got = (*pieces, *torch.autograd.grad(pieces, leaves, (gy, g_final)))
    want = (*whole, *torch.autograd.grad(whole, leaves, (gy, g_final)))
    gate = 2e-6 if dtype == FP32 else 6e-3
    assert all(error(a.detach(), b.detach().double()) <= gate for a, b in zip(got, want))


@pytest.mark.parametrize("kernel", ["sequential", "chunk"])
def test_offsets_beyond_32_bits(kernel):
    B, T, H, N = 9, 4096, 1024, 64  # 2.4e9 elements, 4.8e9 bytes a tensor
    free, _ = torch.cuda.mem_get_info()
    if free < 35e9:
        pytest.skip(f"needs 35 GB of GPU memory, {free / 1e9:.0f} GB are free")
    row = [torch.randn(1, T, H, N, device=DEVICE).to(BF16) for _ in range(4)]
    row[3] = -torch.rand_like(row[3])
    u = torch.randn(H, N, device=DEVICE)
    y_row, final_row, _ = wkv6_cuda.forward(*row, u, None, save=False, kernel=kernel)
    y, final_state, _ = wkv6_cuda.forward(
        *(x.expand(B, -1, -1, -1).contiguous() for x in row), u, None, save=False, kernel=kernel
    )
    assert torch.equal(y[-1], y_row[0]) and torch.equal(final_state[-1], final_row[0])


def test_an_error_code_becomes_an_exception():
    r = torch.randn(1, 4, 1, 8, device=DEVICE)
    with pytest.raises(torch.cuda.CudaError, match="invalid argument"):
        cuda.run(
            wkv6_cuda.library("sequential", DEVICE).wkv6_sequential_forward, DEVICE, 0, 0, 1, 0, 1, 8,
            r, r, r, r, r, None, r, r,
        )  # fmt: skip
