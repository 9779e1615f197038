"""Whether a kernel is right on this GPU. It is found out once for each GPU, driver and torch, and decides what runs there.

A kernel is compared with its definition in float64: output, final state and every gradient, on random inputs, strong decay, a
repeated token, one token, a tail and several segments (of WKV7 with weak decay, as states reach from one into the next then).
Then it is launched again and again on two streams, for as many heads as fill the GPU, all with the same values: every head of
every launch must give the same bits. That is done in another process, as a kernel that writes where it must not, or never ends,
takes its process along.
"""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..errors import UserError
from . import build, cuda

LAUNCHES = 60  # what goes wrong in one launch of ten is missed in 0.2 % of the checks
SECONDS = 600  # for a check in a process of its own: fla compiles and tunes its kernels first
CASES = (("random", 70), ("strong", 70), ("repeat", 70), ("random", 1), ("weak", 531))  # regime, tokens; 531: in segments
BONE_SIZES = ((3, 4, 2, 64), (130, 2, 3, 24), (700, 8, 8, 64))  # tokens, pieces of x, pieces of y, r
OURS = ("chunk", "sequential")
LEAST_LOG_W = -0.60653066  # of RWKV-7
Results = dict[str, Tensor]  # y, the final state and the gradients, by name
Inputs = dict[str, Tensor | None]
Run = Callable[[Inputs, Tensor, Tensor], Results]  # of inputs by name, and gradients of y and final state


@dataclass(frozen=True)
class Verdict:
    """`text`: to how much it is right, or what is wrong and by how much; without a final full stop."""

    ok: bool
    text: str


def gate(kernel: str, dtype: torch.dtype, regime: str) -> float:
    """The largest relative L2 error of a result. In bf16, rounding it alone gives 1.7e-3, and the chunked forms round the factors
    of their products too; fla's loses the more where one token comes again and again."""
    if dtype == torch.float32:
        return 1e-4 if kernel == "fla" else 3e-6
    return {"sequential": 4e-3, "chunk": 6e-3, "fla": 4e-2 if regime == "repeat" else 2e-2, "bone": 4e-3}[kernel]


# ---------------------------------------------------------------- the check


def sample(name: str, T: int, regime: str, dtype: torch.dtype, N: int, H: int = 2) -> tuple[Inputs, Tensor, Tensor]:
    """Inputs of the recurrence `name` in its op's order, and gradients of y (1, T, H, N) and of the final state, on the CPU."""
    generator = torch.Generator().manual_seed(T)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    r, k, v, gy, a, x, gates = (random(1, T, H, N) for _ in range(7))
    if regime == "repeat":  # of WKV7 the removal keys alone, without decay: its triangular systems are at their worst
        k, a = k[:, :1].expand_as(k) if name == "wkv6" else k, a[:, :1].expand_as(a)
    state, gfinal = random(1, H, N, N), random(1, H, N, N)
    given = {"r": r, "k": k, "v": v}
    if name == "wkv6":
        high = 3.0 if regime == "strong" else -0.5
        given |= {"log_w": -torch.exp(-6 + (high + 6) * x.sigmoid()), "u": random(H, N)}
    else:
        x = {"random": 6 * x, "strong": x.abs() + 12, "weak": -x.abs() - 4, "repeat": -x.abs() - 40}[regime]
        a, gates = normalize(a, dim=-1), gates.sigmoid() if regime != "repeat" else torch.ones_like(gates)
        given = {"r": r, "log_w": LEAST_LOG_W * x.sigmoid(), "k": k, "v": v, "a": -a, "b": a * gates}
    exact = ("log_w", "u") if T % 2 else ("u",)  # log_w in float32 too
    inputs: Inputs = {n: z.contiguous() if n in exact else z.to(dtype) for n, z in given.items()}
    inputs["state"] = state
    if name == "wkv7":
        inputs["reset"] = torch.arange(T).view(1, T) == 37 if T > 100 else None
    return inputs, gy.to(dtype), gfinal


def by_autograd(function: Callable) -> Run:
    def run(inputs: Inputs, gy: Tensor, gfinal: Tensor) -> Results:
        leaves = {n: x if x is None or x.dtype == torch.bool else x.detach().requires_grad_() for n, x in inputs.items()}
        y, final = function(*leaves.values())
        wanted = {n: x for n, x in leaves.items() if x is not None and x.requires_grad}
        gradients = torch.autograd.grad((y, final), list(wanted.values()), (gy, gfinal))
        return named(y.detach(), final.detach(), gradients, wanted)

    return run


def by_kernel(recurrence: Any, kernel: str, module: Any = None) -> Run:
    """The kernel called without autograd, as `recurrence` calls it."""
    module = module or recurrence.kernels["cuda"]

    def run(inputs: Inputs, gy: Tensor, gfinal: Tensor) -> Results:
        y, final, saved = module.forward(*inputs.values(), save=True, kernel=kernel)
        others = [x for n, x in inputs.items() if n != "state"]
        gradients = module.backward(*others, saved, gy, gfinal, kernel=kernel)
        return named(y, final, gradients, [n for n, has in zip(inputs, recurrence.has_gradient) if has])

    return run


def named(y: Tensor, final: Tensor, gradients: Any, names: Any) -> Results:
    return {"y": y, "final state": final, **{f"gradient of {n}": g for n, g in zip(names, gradients)}}


def errors(
    run: Run, definition: Callable, inputs: Inputs, gy: Tensor, gfinal: Tensor, device: str
) -> dict[str, float]:
    """Relative L2 errors of `run` on `device` against `definition` in float64 on the CPU, by result."""
    exact = {n: x if x is None or x.dtype == torch.bool else x.double() for n, x in inputs.items()}
    wanted = by_autograd(definition)(exact, gy.double(), gfinal.double())
    moved = {n: None if x is None else x.to(device, copy=True) for n, x in inputs.items()}
    got = run(moved, gy.to(device), gfinal.to(device))
    return {n: float((got[n].cpu().double() - x).norm() / x.norm()) for n, x in wanted.items()}


def examine(run: Run, recurrence: Any, kernel: str, dtype: torch.dtype, N: int, device: str, heads: int) -> Verdict:
    """What `run` is worth on `device`. `heads`: so many are launched at once where their bits are compared."""
    worst = 0.0
    for regime, T in CASES:
        inputs, gy, gfinal = sample(recurrence.name, T, regime, dtype, N, 1 if T > 100 else 2)
        allowed = gate(kernel, dtype, regime)
        for what, error in errors(run, recurrence.reference, inputs, gy, gfinal, device).items():
            if not error <= allowed:  # NaN is not <=
                return Verdict(False, f"{what} is off by {error:.0e} (allowed {allowed:.0e}): {regime} inputs, {T} tokens")
            worst = max(worst, error)
    inputs, gy, gfinal = sample(recurrence.name, 70, "random", dtype, N, 1)

    def wide(name: str, x: Tensor) -> Tensor:  # all heads have the values of one
        sizes = [-1] * x.dim()
        sizes[head_dimension(name, x)] = heads
        return x.to(device).expand(sizes).contiguous()

    inputs = {n: x if x is None else wide(n, x) for n, x in inputs.items()}
    gy, gfinal = wide("y", gy), wide("final state", gfinal)
    first = {n: x.narrow(head_dimension(n, x), 0, 1) for n, x in run(inputs, gy, gfinal).items()}
    if differs := unsteady(lambda: run(inputs, gy, gfinal), first, device):
        return Verdict(False, f"{differs} is not the same in {LAUNCHES} launches of the same work")
    return Verdict(True, f"right to {worst:.0e}")


def head_dimension(name: str, x: Tensor) -> int:
    return 1 if "state" in name else x.dim() - 2


def unsteady(launch: Callable[[], Results], first: Results, device: str) -> str:
    """Which result of a launch is not `first`, bit for bit, in every launch; "" if all are. Two streams launch in turn."""
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.synchronize(device)
    streams = [torch.cuda.Stream(device) for _ in range(2)] if on_gpu else []
    same: dict[str, list[Tensor]] = {n: [] for n in first}
    for launched in range(LAUNCHES):
        with torch.cuda.stream(streams[launched % 2]) if streams else contextlib.nullcontext():
            for n, x in launch().items():
                same[n].append((x == first[n]).all())
    if on_gpu:
        torch.cuda.synchronize(device)
    return next((n for n, found in same.items() if not torch.stack(found).all()), "")


def examine_bone(module: Any, device: str) -> Verdict:
    """Bone's two kernels: u becomes x + u, rounded to one of its neighbours without bias; y and du are sums of pieces."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, torch.bfloat16)

    for n, m, tiles, r in BONE_SIZES:
        x, g, u, q = random(n, m * r), random(n, tiles * r), 0.01 * random(n, m, r), random(n, m, r)

        def launch() -> Results:
            x_plus_u, y, du = u.clone(), torch.empty_like(g), torch.empty_like(q)  # noqa: B023
            module.forward(x, x_plus_u, y)  # noqa: B023
            module.backward(g, q, du)  # noqa: B023
            return {"x + u": x_plus_u, "y": y, "du": du}

        pieces = g.double().view(n, tiles, r).sum(1, keepdim=True)
        wanted = {"x + u": x.double().view(n, m, r) + u.double(), "du": q.double() + pieces}
        wanted["y"] = u.double().sum(1).repeat(1, tiles)
        found, allowed = launch(), gate("bone", torch.bfloat16, "random")
        for what, exact in wanted.items():
            error = float((found[what].double() - exact).norm() / exact.norm())
            if not error <= allowed:
                return Verdict(False, f"{what} is off by {error:.0e} (allowed {allowed:.0e}): {n} tokens, r {r}")
        if differs := unsteady(launch, found, device):
            return Verdict(False, f"{differs} is not the same in {LAUNCHES} launches of the same work")
    return Verdict(True, "right to rounding")


# ---------------------------------------------------------------- verdicts, which are kept


def driver() -> str:
    """The version of the GPU's driver; of ROCm "" (torch's own version tells that)."""
    try:
        return next((w for w in Path("/proc/driver/nvidia/version").read_text().split() if w[:1].isdigit() and "." in w), "")
    except OSError:  # WSL has none
        return str(getattr(torch._C, "_cuda_getDriverVersion", str)())


def circumstances(device: torch.device) -> dict[str, str]:
    """What a verdict holds for, beside the kernel itself."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "GPU": f"{properties.name}, {properties.major}.{properties.minor}", "driver": driver(), "torch": torch.__version__,
        "CUDA": str(torch.version.cuda or torch.version.hip), "triton": version("triton"),
    }  # fmt: skip


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def verdict(name: str, kernel: str, dtype: torch.dtype, N: int, device: torch.device) -> Verdict:
    """The verdict on a kernel, from its file beside the library if it was given before. UserError where it cannot be built."""
    if kernel == "fla":
        library = build.cache_dir() / f"{name}_fla-{version('fla-core') or version('rwkv-fla')}.py"
    else:
        library = cuda.build_library(name if kernel == "bone" else f"{name}_{kernel}", torch.cuda.get_device_capability(device))
    where = circumstances(device)
    key = hashlib.sha256(repr((where, str(dtype), N)).encode()).hexdigest()[:8]
    file = library.with_name(f"{library.stem}-{str(dtype)[6:]}-{N}-{key}.json")
    try:
        with build.lock(file.with_suffix(".lock")) if os.name == "posix" and not file.exists() else contextlib.nullcontext():
            if file.exists():
                known = json.loads(file.read_text())
                return Verdict(known["ok"], known["text"])
            found = examine_apart(name, kernel, dtype, N, device)
            if found.ok or "allowed" in found.text or "launches" in found.text:  # not what ended for want of memory or time
                about = {"kernel": f"{name} {kernel}", "library": library.name, "dtype": str(dtype), "N": N, **where}
                about |= {"date": str(datetime.date.today()), **dataclasses.asdict(found)}
                partial = file.with_suffix(f".{os.getpid()}")
                partial.write_text(json.dumps(about, indent=1) + "\n")
                partial.replace(file)
            return found
    except OSError:  # the cache cannot be written: the verdict is this process's own
        return examine_apart(name, kernel, dtype, N, device)


def examine_apart(name: str, kernel: str, dtype: torch.dtype, N: int, device: torch.device) -> Verdict:
    """`examine_here` in another process, which may crash or hang; in this one where a GPU takes one process alone."""
    arguments = [name, kernel, str(dtype)[6:], str(N), str(torch.device(device).index or 0)]
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "rwkv_bone.ops.selfcheck", *arguments]
    print(f"rwkv-bone: checking {name.upper()}, {WORDS.get(kernel, 'CUDA kernels')}, on this GPU, once", file=sys.stderr)
    try:
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return Verdict(False, f"the check of it did not end within {SECONDS} s")
    if done.returncode == 0:
        return Verdict(**json.loads(done.stdout.splitlines()[-1]))
    said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]
    if "busy or unavailable" in said:
        return examine_here(name, kernel, dtype, N, f"cuda:{arguments[-1]}")
    return Verdict(False, f"the check of it stopped: {said}")


def examine_here(name: str, kernel: str, dtype: torch.dtype, N: int, device: str) -> Verdict:
    if kernel == "bone":
        module: Any = importlib.import_module("rwkv_bone.ops.bone.cuda")
        module.checking = True
        return examine_bone(module, device)
    recurrence = importlib.import_module(f"rwkv_bone.ops.{name}").recurrence
    run = by_autograd(recurrence.fla) if kernel == "fla" else by_kernel(recurrence, kernel)
    heads = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return examine(run, recurrence, kernel, dtype, N, device, heads)


# ---------------------------------------------------------------- the choice


@dataclass(frozen=True)
class Choice:
    """What runs: "chunk", "sequential" (of ours), "fla" or "torch"; and in words, with what would be faster."""

    way: str
    text: str


def candidates(recurrence: Any, dtype: torch.dtype, N: int, T: int, op: str) -> Iterator[str]:
    """What may run for --op `op`, the fastest first."""
    if op == "cuda":
        yield cuda.choose(recurrence.name, dtype, N, T)
    if op == "auto" and torch.version.hip is None and dtype in cuda.DTYPES and N <= 128:
        yield from OURS[OURS.index(cuda.choose(recurrence.name, dtype, N, T)) :]
    if op == "fla" or (op == "auto" and dtype in cuda.DTYPES and importlib.util.find_spec("fla")):
        yield "fla"
    if op == "auto":
        yield "torch"


WORDS = {"chunk": "CUDA kernel, chunk", "sequential": "CUDA kernel, sequential", "fla": "flash-linear-attention's chunk kernel",
         "torch": "chunked, in plain torch"}  # fmt: skip


@functools.cache
def choose(recurrence: Any, dtype: torch.dtype, N: int, T: int, device: torch.device, op: str) -> Choice:
    """The first of the candidates that is there and right on `device`, for T tokens or, where T is a chunk's, for that many and
    more; what is passed over is said on stderr. With op "cuda" or "fla" a UserError instead."""
    name, refused = recurrence.name, dict[str, list[str]]()
    if op == "cuda" and torch.version.hip:
        raise UserError("--op cuda: this torch is built for ROCm, and the CUDA kernels are for NVIDIA GPUs; leave --op out")
    for kernel in candidates(recurrence, dtype, N, T, op):
        if kernel == "torch":
            found = Verdict(True, "")
        else:
            try:
                found = verdict(name, kernel, dtype, N, device)
            except UserError as error:
                found = Verdict(False, str(error).removesuffix(f", {build.WITHOUT_COMPILER}"))
        if found.ok:
            break
        if op != "auto":
            cure = "leave --op out to run what works here"
            raise UserError(f"--op {op}: {name.upper()}, {WORDS[kernel]}: {found.text}; {cure}")
        cuda.refused.add((name, kernel, dtype, N))
        refused.setdefault(found.text, []).append(kernel)
    text = WORDS[kernel] + (f", checked on this GPU: {found.text}" if found.text else "")
    if refused:
        why = "; ".join(f"{' and '.join(WORDS[k] for k in kernels)}: {text}" for text, kernels in refused.items())
        if os.environ.get("LOCAL_RANK", "0") == "0" and T == cuda.CHUNK:
            print(f"rwkv-bone: {name.upper()} runs by {WORDS[kernel]}, which is slower, as others cannot: {why}", file=sys.stderr)
        (why, (fastest, *_)), *_ = refused.items()
        text += f"; faster would be the {WORDS[fastest]}, but: {why}"
    if kernel == "torch" and dtype in cuda.DTYPES and not importlib.util.find_spec("fla"):
        text += "; pip install fla-core gives kernels that need no nvcc"
    return Choice(kernel, text)


if __name__ == "__main__":
    name, kernel, dtype, N, index = sys.argv[1:]
    torch.cuda.set_device(int(index))
    print(json.dumps(dataclasses.asdict(examine_here(name, kernel, getattr(torch, dtype), int(N), f"cuda:{index}"))))
