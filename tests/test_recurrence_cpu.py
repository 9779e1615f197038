"""The recurrences' CPU kernels, of every instruction set, and their chunked torch forms against the definition in float64."""

import importlib.util
from pathlib import Path

import pytest
import torch
from recurrences import (
    BF16,
    FP32,
    FP64,
    OPS,
    WITH_REGIMES,
    Guarded,
    assert_close,
    assert_same,
    case,
    changed,
    errors,
    guard,
    make_inputs,
    named,
    reference,
    without_state,
)  # fmt: skip

from rwkv_bone.ops import cpu
from rwkv_bone.ops.recurrence import names_of
from rwkv_bone.ops.selfcheck import by_autograd

VARIANTS = ["portable", "avx2", "avx512"]
SHAPES = [  # B, T, H, N: chunks of 8 and 16, whole and cut; heads of any size
    (2, 1, 3, 8), (2, 7, 2, 33), (1, 8, 3, 16), (1, 16, 3, 40), (3, 17, 4, 1), (1, 63, 3, 5), (2, 64, 1, 8), (1, 65, 1, 64),
    (1, 130, 1, 100), (1, 130, 1, 128),
]  # fmt: skip


def run(name, form, inputs, gy, g_final, threads=1):
    """y, the final state and the gradients from the chunked torch form, or from the kernel for one instruction set."""
    op = OPS[name]
    if form == "torch":
        given = dict(zip(names_of(OPS[name].inputs), inputs))
        found = by_autograd(lambda *x: op(x, "torch"))(given, gy, torch.zeros(0) if g_final is None else g_final)
        return {n.replace("gradient of ", "g_").replace("final state", "final_state"): x for n, x in found.items()}
    kernels = op.kernels["cpu"]
    if form not in kernels.variants:
        pytest.skip(f"this machine has no {form}")
    y, final_state, saved = kernels.forward(*inputs, save=True, variant=form, threads=threads)
    gradients = kernels.backward(*without_state(name, inputs), saved, gy, g_final, variant=form, threads=threads)
    return named(name, y, final_state, gradients)


LIMITS = {"wkv6": {FP32: 1e-6, BF16: 2.5e-3, FP64: 1e-13}, "wkv7": {FP32: 2e-6, BF16: 3e-3, FP64: 1e-13}}


def limit(name):
    """Rounding a result to bf16 gives 1.7e-3 by this measure."""
    return lambda x: LIMITS[name][x.dtype]


def best(name):
    return OPS[name].kernels["cpu"].variants[-1]


@pytest.mark.parametrize("form", ["torch", *VARIANTS])
@pytest.mark.parametrize(("name", "regime"), WITH_REGIMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_equals_the_definition(form, name, regime, shape):
    inputs, gy, g_final, want = case(name, *shape, regime=regime)
    single = regime == "repeat" and shape[3] == 1  # one number, which is removed and added again: 2.3e-6
    assert_close(run(name, form, inputs, gy, g_final), want, 1e-5 if single else limit(name))


@pytest.mark.parametrize("form", VARIANTS)
@pytest.mark.parametrize(("name", "regime"), [case for case in WITH_REGIMES if case[1] != "repeat"])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, FP32), (FP64, FP64)], ids=["bf16", "bf16, log_w fp32", "fp64"])
def test_other_dtypes_equal_the_definition_and_nothing_else_is_written(form, name, regime, dtypes, monkeypatch):
    dtype, w_dtype = dtypes
    states = FP64 if dtype == FP64 else FP32
    for T, options in ((15, {"state": False}), (70, {"resets": 0.1})):
        options = {} if name == "wkv6" and "resets" in options else options
        options = {"regime": regime, "dtype": dtype, "w_dtype": w_dtype, **options}
        inputs, gy, g_final, want = case(name, 2, T, 2, 8 if T == 70 else 40, **options)
        given = [guard(x) for x in inputs], guard(gy), guard(g_final)
        with Guarded(monkeypatch):
            got = run(name, form, *given, threads=1 + T % 2)
        kinds = {"final_state": states, "g_state": states, "g_u": states, "g_log_w": w_dtype}
        assert {n: x.dtype for n, x in got.items()} == {n: kinds.get(n, dtype) for n in got}
        assert_close(got, want, limit(name))


@pytest.mark.parametrize("form", VARIANTS)
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_large_results_that_go_past_the_caches_are_the_same(form, name, dtype):
    inputs, gy, g_final, want = case(name, 32 if dtype == FP32 else 64, 16, 8, 64, dtype=dtype)  # 1 MiB
    assert_close(run(name, form, inputs, gy, g_final, threads=2), want, limit(name))


@pytest.mark.parametrize("form", VARIANTS)
@pytest.mark.parametrize(("name", "regime", "options"), [
    ("wkv6", "normal", {}), ("wkv6", "extreme", {}), ("wkv7", "slow", {}), ("wkv7", "slow", {"resets": 0.1}),
])  # fmt: skip
@pytest.mark.parametrize("shape", [(1, 600, 1, 24), (2, 257, 1, 12), (1, 300, 3, 8), (1, 150, 1, 64)], ids=str)
def test_any_number_of_threads_gives_the_same(form, name, regime, options, shape):
    """Where threads are more than heads, the tokens are cut into segments of whole blocks."""
    inputs, gy, g_final, want = case(name, *shape, regime=regime, **options)
    for threads in (1, 2, 3, 7, 50):
        assert_close(run(name, form, inputs, gy, g_final, threads), want, limit(name))
    assert_same(run(name, form, inputs, gy, g_final, 2), run(name, form, inputs, gy, g_final, 2))


@pytest.mark.parametrize("name", OPS)
def test_threads_of_our_own_do_the_same_as_torchs(name, monkeypatch):
    assert cpu.torch_threads() is not None
    monkeypatch.setattr(cpu, "torch_threads", lambda: None)
    inputs, gy, g_final, want = case(name, 1, 300, 2, 8)
    assert_close(run(name, best(name), inputs, gy, g_final, threads=3), want, limit(name))


@pytest.mark.parametrize("form", VARIANTS)
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("shape", [(1, 512, 8, 64), (1, 512, 1, 64)], ids=str)
def test_no_digits_are_lost_on_a_repeated_token(form, threads, shape):
    """Here the inverse of the triangle by powers, or a suffix sum over rounded gradients, loses one to all digits; and where
    segments meet."""
    inputs, gy, g_final, want = case("wkv7", *shape, regime="repeat")
    assert_close(run("wkv7", form, inputs, gy, g_final, threads), want, limit("wkv7"))


@pytest.mark.parametrize("form", VARIANTS)
def test_bfloat16_on_a_repeated_token(form):
    inputs, gy, g_final, want = case("wkv7", 1, 512, 2, 64, regime="repeat", dtype=BF16)
    assert_close(run("wkv7", form, inputs, gy, g_final), want, 1.2e-2)


@pytest.mark.parametrize("form", ["torch", *VARIANTS])
def test_gradients_of_a_slow_channel_stay_exact_over_many_tokens(form):
    """w is the same at every step, so that an error of its rounding would add up over the 4,000 tokens it remembers."""
    inputs, gy, g_final = make_inputs("wkv6", 1, 1000, 1, 8, "none")
    inputs[3].copy_(-torch.linspace(0.00025, 0.01, 8))
    assert_close(run("wkv6", form, inputs, gy, g_final), reference("wkv6", inputs, gy, g_final), 2e-6)


@pytest.mark.parametrize("form", ["torch", *VARIANTS])
def test_where_w_is_0_its_gradient_is_exactly_0_and_large_inputs_stay_finite(form):
    inputs, gy, g_final = make_inputs("wkv6", 1, 100, 2, 24, "cut")
    assert (run("wkv6", form, inputs, gy, g_final)["g_log_w"][inputs[3] == -torch.inf] == 0).all()
    inputs, gy, g_final = make_inputs("wkv6", 1, 100, 1, 16, "extreme")
    large = changed("wkv6", inputs, **dict.fromkeys("rkv", lambda x: 1e4 * x))
    assert all(x.isfinite().all() for x in run("wkv6", form, large, gy, g_final).values())


@pytest.mark.parametrize(("form", "dtype"), [*((form, d) for form in VARIANTS for d in (FP32, BF16)), ("portable", FP64)])
@pytest.mark.parametrize("name", OPS)
def test_without_backward_nothing_is_kept_and_the_results_are_the_same(name, form, dtype):
    kernels = OPS[name].kernels["cpu"]
    if form not in kernels.variants:
        pytest.skip(f"this machine has no {form}")
    for T, N, state in ((1, 64, True), (8, 24, False), (8, 64, True)):
        inputs, _, _, want = case(name, 2, T, 3, N, dtype=dtype, state=state)
        y, final_state, saved = kernels.forward(*inputs, save=False, variant=form, threads=2)
        assert saved.numel() == 0
        assert_close({**want, "y": y, "final_state": final_state}, want, limit(name))


@pytest.mark.parametrize("name", OPS)
def test_inputs_at_odd_addresses_are_read_right(name):
    inputs, gy, g_final, want = case(name, 1, 50, 2, 16)
    odd = [None if x is None else torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in inputs]
    assert all(x is None or x.data_ptr() % 8 == 4 for x in odd)
    assert_close(run(name, best(name), odd, gy, g_final), want, limit(name))


def test_wkv6_takes_heads_of_any_size():
    inputs, gy, g_final, want = case("wkv6", 1, 20, 1, 256)
    assert_close(run("wkv6", best("wkv6"), inputs, gy, g_final), want, limit("wkv6"))


def test_wkv6_equals_the_recurrence_of_flash_linear_attention():
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
        inputs, gy, g_final, want = case("wkv6", 2, 33, 3, 12, regime=regime)
        found = by_autograd(theirs)(dict(zip(names_of(OPS["wkv6"].inputs), inputs)), gy, g_final)
        assert max(errors(dict(zip(want, found.values())), want).values()) < 1e-6
