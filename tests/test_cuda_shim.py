"""The shim that runs CUDA kernels on the CPU: right programs give the right result in every order of their threads, and
wrong ones are stopped or give themselves away."""

import ctypes
import subprocess
import sys

import pytest
import torch
from cuda_shim import TESTS, compile_for_cpu, pointer

SEEDS = range(5)  # 0 is the natural order


@pytest.fixture(scope="module", params=["", "-DCUDA_SHIM_UCONTEXT"], ids=["default", "ucontext"])
def library(request, tmp_path_factory):
    return compile_for_cpu(TESTS / "cuda_shim_cases.cu", tmp_path_factory.mktemp("shim"), *filter(None, [request.param]))


@pytest.fixture(scope="module")
def lib(library):
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    return compile_for_cpu(TESTS / "cuda_shim_cases.cu", tmp_path_factory.mktemp("races"), races=True)


def run(lib, name: str, inputs, output_shape: tuple[int, ...], seed: int) -> torch.Tensor:
    output = torch.full(output_shape, torch.nan)
    lib.cuda_shim_seed(seed)
    assert getattr(lib, name)(*map(pointer, inputs), pointer(output)) == 0
    return output


@pytest.mark.parametrize("seed", SEEDS)
def test_right_programs_give_the_right_result_in_every_order(lib, seed):
    x = torch.randn(768)
    assert torch.equal(run(lib, "run_reverse", [x[:64]], (64,), seed), x[:64].flip(0))
    torch.testing.assert_close(run(lib, "run_block_sum", [x], (6,), seed), x.view(6, 128).sum(1))


def test_a_missing_barrier_shows(lib):
    x = torch.randn(64)
    results = [run(lib, "run_reverse_without_barrier", [x], (64,), seed) for seed in SEEDS]
    assert not any(torch.equal(result, x.flip(0)) for result in results)
    assert all(result.isnan().any() for result in results)


@pytest.mark.parametrize("name", ["run_product_bf16", "run_product_ldmatrix"])
@pytest.mark.parametrize("seed", SEEDS)
def test_mma_bf16_multiplies_matrices_laid_out_as_the_ptx_isa_says(lib, name, seed):
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 8).bfloat16()
    torch.testing.assert_close(run(lib, name, [a, b], (16, 8), seed), a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_mma_tf32_multiplies_matrices_laid_out_as_the_ptx_isa_says(lib):
    a, b = torch.randn(16, 8), torch.randn(8, 8)
    got = run(lib, "run_product_tf32", [a, b], (16, 8), seed=0)
    torch.testing.assert_close(got, a @ b, rtol=0, atol=8 * 2**-9)
    assert (got - a @ b).abs().max() > 1e-6  # 10 bits of mantissa, not 23
    a, b = torch.randint(-8, 8, (16, 8)).float(), torch.randint(-8, 8, (8, 8)).float()
    assert torch.equal(run(lib, "run_product_tf32", [a, b], (16, 8), seed=1), a @ b)


def test_a_missing_wait_for_cp_async_shows(lib):
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 8).bfloat16()
    assert run(lib, "run_product_too_early", [a, b], (16, 8), seed=0).isnan().all()


def test_shared_memory_starts_as_nan(lib):
    got = run(lib, "run_uninitialised", [], (64,), seed=0)
    assert got[0] == 1 and got[1:].isnan().all()


def test_bf16_rounds_to_nearest_even_and_ex2_flushes_to_zero(lib):
    special = [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, 1e-40, torch.inf, -torch.inf, torch.nan, -126.0]
    x = torch.cat([torch.tensor(special), -torch.rand(117) * 200])
    rounded = torch.empty(128)
    powers = run(lib, "run_formats", [x, rounded], (128,), seed=0)
    torch.testing.assert_close(rounded, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)
    want = torch.where(x < -126, 0.0, torch.exp2(x.double()).float())
    torch.testing.assert_close(powers, want, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "case, message",
    [
        ("barrier_not_reached", "barrier not reached by all: thread 0 is at"),
        ("two_barriers", "barrier not reached by all: thread 0 is at"),
        ("divergent_warp", "divergent warp: lane 15 is at"),
        ("shuffle_against_barrier", "divergent warp: lane 15 is at"),
        ("small_warp", "a warp instruction in a warp of 8 threads"),
        ("overrun", "a write 0 bytes beyond the 100 bytes of dynamic shared memory"),
        ("too_much_shared", "122880 bytes of dynamic shared memory; sm_86, sm_89 and sm_120 have 101376"),
        ("misaligned", "ldmatrix: row 1 of matrix 0 is not aligned to 16 bytes"),
        ("copy_to_global", "cp.async does not write to shared memory"),
        ("never_waited", "a thread ended with a cp.async that nobody waited for"),
        ("never_committed", "a thread ended with a cp.async that was never committed"),
    ],
)
def test_a_wrong_program_is_stopped(library, case, message):
    assert_stopped(library, case, message)


def assert_stopped(library, case, message):
    code = f"""
import ctypes, resource
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
ctypes.CDLL({str(library)!r}).stop_{case}()"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0 and message in result.stderr, result


@pytest.mark.parametrize("seed", SEEDS)
def test_programs_without_races_pass_the_search_for_them(watched, seed):
    lib = ctypes.CDLL(str(watched))
    x, a, b = torch.randn(768), torch.randn(16, 16).bfloat16(), torch.randn(16, 8).bfloat16()
    assert torch.equal(run(lib, "run_reverse", [x[:64]], (64,), seed), x[:64].flip(0))
    torch.testing.assert_close(run(lib, "run_block_sum", [x], (6,), seed), x.view(6, 128).sum(1))
    product = run(lib, "run_product_ldmatrix", [a, b], (16, 8), seed)
    torch.testing.assert_close(product, a.float() @ b.float(), rtol=1e-5, atol=1e-5)
    for name in ("a_warp_in_step", "a_block_in_step", "matrix_of_all", "own_copies", "others_copies"):
        assert getattr(lib, f"run_{name}")() == 0


@pytest.mark.parametrize(
    "case, message",
    [
        ("read_after_write", "of static shared memory, with no barrier since it was written by thread 0"),
        ("write_after_read", "with no barrier since it was read by thread 0"),
        ("only_a_shuffle_between", "race: thread 1 reads"),
        ("read_of_another_warp", "race: thread 33 reads"),
        ("write_after_read_of_another_warp", "race: thread "),
        ("two_writes", "race: thread 1 writes"),
        ("matrix_too_early", "race: thread 0 reads"),
        ("own_copy_too_early", "the target of a cp.async not waited for, by thread 0"),
        ("waited_for_by_another_lane", "race: thread "),
        ("copy_over_what_is_read", "race: thread "),
    ],
)
def test_a_race_is_stopped(watched, case, message):
    assert_stopped(watched, case, message)
