"""The recurrences' CUDA kernels on a GPU against float64. The same kernels run on any CPU in test_recurrence_cuda.py; here are
real tensor cores, real memory and real concurrency.

Under NVIDIA's checkers: compute-sanitizer --tool memcheck (or racecheck) python -m pytest THIS_FILE -k sanitizer
"""

import pytest
import torch
from cuda_shim import error
from recurrences import BF16, FP32, OPS, SMOOTH, assert_close, assert_same, make_inputs, named, reference, without_state
from test_recurrence_cuda import gate

from rwkv_bone.ops import cuda
from rwkv_bone.ops.recurrence import names_of

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

DEVICE = torch.device("cuda:0")
SEQUENTIAL = [("sequential", FP32, FP32), ("sequential", BF16, BF16), ("sequential", BF16, FP32)]  # dtypes of r and of log_w
CHUNK = [("chunk", BF16, BF16), ("chunk", BF16, FP32)]
every_kernel = pytest.mark.parametrize("kernel, dtype, w_dtype", [*SEQUENTIAL, *CHUNK])
every_op = pytest.mark.parametrize("name", OPS)


def limit(name, kernel, dtype):
    return max(2e-6, gate(name, kernel, dtype))


def to_gpu(*tensors, device=DEVICE):
    return [None if x is None else x.to(device) for x in tensors]


def run(name, kernel, inputs, gy, g_final):
    """y, the final state and all gradients, on the CPU, by name."""
    kernels, inputs = OPS[name].kernels["cuda"], to_gpu(*inputs)
    y, final_state, saved = kernels.forward(*inputs, save=True, kernel=kernel)
    gradients = kernels.backward(*without_state(name, inputs), saved, *to_gpu(gy, g_final), kernel=kernel)
    return {n: x.cpu() for n, x in named(name, y, final_state, gradients).items()}


def assert_right(name, kernel, inputs, gy, g_final):
    want = reference(name, inputs, gy, g_final)
    assert_close(run(name, kernel, inputs, gy, g_final), want, limit(name, kernel, inputs[0].dtype))


def of_the_op(name, leaves, gy, g_final):
    y, final_state = OPS[name](tuple(leaves), "auto")
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    return [y, final_state, *torch.autograd.grad((y, final_state), wanted, (gy, g_final))]


def leaves_of(inputs, device=DEVICE):
    return [x if x is None or x.dtype == torch.bool else x.detach().requires_grad_() for x in to_gpu(*inputs, device=device)]


@pytest.mark.parametrize("T", [1, 15, 16, 17, 63, 64, 65, 200, 600])  # 600: chunk in segments
@pytest.mark.parametrize("name, regime", SMOOTH)
@every_kernel
def test_kernels_equal_the_definition(kernel, dtype, w_dtype, name, regime, T):
    assert_right(name, kernel, *make_inputs(name, 2, T, 2, 64, regime, dtype, w_dtype))


@pytest.mark.parametrize("N", [1, 5, 8, 16, 17, 40, 65, 128])
@every_op
@pytest.mark.parametrize("kernel, dtype, w_dtype", SEQUENTIAL)
def test_sequential_takes_any_head_size(kernel, dtype, w_dtype, name, N):
    assert_right(name, kernel, *make_inputs(name, 1, 33, 2, N, "strong" if name == "wkv6" else "random", dtype, w_dtype))


@pytest.mark.parametrize("state", [True, False], ids=["state", "no_state"])
@every_op
@every_kernel
def test_sanitizer_case(kernel, dtype, w_dtype, name, state):
    regime = "normal" if name == "wkv6" else "weak"  # in segments, the last chunk half full
    assert_right(name, kernel, *make_inputs(name, 2, 600, 2, 64, regime, dtype, w_dtype, resets=0.005, state=state))


@every_op
@every_kernel
def test_every_run_gives_the_same_bits(kernel, dtype, w_dtype, name):
    inputs, gy, g_final = make_inputs(name, 4, 512, 40, 64, "", dtype, w_dtype, resets=0.01)
    want = run(name, kernel, inputs, gy, g_final)
    for _ in range(5):
        assert_same(run(name, kernel, inputs, gy, g_final), want)


@pytest.mark.parametrize("w_dtype", [BF16, FP32])
# of wkv7 not one token again and again, never forgotten: S grows, S a does not
@pytest.mark.parametrize("name, regime", [case for case in SMOOTH if case[1] != "repeat"])
def test_the_kernels_agree_over_4096_tokens(name, regime, w_dtype):
    inputs, gy, g_final = make_inputs(name, 1, 4096, 4, 64, regime, BF16, w_dtype)
    chunk, sequential = (run(name, kernel, inputs, gy, g_final) for kernel in ("chunk", "sequential"))
    assert_close(chunk, {n: x.double() for n, x in sequential.items()}, 1.2 * gate(name, "chunk", BF16))  # both are rounded


@pytest.mark.parametrize("dtype, N", [(FP32, 8), (BF16, 64)])
@every_op
def test_the_op_runs_on_the_current_stream(name, dtype, N):
    inputs, *gradients = make_inputs(name, 2, 100, 3, N, dtype=dtype)
    leaves, gradients = leaves_of(inputs), to_gpu(*gradients)
    want = of_the_op(name, leaves, *gradients)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what comes before on this stream is late: a kernel on another would overtake it
        late = [None if x is None else x.detach().clone().requires_grad_() for x in leaves]
        got = of_the_op(name, late, *gradients)
    torch.cuda.synchronize()
    assert all(map(torch.equal, got, want))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("dtype, N", [(FP32, 128), (BF16, 64)])
@every_op
def test_the_op_runs_on_the_device_of_its_tensors(name, dtype, N):
    """While another is the current one; both kernels ask for more than 48 KB of shared memory, which each device grants."""
    inputs, *gradients = make_inputs(name, 2, 100, 3, N, dtype=dtype)
    results = []
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        found = of_the_op(name, leaves_of(inputs, device), *to_gpu(*gradients, device=device))
        assert torch.cuda.current_device() == 0 and found[0].device == found[2].device == torch.device(device)
        results.append([x.cpu() for x in found])
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


@pytest.mark.parametrize("dtype, N", [(FP32, 128), (BF16, 64)])
@every_op
def test_a_cuda_graph_captures_forward_and_backward(name, dtype, N):
    inputs, gy, g_final = make_inputs(name, 1, 600, 3, N, dtype=dtype, resets=0.01)
    inputs, gradients, kernels = to_gpu(*inputs), to_gpu(gy, g_final), OPS[name].kernels["cuda"]

    def both():
        y, final_state, saved = kernels.forward(*inputs, save=True)
        return y, final_state, *kernels.backward(*without_state(name, inputs), saved, *gradients)

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
@every_op
def test_two_pieces_with_the_state_carried_equal_the_whole(name, dtype, N, cut):
    inputs, *gradients = make_inputs(name, 2, 65, 3, N, dtype=dtype)
    leaves, (gy, g_final) = leaves_of(inputs), to_gpu(*gradients)
    at = names_of(OPS[name].inputs).index("state")

    def piece(of, state):
        cut_to = [x[:, of].contiguous() if x is not None and x.shape[:2] == gy.shape[:2] else x for x in leaves]
        return OPS[name]((*cut_to[:at], state, *cut_to[at + 1 :]), "auto")

    y1, middle = piece(slice(cut), leaves[at])
    y2, final_state = piece(slice(cut, None), middle)
    pieces, whole = (torch.cat([y1, y2], 1), final_state), OPS[name](tuple(leaves), "auto")
    wanted = [x for x in leaves if x is not None]
    got, want = ((*of, *torch.autograd.grad(of, wanted, (gy, g_final))) for of in (pieces, whole))
    allowed = 2e-6 if dtype == FP32 else 1.2 * gate(name, "chunk", BF16)
    assert all(error(a.detach(), b.detach().double()) <= allowed for a, b in zip(got, want))


@pytest.mark.parametrize("kernel", ["sequential", "chunk"])
@every_op
def test_offsets_beyond_32_bits(name, kernel):
    B, T, H, N = 9, 4096, 1024, 64  # 2.4e9 elements, 4.8e9 bytes a tensor
    free, _ = torch.cuda.mem_get_info()
    if free < 45e9:
        pytest.skip(f"needs 45 GB of GPU memory, {free / 1e9:.0f} GB are free")
    row, _, _ = make_inputs(name, 1, T, H, N, dtype=BF16, state=False)
    row, forward = to_gpu(*row), OPS[name].kernels["cuda"].forward
    y_row, final_row, _ = forward(*row, save=False, kernel=kernel)
    rows = [x.expand(B, -1, -1, -1).contiguous() if x is not None and x.dim() == 4 else x for x in row]
    y, final_state, _ = forward(*rows, save=False, kernel=kernel)
    assert torch.equal(y[-1], y_row[0]) and torch.equal(final_state[-1], final_row[0])


@every_op
def test_an_error_code_becomes_an_exception(name):
    function = getattr(OPS[name].kernels["cuda"].library("sequential", DEVICE), f"{name}_sequential_forward")
    r = torch.randn(1, 4, 1, 8, device=DEVICE)
    with pytest.raises(torch.cuda.CudaError, match="invalid argument"):  # no token
        cuda.run(function, DEVICE, 0, 0, 1, 0, 1, 8, *[r] * (len(function.argtypes) - 7))
