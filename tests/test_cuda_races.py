"""No kernel of cuda/ has a race on shared memory: the shim looks at every access of every thread, in several orders of them.

A race ends the process that has it, so each kernel runs in one of its own, which this file is the program of.
"""

import ctypes
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_shim import CUDA, TESTS, compile_for_cpu, make_inputs

from rwkv_bone.ops import cuda
from rwkv_bone.ops.bone import cuda as bone_cuda
from rwkv_bone.ops.wkv6 import cuda as wkv6_cuda
from rwkv_bone.ops.wkv7 import cuda as wkv7_cuda

FP32, BF16 = torch.float32, torch.bfloat16
pytestmark = pytest.mark.slow


def call(function, *arguments) -> None:
    """Call a launching function with tensors as addresses."""
    assert function(*(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments), None) == 0


def run_chunk(lib: ctypes.CDLL) -> None:
    for w_dtype, segments, T in ((FP32, 1, 100), (BF16, 2, 150)):  # each slot of the buffers is used again
        inputs, gy, g_final = make_inputs(1, T, 1, 64, dtype=BF16, w_dtype=w_dtype)
        outputs, g_u, state = [x.clone() for x in inputs[:4]], torch.empty(1, 64), torch.empty(1, 1, 64, 64)
        sizes = (cuda.DTYPES[w_dtype], 1, T, 1)
        saved = torch.empty(wkv6_cuda.saved_shape(gy, "chunk"))
        scratch = torch.empty(lib.wkv6_chunk_scratch_bytes(1, 1, segments), dtype=torch.uint8)
        call(lib.wkv6_chunk_forward, *sizes, *inputs, outputs[0], state, saved, scratch, segments)
        call(lib.wkv6_chunk_backward, *sizes, *inputs[:5], saved, gy, g_final, *outputs, g_u, state, scratch, segments)


def run_sequential(lib: ctypes.CDLL) -> None:
    for N in (8, 40, 128):
        inputs, gy, g_final = make_inputs(1, 34, 1, N)  # three tiles: each of the two buffers is used again
        outputs, g_u, state = [x.clone() for x in inputs[:4]], torch.empty(1, N), torch.empty(1, 1, N, N)
        sizes = (0, 0, *gy.shape)
        scratch = torch.empty(lib.wkv6_sequential_scratch(*gy.shape) // 4)
        call(lib.wkv6_sequential_forward, *sizes, *inputs, outputs[0], state)
        call(lib.wkv6_sequential_backward, *sizes, *inputs, gy, g_final, *outputs, g_u, state, scratch)


def run_wkv7(lib: ctypes.CDLL, kernel: str, dtype: torch.dtype, w_dtype: torch.dtype, T: int, N: int, cut: int = 1) -> None:
    """Forward and backward through the host side; half of the tokens of one batch row begin a document."""
    wkv7_cuda.library = lambda kernel, device: lib
    cuda.segments = lambda name, lib, r: (torch.empty(lib.wkv7_chunk_scratch_bytes(2, 1, cut) // 4), cut)
    cuda.run = lambda function, device, *arguments: call(function, *arguments)
    r, k, v, a, b, gy = (0.1 * torch.randn(2, T, 1, N).to(dtype) for _ in range(6))
    log_w, state = -0.6 * torch.rand(2, T, 1, N).to(w_dtype), torch.randn(2, 1, N, N)
    reset = torch.stack([torch.rand(T) < 0.5, torch.zeros(T) > 0])
    saved = wkv7_cuda.forward(r, log_w, k, v, a, b, state, reset, save=True, kernel=kernel)[2]
    wkv7_cuda.backward(r, log_w, k, v, a, b, reset, saved, gy, state, kernel=kernel)


def run_wkv7_chunk(lib: ctypes.CDLL) -> None:
    for w_dtype, segments in ((BF16, 1), (FP32, 1), (BF16, 3)):
        run_wkv7(lib, "chunk", BF16, w_dtype, 150, 64, segments)


def run_wkv7_sequential(lib: ctypes.CDLL) -> None:
    for N in (8, 40, 128):
        run_wkv7(lib, "sequential", FP32, FP32, 34, N)


def run_bone(lib: ctypes.CDLL) -> None:
    for in_, out, r in ((64, 128, 64), (4096, 16, 8), (48, 104, 24), (2048, 4096, 2048)):
        x, u, y = torch.randn(2, in_).to(BF16), torch.randn(2, in_).to(BF16), torch.randn(2, out).to(BF16)
        call(lib.bone_forward, 2, in_, out, r, x, u, y)
        call(lib.bone_backward, 2, in_, out, r, y, x, u)


KERNELS = {
    "wkv6_chunk": (wkv6_cuda.functions, run_chunk),
    "wkv6_sequential": (wkv6_cuda.functions, run_sequential),
    "wkv7_chunk": (wkv7_cuda.functions, run_wkv7_chunk),
    "wkv7_sequential": (wkv7_cuda.functions, run_wkv7_sequential),
    "bone": (bone_cuda.FUNCTIONS, run_bone),
}


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
