"""The recurrences' CUDA kernels, the files that nvcc compiles, run on the CPU by the shim through their host side."""

import ctypes

import pytest
import torch
from cuda_shim import CUDA, compile_for_cpu, error
from recurrences import (
    BF16,
    FP32,
    FP64,
    OPS,
    SMOOTH,
    Guarded,
    assert_close,
    assert_same,
    case,
    changed,
    guard,
    make_inputs,
    named,
    reference,
    without_state,
)  # fmt: skip

from rwkv_bone.ops import cuda
from rwkv_bone.ops.recurrence import names_of

# a kernel of each op, its dtype, N, and into how many segments it cuts T
KERNELS = [("sequential", FP32, 16, 1), ("chunk", BF16, 64, 1), ("chunk", BF16, 64, 3)]
KERNELS = [(name, *kernel) for name in OPS for kernel in KERNELS]
LEAST_LOG_W = -16.625  # of wkv6_chunk, which takes what is below for this


def gate(name, kernel, dtype):
    """Rounding a result to bf16 gives 1.7e-3 (2^-8 an element), rounding the factors of the chunk kernels' products more."""
    if kernel == "sequential":
        return {FP32: 1e-6, BF16: 2**-8 + 1e-6}[dtype] if name == "wkv6" else {FP32: 2e-6, BF16: 4e-3}[dtype]
    return 5e-3 if name == "wkv6" else 6e-3


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    folder, names = tmp_path_factory.mktemp("kernels"), [(name, kernel) for name in OPS for kernel in ("sequential", "chunk")]
    paths = {of: compile_for_cpu(CUDA / "{}_{}.cu".format(*of), folder) for of in names}
    return {of: cuda.declare(ctypes.CDLL(str(path)), OPS[of[0]].kernels["cuda"].functions) for of, path in paths.items()}


@pytest.fixture
def shim(libraries, monkeypatch):
    """CPU tensors go the way of CUDA tensors. Yields the set of the kernels that ran."""
    ran = set()

    def run(function, device, *arguments):
        assert function(*(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments), None) == 0

    for name, op in OPS.items():
        kernels = op.kernels["cuda"]
        monkeypatch.setattr(kernels, "library", lambda kernel, _, name=name: ran.add(kernel) or libraries[name, kernel])
        monkeypatch.setitem(op.kernels, "cpu", kernels)
    monkeypatch.setattr(cuda, "run", run)
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 4)
    return ran


@pytest.fixture
def both(shim, libraries, monkeypatch):
    """A function that runs a kernel forward and backward between guards, and names what it gives."""

    def run_both(name, kernel, inputs, gy, g_final, cut=1, seed=0):
        def segments(name, lib, r):
            size = getattr(lib, f"{name}_chunk_scratch_bytes")(r.shape[0], r.shape[2], cut)
            return torch.empty(size // 4), cut

        monkeypatch.setattr(cuda, "segments", segments)
        libraries[name, kernel].cuda_shim_seed(seed)
        kernels, given = OPS[name].kernels["cuda"], [guard(x) for x in inputs]
        gy, g_final = guard(gy), guard(g_final)
        with Guarded(monkeypatch):
            y, final_state, saved = kernels.forward(*given, save=True, kernel=kernel)
            gradients = kernels.backward(*without_state(name, given), saved, gy, g_final, kernel=kernel)
        return named(name, y, final_state, gradients)

    return run_both


def assert_right(both, name, kernel, inputs, gy, g_final, cut=1, limit=None, want=None):
    got, want = both(name, kernel, inputs, gy, g_final, cut), want or reference(name, inputs, gy, g_final)
    log_w = inputs[names_of(OPS[name].inputs).index("log_w")].double()
    if kernel == "chunk" and name == "wkv6":
        # what trains log_w = -exp(x) is the gradient of x: small gradients of strong decays count more
        got, want = ({**x, "g_x": x["g_log_w"] * log_w} for x in (got, want))
    assert_close(got, want, limit or gate(name, kernel, inputs[0].dtype))
    return got


# ---------------------------------------------------------------- against the definition


@pytest.mark.parametrize("T, dtype, w_dtype", [
    (1, BF16, FP32), (15, FP32, FP32), (16, BF16, BF16), (17, BF16, BF16), (63, FP32, FP32), (65, BF16, FP32), (200, FP32, FP32),
])  # fmt: skip
@pytest.mark.parametrize("name, regime", SMOOTH)
def test_sequential_equals_the_definition(both, name, regime, T, dtype, w_dtype):
    inputs, gy, g_final, want = case(name, 2, T, 3, 8, regime=regime, dtype=dtype, w_dtype=w_dtype)
    assert_right(both, name, "sequential", inputs, gy, g_final, want=want)


@pytest.mark.parametrize("N", [1, 5, 16, 17, 40, 64, 65, 128])
@pytest.mark.parametrize("name", OPS)
def test_sequential_takes_any_head_size(both, name, N):
    assert_right(both, name, "sequential", *make_inputs(name, 1, 33, 2, N, "extreme" if name == "wkv6" else "random"))
    assert_right(both, name, "sequential", *make_inputs(name, 1, 16, 2, N, "strong", BF16))


@pytest.mark.parametrize("T, w_dtype", [(1, BF16), (15, FP32), (16, BF16), (17, BF16), (64, FP32), (130, BF16)])
@pytest.mark.parametrize("name, regime", SMOOTH)
def test_chunk_equals_the_definition(both, name, regime, T, w_dtype):
    assert_right(both, name, "chunk", *make_inputs(name, 1, T, 2, 64, regime, BF16, w_dtype))


@pytest.mark.parametrize(
    "B, T, H, w_dtype, cut",
    [(2, 65, 3, BF16, 2), (1, 33, 2, FP32, 3), (1, 65, 1, FP32, 4), (1, 200, 1, BF16, 13), (1, 300, 1, FP32, 4)],
)
@pytest.mark.parametrize("name, regime", SMOOTH)
def test_chunk_in_segments_equals_the_definition(both, name, regime, B, T, H, w_dtype, cut):
    assert_right(both, name, "chunk", *make_inputs(name, B, T, H, 64, regime, BF16, w_dtype, state=T != 65), cut)


@pytest.mark.parametrize("name, kernel, regime, T, N, cut, limit", [
    ("wkv6", "sequential", "none", 2000, 8, 1, 3e-6),  # rounding errors of 2000 additions, a random walk: measured up to 1.0e-6
    # the state grows and what is removed from it does not: 1.4e-2 after 1,600 tokens with the states rounded to bf16 there
    ("wkv7", "chunk", "repeat", 800, 64, 1, None), ("wkv7", "chunk", "repeat", 800, 64, 6, None),
])  # fmt: skip
def test_many_tokens_that_are_never_forgotten_stay_exact(both, name, kernel, regime, T, N, cut, limit):
    inputs = make_inputs(name, 1, T, 1, N, regime, *((BF16, FP32) if kernel == "chunk" else ()))
    assert_right(both, name, kernel, *inputs, cut, limit)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize("name, regime", [*(case for case in SMOOTH if case[0] == "wkv6"), ("wkv7", "random")])
def test_chunk_takes_large_and_small_inputs(both, name, regime, scale):
    inputs, gy, g_final = make_inputs(name, 1, 70, 1, 64, regime, BF16)
    scaled = changed(name, inputs, **dict.fromkeys(("r", "k", "v", "state"), lambda x: x * scale))
    assert_right(both, name, "chunk", scaled, gy, g_final)


@pytest.mark.parametrize("resets, state", [(0.05, True), (0.5, False), (1.0, True)])
@pytest.mark.parametrize("name, kernel, dtype, N, cut", [kernel for kernel in KERNELS if kernel[0] == "wkv7"])
def test_no_token_sees_beyond_a_reset(both, name, kernel, dtype, N, cut, resets, state):
    inputs, gy, g_final = make_inputs(name, 2, 70, 2, N, dtype=dtype, resets=resets, state=state)
    got = assert_right(both, name, kernel, inputs, gy, g_final, cut)
    assert (got["g_log_w"][inputs[-1]] == 0).all()
    loud = changed(name, inputs, k=torch.clone)
    for b in range(2):  # what comes before the last reset says nothing about what comes after it
        last = inputs[-1][b].nonzero().max()
        loud[2][b, :last] *= 1e3
        after = both(name, kernel, loud, gy, g_final, cut)
        assert torch.equal(after["y"][b, last:], got["y"][b, last:])
        assert torch.equal(after["final_state"][b], got["final_state"][b])


@pytest.mark.parametrize("N", [8, 64])
def test_a_decay_to_exactly_zero_forgets_everything_in_wkv6_sequential(both, N):
    inputs, gy, g_final = make_inputs("wkv6", 2, 40, 2, N, "cut")
    inputs[3][:, 20] = -torch.inf
    got = assert_right(both, "wkv6", "sequential", inputs, gy, g_final)
    other = both("wkv6", "sequential", changed("wkv6", inputs, state=lambda x: torch.full_like(x, 1e30)), gy, g_final)
    assert torch.equal(other["y"][:, 21:], got["y"][:, 21:])


@pytest.mark.parametrize("w_dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_log_w_beyond_the_bound_of_wkv6_chunk_is_the_bound_and_has_no_gradient(both, w_dtype):
    inputs, gy, g_final = make_inputs("wkv6", 1, 70, 2, 64, "normal", BF16, w_dtype)
    beyond = torch.rand(inputs[3].shape) < 0.3
    beyond[:, 32:48] = True  # a chunk that forgets everything
    for value in (-17.0, -torch.inf):
        below = inputs[3].masked_fill(beyond, value)
        got = both("wkv6", "chunk", changed("wkv6", inputs, log_w=below), gy, g_final)
        assert_same(got, both("wkv6", "chunk", changed("wkv6", inputs, log_w=below.clamp(min=LEAST_LOG_W)), gy, g_final))
        assert (got["g_log_w"][beyond] == 0).all() and (got["g_log_w"][~beyond] != 0).any()
        # -exp(x) at the bound is 6e-8: against the true decay nothing is lost
        got["g_log_w"] = torch.where(beyond, 0, got["g_log_w"])
        want = reference("wkv6", changed("wkv6", inputs, log_w=below.double()), gy, g_final)
        assert max(error(got[n], x) for n, x in want.items()) <= gate("wkv6", "chunk", BF16)


# ---------------------------------------------------------------- the same bits


@pytest.mark.parametrize("name, kernel, dtype, N, cut", [*KERNELS, ("wkv6", "sequential", BF16, 128, 1)])
def test_no_order_of_threads_changes_a_bit(both, name, kernel, dtype, N, cut):
    inputs, gy, g_final = make_inputs(name, 2, 90 if N < 128 else 16, 2, N, "strong", dtype, resets=0.05)
    want = both(name, kernel, inputs, gy, g_final, cut)
    for seed in range(1, 4):
        assert_same(both(name, kernel, inputs, gy, g_final, cut, seed), want)


@pytest.mark.parametrize("name, kernel, dtype, N, cut", KERNELS)
def test_absent_states_are_zeros_and_nothing_is_kept_unless_asked(both, name, kernel, dtype, N, cut):
    inputs, gy, _ = make_inputs(name, 2, 40, 2, N, dtype=dtype, state=False)
    zeros = torch.zeros(2, 2, N, N)
    want = both(name, kernel, inputs, gy, None, cut)
    assert_same(both(name, kernel, changed(name, inputs, state=zeros), gy, zeros, cut), want)
    y, final_state, saved = OPS[name].kernels["cuda"].forward(*inputs, save=False, kernel=kernel)
    assert torch.equal(y, want["y"]) and torch.equal(final_state, want["final_state"]) and saved.numel() == 0
    silent = changed(name, inputs, **dict.fromkeys(("r", "k", "v"), torch.zeros_like))
    assert all((x == 0).all() for x in both(name, kernel, silent, torch.zeros_like(gy), None, cut).values())


@pytest.mark.parametrize("cut", [16, 37])
@pytest.mark.parametrize("name", OPS)
def test_two_pieces_with_the_state_carried_equal_the_whole(both, name, cut):
    inputs, gy, g_final = make_inputs(name, 2, 65, 3, 8)
    want = both(name, "sequential", inputs, gy, g_final)

    def piece(of):
        along_time = (x is not None and x.shape[:2] == gy.shape[:2] for x in (*inputs, gy))
        *cut_to, g = (x[:, of].contiguous() if along else x for x, along in zip((*inputs, gy), along_time))
        return cut_to, g

    (first, gy1), (second, gy2) = piece(slice(cut)), piece(slice(cut, None))
    middle = both(name, "sequential", first, gy1, g_final)["final_state"]
    two = both(name, "sequential", changed(name, second, state=middle), gy2, g_final)
    one = both(name, "sequential", first, gy1, two["g_state"])
    got = {n: torch.cat([one[n], two[n]], 1) for n in want if want[n].shape[:2] == gy.shape[:2]}
    got |= {"final_state": two["final_state"], "g_state": one["g_state"]}
    got |= {"g_u": one["g_u"] + two["g_u"]} if name == "wkv6" else {}
    assert_close(got, {n: x.double() for n, x in want.items()}, gate(name, "sequential", FP32))


@pytest.mark.parametrize("name", OPS)
def test_chunk_takes_tensors_in_the_middle_of_others(both, name):
    inputs, gy, g_final = make_inputs(name, 1, 20, 1, 64, dtype=BF16)
    want = both(name, "chunk", inputs, gy, g_final)
    shifted = [None if x is None else torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x) for x in inputs]
    assert shifted[0].data_ptr() % 16
    y, final_state, _ = OPS[name].kernels["cuda"].forward(*shifted, save=False, kernel="chunk")
    assert torch.equal(y, want["y"]) and torch.equal(final_state, want["final_state"])


# ---------------------------------------------------------------- the op


@pytest.mark.parametrize("use", [(True, True), (True, False), (False, True)], ids=["both", "y", "final_state"])
@pytest.mark.parametrize("dtype, w_dtype, N, T, kernel, state", [
    (FP32, FP32, 8, 33, "sequential", True), (BF16, FP32, 32, 33, "sequential", False), (BF16, BF16, 64, 33, "chunk", True),
    (BF16, FP32, 64, 520, "chunk", False),  # in two segments or more
])  # fmt: skip
@pytest.mark.parametrize("name", OPS)
def test_the_op_has_the_gradients_of_the_definition(shim, name, dtype, w_dtype, N, T, kernel, state, use):
    sizes = (1, T, 1) if T > 500 else (2, T, 3)
    inputs, gy, g_final = make_inputs(name, *sizes, N, dtype=dtype, w_dtype=w_dtype, state=state)
    g_final = torch.randn(sizes[0], sizes[2], N, N) if g_final is None else g_final
    results = []
    for function, of in ((lambda *x: OPS[name](x, "auto"), lambda x: x), (OPS[name].reference, lambda x: x.double())):
        leaves = [None if x is None else of(x).detach().requires_grad_() for x in inputs]
        y, final_state = function(*leaves)
        sum((x.double() * g).sum() for x, g, wanted in zip((y, final_state), (gy, g_final), use) if wanted).backward()
        of_names = dict(zip(names_of(OPS[name].inputs), leaves))
        found = {f"g_{n}": torch.zeros_like(x) if x.grad is None else x.grad for n, x in of_names.items() if x is not None}
        results.append({"y": y.detach(), "final_state": final_state.detach(), **found})
    got, want = results
    assert shim == {kernel} and got["y"].dtype == dtype and got["final_state"].dtype == FP32
    assert all(g.dtype == x.dtype for g, x in zip(list(got.values())[2:], [x for x in inputs if x is not None]))
    assert not {n: error(got[n], x) for n, x in want.items() if not error(got[n], x) <= gate(name, kernel, dtype)}


@pytest.mark.parametrize("dtype, N", [(FP32, 8), (BF16, 64)])
@pytest.mark.parametrize("name", OPS)
def test_the_registered_op_is_sound(shim, name, dtype, N):
    inputs, _, _ = make_inputs(name, 2, 20, 3, N, dtype=dtype)
    arguments = [None if x is None else x.requires_grad_() for x in inputs]
    torch.library.opcheck(OPS[name].op, (*arguments, True), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype, N, kernel", [(BF16, 64, "chunk"), (BF16, 32, "sequential"), (FP32, 64, "sequential")])
@pytest.mark.parametrize("name", OPS)
def test_the_kernel_is_chosen_by_dtype_and_head_size(name, dtype, N, kernel):
    assert OPS[name].kernels["cuda"].choose(dtype, N) == kernel


@pytest.mark.parametrize("dtype, N", [(FP64, 8), (FP32, 129)])
@pytest.mark.parametrize("name", OPS)
def test_what_no_kernel_takes_is_refused(shim, name, dtype, N):
    with pytest.raises(ValueError, match=rf"up to 128 channels, not {dtype} and {N}; use op='torch'"):
        OPS[name](tuple(make_inputs(name, 1, 1, 1, N, dtype=dtype)[0]), "auto")


# ---------------------------------------------------------------- the C interface


def call(libraries, name, kernel, direction, *head):
    """The error code of a launching function for so many of its arguments; the others are null, or one segment."""
    function = getattr(libraries[name, kernel], f"{name}_{kernel}_{direction}")
    rest = [0 if kind in (cuda.INT, cuda.SIZE) else None for kind in function.argtypes[len(head) :]]
    if kernel == "chunk" and 0 in rest:
        rest[rest.index(0)] = 1
    return function(*head, *rest)


@pytest.mark.parametrize("name", OPS)
def test_what_the_kernels_cannot_do_is_refused_with_an_error_code(libraries, name):
    shapes = [(0, 1, 1, 8), (1, 0, 1, 8), (1, 1, 0, 8), (1, 1, 1, 0), (1, 1, 1, 129)]
    heads = [(2, 0, 1, 1, 1, 8), (0, -1, 1, 1, 1, 8), *((0, 0, *shape) for shape in shapes)]
    sizes = [(2, 1, 33, 1), (1, 0, 33, 1), (1, 1, 0, 1), (1, 1, 33, 0), (1, 1, 2**31, 1), (1, 2**20, 16, 2**12)]
    for direction in ("forward", "backward"):
        assert {call(libraries, name, "sequential", direction, *head) for head in heads} == {1}
        assert {call(libraries, name, "chunk", direction, *size) for size in sizes} == {1}
        assert call(libraries, name, "chunk", direction, 1, 1, 33, 1, 8) == 1  # copies need 16-byte alignment
        function = getattr(libraries[name, "chunk"], f"{name}_chunk_{direction}")
        pointers = [None] * (len(function.argtypes) - 6)
        assert {function(1, 1, 33, 1, *pointers, segments, None) for segments in (0, 4)} == {1}  # there are three chunks


@pytest.mark.parametrize(
    "B, T, H", [(8, 4096, 64), (1, 4096, 12), (1, 4096, 64), (1, 4096, 1), (1, 17, 1), (32, 512, 32), (1, 10**6, 2)]
)
@pytest.mark.parametrize("multiprocessors", [28, 132])
@pytest.mark.parametrize("name, least", [("wkv6", 256), ("wkv7", 128)])
def test_the_recommended_segments_are_long_and_as_many_as_the_gpu_can_run(libraries, name, least, B, T, H, multiprocessors):
    segments = getattr(libraries[name, "chunk"], f"{name}_chunk_segments")(B, T, H, multiprocessors)
    assert segments == 1 or (segments > 1 and T // segments >= least)
    assert B * H * (segments - 1) < 2 * multiprocessors  # no more than needed
    if name == "wkv7":
        assert (segments > 1) == (segments > 2) == (2 * multiprocessors >= 3 * B * H and T >= 384)
