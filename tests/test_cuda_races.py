"""No kernel of cuda/ has a race on shared memory: the shim looks at every access of every thread, in several orders of them.

A race ends the process that has it, so each kernel runs in one of its own, which this file is the program of.
"""

import ctypes
import functools
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_shim import CUDA, TESTS, compile_for_cpu
from recurrences import OPS, make_inputs, without_state

from rwkv_bone.ops import cuda
from rwkv_bone.ops.bone import cuda as bone_cuda

FP32, BF16 = torch.float32, torch.bfloat16
pytestmark = pytest.mark.slow


def call(function, *arguments) -> None:
    """Call a launching function with tensors as addresses."""
    assert function(*(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments), None) == 0


CASES = {  # dtype, dtype of log_w, tokens, N, segments: each of two buffers is used again
    "sequential": [(FP32, FP32, 34, 8, 1), (FP32, FP32, 34, 40, 1), (FP32, FP32, 34, 128, 1)],
    "chunk": [(BF16, BF16, 150, 64, 1), (BF16, FP32, 100, 64, 1), (BF16, FP32, 150, 64, 3)],
}


def run_recurrence(name: str, kernel: str, lib: ctypes.CDLL) -> None:
    """Forward and backward through the host side; of wkv7 a third of the tokens begin a document."""
    kernels = OPS[name].kernels["cuda"]
    kernels.library = lambda kernel, device: lib
    cuda.run = lambda function, device, *arguments: call(function, *arguments)
    for dtype, w_dtype, T, N, cut in CASES[kernel]:
        size = getattr(lib, f"{name}_chunk_scratch_bytes")(2, 1, cut) // 4 if kernel == "chunk" else 0
        cuda.segments = lambda name, lib, r, size=size, cut=cut: (torch.empty(size), cut)
        inputs, gy, g_final = make_inputs(name, 2, T, 1, N, "", dtype, w_dtype, resets=0.3)
        saved = kernels.forward(*inputs, save=True, kernel=kernel)[2]
        kernels.backward(*without_state(name, inputs), saved, gy, g_final, kernel=kernel)


def run_bone(lib: ctypes.CDLL) -> None:
    for in_, out, r in ((64, 128, 64), (4096, 16, 8), (48, 104, 24), (2048, 4096, 2048)):
        x, u, y = torch.randn(2, in_).to(BF16), torch.randn(2, in_).to(BF16), torch.randn(2, out).to(BF16)
        call(lib.bone_forward, 2, in_, out, r, x, u, y)
        call(lib.bone_backward, 2, in_, out, r, y, x, u)


KERNELS = {
    **{f"{name}_{kernel}": (op.kernels["cuda"].functions, functools.partial(run_recurrence, name, kernel))
       for name, op in OPS.items() for kernel in CASES},
    "bone": (bone_cuda.FUNCTIONS, run_bone),
}  # fmt: skip


def search(source: Path, name: str, folder: Path) -> subprocess.CompletedProcess:
    library = compile_for_cpu(source, folder, races=True)
    command = [sys.executable, __file__, name, str(library)]
    return subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": f"{TESTS.parent}", "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_has_no_race(name, tmp_path):
    result = search(CUDA / f"{name}.cu", name, tmp_path)
    assert result.returncode == 0 and result.stdout == f"{name}: searched\n", result.stderr


BARRIERS = [("wkv6_chunk", "__syncwarp();"), ("wkv6_sequential", "__syncthreads();"), ("wkv7_chunk", "__syncwarp();")]


@pytest.mark.parametrize("name, barrier", BARRIERS)
def test_a_barrier_left_out_is_found(name, barrier, tmp_path):
    source = tmp_path / f"{name}.cu"
    source.write_text((CUDA / f"{name}.cu").read_text().replace(barrier, ";", 1))
    result = search(source, name, tmp_path)
    assert result.returncode != 0 and "cuda shim: race: thread" in result.stderr


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    kernel, path = sys.argv[1:]
    functions, run = KERNELS[kernel]
    library = cuda.declare(ctypes.CDLL(path), functions)
    for seed in range(3):
        library.cuda_shim_seed(seed)
        run(library)
    print(f"{kernel}: searched")
