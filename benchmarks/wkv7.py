"""WKV7: our kernels beside the definition, chunked plain torch and, if installed, flash-linear-attention.

    python benchmarks/wkv7.py                      B1 T2048 H8 N64, float32, 1 and 2 threads
    python benchmarks/wkv7.py --dtype bf16 --shape 4,512,12,64
    python benchmarks/wkv7.py --device cuda        B8 T4096 at C 2048, 2560, 4096; B1 T4096; B32 T512, bfloat16

One run measures everything in turn, several times, and takes each one's least time: the ratios are what counts. With one
thread the thread's own time is taken, so that other programs on the machine count little; on a GPU it is the GPU's own time, as
in wkv6.py. Errors are relative L2 against the definition in float64, the largest of output, final state and gradients, on 512
tokens and 2 heads: random inputs, and one removal key at every token with w = 1 and a gate of 1 (repeated). "kept" is what
forward keeps for backward beside its inputs. The share of the peak (CPU) counts the multiply-adds of the chunked form (chunks of
16; for N = 64 24.6 k forward and 59.4 k backward a token and head), against the most that the same threads do in a loop of
nothing else; the share of the bandwidth (GPU) counts each input as read and each result as written once.
"""

import argparse
import datetime
import importlib.util
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from wkv6 import (
    DTYPES,
    GPU_SHAPES,
    OURS,
    hardware,
    kept_for_backward,
    least_times,
    measure_bandwidth,
    multiply_add_peak,
    parse_shape,
    table,
)

from rwkv_bone.ops.wkv7 import describe, wkv7, wkv7_chunked, wkv7_reference
from rwkv_bone.ops.wkv7.fla import wkv7_fla

L = 16  # tokens a chunk


def contestants(device: str) -> dict[str, Callable]:
    peers: dict[str, Callable] = {OURS: wkv7, "chunked torch 16 (--op torch)": wkv7_chunked}
    if device == "cpu":
        peers["loop over tokens (the definition)"] = wkv7_reference
    package = importlib.util.find_spec("fla")
    if package is None or not package.submodule_search_locations:
        print("without flash-linear-attention (pip install fla-core)", file=sys.stderr)
        return peers
    if device == "cuda":
        return peers | {"fla chunk_rwkv7": wkv7_fla}
    # by its file: the package itself needs triton
    file = Path(package.submodule_search_locations[0], "ops/generalized_delta_rule/dplr/naive.py")
    dplr_recurrence = runpy.run_path(str(file))["dplr_recurrence"]

    def fla(r, log_w, k, v, a, b, state):  # (B, H, T, N); states are [key, value]; the scale of 1 / sqrt(N) undone
        q, log_w, k, v, a, b = (x.transpose(1, 2) for x in (r * r.shape[-1] ** 0.5, log_w, k, v, a, b))
        y, state = dplr_recurrence(q, k, v, a, b, log_w, state.mT, True)
        return y.transpose(1, 2), state.mT

    return peers | {"fla dplr_recurrence (naive)": fla}


# ---- measuring


def make_inputs(shape, dtype: torch.dtype, device: str, repeated: bool = False) -> tuple[list[Tensor], Tensor, Tensor]:
    B, _, H, N = shape
    torch.manual_seed(0)
    r, k, v, kk, gy, x, gate = (torch.randn(shape, device=device) for _ in range(7))
    log_w, gate = -0.60653066 * torch.sigmoid(x), torch.sigmoid(gate)
    if repeated:
        log_w, gate, kk = torch.zeros_like(log_w), torch.ones_like(gate), kk[:, :1].expand(shape)
    kk = F.normalize(kk, dim=-1)
    tensors = [x.to(torch.float32 if x is log_w else dtype) for x in (r, log_w, k, v, -kk, kk * gate)]
    state, gfinal = torch.randn(2, B, H, N, N, device=device)
    return [x.contiguous().requires_grad_() for x in (*tensors, state)], gy.to(dtype), gfinal


def errors(function: Callable, dtype: torch.dtype, device: str, N: int) -> list[str]:
    """The largest error on random inputs and with one repeated key."""
    found = []
    for repeated in (False, True):
        inputs, gy, gfinal = make_inputs((1, 512, 2, N), dtype, device, repeated)
        exact = [x.detach().double().requires_grad_() for x in inputs]
        want, got = [*wkv7_reference(*exact)], [*function(*inputs)]
        want += torch.autograd.grad(want, exact, (gy.double(), gfinal.double()))
        got += torch.autograd.grad(got, inputs, (gy, gfinal))
        with torch.no_grad():
            found.append(f"{max(float((x.double() - z).norm() / z.norm()) for x, z in zip(got, want)):.1e}")
    return found


def multiply_adds(shape) -> tuple[int, int]:
    """Those of the chunked form, forward and backward; backward computes scores and values anew."""
    B, T, H, N = shape
    return tuple(int(B * T * H * x) for x in (4 * N * N + 8 * L * N, 9 * N * N + 22 * L * N))


def memory_bytes(shape, dtype: torch.dtype) -> tuple[int, int]:
    """Those of every input read and every result written once, forward and backward; log_w is float32."""
    B, T, H, N = shape
    one, state = B * T * H * N, B * H * N * N * 4
    return one * (6 * dtype.itemsize + 4) + 2 * state, one * (11 * dtype.itemsize + 8) + 3 * state


def compare(shape, dtype: torch.dtype, device: str, repeats: int) -> list[str]:
    inputs, gy, gfinal = make_inputs(shape, dtype, device)
    least = least_times(contestants(device), inputs, gy, gfinal, device, repeats)
    ours = sum(least[OURS])
    B, T, H, N = shape
    lines = [f"### B{B} T{T} H{H} N{N} (C {H * N}), {str(dtype)[6:]}; ours: {describe(device, dtype, N)}", ""]
    rows = []
    for name, function in contestants(device).items():
        if name in least:
            ms = [1e3 * x for x in (*least[name], sum(least[name]))]
            kept = kept_for_backward(function, inputs) / 2**20
            took = [*(f"{x:.2f}" for x in ms), f"{sum(least[name]) / ours:.1f}"]
            rows.append([name, *took, f"{kept:.0f}", *errors(function, dtype, device, N)])
    titles = ["", "forward ms", "backward ms", "both ms", "times ours", "kept MiB", "error, random", "error, repeated"]
    lines += table(titles, rows)
    if device == "cuda":
        peak, needed = measure_bandwidth(), memory_bytes(shape, dtype)
        what = f"Copying: {peak / 1e12:.2f} TB/s"
    else:
        peak, needed = multiply_add_peak(torch.get_num_threads()), multiply_adds(shape)
        what = f"Peak of {torch.get_num_threads()} threads: {peak / 1e9:.0f} G multiply-adds/s"
    shares = [n / seconds / peak for n, seconds in zip(needed, least[OURS])]
    return [*lines, "", f"{what}. Ours reaches {shares[0]:.0%} of it forward, {shares[1]:.0%} backward, "
            f"{sum(needed) / ours / peak:.0%} together."]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", type=parse_shape, nargs="+", metavar="B,T,H,N")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32 on the CPU, bf16 on a GPU; log_w stays in float32")
    parser.add_argument("--threads", type=int, nargs="+", help="of the CPU; default: 1 and 2")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    dtype = DTYPES[args.dtype or ("fp32" if args.device == "cpu" else "bf16")]
    command = " ".join(["python benchmarks/wkv7.py", *sys.argv[1:]])
    for threads in args.threads or ([1, 2] if args.device == "cpu" else [torch.get_num_threads()]):
        torch.set_num_threads(threads)
        print(f"# WKV7 on {hardware(args.device)}\n\n{datetime.date.today()}, torch {torch.__version__}, `{command}`")
        for shape in args.shape or ([(1, 2048, 8, 64)] if args.device == "cpu" else GPU_SHAPES):
            print("\n".join(["", *compare(shape, dtype, args.device, args.repeats), ""]), flush=True)


if __name__ == "__main__":
    main()
