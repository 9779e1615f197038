"""WKV6: our kernels beside the definition, chunked plain torch and, on a GPU, flash-linear-attention.

    python benchmarks/wkv6.py                                  B1 T2048 H8 N64, float32, on the CPU
    python benchmarks/wkv6.py --threads 1 --output benchmarks/results
    python benchmarks/wkv6.py --device cuda                    B8 T4096 at C 2048, 2560, 4096; B1 T4096; B32 T512, bfloat16

One run measures everything in turn, several times, and takes each one's least time: the ratios are what counts. With one
thread the thread's own time is taken, so that other programs on the machine count little. On a GPU it is the GPU's own time,
with cold caches and all of a call queued before it begins. Errors are relative L2 against the
definition in float64, on 256 tokens and 2 heads, with log(-log_w) uniform from -6 to -0.5 (normal), to 3 (strong) and to 5
(extreme: -150 a step). "kept" is what forward keeps for backward beside its inputs. The share of the peak counts the
multiply-adds of the chunked form's products (16 tokens a chunk), against the most that the same threads do in a loop of
nothing else; the share of the bandwidth (GPU) counts each input as read and each result as written once.
"""

import argparse
import ctypes
import datetime
import functools
import importlib.util
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_bone.doctor import cpu_name
from rwkv_bone.models import MODELS, LanguageModel
from rwkv_bone.ops import build, cpu
from rwkv_bone.ops.wkv6 import cpu as wkv6_cpu
from rwkv_bone.ops.wkv6 import describe, wkv6, wkv6_chunked, wkv6_reference
from rwkv_bone.ops.wkv6.fla import wkv6_fla

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CPU_SHAPES = [(1, 2048, 8, 64)]
GPU_SHAPES = [(8, 4096, 32, 64), (8, 4096, 40, 64), (8, 4096, 64, 64), (1, 4096, 64, 64), (32, 512, 64, 64)]
OURS = "ours"


# ---- the peers


def chunked_pairwise(r, k, v, log_w, u, state):
    """The usual stable form: chunks of 64 in sub-chunks of 16, each pair of a sub-chunk with a decay of its own."""
    SUB, CHUNK = 16, 64
    B, T, H, N = r.shape
    C, M, y_dtype = -(-T // CHUNK), CHUNK // SUB, r.dtype

    def chunks(x: Tensor) -> Tensor:
        x = F.pad(x.float(), (0, 0, 0, 0, 0, C * CHUNK - T))
        return x.view(B, C, M, SUB, H, N).permute(0, 4, 1, 2, 3, 5).contiguous()  # (B, H, C, M, SUB, N)

    r, k, v, log_w = map(chunks, (r, k, v, log_w.clamp(min=-120)))
    until = log_w.cumsum(-2)
    before = until - log_w
    whole = until[..., -1, :]  # (B, H, C, M, N)
    start = whole.cumsum(-2) - whole
    lower = torch.ones(SUB, SUB, dtype=torch.bool, device=r.device).tril(-1).unsqueeze(-1)
    pairs = (before.unsqueeze(-2) - until.unsqueeze(-3)).masked_fill(~lower, -torch.inf).exp()
    y = ((k.unsqueeze(-3) * pairs) @ r.unsqueeze(-1)).squeeze(-1) @ v + (r * u.view(H, 1, 1, 1, N) * k).sum(-1, True) * v
    r_sub, k_sub = r * before.exp(), k * (whole.unsqueeze(-2) - until).exp()
    ys = [y[:, :, :, 0]]
    for m in range(1, M):
        keys = k_sub[:, :, :, :m] * (start[..., m : m + 1, :] - start[..., 1 : m + 1, :]).exp().unsqueeze(-2)
        scores = r_sub[:, :, :, m] @ keys.flatten(3, 4).mT
        ys.append(y[:, :, :, m] + scores @ v[:, :, :, :m].flatten(3, 4))
    total = start[..., -1, :] + whole[..., -1, :]
    keys = (k_sub * (total.unsqueeze(-2) - start - whole).exp().unsqueeze(-2)).flatten(3, 4)
    states = []
    for decay, added in zip(total.exp().unsqueeze(-1).unbind(2), (keys.mT @ v.flatten(3, 4)).unbind(2)):
        states.append(state)
        state = decay * state + added
    y = torch.stack(ys, 3).flatten(3, 4) + (r_sub * start.exp().unsqueeze(-2)).flatten(3, 4) @ torch.stack(states, 2)
    return y.permute(0, 2, 3, 1, 4).reshape(B, C * CHUNK, H, N)[:, :T].to(y_dtype), state


def contestants(device: str) -> dict[str, Callable]:
    peers = {OURS: wkv6}
    if device == "cpu":
        peers |= {
            "loop over tokens (the definition)": wkv6_reference,
            "chunked torch 64/16, pairwise": chunked_pairwise,
            "chunked torch 64, by halving (--op torch)": wkv6_chunked,
        }
        return peers
    peers["chunked torch 64, by halving (--op torch)"] = wkv6_chunked
    if importlib.util.find_spec("fla") is None:
        print("without flash-linear-attention (pip install fla-core)", file=sys.stderr)
        return peers
    return peers | {"fla chunk_rwkv6": wkv6_fla}


# ---- measuring


def make_inputs(shape, dtype: torch.dtype, device: str, strongest: float = -0.5) -> tuple[list[Tensor], Tensor, Tensor]:
    B, _, H, N = shape
    torch.manual_seed(0)
    r, k, v, gy = (torch.randn(shape).to(device, dtype) for _ in range(4))
    log_w = -torch.exp(-6 + (strongest + 6) * torch.rand(shape)).to(device, dtype)
    u, state, gfinal = 0.3 * torch.randn(H, N), torch.randn(B, H, N, N), torch.randn(B, H, N, N)
    inputs = [r, k, v, log_w, u.to(device), state.to(device)]
    return [x.requires_grad_() for x in inputs], gy, gfinal.to(device)


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.thread_time() if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def times(function: Callable, inputs, gy, gfinal, device: str) -> tuple[float, float]:
    """Seconds of one forward and one backward pass."""
    results, forward = timed(lambda: function(*inputs), device)
    _, backward = timed(lambda: torch.autograd.grad(results, inputs, (gy, gfinal), allow_unused=True), device)
    return forward, backward


def timed(call: Callable, device: str) -> tuple:
    """What the call returns, and the seconds that it takes."""
    if device == "cpu":
        began = clock(device)
        return call(), clock(device) - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.zeros(1 << 28, dtype=torch.uint8, device=device)  # what the L2 cache held is gone
    torch.cuda._sleep(20_000_000)  # about 10 ms, in which Python queues the call
    start.record()
    result = call()
    end.record()
    end.synchronize()
    return result, start.elapsed_time(end) / 1e3


def least_times(peers: dict[str, Callable], inputs, gy, gfinal, device: str, repeats: int) -> dict[str, list[float]]:
    """Least seconds of each one's forward and backward, without those that cannot run here."""
    least = {name: [float("inf")] * 2 for name in peers}
    for repeat in range(repeats + 1):  # the first one builds, compiles and warms up
        for name in [*least]:
            if name != OURS and device == "cpu" and repeat > 1 + repeats // 5:  # the slow ones vary less
                continue
            try:
                took = times(peers[name], inputs, gy, gfinal, device)
            except Exception as error:  # a peer's lack of memory, or of what its compiler needs: we go on without it
                if name == OURS:
                    raise
                print(f"without {name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
                del least[name]
                continue
            if repeat:
                least[name] = [min(a, b) for a, b in zip(least[name], took)]
    return least


def kept_for_backward(function: Callable, inputs) -> int:
    """Bytes that forward keeps beside its inputs, each storage once."""
    given = {x.untyped_storage().data_ptr() for x in inputs}
    kept = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        results = function(*inputs)
    del results
    return sum(kept.values())


def errors(function: Callable, dtype: torch.dtype, device: str, N: int) -> list[str]:
    """For normal, strong and extreme decays, the largest error of all but log_w's gradient, and of that."""
    found = []
    for strongest in (-0.5, 3.0, 5.0):
        inputs, gy, gfinal = make_inputs((1, 256, 2, N), dtype, device, strongest)
        exact = [x.detach().double().requires_grad_() for x in inputs]
        want = [*wkv6_reference(*exact)]
        want += torch.autograd.grad(want, exact, (gy.double(), gfinal.double()))
        got = [*function(*inputs)]
        got += torch.autograd.grad(got, inputs, (gy, gfinal))
        with torch.no_grad():
            relative = [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, want)]
        found.append(f"{max(relative[:5] + relative[6:]):.0e} / {relative[5]:.0e}")
    return found


def multiply_add_peak(threads: int) -> float:
    """Multiply-adds a second that `threads` threads do together, in the best instruction set of the kernel."""
    variant = wkv6_cpu.variants[-1]
    width = {"avx512": 64, "avx2": 32, "portable": 16}[variant]
    flags = ("-O3", "-fPIC", f"-DWIDTH={width}", *cpu.VARIANT_FLAGS[variant])
    source = build.Object(Path(__file__).with_name("fma_peak.cpp"), flags)
    library = build.load(build.build("fma_peak", [source], build.cxx_compiler()))
    library.multiply_adds.argtypes, library.multiply_adds.restype = [ctypes.c_long], ctypes.c_float
    rounds, rates = 1_000_000, []

    def run():
        began = time.thread_time()
        library.multiply_adds(rounds)
        rates.append(rounds * 16 * width / 4 / (time.thread_time() - began))

    best = 0.0
    for _ in range(10):
        rates.clear()
        workers = [threading.Thread(target=run) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, sum(rates))
    return best


def multiply_adds(shape) -> tuple[int, int]:
    """Those of the chunked form's matrix products, forward and backward; L tokens a chunk, pairs s <= t inside it."""
    B, T, H, N = shape
    L = 16
    state, pairs = N * N, (L + 1) / 2 * N  # of a token: a product with the state, one with the chunk's other tokens
    return tuple(int(B * T * H * x) for x in (2 * state + 2 * pairs, 5 * state + 5 * pairs))


def memory_bytes(shape, dtype: torch.dtype) -> tuple[int, int]:
    """Those of every input read and every result written once, forward and backward."""
    B, T, H, N = shape
    one, state = B * T * H * N * dtype.itemsize, B * H * N * N * 4
    return 5 * one + 2 * state, 9 * one + 3 * state


def measure_bandwidth() -> float:
    """Bytes a second that the GPU copies, read and written."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / min(timed(lambda: y.copy_(x), "cuda")[1] for _ in range(10))


# ---- reports


def compare(shape, dtype: torch.dtype, device: str, repeats: int) -> list[str]:
    B, T, H, N = shape
    inputs, gy, gfinal = make_inputs(shape, dtype, device)
    least = least_times(contestants(device), inputs, gy, gfinal, device, repeats)
    ours = sum(least[OURS])
    what = describe(device, dtype, N)
    lines = [f"### B{B} T{T} H{H} N{N} (C {H * N}), {str(dtype)[6:]}; ours: {what}", ""]
    titles = ["", "forward ms", "backward ms", "both ms", "times ours", "kept MiB", *(
        f"errors, {regime} (most / log_w's)" for regime in ("normal", "strong", "extreme"))]  # fmt: skip
    rows = []
    for name, function in contestants(device).items():
        if name not in least:
            continue
        ms = [1e3 * x for x in (*least[name], sum(least[name]))]
        kept = kept_for_backward(function, inputs) / 2**20
        rows.append([name, *(f"{x:.2f}" for x in ms), f"{sum(least[name]) / ours:.1f}", f"{kept:.0f}",
                     *(errors(function, dtype, device, N))])  # fmt: skip
    lines += table(titles, rows)
    if device == "cpu":
        peak = multiply_add_peak(torch.get_num_threads())
        shares = [n / seconds / peak for n, seconds in zip(multiply_adds(shape), least[OURS])]
        both = sum(multiply_adds(shape)) / ours / peak
        lines += ["", f"Peak of {torch.get_num_threads()} threads: {peak / 1e9:.0f} G multiply-adds/s. Ours reaches "
                  f"{shares[0]:.0%} of it forward, {shares[1]:.0%} backward, {both:.0%} together."]  # fmt: skip
    else:
        bandwidth = measure_bandwidth()
        needed = memory_bytes(shape, dtype)
        shares = [n / seconds / bandwidth for n, seconds in zip(needed, least[OURS])]
        both = sum(needed) / ours / bandwidth
        lines += ["", f"Copying: {bandwidth / 1e12:.2f} TB/s. Ours reaches {shares[0]:.0%} of it forward, "
                  f"{shares[1]:.0%} backward, {both:.0%} together."]  # fmt: skip
    return lines


def sampling(device: str, dtype: torch.dtype) -> list[str]:
    """One token at a time: the op for the heads of one layer, and whole models."""
    rows = []
    with torch.no_grad():
        for H in (8, 32, 64):
            inputs, _, _ = make_inputs((1, 1, H, 64), dtype, device)
            took = {}
            for name in ("auto", "torch"):
                step = functools.partial(wkv6, op=name)
                took[name] = least_of(lambda: step(*inputs), device)  # noqa: B023
            took["definition"] = least_of(lambda: wkv6_reference(*inputs), device)  # noqa: B023
            rows.append([f"H{H} N64", *(f"{1e6 * took[x]:.0f}" for x in ("auto", "torch", "definition"))])
    lines = ["### One token, with state", "", *table(["one layer's op", "ours us", "--op torch us", "definition us"], rows)]
    rows = []
    for n_layer, n_embd, vocab_size in ((6, 256, 256), (12, 768, 4096)):
        kind = MODELS["x060"]
        sizes = kind.new_sizes(vocab_size=vocab_size, n_layer=n_layer, n_embd=n_embd, head_size=64)
        model = kind(sizes).initialise(0).to(device, dtype)
        speeds = []
        for name in ("auto", "torch"):
            speeds.append(1 / least_of(token_step(model.with_execution(op=name), device), device, calls=20))
        rows.append([f"L{n_layer} C{n_embd} V{vocab_size}", *(f"{x:.0f}" for x in speeds), f"{speeds[0] / speeds[1]:.2f}"])
    return [*lines, "", *table(["model", "tokens/s", "with --op torch", "ratio"], rows)]


def token_step(model: LanguageModel, device: str) -> Callable:
    state = None
    token = torch.zeros(1, 1, dtype=torch.long, device=device)

    @torch.no_grad()
    def step():
        nonlocal state
        _, state = model(token, state)

    return step


def least_of(call: Callable, device: str, calls: int = 100, repeats: int = 10) -> float:
    """Seconds of one call: the least mean of `calls` of them."""
    call()
    best = float("inf")
    for _ in range(repeats):
        began = clock(device)
        for _ in range(calls):
            call()
        best = min(best, (clock(device) - began) / calls)
    return best


def table(titles: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(titles, *rows)]
    lines = [titles, ["-" * w for w in widths], *rows]
    return ["| " + " | ".join(x.ljust(w) for x, w in zip(line, widths)) + " |" for line in lines]


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{cpu_name()}; {torch.get_num_threads()} threads; {'thread' if torch.get_num_threads() == 1 else 'wall'} time"


def parse_shape(text: str) -> tuple[int, ...]:
    shape = tuple(int(x) for x in text.split(","))
    if len(shape) != 4 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"a shape is B,T,H,N such as 1,2048,8,64, not {text}")
    return shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", type=parse_shape, nargs="+", metavar="B,T,H,N")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32 on the CPU, bf16 on a GPU")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, help="folder for the report, as wkv6-DEVICE-DTYPE[-THREADS].md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = DTYPES[args.dtype or ("fp32" if args.device == "cpu" else "bf16")]

    command = " ".join(["python benchmarks/wkv6.py", *sys.argv[1:]])
    lines = [f"# WKV6 on {hardware(args.device)}", "", f"{datetime.date.today()}, torch {torch.__version__}, `{command}`"]
    print("\n".join(lines))
    for shape in args.shape or (CPU_SHAPES if args.device == "cpu" else GPU_SHAPES):
        part = ["", *compare(shape, dtype, args.device, args.repeats)]
        lines += part
        print("\n".join(part), flush=True)
    part = ["", *sampling(args.device, dtype)]
    lines += part
    print("\n".join(part))
    if args.output:
        name = "-".join(["wkv6", args.device, str(dtype)[6:], *([f"{args.threads}threads"] if args.device == "cpu" else [])])
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / f"{name}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
