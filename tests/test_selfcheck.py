"""The check of kernels at their first use on a GPU, on kernels that are wrong on purpose, and what runs in their place."""

import ast
import ctypes
import importlib.util
import inspect
import itertools
import json
import random
import runpy
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cuda_shim import CUDA, compile_for_cpu

from rwkv_bone.errors import UserError
from rwkv_bone.ops import build, cuda, selfcheck, wkv6, wkv7
from rwkv_bone.ops.bone import cuda as bone_cuda
from rwkv_bone.ops.selfcheck import Verdict
from rwkv_bone.ops.wkv6 import cuda as wkv6_cuda
from rwkv_bone.ops.wkv7 import cuda as wkv7_cuda

FP32, BF16 = torch.float32, torch.bfloat16
RECURRENCES = [wkv6.recurrence, wkv7.recurrence]
GPU = torch.device("cuda", 0)


# ---------------------------------------------------------------- kernels that are wrong on purpose


def wrong_sign(results, inputs):
    results["gradient of k"].neg_()


def nan_in_the_tail(results, inputs):
    if results["y"].shape[1] % 16:
        results["y"][:, -1, 0, 0] = torch.nan


CHANCE = random.Random(0)


def race(results, inputs):
    if inputs["r"].shape[2] > 2 and CHANCE.random() < 0.1:  # in one of ten launches, one number of one head, by one bit
        x = results["gradient of v"][0, 3, -1]
        x[5] = torch.nextafter(x[5], x[5] + 1)


def wrong_in_the_last_head(results, inputs):
    results["final state"][:, 2:] *= 1.001


def forgets_the_state(results, inputs):
    results["gradient of state"].zero_()


FAULTS = {
    wrong_sign: "gradient of k is off by 2e+00", nan_in_the_tail: "y is off by nan", race: "gradient of v is not the same",
    wrong_in_the_last_head: "final state is not the same", forgets_the_state: "gradient of state is off by 1e+00",
}  # fmt: skip


@pytest.mark.parametrize("recurrence", RECURRENCES, ids=lambda r: r.name)
@pytest.mark.parametrize("fault", [None, *FAULTS], ids=lambda f: f.__name__ if f else "right")
def test_a_kernel_with_a_fault_is_found(recurrence, fault):
    right = selfcheck.by_autograd(recurrence.chunked)

    def run(inputs, gy, gfinal):
        results = right(inputs, gy, gfinal)
        if fault:
            fault(results, inputs)
        return results

    found = selfcheck.examine(run, recurrence, "sequential", FP32, 8, "cpu", heads=4)
    if fault:
        assert not found.ok and found.text.startswith(FAULTS[fault])
    else:
        assert found.ok and found.text.startswith("right to ") and float(found.text.split()[-1]) < 3e-6


@pytest.fixture
def shim(monkeypatch, tmp_path):
    """A function that compiles a kernel's source, with something in it replaced; each launch takes another order of threads."""
    seeds = itertools.count()

    def compiled(name, functions, *change):
        source = tmp_path / f"{name}.cu"
        assert not change or change[0] in (CUDA / source.name).read_text()
        source.write_text((CUDA / source.name).read_text().replace(*change or ("", ""), 1))
        library = cuda.declare(ctypes.CDLL(str(compile_for_cpu(source, tmp_path, "-O0"))), functions)

        def run(function, device, *arguments):
            library.cuda_shim_seed(next(seeds))
            assert function(*(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments), None) == 0

        for kernels, module in ((wkv6_cuda, cuda), (bone_cuda, bone_cuda)):
            monkeypatch.setattr(kernels, "library", lambda *_: library)
            monkeypatch.setattr(module, "run", run)
        monkeypatch.setattr(cuda, "multiprocessors", lambda device: 2)

    return compiled


BONE = {
    "right": (), "sign": ("sum.x[i] += t[", "sum.x[i] -= t["), "barrier": ("__syncthreads();", ";"),
    "rounding": ("round_evenly(xs.x[i] + sum.x[i], ", "round_evenly(1.01f * xs.x[i] + sum.x[i], "),
}  # fmt: skip
WKV6 = {"right": (), "sign": ("] = expf(log_w", "] = -expf(log_w"), "barrier": ("__syncthreads();", ";")}


@pytest.mark.parametrize("change", BONE)
def test_bone_in_the_shim(shim, change, monkeypatch):
    monkeypatch.setattr(selfcheck, "BONE_SIZES", ((3, 4, 2, 64), (5, 2, 3, 24)))
    monkeypatch.setattr(selfcheck, "LAUNCHES", 3)
    shim("bone", bone_cuda.FUNCTIONS, *BONE[change])
    assert selfcheck.examine_bone(bone_cuda, "cpu").ok == (change == "right")


@pytest.mark.parametrize("change", WKV6)
def test_wkv6_in_the_shim(shim, change, monkeypatch):
    monkeypatch.setattr(selfcheck, "CASES", (("random", 20),))
    monkeypatch.setattr(selfcheck, "LAUNCHES", 3)
    shim("wkv6_sequential", wkv6_cuda.functions, *WKV6[change])
    run = selfcheck.by_kernel(wkv6.recurrence, "sequential")
    assert selfcheck.examine(run, wkv6.recurrence, "sequential", FP32, 8, "cpu", heads=2).ok == (change == "right")


# ---------------------------------------------------------------- verdicts


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU that is not there. `found`: the verdict of a check by kernel; `where`: GPU, driver and versions; `checked`: the
    kernels that were, in order."""
    gpu = SimpleNamespace(found={}, where={"GPU": "Some GPU, 9.0", "driver": "580.1"}, checked=[], capability=(9, 0), nvcc=True)

    def examine_apart(name, kernel, dtype, N, device):
        gpu.checked.append(kernel)
        return gpu.found.get(kernel, Verdict(True, "right to 3e-03"))

    def built(name, *_, **__):
        return tmp_path / f"{name}-0123.so"

    def nvcc():
        if not gpu.nvcc:
            raise UserError(f"the CUDA kernels need nvcc: pip install nvidia-cuda-nvcc, {build.WITHOUT_COMPILER}")
        return "nvcc"

    monkeypatch.setattr(selfcheck, "examine_apart", examine_apart)
    monkeypatch.setattr(selfcheck, "circumstances", lambda device: gpu.where)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: gpu.capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(build, "build", built)
    monkeypatch.setattr(build, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(cuda, "nvcc", nvcc)
    monkeypatch.setattr(cuda, "refused", set())
    selfcheck.choose.cache_clear()
    yield gpu
    selfcheck.choose.cache_clear()


def choose(op="auto", dtype=BF16, N=64, T=16, recurrence=wkv7.recurrence):
    return selfcheck.choose(recurrence, dtype, N, T, GPU, op)


WRONG = Verdict(False, "gradient of b is off by 2e-01 (allowed 6e-03): random inputs, 70 tokens")


@pytest.mark.parametrize(
    ("broken", "dtype", "N", "way", "checked"),
    [
        ([], BF16, 64, "chunk", ["chunk"]),
        ([], FP32, 64, "sequential", ["sequential"]),
        ([], BF16, 8, "sequential", ["sequential"]),
        (["chunk"], BF16, 64, "sequential", ["chunk", "sequential"]),
        (["chunk", "sequential"], BF16, 64, "fla", ["chunk", "sequential", "fla"]),
        (["chunk", "sequential", "fla"], BF16, 64, "torch", ["chunk", "sequential", "fla"]),
        ([], torch.float64, 64, "torch", []),
        ([], BF16, 256, "fla", ["fla"]),
    ],
)
def test_the_fastest_kernel_that_is_right_runs(gpu, capsys, broken, dtype, N, way, checked):
    gpu.found = dict.fromkeys(broken, WRONG)
    choice = choose(dtype=dtype, N=N)
    assert (choice.way, gpu.checked) == (way, checked)
    said = capsys.readouterr().err
    assert said.count("\n") == bool(broken) and (not broken or WRONG.text in said)
    assert ("faster would be" in choice.text) == bool(broken)
    choose(dtype=dtype, N=N)
    assert capsys.readouterr().err == ""  # it is said once
    if broken and way in selfcheck.OURS:
        assert cuda.choose("wkv7", dtype, N) == way  # what a compiled model's op asks


def test_fewer_tokens_than_a_chunk_go_step_by_step(gpu):
    assert choose(T=15).way == "sequential" and choose().way == "chunk"
    r = torch.empty(2, 15, 3, 64, dtype=BF16, device="meta")
    assert wkv7_cuda.saved_shape(r) == (2, 3, 64, 64)  # the initial state alone


def test_without_nvcc_the_line_says_once_how_to_get_it(gpu, capsys):
    gpu.nvcc = False
    choice = choose()
    assert choice.way == "fla" and choice.text.count("pip install nvidia-cuda-nvcc") == 1
    said = capsys.readouterr().err
    assert said.count("pip install nvidia-cuda-nvcc") == 1 and "chunk and CUDA kernel, sequential" in said


@pytest.mark.parametrize("op", ["cuda", "fla"])
def test_an_op_that_is_asked_for_by_name_runs_or_ends_in_an_error(gpu, op):
    kernel = "chunk" if op == "cuda" else "fla"
    assert choose(op).way == kernel and gpu.checked == [kernel]
    gpu.found = {kernel: WRONG}
    gpu.where = {"GPU": "Another, 8.0"}
    selfcheck.choose.cache_clear()
    with pytest.raises(UserError, match=rf"--op {op}: WKV7, .*gradient of b is off by 2e-01.*leave --op out"):
        choose(op)


def test_a_verdict_is_kept_for_its_library_gpu_driver_and_versions(gpu, tmp_path):
    check = ("wkv6", "chunk", BF16, 64, GPU)
    assert [selfcheck.verdict(*check) for _ in range(3)] == [Verdict(True, "right to 3e-03")] * 3 and len(gpu.checked) == 1
    (file,) = tmp_path.glob("wkv6_chunk-0123-*.json")
    assert json.loads(file.read_text()).items() >= {"GPU": "Some GPU, 9.0", "driver": "580.1", "ok": True, "N": 64}.items()
    gpu.where, gpu.found = {**gpu.where, "driver": "590.2"}, {"chunk": WRONG}
    assert [selfcheck.verdict(*check) for _ in range(2)] == [WRONG] * 2 and len(gpu.checked) == 2
    gpu.where = {**gpu.where, "driver": "600"}
    gpu.found = {"chunk": Verdict(False, "the check of it stopped: out of memory")}
    assert not selfcheck.verdict(*check).ok and not selfcheck.verdict(*check).ok
    assert len(gpu.checked) == 4  # another time there may be memory


def test_a_cache_that_cannot_be_written_is_no_obstacle(gpu, monkeypatch):
    def full(path, **_):
        raise PermissionError(path)

    monkeypatch.setattr(build, "lock", full)
    assert selfcheck.verdict("wkv6", "chunk", BF16, 64, GPU).ok and gpu.checked == ["chunk"]


def test_a_check_that_dies_or_hangs_is_a_verdict(monkeypatch):
    found = selfcheck.examine_apart("wkv6", "chunk", BF16, 64, GPU)
    if not torch.cuda.is_available():
        assert not found.ok and found.text.startswith("the check of it stopped: ")

    def hang(*args, timeout, **kwargs):
        raise subprocess.TimeoutExpired("", timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    assert "did not end" in selfcheck.examine_apart("wkv6", "chunk", BF16, 64, GPU).text


def test_a_gpu_of_7_5_has_the_sequential_kernels(gpu, capsys):
    gpu.capability = (7, 5)
    assert choose().way == "sequential" and "needs a GPU of compute capability 8.0" in capsys.readouterr().err
    gpu.capability = (7, 0)
    selfcheck.choose.cache_clear()
    assert choose().way == "fla"
    with pytest.raises(UserError, match=r"compute capability 7\.5 \(Turing\) or newer, and this one has 7\.0"):
        choose("cuda", FP32)


def test_on_rocm_nothing_of_cuda_is_called(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.version, "cuda", None)
    gpu.nvcc = False
    assert choose().way == "fla" and gpu.checked == ["fla"]
    gpu.found = {"fla": WRONG}
    gpu.where = {"GPU": "gfx1100"}
    assert choose(N=32).way == "torch"
    bone_cuda._verdict.cache_clear()
    assert bone_cuda.library(GPU) is None
    bone_cuda._verdict.cache_clear()
    assert "nvcc" not in capsys.readouterr().err
    with pytest.raises(UserError, match="this torch is built for ROCm"):
        choose("cuda")


# ---------------------------------------------------------------- flash-linear-attention


@pytest.fixture
def fla(monkeypatch):
    """fla's two functions, with the arguments that they have and its own definitions behind them (Triton needs a GPU)."""
    spec = importlib.util.find_spec("fla")
    if spec is None:
        pytest.skip("needs fla-core")
    ops = Path(spec.submodule_search_locations[0]) / "ops"

    def arguments(file, name):
        (function,) = [n for n in ast.parse((ops / file).read_text()).body if isinstance(n, ast.FunctionDef) and n.name == name]
        return {a.arg for a in function.args.args}

    naive6 = runpy.run_path(str(ops / "rwkv6/recurrent_naive.py"))["naive_recurrent_rwkv6"]
    naive7 = runpy.run_path(str(ops / "generalized_delta_rule/dplr/naive.py"))["dplr_recurrence"]

    def heads_first(x):
        return x.transpose(1, 2)

    def chunk_rwkv6(r, k, v, w, u, **named):
        assert named.keys() <= arguments("rwkv6/chunk.py", "chunk_rwkv6")
        y, final = naive6(*map(heads_first, (r, k, v, w)), u, **named)
        return heads_first(y), final

    def chunk_rwkv7(*, cu_seqlens=None, **named):
        assert named.keys() <= arguments("rwkv7/chunk.py", "chunk_rwkv7") and named["scale"] == 1.0
        state, (r, w, k, v, a, b) = named["initial_state"], map(heads_first, map(named.get, "rwkvab"))
        pieces = list(itertools.pairwise(cu_seqlens.tolist())) if cu_seqlens is not None else [(0, r.shape[2])]
        ys, finals = [], []
        for n, (begin, end) in enumerate(pieces):
            given = state if state is None or cu_seqlens is None else state[n : n + 1]
            q, *others = (x[:, :, begin:end] for x in (r * r.shape[-1] ** 0.5, k, v, a, b, w))
            y, final = naive7(q, *others, given, True)
            ys.append(heads_first(y))
            finals.append(final)
        return torch.cat(ys, 1), torch.cat(finals)

    for name, function in (("rwkv6", chunk_rwkv6), ("rwkv7", chunk_rwkv7)):
        module = types.ModuleType(f"fla.ops.{name}")
        setattr(module, function.__name__, function)
        for package in ("fla", "fla.ops"):
            monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return sys.modules


@pytest.mark.parametrize("recurrence", RECURRENCES, ids=lambda r: r.name)
@pytest.mark.parametrize("regime", ["random", "strong", "repeat"])
def test_flas_arguments_and_states_are_ours(fla, recurrence, regime):
    run = selfcheck.by_autograd(recurrence.fla)
    sample = selfcheck.sample(recurrence.name, 40, regime, FP32, 8)
    assert max(selfcheck.errors(run, recurrence.reference, *sample, "cpu").values()) < 3e-6


def test_rwkv_flas_other_name_of_the_decay_is_known(fla, monkeypatch):
    upstream = fla["fla.ops.rwkv7"].chunk_rwkv7
    monkeypatch.setattr(fla["fla.ops.rwkv7"], "chunk_rwkv7", lambda w=None, log_w=None, **named: upstream(w=log_w, **named))
    assert "log_w" in inspect.signature(fla["fla.ops.rwkv7"].chunk_rwkv7).parameters
    test_flas_arguments_and_states_are_ours(fla, wkv7.recurrence, "random")


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("at", [[(0, 0), (1, 5), (1, 6)], [(0, 7)], []])
def test_resets_are_sequences_of_fla(fla, at, with_state):
    torch.manual_seed(0)
    inputs = dict(zip(("r", "log_w", "k", "v", "a", "b"), torch.randn(6, 2, 9, 2, 4)))
    inputs["log_w"] = -inputs["log_w"].abs()
    inputs["state"] = torch.randn(2, 2, 4, 4) if with_state else None
    inputs["reset"] = torch.zeros(2, 9, dtype=torch.bool)
    for place in at:
        inputs["reset"][place] = True
    sample = inputs, torch.randn(2, 9, 2, 4), torch.randn(2, 2, 4, 4)
    errors = selfcheck.errors(selfcheck.by_autograd(wkv7.recurrence.fla), wkv7.wkv7_reference, *sample, "cpu")
    assert max(errors.values()) < 3e-6


def test_a_decay_to_zero_stays_finite_with_fla(fla):  # where rows are packed, RWKV-6 asks for it
    inputs, gy, gfinal = selfcheck.sample("wkv6", 20, "random", FP32, 8)
    inputs["log_w"][:, 9] = -torch.inf
    run = selfcheck.by_autograd(wkv6.recurrence.fla)
    assert max(selfcheck.errors(run, wkv6.recurrence.reference, inputs, gy, gfinal, "cpu").values()) < 3e-6


@pytest.mark.parametrize("way", ["torch", "fla"])
@pytest.mark.parametrize("recurrence", RECURRENCES, ids=lambda r: r.name)
def test_the_op_goes_the_way_that_was_chosen(fla, monkeypatch, recurrence, way):
    monkeypatch.setattr(recurrence, "_way", lambda r, op: way)
    inputs, _, _ = selfcheck.sample(recurrence.name, 20, "random", FP32, 8)
    went = []
    for name in ("chunked", "fla"):
        function = getattr(recurrence, name)
        monkeypatch.setattr(recurrence, name, lambda *x, name=name, function=function: went.append(name) or function(*x))
    y, _ = recurrence(tuple(inputs.values()), "auto")
    assert went == [{"torch": "chunked", "fla": "fla"}[way]]
    torch.testing.assert_close(y, recurrence.reference(*inputs.values())[0], rtol=1e-4, atol=1e-5)
