"""WKV7 on the CPU: our kernel beside chunked plain torch, the recurrence and, if installed, flash-linear-attention's naive form.

    python benchmarks/wkv7.py                      B1 T2048 H8 N64, float32, 1 and 2 threads
    python benchmarks/wkv7.py --dtype bf16 --shape 4,512,12,64

One run measures everything in turn, several times, and takes each one's least time: the ratios are what counts. With one
thread the thread's own time is taken, so that other programs on the machine count little. Errors are relative L2 against the
recurrence in float64, the largest of output, final state and gradients, on 512 tokens and 2 heads: random inputs, and one removal
key at every token with w = 1 and a gate of 1 (repeated). "kept" is what forward keeps for backward beside its inputs. The share
of the peak counts the multiply-adds of the chunked form (chunks of 16; for N = 64 24.6 k forward and 59.4 k backward a token and
head), against the most that the same threads do in a loop of nothing else.
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
from wkv6 import DTYPES, OURS, hardware, kept_for_backward, multiply_add_peak, parse_shape, table, timed

from rwkv_bone.ops.wkv7 import cpu

L = 16  # tokens a chunk


class Ours(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        y, final_state, saved = cpu.forward(*inputs, None, True)
        ctx.save_for_backward(*inputs[:6], saved)
        return y, final_state

    @staticmethod
    def backward(ctx, gy, gfinal):
        return cpu.backward(*ctx.saved_tensors[:6], None, ctx.saved_tensors[6], gy.contiguous(), gfinal)


# ---- the peers


def recurrence(r, log_w, k, v, a, b, state):
    """The definition, in the dtype of the state."""
    ys, dtype = [], r.dtype
    for rt, wt, kt, vt, at, bt in zip(*(x.to(state.dtype).unbind(1) for x in (r, log_w.exp(), k, v, a, b))):
        u = state @ at.unsqueeze(-1)
        state = state * wt.unsqueeze(-2) + u * bt.unsqueeze(-2) + vt.unsqueeze(-1) * kt.unsqueeze(-2)
        ys.append((state @ rt.unsqueeze(-1)).squeeze(-1))
    return torch.stack(ys, 1).to(dtype), state


def chunked(r, log_w, k, v, a, b, state):
    """Chunks of 16 in plain torch: all that does not need the state at once, then chunk by chunk; gradients by autograd."""
    B, T, H, N = r.shape
    dtype = r.dtype

    def chunks(x: Tensor) -> Tensor:  # (B, H, chunks, L, N), padded with zeros
        return F.pad(x.to(state.dtype), (0, 0, 0, 0, 0, -T % L)).view(B, -1, L, H, N).permute(0, 3, 1, 2, 4)

    r, log_w, k, v, a, b = map(chunks, (r, log_w, k, v, a, b))
    total = log_w.cumsum(-2)
    queries_a, queries_r = a * (total - log_w).exp(), r * total.exp()
    keys, decay = (-total).exp(), total[..., -1:, :].exp()
    keys_k, keys_b = (k * keys).mT, (b * keys).mT
    triangle = torch.eye(L, dtype=state.dtype) - (queries_a @ keys_b).tril(-1)
    added = (queries_a @ keys_k).tril(-1) @ v
    y_added, y_scores = (queries_r @ keys_k).tril() @ v, (queries_r @ keys_b).tril()
    solved_added, solved_queries = torch.linalg.solve_triangular(
        triangle, torch.cat((added, queries_a), -1), upper=False, unitriangular=True
    ).split(N, -1)
    new = v.mT @ keys_k.mT * decay
    ys = []
    for queries, x, q_r, scores, y, key, d, n in zip(
        *(z.unbind(2) for z in (solved_queries, solved_added, queries_r, y_scores, y_added, keys_b.mT * decay, decay, new))
    ):
        u = queries @ state.mT + x
        ys.append(q_r @ state.mT + y + scores @ u)
        state = state * d + n + u.mT @ key
    return torch.stack(ys, 2).permute(0, 2, 3, 1, 4).reshape(B, -1, H, N)[:, :T].to(dtype), state


def contestants() -> dict[str, Callable]:
    peers: dict[str, Callable] = {OURS: Ours.apply, "chunked torch 16": chunked, "loop over tokens (the definition)": recurrence}
    package = importlib.util.find_spec("fla")
    if package is None or not package.submodule_search_locations:
        print("without flash-linear-attention (pip install fla-core)", file=sys.stderr)
        return peers
    # by its file: the package itself needs triton
    file = Path(package.submodule_search_locations[0], "ops/generalized_delta_rule/dplr/naive.py")
    dplr_recurrence = runpy.run_path(str(file))["dplr_recurrence"]

    def fla(r, log_w, k, v, a, b, state):  # (B, H, T, N); states are [key, value]; the scale of 1 / sqrt(N) undone
        q, log_w, k, v, a, b = (x.transpose(1, 2) for x in (r * r.shape[-1] ** 0.5, log_w, k, v, a, b))
        y, state = dplr_recurrence(q, k, v, a, b, log_w, state.mT, True)
        return y.transpose(1, 2), state.mT

    return peers | {"fla dplr_recurrence (naive)": fla}


# ---- measuring


def make_inputs(shape, dtype: torch.dtype, repeated: bool = False) -> tuple[list[Tensor], Tensor, Tensor]:
    B, _, H, N = shape
    torch.manual_seed(0)
    r, k, v, kk, gy, x, gate = (torch.randn(shape) for _ in range(7))
    log_w, gate = -0.60653066 * torch.sigmoid(x), torch.sigmoid(gate)
    if repeated:
        log_w, gate, kk = torch.zeros(shape), torch.ones(shape), kk[:, :1].expand(shape)
    kk = F.normalize(kk, dim=-1)
    tensors = [r, log_w, k, v, -kk, kk * gate]
    inputs = [*(x.to(torch.float32 if x is log_w else dtype) for x in tensors), torch.randn(B, H, N, N)]
    return [x.contiguous().requires_grad_() for x in inputs], gy.to(dtype), torch.randn(B, H, N, N)


def run(function: Callable, inputs, gy, gfinal) -> tuple[tuple[Tensor, ...], float, float]:
    """The results and gradients, and the seconds of one forward and one backward pass."""
    results, forward = timed(lambda: function(*inputs), "cpu")
    gradients, backward = timed(lambda: torch.autograd.grad(results, inputs, (gy, gfinal)), "cpu")
    return (*(x.detach() for x in results), *gradients), forward, backward


def errors(function: Callable, dtype: torch.dtype, N: int) -> list[str]:
    """The largest error on random inputs and with one repeated key."""
    found = []
    for repeated in (False, True):
        inputs, gy, gfinal = make_inputs((1, 512, 2, N), dtype, repeated)
        exact = [x.detach().double().requires_grad_() for x in inputs]
        want = run(recurrence, exact, gy.double(), gfinal.double())[0]
        got = run(function, inputs, gy, gfinal)[0]
        found.append(f"{max(float((x.double() - z).norm() / z.norm()) for x, z in zip(got, want)):.1e}")
    return found


def multiply_adds(shape) -> tuple[int, int]:
    """Those of the chunked form, forward and backward; backward computes scores and values anew."""
    B, T, H, N = shape
    return tuple(int(B * T * H * x) for x in (4 * N * N + 8 * L * N, 9 * N * N + 22 * L * N))


def compare(shape, dtype: torch.dtype, repeats: int) -> list[str]:
    threads, peers = torch.get_num_threads(), contestants()
    inputs, gy, gfinal = make_inputs(shape, dtype)
    least = {name: [float("inf")] * 2 for name in peers}
    for repeat in range(repeats + 1):  # the first one builds and warms up
        for name, function in peers.items():
            if name not in (OURS, "chunked torch 16") and repeat > 2:  # the slow ones vary less
                continue
            took = run(function, inputs, gy, gfinal)[1:]
            if repeat:
                least[name] = [min(a, b) for a, b in zip(least[name], took)]
    ours = sum(least[OURS])
    B, T, H, N = shape
    lines = [f"### B{B} T{T} H{H} N{N} (C {H * N}), {str(dtype)[6:]}; ours: {cpu.describe(dtype, N)}", ""]
    rows = []
    for name, function in peers.items():
        ms = [1e3 * x for x in (*least[name], sum(least[name]))]
        kept = kept_for_backward(function, inputs) / 2**20
        times = [*(f"{x:.2f}" for x in ms), f"{sum(least[name]) / ours:.1f}"]
        rows.append([name, *times, f"{kept:.0f}", *errors(function, dtype, N)])
    titles = ["", "forward ms", "backward ms", "both ms", "times ours", "kept MiB", "error, random", "error, repeated"]
    lines += table(titles, rows)
    peak, needed = multiply_add_peak(threads), multiply_adds(shape)
    shares = [n / seconds / peak for n, seconds in zip(needed, least[OURS])]
    both = sum(needed) / ours / peak
    return [*lines, "", f"Peak of {threads} threads: {peak / 1e9:.0f} G multiply-adds/s. Ours reaches {shares[0]:.0%} of it "
            f"forward, {shares[1]:.0%} backward, {both:.0%} together."]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=parse_shape, nargs="+", metavar="B,T,H,N", default=[(1, 2048, 8, 64)])
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="log_w stays in float32")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    command = " ".join(["python benchmarks/wkv7.py", *sys.argv[1:]])
    for threads in args.threads:
        torch.set_num_threads(threads)
        print(f"# WKV7 on {hardware('cpu')}\n\n{datetime.date.today()}, torch {torch.__version__}, `{command}`")
        for shape in args.shape:
            print("\n".join(["", *compare(shape, DTYPES[args.dtype], args.repeats), ""]), flush=True)


if __name__ == "__main__":
    main()
